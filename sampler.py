"""The reverse process: from masked tokens to text, with any predictor `predict(tokens) -> logits`.

`reverse_process` is the loop. Below it: which positions are revealed first (the orders), and how many at each step (the
plan). Which tokens are written is decided in logits.py.

Letters: B rows, T positions, V vocabulary, K steps; n masked positions and N candidates among them, all rows together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from config import SWEEP_STEPS, SamplingConfig
from logits import draw_tokens, in_float64, noise, penalize_repetition, row_generators
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
    are. [MASK] itself and the ids in `never` are never written. config: how to sample; `settings` are fields of it that
    replace its own. generator: each row draws from its own (see `row_generators`), so that its text does not depend on
    the batch. Raises ArgumentError, at the first step, for settings that do not fit the tokens.
    """
    config = replace(config or SamplingConfig(), **settings)
    given, never, nfe = tokens != mask_token_id, {mask_token_id, *never}, 0
    plan, generators = make_plan(~given, config), row_generators(generator, tokens)

    def evaluate(masked: Tensor) -> Tensor:
        """One network evaluation of the rows in which masked (B, T) is true anywhere: (n, V) logits where it is."""
        nonlocal nfe
        nfe += 1 if config.cfg_scale == 0 else 2
        rows = masked.any(1)
        seen = tokens.masked_fill(masked, mask_token_id)[rows]
        logits = guided(predict, seen, given[rows], mask_token_id, config.cfg_scale)
        logits = in_float64(logits[masked[rows].to(logits.device)]).to(tokens.device)
        logits[:, [token for token in never if token < logits.shape[1]]] = -torch.inf
        return penalize_repetition(logits, seen, config.repetition_penalty, masked[rows].nonzero()[:, 0])

    if given.all():
        yield Step(tokens, ~given, ~given, torch.empty(0, 0, dtype=torch.float64), nfe)
    while (masked := tokens == mask_token_id).any():
        logits = evaluate(masked)  # 1. predict
        p = logits.softmax(-1)
        where, count = next_candidates(plan, masked)  # 2. order: which positions may be revealed, and how many of them
        among = where[masked]  # (n,) bool, N true
        if config.order == "drawn_confidence":  # draw at all candidates: the drawn tokens decide the positions
            drawn = draw_tokens(logits[among], where, generators, config)
            confidence = p[among].gather(1, drawn[:, None])[:, 0]
            chosen = choose(Candidates(where, confidence, plan.sweep_step, generators), count, config)
            written = drawn[chosen[where]]
        else:
            chosen = choose(Candidates(where, p[among].amax(-1), plan.sweep_step, generators), count, config)
            written = draw_tokens(logits[chosen[masked]], chosen, generators, config)  # 3. draw
        tokens = tokens.masked_scatter(chosen, written)  # 4. reveal
        yield Step(tokens, chosen, masked, p, nfe)

    # 5. Correct: blocked Gibbs sampling of the model's own conditionals. Each position is drawn anew, given all others
    # but those far away that are drawn with it. With true conditionals this leaves the distribution of texts as it is.
    correction = replace(config, temperature=config.correct_temperature)
    group = ((~given).cumsum(1) - 1) % CORRECTION_STEPS
    for k in [*range(CORRECTION_STEPS)] * config.correct:
        masked = ~given & (group == k)
        if masked.any():
            logits = evaluate(masked)
            tokens = tokens.masked_scatter(masked, draw_tokens(logits, masked, generators, correction))
            yield Step(tokens, masked, masked, logits.softmax(-1), nfe)


def guided(predict: Predict, tokens: Tensor, given: Tensor, mask_token_id: int, scale: float) -> Tensor:
    """`predict` with classifier-free guidance: u + (scale + 1) (c - u), u with the given tokens masked."""
    if scale == 0:
        return predict(tokens)
    c, u = predict(torch.cat([tokens, tokens.masked_fill(given, mask_token_id)])).chunk(2)
    return torch.where(c == -torch.inf, c, u + (scale + 1) * (c - u))  # -inf - -inf is no number


# ------------------------------------------------------------------------------------------------- which positions
class Candidates(NamedTuple):
    """The masked positions that may be revealed now."""

    where: Tensor  # (B, T) bool, true N times
    confidence: Tensor  # (N,) float64 p of the likeliest token; of the drawn one for the order drawn_confidence
    sweep_step: Tensor  # (B or 1, T) the step at which the sweep reveals each position
    generators: list[torch.Generator]  # one a row


ORDERS: dict[str, Callable[[Candidates], Tensor]] = {  # name -> (N,) scores: the best are revealed first
    "random": lambda c: noise(c.generators, c.where)[c.where],  # LLaDA's random remasking
    "drawn_confidence": lambda c: c.confidence,  # LLaDA's low-confidence remasking (arXiv 2502.09992, Alg. 5)
    "confidence": lambda c: c.confidence,
    "left": lambda c: -c.where.nonzero()[:, 1],
    # Step k of S reveals masked positions k, k + S, k + 2S, ...: after step 0, each left neighbour is visible. Tokens
    # far apart hardly depend on each other. Related: dilated unmasking (arXiv 2506.19037), parallelized autoregression
    # of images (arXiv 2412.15119).
    "sweep": lambda c: -c.sweep_step.expand_as(c.where)[c.where],
}
EXACT_ORDERS = ("confidence", "left", "sweep")  # their positions follow from what is visible


def choose(candidates: Candidates, count: Tensor, config: SamplingConfig) -> Tensor:
    """(B, T) bool: the count[b] best candidates of each row, and all that reach the threshold, if there is one.

    Equal scores go from left to right, whatever the batch.
    """
    where = candidates.where
    scores = torch.full(where.shape, -torch.inf, dtype=torch.float64, device=where.device)
    scores[where] = ORDERS[config.order](candidates).to(scores)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = rank < count[:, None]
    if config.threshold is not None:  # Fast-dLLM, arXiv 2505.22618, Alg. 1
        chosen = chosen.masked_scatter(where, chosen[where] | (candidates.confidence >= config.threshold))
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
    sweep_step: Tensor  # (B, T) the step of its block at which the sweep reveals a position
    remaining: Tensor  # (B, K) the masks that are left in the row after each step; never rises


def make_plan(masked: Tensor, config: SamplingConfig) -> Plan:
    """The plan of rows with masked (B, T) at the start. Raises ArgumentError if the settings do not fit a row."""
    T, remaining = masked.shape[1], []
    block, sweep_step = torch.full(masked.shape, T), torch.zeros(masked.shape, dtype=torch.long)
    for b, row in enumerate(masked.cpu()):
        positions, counts = row.nonzero()[:, 0], [0]
        labels = (positions - positions[:1]) // (config.block_length or T)
        sizes = labels.unique_consecutive(return_counts=True)[1].tolist()  # a block without masks is none
        for i, (part, planned) in enumerate(zip(positions.split(sizes), counts_of_blocks(sizes, config), strict=True)):
            block[b, part], sweep_step[b, part] = i, torch.arange(len(part)) % len(planned)
            counts += planned
        remaining.append(len(positions) - torch.tensor(counts).cumsum(0))
    return Plan(*(x.to(masked.device) for x in (block, sweep_step, pad_sequence(remaining, batch_first=True))))


def counts_of_blocks(sizes: list[int], config: SamplingConfig) -> list[list[int]]:
    """How many of its masks each block of a row reveals at each of its steps, given how many masks the blocks have."""
    if not isinstance(config.schedule, str):
        if wrong := [size for size in sizes if size != sum(config.schedule)]:
            raise ArgumentError("schedule", f"reveals {sum(config.schedule)} positions, but {wrong[0]} are masked")
        return [list(config.schedule) for _ in sizes]
    if config.steps is None:
        steps = [min(size, SWEEP_STEPS) if config.order == "sweep" else size for size in sizes]
    elif config.steps < len(sizes):
        raise ArgumentError("steps", f"must be at least {len(sizes)}, one for each block, got {config.steps}")
    else:
        # Each of twice as many steps as positions reveals one at most, with every schedule: more would change nothing.
        shares = uniform_schedule(config.steps, len(sizes))
        steps = [min(share, 2 * size) for share, size in zip(shares, sizes, strict=True)]
    return [SCHEDULES[config.schedule](*block) for block in zip(sizes, steps, strict=True)]


def next_candidates(plan: Plan, masked: Tensor) -> tuple[Tensor, Tensor]:
    """What the next step may reveal while masked (B, T): candidates (B, T) bool, and how many of them, (B,).

    Candidates are the masked positions of a row's first block that has any. The next step is the first one planned that
    reveals something: a threshold may have revealed more than planned.
    """
    left = masked.sum(1, keepdim=True)  # (B, 1)
    k = (plan.remaining >= left).sum(1, keepdim=True).clamp(max=plan.remaining.shape[1] - 1)
    count = left - plan.remaining.take_along_dim(k, dim=1)
    current = plan.block.masked_fill(~masked, masked.shape[1]).amin(1, keepdim=True)
    return masked & (plan.block == current), count[:, 0]


# ------------------------------------------------------------------------------------------------- likelihoods
def has_exact_likelihood(config: SamplingConfig) -> bool:
    """Whether `likelihood.policy_likelihood` of `policy_of(config)` is the exact likelihood of this sampler.

    Tokens must be drawn from the network's own p, positions follow from what is visible, and no text be corrected.
    """
    plain = (config.temperature, config.top_k, config.top_p, config.repetition_penalty) == (1, None, None, 1)
    return plain and config.cfg_scale == 0 and config.correct == 0 and config.order in EXACT_ORDERS


def policy_of(config: SamplingConfig, generator: torch.Generator | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The positions that the sampler reveals, as `likelihood.policy_likelihood` asks for them, of windows that were
    fully masked at first: policy(logits (B, T, V), masked (B, T)) -> (B, T) bool.

    With a generator, order random, whose result is an upper bound in expectation over the drawn orders. Raises
    ValueError for an order whose positions do not follow from what is visible.
    """
    if config.order not in EXACT_ORDERS and (config.order != "random" or generator is None):
        raise ValueError(f"with order {config.order} there is no exact likelihood")

    def policy(logits: Tensor, masked: Tensor) -> Tensor:
        plan = make_plan(torch.ones_like(masked[:1]), config)  # one for all rows
        where, count = next_candidates(plan, masked)
        confidence = in_float64(logits[where]).softmax(-1).amax(-1)
        return choose(Candidates(where, confidence, plan.sweep_step, [generator] * len(masked)), count, config)

    return policy
