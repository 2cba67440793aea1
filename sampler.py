"""The reverse process: from masked tokens to text, with any predictor `predict(tokens) -> logits`.

`reverse_process` is the loop. Beside it: which positions are revealed next (the orders), and how many (the plan).
Which tokens are written is decided in logits.py.

Letters: B rows, T positions, V vocabulary, N candidates (all rows together), n masked positions, K steps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from config import SWEEP_STEPS, SamplingConfig
from logits import draw_tokens, in_float64, is_excluded, noise, penalize_repetition, row_generators
from utils.errors import ArgumentError

Predict = Callable[[Tensor], Tensor]  # (B, T) -> (B, T, V), row by row
CORRECTION_STEPS = 8  # network evaluations of a correction pass: each masks every 8th written position


@dataclass
class Step:
    """A state of the reverse process. Do not modify `tokens`: the process goes on from them."""

    tokens: Tensor  # (B, T) int64, after the step
    revealed: Tensor  # (B, T) bool: written at this step
    masked: Tensor  # (B, T) bool, n true: what the network saw as [MASK] at this step
    probabilities: Tensor  # (n, V) float64 at these positions, row-major; before temperature, top-k and top-p
    nfe: int  # network evaluations so far: calls of predict; a guided call reads every row twice and counts as two


# ------------------------------------------------------------------------------------------------- the loop
@torch.no_grad()
def reverse_process(
    predict: Predict,
    tokens: Tensor,
    mask_token_id: int,
    config: SamplingConfig | None = None,
    *,
    never: Sequence[int] = (),
    generator: torch.Generator | list[torch.Generator] | None = None,
    **settings,
) -> Iterator[Step]:
    """Write a token wherever tokens (B, T) hold `mask_token_id`; yield the state after every step, the last unmasked.

    predict maps (b, T) tokens to (b, T, V) logits for any rows of the batch. Given tokens never change, wherever they
    stand. [MASK] itself and the ids in `never` are never written. config: how to sample; `settings` are fields of it
    that replace its own. generator: each row has its own random stream (see `row_generators`), so that its text does
    not depend on the batch. Raises ArgumentError, at the first step, for settings that do not fit the tokens.
    """
    config = replace(config or SamplingConfig(), **settings)
    given, never, nfe = tokens != mask_token_id, sorted({mask_token_id, *never}), 0
    generators, plan = row_generators(generator, tokens), make_plan(~given, config)

    def look(masked: Tensor) -> tuple[Tensor, list[torch.Generator], Tensor]:
        """One network evaluation of the rows that have masks: these rows, their generators, logits (n, V)."""
        nonlocal nfe
        nfe += 1 if config.cfg_scale == 0 else 2
        rows = masked.any(1).nonzero()[:, 0]
        seen = tokens.masked_fill(masked, mask_token_id)[rows]
        logits = guided(predict, seen, given[rows], mask_token_id, config.cfg_scale)
        logits = with_a_choice(in_float64(logits[masked[rows].to(logits.device)]).to(tokens.device), never)
        return rows, [generators[b] for b in rows], penalized(logits, seen, masked[rows], config.repetition_penalty)

    if given.all():
        yield Step(tokens, ~given, ~given, torch.empty(0, 0, dtype=torch.float64), nfe)
    while (masked := tokens == mask_token_id).any():
        rows, own, logits = look(masked)  # 1. predict
        p = logits.softmax(-1)
        where, turn, count = plan.next(masked, rows)  # 2. candidates, and how many to reveal
        inside = where[masked[rows]]  # (n,)
        candidates = Candidates(where, turn, own, p[inside].masked_fill(is_excluded(never, p), 0.0))
        if config.order == "drawn_confidence":  # the drawn tokens decide the positions
            drawn = draw_tokens(logits[inside], where, own, config, never)
            candidates.drawn_p = p[inside].gather(1, drawn[:, None])[:, 0]
            chosen = choose(config, candidates, count)
            written = drawn[chosen[where]]
        else:
            chosen = choose(config, candidates, count)
            written = draw_tokens(logits[chosen[masked[rows]]], chosen, own, config, never)
        revealed = torch.zeros_like(masked)
        revealed[rows] = chosen
        tokens = tokens.masked_scatter(revealed, written)  # 3. reveal
        yield Step(tokens, revealed, masked, p, nfe)

    # 4. Correct: blocked Gibbs sampling of the model's own conditionals. Each position is drawn anew, given all others
    # but those far away that are drawn with it. With true conditionals this leaves the distribution of texts as it is.
    correction = replace(config, temperature=config.correct_temperature)
    group = ((~given).cumsum(1) - 1) % CORRECTION_STEPS
    for k in [*range(CORRECTION_STEPS)] * config.correct:
        masked = ~given & (group == k)
        if masked.any():
            _, own, logits = look(masked)
            written = draw_tokens(logits, masked[masked.any(1)], own, correction, never)
            tokens = tokens.masked_scatter(masked, written)
            yield Step(tokens, masked, masked, logits.softmax(-1), nfe)


def guided(predict: Predict, tokens: Tensor, given: Tensor, mask_token_id: int, scale: float) -> Tensor:
    """`predict` with classifier-free guidance: u + (scale + 1) (c - u), u with the given tokens masked."""
    if scale == 0:
        return predict(tokens)
    c, u = predict(torch.cat([tokens, tokens.masked_fill(given, mask_token_id)])).chunk(2)
    return torch.where(c == -torch.inf, c, u + (scale + 1) * (c - u))  # -inf - -inf is no number


def penalized(logits: Tensor, tokens: Tensor, masked: Tensor, penalty: float) -> Tensor:
    """logits (n, V) of the masked positions after the repetition penalty for the tokens (B, T) of their rows."""
    if penalty == 1.0:
        return logits
    V = logits.shape[-1]
    seen = torch.zeros(len(tokens), max(V, int(tokens.max()) + 1), dtype=torch.bool, device=tokens.device)
    seen = seen.scatter_(1, tokens, True)[:, :V]  # (B, V)
    return penalize_repetition(logits, seen[masked.nonzero()[:, 0]], penalty)


def with_a_choice(logits: Tensor, never: list[int]) -> Tensor:
    """logits (n, V), but where every token that may be written has -inf, all of these are equally likely."""
    excluded = is_excluded(never, logits)
    hopeless = (logits.isneginf() | excluded).all(-1, keepdim=True)  # (n, 1)
    return logits.masked_fill(hopeless & ~excluded, 0.0) if hopeless.any() else logits


# ------------------------------------------------------------------------------------------------- which positions
@dataclass
class Candidates:
    """The masked positions that may be revealed now."""

    where: Tensor  # (B, T) bool, true N times: the masked positions of each row's current block
    turn: Tensor  # (B, T) the step at which the sweep reveals each position
    generators: list[torch.Generator] | None = None  # one a row
    p: Tensor | None = None  # (N, V) float64 probabilities of the network, row-major as in `where`
    drawn_p: Tensor | None = None  # (N,) the share of p of the token that was drawn; of the order drawn_confidence


def random_order(candidates: Candidates) -> Tensor:
    """A fresh uniform score: LLaDA's random remasking."""
    return noise(candidates.generators, candidates.where)[candidates.where]


def drawn_confidence_order(candidates: Candidates) -> Tensor:
    """Probability of the token that was drawn: LLaDA's low-confidence remasking (arXiv 2502.09992, Alg. 5)."""
    return candidates.drawn_p


def confidence_order(candidates: Candidates) -> Tensor:
    """Probability of the likeliest token. Equal to `drawn_confidence` at temperature 0."""
    return candidates.p.amax(-1)


def left_order(candidates: Candidates) -> Tensor:
    """Left to right."""
    return -candidates.where.nonzero()[:, 1].double()


def sweep_order(candidates: Candidates) -> Tensor:
    """Step k of S reveals masked positions k, k + S, k + 2S, ...: after step 0, each left neighbour is visible.

    Tokens far apart hardly depend on each other. Related: dilated unmasking (arXiv 2506.19037), parallelized
    autoregression of images (arXiv 2412.15119).
    """
    T = candidates.where.shape[1]
    return -candidates.turn[candidates.where].double() - candidates.where.nonzero()[:, 1].double() / T


ORDERS: dict[str, Callable[[Candidates], Tensor]] = {  # name -> (N,) scores, best first
    "random": random_order,
    "drawn_confidence": drawn_confidence_order,
    "confidence": confidence_order,
    "left": left_order,
    "sweep": sweep_order,
}
EXACT_ORDERS = ("confidence", "left", "sweep")  # their positions follow from what is visible


def choose(config: SamplingConfig, candidates: Candidates, count: Tensor) -> Tensor:
    """(B, T) bool: the count[b] best candidates of each row, and all that reach the threshold, if there is one.

    Equal scores go from left to right, whatever the batch.
    """
    where = candidates.where
    scores = torch.full(where.shape, -torch.inf, dtype=torch.float64, device=where.device)
    scores[where] = ORDERS[config.order](candidates).to(scores)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = rank < count[:, None]
    if config.threshold is not None:  # Fast-dLLM, arXiv 2505.22618, Alg. 1
        confidence = candidates.p.amax(-1) if candidates.drawn_p is None else candidates.drawn_p
        chosen = chosen.masked_scatter(where, chosen[where] | (confidence >= config.threshold))
    return chosen


# ------------------------------------------------------------------------------------------------- how many
def uniform_schedule(masked: int, steps: int) -> list[int]:
    """Equal counts, the remainder to the first steps (LLaDA).

    >>> uniform_schedule(10, 4)
    [3, 3, 2, 2]
    """
    return [masked // steps + (k < masked % steps) for k in range(steps)]


def cosine_schedule(masked: int, steps: int) -> list[int]:
    """After step k of K the share cos(pi/2 k/K) is masked, so the first steps reveal few (MaskGIT, arXiv 2202.04200).

    >>> cosine_schedule(10, 4)
    [1, 2, 4, 3]
    """
    left = [math.floor(masked * math.cos(math.pi / 2 * k / steps)) for k in range(steps)] + [0]
    return [before - after for before, after in pairwise(left)]


SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {"uniform": uniform_schedule, "cosine": cosine_schedule}


class Plan(NamedTuple):
    """The steps of B rows, fixed before the first one."""

    block: Tensor  # (B, T) the block of each masked position; T elsewhere. Blocks are filled one after the other
    turn: Tensor  # (B, T) the step of its block at which the sweep reveals a position
    remaining: Tensor  # (B, K) the masks that are left in the row after each step; never rises

    def next(self, masked: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the next step of `rows` (b,), which all have masks, may reveal: where, turn (b, T), and count (b,).

        The next step is the first one that has something to reveal: a threshold may have revealed more than planned.
        """
        masked, block, remaining = masked[rows], self.block[rows], self.remaining[rows]
        left = masked.sum(1, keepdim=True)  # (b, 1)
        k = (remaining >= left).sum(1, keepdim=True)  # the first planned step that leaves fewer masks than there are
        current = block.masked_fill(~masked, block.shape[1]).amin(1, keepdim=True)
        return masked & (block == current), self.turn[rows], (left - remaining.gather(1, k))[:, 0]


def make_plan(masked: Tensor, config: SamplingConfig) -> Plan:
    """The plan of rows with masked (B, T) at the start. Raises ArgumentError if the settings do not fit a row."""
    (B, T), remaining = masked.shape, []
    block, turn = torch.full((B, T), T), torch.zeros(B, T, dtype=torch.long)
    for b, positions in enumerate(row.nonzero()[:, 0] for row in masked.cpu()):
        remaining.append([len(positions)])
        if len(positions):
            labels = (positions - positions[0]) // (config.block_length or T)
            block[b, positions] = labels = labels.unique(return_inverse=True)[1]  # without masks: no block
            sizes, turns = labels.bincount().tolist(), []
            for size, steps in zip(sizes, steps_of_blocks(sizes, config), strict=True):
                turns.append(torch.arange(size) % steps)
                for count in counts_of_block(size, steps, config):
                    remaining[b].append(remaining[b][-1] - count)
            turn[b, positions] = torch.cat(turns)
    longest = max(map(len, remaining))
    remaining = torch.tensor([left[1:] + [0] * (longest - len(left) + 1) for left in remaining])
    return Plan(*(x.to(masked.device) for x in (block, turn, remaining)))


def steps_of_blocks(sizes: list[int], config: SamplingConfig) -> list[int]:
    """How many steps each block of a row gets, given how many masks the blocks have."""
    if config.steps is None:
        return [min(size, SWEEP_STEPS) if config.order == "sweep" else size for size in sizes]
    if config.steps < len(sizes):
        raise ArgumentError("steps", f"must be at least {len(sizes)}, one for each block, got {config.steps}")
    # Each of twice as many steps as positions reveals one at most, with every schedule: more would change nothing.
    shares = uniform_schedule(config.steps, len(sizes))
    return [min(steps, 2 * size) for steps, size in zip(shares, sizes, strict=True)]


def counts_of_block(size: int, steps: int, config: SamplingConfig) -> list[int]:
    """How many of a block's `size` masks are revealed at each step. The sweep's counts are those of its turns."""
    if isinstance(config.schedule, str):
        return SCHEDULES[config.schedule](size, steps)
    if sum(config.schedule) != size:
        raise ArgumentError("schedule", f"reveals {sum(config.schedule)} positions, but {size} are masked")
    return list(config.schedule)


# ------------------------------------------------------------------------------------------------- likelihoods
def has_exact_likelihood(config: SamplingConfig) -> bool:
    """Whether `likelihood.policy_likelihood` of `policy_of(config)` is the exact likelihood of this sampler.

    Its positions must follow from what is visible, its tokens be drawn from the network's own p, and a text that was
    corrected after it was written has no likelihood.
    """
    plain = (config.temperature, config.top_k, config.top_p, config.repetition_penalty) == (1, None, None, 1)
    return plain and config.cfg_scale == 0 and config.correct == 0 and config.order in EXACT_ORDERS


def policy_of(
    config: SamplingConfig, generator: torch.Generator | None = None
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The positions that the sampler reveals, as `likelihood.policy_likelihood` asks for them, of windows that were
    fully masked at first: policy(logits (B, T, V), masked (B, T), step) -> (B, T) bool.

    With a generator, order random, whose result is an upper bound in expectation over the drawn orders. Raises
    ValueError for an order whose positions do not follow from what is visible.
    """
    if config.order not in EXACT_ORDERS and (config.order != "random" or generator is None):
        raise ValueError(f"with order {config.order} there is no exact likelihood")

    def policy(logits: Tensor, masked: Tensor, step: int) -> Tensor:
        plan = Plan(*(x.expand(len(masked), -1) for x in make_plan(torch.ones_like(masked[:1]), config)))
        where, turn, count = plan.next(masked, torch.arange(len(masked), device=masked.device))
        needs_p = config.order == "confidence" or config.threshold is not None
        p = in_float64(logits)[where.to(logits.device)].softmax(-1) if needs_p else None
        return choose(config, Candidates(where, turn, [generator] * len(masked), p), count)

    return policy
