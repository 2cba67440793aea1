"""The reverse process: from masked tokens to text, with any predictor `predict(tokens) -> logits`.

A sampler makes three decisions, each a small function of its own: which positions to reveal and how many
(unmasking.py), which tokens to write there (logits.py), and which written tokens to mask again (remasking, below).
`reverse_process` is the entry; the loop itself is `unmask`.

Letters: B rows, T positions, V vocabulary, N positions for which a token is drawn, n tokens written so far.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from logits import LogitsConfig, draw, noise, penalize_repetition, probabilities, row_generators
from unmasking import TURNS, Candidates, RowSchedule, ScheduledStep, UnmaskingPolicy
from utils.errors import ArgumentError, check_number

Predict = Callable[[Tensor], Tensor]  # (B, T) -> (B, T, V), row by row


# ------------------------------------------------------------------------------------------------- remasking
# A step, eta and the confidences (n,) of the tokens written so far -> sigma (n,), their probabilities of being masked
# again: ReMDM's schedules (arXiv 2503.00307, section 4). alpha_t is the share that is visible at time t.
def sigma_max(step: ScheduledStep) -> float:
    """The largest sigma that keeps the marginals: min(1, (1 - alpha_s) / alpha_t)."""
    return min(1.0, step.s / (1 - step.t)) if step.t < 1 else 1.0


def remask_random(step: ScheduledStep, eta: float, confidence: Tensor) -> Tensor:
    """The falling rate 1 - alpha_s, the same for all."""
    return torch.full_like(confidence, step.s)


def remask_cap(step: ScheduledStep, eta: float, confidence: Tensor) -> Tensor:
    """min(eta, sigma_max)."""
    return torch.full_like(confidence, min(eta, sigma_max(step)))


def remask_rescale(step: ScheduledStep, eta: float, confidence: Tensor) -> Tensor:
    """eta sigma_max."""
    return torch.full_like(confidence, eta * sigma_max(step))


def remask_conf(step: ScheduledStep, eta: float, confidence: Tensor) -> Tensor:
    """sigma_max distributed by softmax(-confidence): the least confident tokens first."""
    return sigma_max(step) * (-confidence).softmax(0)


def remask_loop(step: ScheduledStep, eta: float, confidence: Tensor) -> Tensor:
    """As `cap` while time stands still (see `loop_schedule`), else nothing."""
    return remask_cap(step, eta, confidence) if step.t == step.s else torch.zeros_like(confidence)


REMASKERS: dict[str, Callable[[ScheduledStep, float, Tensor], Tensor]] = {
    "random": remask_random,
    "cap": remask_cap,
    "rescale": remask_rescale,
    "conf": remask_conf,
    "loop": remask_loop,
}
LOOP_ON, LOOP_OFF, LOOP_MASKED = 0.55, 0.05, 0.1  # ReMDM's t_on, t_off and 1 - alpha_on


def loop_schedule(steps: list[ScheduledStep], size: int) -> list[ScheduledStep]:
    """ReMDM-loop's time for a block of `size` positions, in as many steps as given.

    45 % of the steps lead down to a tenth masked, the last 5 % (at least one) from there to none, and in those between
    time stands still. Fewer than three steps stay as they are.
    """
    K = len(steps)
    if K < 3:
        return steps
    first, last = max(1, round(K * (1 - LOOP_ON))), max(1, round(K * LOOP_OFF))
    shares = [1 - (1 - LOOP_MASKED) * k / first for k in range(first)] + [LOOP_MASKED] * max(K - first - last + 1, 1)
    shares += [LOOP_MASKED * (1 - k / last) for k in range(1, last)] + [0.0]
    return [ScheduledStep(steps[0].block, round(size * s), t, s) for t, s in pairwise(shares)]


# ------------------------------------------------------------------------------------------------- settings, states
@dataclass(frozen=True, kw_only=True)
class SamplingConfig(UnmaskingPolicy, LogitsConfig):
    """Everything that decides how masks become text. The defaults are LLaDA's published sampler (arXiv 2502.09992).

    The unmasking policy's fields: see `UnmaskingPolicy`; temperature (here 0 by default), top_k, top_p and
    repetition_penalty: see `LogitsConfig`. Confidence is the probability before temperature, top-k and top-p.

    remask: a name in REMASKERS; eta: its strength. With order random and schedule ancestral these are ReMDM's
        samplers; with other orders and schedules as many tokens are revealed as keep the schedule.
    cfg_scale: unsupervised classifier-free guidance: logits = u + (cfg_scale + 1) (c - u), with u from the given tokens
        masked (LLaDA, appendix A). It doubles the rows that the network reads.
    slide: how far the window moves on over texts longer than the context (generation/infilling.py); None: half of it.

    Raises ValueError (ArgumentError where it names an argument) for values that cannot be used together.
    """

    temperature: float = 0.0
    remask: str | None = None
    eta: float = 0.02
    cfg_scale: float = 0.0
    slide: int | None = None

    def __post_init__(self):
        UnmaskingPolicy.__post_init__(self)
        LogitsConfig.__post_init__(self)
        if self.remask is not None and self.remask not in REMASKERS:
            raise ArgumentError("remask", f"must be one of {', '.join(REMASKERS)}, got {self.remask!r}")
        if self.remask is not None and self.order in TURNS:
            raise ArgumentError("remask", f"does not go with the {self.order} order, which reveals each position once")
        check_number("eta", self.eta, low=0, high=1)
        check_number("cfg_scale", self.cfg_scale, low=0)
        if self.slide is not None:
            check_number("slide", self.slide, low=1)

    @property
    def acts_at_every_step(self) -> bool:
        """As in `UnmaskingPolicy`; remasking may act at any step."""
        return self.remask is not None or super().acts_at_every_step

    @property
    def has_exact_likelihood(self) -> bool:
        """Whether `policy_likelihood` is the exact likelihood of this sampler: it draws from the network's own p."""
        plain = (self.temperature, self.top_k, self.top_p, self.repetition_penalty) == (1, None, None, 1)
        return plain and self.remask is None and self.cfg_scale == 0 and super().has_exact_likelihood


@dataclass
class Step:
    """A state of the reverse process. Tensors are (B, T) if not marked otherwise, and the caller's own."""

    tokens: Tensor  # int64
    revealed: Tensor  # bool: written at this step
    remasked: Tensor  # bool: masked again at this step
    confidence: Tensor  # float64: the network's probability of each token when it was written; 1 if given, 0 if masked
    probabilities: Tensor  # (n, V) float64: the network's at the n positions written at this step, in row-major order
    nfe: int  # network evaluations so far: calls of predict (a guided call holds each row twice, and is one)
    evaluations: Tensor  # (B,) rows that the network has read for each of ours: guidance counts 2 a call


# ------------------------------------------------------------------------------------------------- the reverse process
def reverse_process(
    predict: Predict,
    tokens: Tensor,
    mask_token_id: int,
    config: SamplingConfig | None = None,
    *,
    never: Sequence[int] = (),
    pad_token_id: int | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    **settings,
) -> Iterator[Step]:
    """Write a token wherever tokens (B, T) hold `mask_token_id`; yield the state after every step, the last unmasked.

    predict maps (b, T) tokens to (b, T, V) logits for any rows of the batch. Visible tokens never change, wherever they
    stand, unless remasking is asked for: then written ones may, given ones never. [MASK] itself and the ids in `never`
    are never written. Rows may be padded at the left with `pad_token_id`.

    config: how to sample, by default LLaDA's published sampler; `settings` are fields of SamplingConfig that replace
    config's. generator: each row has its own random stream (see `row_generators`), so that its text does not depend on
    the batch; None is seed 0. Raises ValueError at once for settings that fit neither each other nor the tokens.
    """
    config = replace(config or SamplingConfig(), **settings)
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be of shape (B, T), got {tuple(tokens.shape)}")
    generators = row_generators(generator, tokens, pad_token_id)
    rows = [
        RowProgress(config, masked, generator)
        for masked, generator in zip(tokens == mask_token_id, generators, strict=True)
    ]
    guided = GuidedPredictor(predict, tokens, mask_token_id, config.cfg_scale, pad_token_id)
    never = sorted({mask_token_id, *never})
    return unmask(guided, config, rows, tokens.clone(), mask_token_id, never, left_padding(tokens, pad_token_id))


def unmask(
    predict: "GuidedPredictor",
    config: SamplingConfig,
    rows: list["RowProgress"],
    tokens: Tensor,
    mask_token_id: int,
    never: list[int],
    first_columns: list[int],
) -> Iterator[Step]:
    """The loop of `reverse_process`. Rows follow their schedules side by side; a finished row is not computed."""
    masked = tokens == mask_token_id
    confidence = (~masked).double()
    nfe, evaluations = 0, torch.zeros(len(tokens), dtype=torch.long)
    nothing = confidence.new_empty(0, 0)  # a step that writes nothing has no probabilities
    if not masked.any():
        yield Step(tokens, torch.zeros_like(masked), torch.zeros_like(masked), confidence, nothing, nfe, evaluations)
    unfinished = list(range(len(tokens)))
    while True:
        # 1. What each row's schedule asks for: candidates, how many of them to reveal, what to mask again.
        moves = {b: rows[b].advance(masked[b], confidence[b]) for b in unfinished}
        unfinished = [b for b in unfinished if moves[b] is not None]
        if not unfinished:
            return
        revealed, remasked, p = torch.zeros_like(masked), torch.zeros_like(masked), nothing
        active = [b for b in unfinished if moves[b].count]  # rows that only remask need no network
        if active:
            # 2. One network evaluation.
            logits = predict(tokens, active)  # (b, T, V)
            nfe += 1
            evaluations[active] += predict.rows_per_row
            # 3. Which positions, and which tokens.
            where = torch.stack([moves[b].where for b in active])
            turn = torch.stack([rows[b].schedule.turn for b in active])
            candidates = Candidates(where, turn, [rows[b].generator for b in active])
            counts, starts = [moves[b].count for b in active], [first_columns[b] for b in active]
            chosen, written, p = reveal(config, logits, tokens[active], candidates, counts, starts, never)
            revealed[active] = chosen
            tokens[revealed], confidence[revealed] = written, p.gather(1, written[:, None])[:, 0]
        # 4. Remasking.
        for b in unfinished:
            remasked[b] = moves[b].remasked
        tokens[remasked], confidence[remasked] = mask_token_id, 0.0
        masked = tokens == mask_token_id
        yield Step(tokens.clone(), revealed, remasked, confidence.clone(), p, nfe, evaluations.clone())


def reveal(
    config: SamplingConfig,
    logits: Tensor,
    tokens: Tensor,
    candidates: Candidates,
    counts: list[int],
    first_columns: list[int],
    never: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Given logits (B, T, V): n positions (B, T) bool, their tokens (n,) and the probabilities there (n, V), row-major.

    Tokens are drawn for the revealed positions alone. Only the drawn_confidence order needs a token for every
    candidate, as the drawn tokens decide the positions.
    """
    where, generators = candidates.where, candidates.generators
    logits = with_a_choice(logits, never)
    if not config.needs_network:
        chosen = config.choose(candidates, counts, first_columns)
        at_chosen = logits_at(logits, tokens, chosen, config)
        written = draw_tokens(at_chosen, chosen, generators, config, never)
        return chosen, written, at_chosen.softmax(-1)

    at_candidates = logits_at(logits, tokens, where, config)  # (N, V)
    p = at_candidates.softmax(-1)  # a foreign predictor may give ids that are never written a share
    candidates.p = p.masked_fill(is_excluded(never, p), 0.0)
    if config.order == "drawn_confidence":
        drawn = draw_tokens(at_candidates, where, generators, config, never)
        candidates.drawn_p = p.gather(1, drawn[:, None])[:, 0]
        chosen = config.choose(candidates, counts, first_columns)
        return chosen, drawn[chosen[where]], p[chosen[where]]
    chosen = config.choose(candidates, counts, first_columns)
    written = draw_tokens(at_candidates[chosen[where]], chosen, generators, config, never)
    return chosen, written, p[chosen[where]]


def logits_at(logits: Tensor, tokens: Tensor, where: Tensor, config: SamplingConfig) -> Tensor:
    """logits (B, T, V) at the N positions of where (B, T), after the repetition penalty: (N, V) float64."""
    at_positions = logits[where].double()
    if config.repetition_penalty == 1.0:
        return at_positions
    V = logits.shape[-1]
    seen = torch.zeros(len(tokens), max(V, int(tokens.max()) + 1), dtype=torch.bool, device=tokens.device)
    seen = seen.scatter_(1, tokens, True)[:, :V]  # (B, V)
    return penalize_repetition(at_positions, seen[where.nonzero()[:, 0]], config.repetition_penalty)


def draw_tokens(
    logits: Tensor, where: Tensor, generators: list[torch.Generator], config: LogitsConfig, never: Sequence[int]
) -> Tensor:
    """One token for each of logits (N, V), the positions of where (B, T) in row-major order: (N,), none of `never`."""
    logits = logits.masked_fill(is_excluded(never, logits), -torch.inf)
    if config.temperature == 0:
        return logits.argmax(-1)
    return draw(probabilities(logits, config), noise(generators, where)[where])


def with_a_choice(logits: Tensor, never: list[int]) -> Tensor:
    """logits (B, T, V), but where every token that may be written has -inf, all of these are equally likely."""
    excluded = is_excluded(never, logits)
    hopeless = (logits.isneginf() | excluded).all(-1, keepdim=True)  # (B, T, 1)
    return logits.masked_fill(hopeless & ~excluded, 0.0) if hopeless.any() else logits


def is_excluded(never: Sequence[int], over_vocabulary: Tensor) -> Tensor:
    """(V,) bool: the ids that are never written, for a tensor (..., V). The mask's id may lie outside of it."""
    ids = torch.arange(over_vocabulary.shape[-1], device=over_vocabulary.device)
    return torch.isin(ids, torch.tensor(never, device=ids.device))


def left_padding(tokens: Tensor, pad_token_id: int | None) -> list[int]:
    """How many padding tokens each row of tokens (B, T) begins with."""
    if pad_token_id is None:
        return [0] * len(tokens)
    return (tokens == pad_token_id).long().cumprod(1).sum(1).tolist()


# ------------------------------------------------------------------------------------------------- one row's progress
@dataclass
class Move:
    """What one row does next."""

    where: Tensor  # (T,) the positions that may be revealed
    count: int  # how many of them must be
    remasked: Tensor  # (T,) written positions to mask again


class RowProgress:
    """Where one row stands in its schedule, and its random stream."""

    def __init__(self, config: SamplingConfig, masked: Tensor, generator: torch.Generator):
        self.config, self.generator, self.step_index = config, generator, 0
        self.schedule = config.plan(masked)
        if config.remask == "loop":
            self.schedule = with_loops(self.schedule)

    def advance(self, masked: Tensor, confidence: Tensor) -> Move | None:
        """The next step that changes something, given masked (T,) and confidence (T,); None after the last one."""
        while self.step_index < len(self.schedule.steps):
            step = self.schedule.steps[self.step_index]
            self.step_index += 1
            block = self.schedule.block == step.block
            where, written = masked & block, block & ~masked
            sigma = self.remask_probabilities(step, block, masked, confidence)
            remasked = torch.zeros_like(written)
            if sigma.any():
                remasked = written & (noise([self.generator], written[None])[0] < sigma)
            if self.config.schedule == "ancestral":
                count = self.ancestral_count(step, sigma[where])
            else:  # as many as keep the schedule
                count = min(int(where.sum()), max(0, int(where.sum()) + int(remasked.sum()) - step.remaining))
            if count or remasked.any():
                return Move(where, count, remasked)
        return None

    def remask_probabilities(self, step: ScheduledStep, block: Tensor, masked: Tensor, confidence: Tensor) -> Tensor:
        """ReMDM's sigma at each position (T,), 0 outside the block; a masked position counts as fully confident."""
        sigma = torch.zeros_like(confidence)
        if self.config.remask is not None and step.s > 0 and (block & ~masked).any():
            in_block = confidence.masked_fill(masked, torch.inf)[block]
            sigma[block] = REMASKERS[self.config.remask](step, self.config.eta, in_block)
        return sigma

    def ancestral_count(self, step: ScheduledStep, sigma: Tensor) -> int:
        """How many masked positions are revealed if each is revealed independently, sigma (n,) being theirs.

        ReMDM: with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t); at sigma 0, ancestral, (t - s) / t.
        """
        shares = ((1 - step.s) - (1 - sigma) * (1 - step.t)) / step.t
        draws = torch.rand(len(sigma), generator=self.generator, dtype=torch.float64)
        return len(sigma) if step.s == 0 else int((draws < shares.cpu()).sum())


def with_loops(schedule: RowSchedule) -> RowSchedule:
    """The schedule with ReMDM-loop's time in each block."""
    sizes = torch.bincount(schedule.block[schedule.block >= 0]).tolist()
    steps = []
    for b, size in enumerate(sizes):
        steps += loop_schedule([step for step in schedule.steps if step.block == b], size)
    return schedule._replace(steps=steps)


# ------------------------------------------------------------------------------------------------- guidance
class GuidedPredictor:
    """`predict` with classifier-free guidance if cfg_scale > 0: one call in which every row stands twice."""

    def __init__(
        self, predict: Predict, tokens: Tensor, mask_token_id: int, cfg_scale: float, pad_token_id: int | None
    ):
        self.predict, self.mask_token_id, self.cfg_scale = predict, mask_token_id, cfg_scale
        self.rows_per_row = 1 if cfg_scale == 0 else 2
        first = torch.tensor(left_padding(tokens, pad_token_id), device=tokens.device)[:, None]  # padding is no prompt
        self.given = (tokens != mask_token_id) & (torch.arange(tokens.shape[1], device=tokens.device) >= first)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, rows: list[int]) -> Tensor:
        """Logits of the given rows of tokens (B, T): (len(rows), T, V)."""
        if self.cfg_scale == 0:
            return self.predict(tokens[rows])
        unconditional = tokens[rows].masked_fill(self.given[rows], self.mask_token_id)
        c, u = self.predict(torch.cat([tokens[rows], unconditional])).chunk(2)
        guided = u + (self.cfg_scale + 1) * (c - u)
        return torch.where(c == -torch.inf, c, guided)  # -inf - -inf is no number
