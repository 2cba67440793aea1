"""The reverse process: from masked text to text, with any predictor `predict(tokens) -> logits`.

Three decisions make a sampler, and each is a named function: which positions to reveal and how many (unmasking.py),
which tokens to write there (drawing.py), which of the written ones to mask again (below).

Letters: B rows, T positions, V vocabulary, N positions a token is drawn for, n tokens written so far.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from drawing import draw, noise, penalize_repetition, probabilities, row_generators
from unmasking import STRATA, Candidates, Due, Plan, UnmaskingPolicy, left_padding

MASK_ID = 1  # with this [MASK], ids 0, 1, 2 are [PAD], [MASK], [START]: this project's vocabulary
Predict = Callable[[Tensor], Tensor]  # (B, T) -> (B, T, V), row by row


@dataclass
class Step:
    """A state of the reverse process. All tensors are (B, T) and the caller's own."""

    tokens: Tensor  # int64
    committed: Tensor  # bool: written at this step
    remasked: Tensor  # bool: masked again at this step
    confidence: Tensor  # float64: the network's probability of each token when it was written; 1 if given, 0 if masked
    nfe: int  # calls of predict so far; a guided call holds each row twice, and is one
    evaluations: Tensor  # (B,) rows the network has seen for each of ours: guidance counts 2 a call


# ------------------------------------------------------------------------------------------------- second thoughts
def highest_sigma(due: Due) -> float:
    """ReMDM's sigma_max = min(1, (1 - alpha_s) / alpha_t), with alpha = 1 - the share masked."""
    return min(1.0, due.s / (1 - due.t)) if due.t < 1 else 1.0


def remask_random(due: Due, eta: float, confidence: Tensor) -> Tensor:
    """Everything written is up for remasking, with the falling rate 1 - alpha_s."""
    return torch.full_like(confidence, due.s)


def remask_cap(due: Due, eta: float, confidence: Tensor) -> Tensor:
    """min(eta, sigma_max)."""
    return torch.full_like(confidence, min(eta, highest_sigma(due)))


def remask_rescale(due: Due, eta: float, confidence: Tensor) -> Tensor:
    """eta sigma_max."""
    return torch.full_like(confidence, eta * highest_sigma(due))


def remask_conf(due: Due, eta: float, confidence: Tensor) -> Tensor:
    """sigma_max shared out by softmax(-confidence): the unsure ones first."""
    return highest_sigma(due) * (-confidence).softmax(0)


def remask_loop(due: Due, eta: float, confidence: Tensor) -> Tensor:
    """As `cap` while time stands still (see `loop_steps`), else nothing."""
    return remask_cap(due, eta, confidence) if due.t == due.s else torch.zeros_like(confidence)


# A step's time, eta and the confidences (n,) of what is written -> (n,) probabilities sigma of being masked again.
REMASKERS: dict[str, Callable[[Due, float, Tensor], Tensor]] = {  # ReMDM, arXiv 2503.00307, section 4
    "random": remask_random,
    "cap": remask_cap,
    "rescale": remask_rescale,
    "conf": remask_conf,
    "loop": remask_loop,
}
LOOP_ON, LOOP_OFF, LOOP_MASKED = 0.55, 0.05, 0.1  # ReMDM's t_on, t_off and 1 - alpha_on


def loop_steps(steps: list[Due], size: int) -> list[Due]:
    """ReMDM-loop's time for a block of `size`: 45 % of the steps down to a tenth masked, the last 5 % (at least one)
    from there to none, and those between standing still. Fewer than three steps leave no time for that."""
    K = len(steps)
    if K < 3:
        return steps
    first, last = max(1, round(K * (1 - LOOP_ON))), max(1, round(K * LOOP_OFF))
    shares = [1 - (1 - LOOP_MASKED) * k / first for k in range(first)] + [LOOP_MASKED] * max(K - first - last + 1, 1)
    shares += [LOOP_MASKED * (1 - k / last) for k in range(1, last)] + [0.0]
    return [Due(steps[0].block, round(size * s), t, s) for t, s in pairwise(shares)]


# ------------------------------------------------------------------------------------------------- one row's progress
class Row:
    """Where one row stands in its plan, and its random stream."""

    def __init__(self, plan: Plan, generator: torch.Generator, policy: UnmaskingPolicy, remask: str | None, eta: float):
        self.plan, self.generator, self.next_step = plan, generator, 0
        self.ancestral, self.remask, self.eta = policy.schedule == "ancestral", remask, eta
        if remask == "loop":
            sizes = torch.bincount(plan.block[plan.block >= 0]).tolist()
            blocks = [[due for due in plan.steps if due.block == b] for b in range(len(sizes))]
            plan.steps = [due for steps, size in zip(blocks, sizes, strict=True) for due in loop_steps(steps, size)]

    def advance(self, masked: Tensor, confidence: Tensor) -> tuple[Tensor, int, Tensor] | None:
        """The next step that changes something, given masked (T,) and confidence (T,): None when the plan is done.

        Returns the positions that may be revealed (T,), how many must be, and those to mask again (T,).
        """
        while self.next_step < len(self.plan.steps):
            due = self.plan.steps[self.next_step]
            self.next_step += 1
            block = self.plan.block == due.block
            where, written = masked & block, block & ~masked
            sigma = self.remask_probabilities(due, block, masked, confidence)
            remasked = written & (noise([self.generator], written[None])[0] < sigma) if sigma.any() else written & False
            if self.ancestral:
                n = self.ancestral_count(due, sigma[where])
            else:  # whatever keeps the schedule
                n = min(int(where.sum()), max(0, int(where.sum()) + int(remasked.sum()) - due.target))
            if n or remasked.any():
                return where, n, remasked
        return None

    def remask_probabilities(self, due: Due, block: Tensor, masked: Tensor, confidence: Tensor) -> Tensor:
        """ReMDM's sigma at each position (T,); 0 outside the block. What is masked counts as infinitely sure."""
        sigma = torch.zeros_like(confidence)
        if self.remask is not None and due.s > 0 and (block & ~masked).any():
            sigma[block] = REMASKERS[self.remask](due, self.eta, confidence.masked_fill(masked, torch.inf)[block])
        return sigma

    def ancestral_count(self, due: Due, sigma: Tensor) -> int:
        """How many masked positions are revealed if each is on its own, sigma (n,) being theirs.

        ReMDM: with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t); at sigma 0, ancestral, (t - s) / t.
        """
        shares = ((1 - due.s) - (1 - sigma) * (1 - due.t)) / due.t
        draws = torch.rand(len(sigma), generator=self.generator, dtype=torch.float64)
        return len(sigma) if due.s == 0 else int((draws < shares.cpu()).sum())


# ------------------------------------------------------------------------------------------------- the reverse process
def reverse_process(
    predict: Predict,
    tokens: Tensor,
    mask_token_id: int,
    *,
    steps: int | None = None,
    order: str = "confidence",
    temperature: float = 0.0,
    block_length: int | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    schedule: str | list[int] = "uniform",
    threshold: float | None = None,
    factor: float | None = None,
    entropy_bound: float | None = None,
    remask: str | None = None,
    eta: float = 0.02,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    cfg_scale: float = 0.0,
) -> Iterator[Step]:
    """Write a token wherever tokens (B, T) hold `mask_token_id`; yield the state after every step, the last unmasked.

    predict maps (b, T) tokens to (b, T, V) logits for any rows of the batch: rows that have nothing to do are not
    computed. Each row has its own random stream (see `row_generators`), so its text does not depend on the batch.
    Visible tokens never change, wherever they stand. `mask_token_id` is never written; in this project's vocabulary
    (mask_token_id 1) neither are [PAD] and [START].

    steps, order, schedule, block_length, threshold, factor, entropy_bound: see `UnmaskingPolicy`. With order
    "confidence", the defaults are LLaDA's sampler (arXiv 2502.09992, Alg. 5): at temperature 0 its very tokens.
    temperature, top_k, top_p: see `probabilities`. Confidence is the probability before them, as in LLaDA.
    remask: a name in REMASKERS, eta its strength; with order "random" and schedule "ancestral" these are ReMDM's
    samplers, with other orders and schedules as many tokens are revealed as keep the schedule.
    cfg_scale: unsupervised classifier-free guidance: logits = u + (cfg_scale + 1) (c - u), with u from the given tokens
    masked (LLaDA, appendix A). Raises ValueError for arguments that do not go together.
    """
    schedule = schedule if isinstance(schedule, str) else tuple(schedule)
    policy = UnmaskingPolicy(steps, order, schedule, block_length, threshold, factor, entropy_bound)
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be of shape (B, T), got {tuple(tokens.shape)}")
    if remask is not None and remask not in REMASKERS:
        raise ValueError(f"remask must be one of {', '.join(REMASKERS)}, got {remask!r}")
    if remask is not None and order in STRATA:
        raise ValueError(f"the {order} order writes each stratum once: it does not go with remask")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is a probability, got {eta}")
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty must be greater than 0, got {repetition_penalty}")
    if not cfg_scale >= 0:
        raise ValueError(f"cfg_scale must be at least 0, got {cfg_scale}")
    probabilities(torch.zeros(1, 2), temperature, top_k, top_p)  # raises for what it does not accept
    write = Writer(mask_token_id, temperature, top_k, top_p, repetition_penalty)
    guided = Guidance(predict, tokens, mask_token_id, cfg_scale)
    rows = [
        Row(policy.plan(masked), stream, policy, remask, eta)
        for masked, stream in zip(tokens == mask_token_id, row_generators(generator, tokens), strict=True)
    ]
    return run(guided, write, policy, rows, tokens.clone(), mask_token_id)


def run(
    predict: "Guidance", write: "Writer", policy: UnmaskingPolicy, rows: list[Row], tokens: Tensor, mask_token_id: int
) -> Iterator[Step]:
    """The loop of `reverse_process`: rows go through their plans side by side, each at its own pace."""
    masked = tokens == mask_token_id
    confidence = (~masked).double()
    nfe, evaluations = 0, torch.zeros(len(tokens), dtype=torch.long)
    if not masked.any():
        nothing = torch.zeros_like(masked)
        yield Step(tokens, nothing, nothing.clone(), confidence, nfe, evaluations)
    unfinished = range(len(tokens))
    while True:
        moves = {b: rows[b].advance(masked[b], confidence[b]) for b in unfinished}
        unfinished = [b for b in unfinished if moves[b] is not None]
        if not unfinished:
            return
        committed, remasked = torch.zeros_like(masked), torch.zeros_like(masked)
        active = [b for b in unfinished if moves[b][1]]  # others only mask again: no need to ask the network
        if active:
            logits = predict(tokens, active)
            nfe += 1
            evaluations[active] += predict.rows_per_row
            where = torch.stack([moves[b][0] for b in active])
            streams = [rows[b].generator for b in active]
            strata = torch.stack([rows[b].plan.stratum for b in active])
            dues = [moves[b][1] for b in active]
            chosen, written, p = reveal(policy, write, logits, tokens[active], Candidates(where, strata, streams), dues)
            committed[active] = chosen
            tokens[committed], confidence[committed] = written, p
        for b in unfinished:
            remasked[b] = moves[b][2]
        tokens[remasked], confidence[remasked] = mask_token_id, 0.0
        masked = tokens == mask_token_id
        yield Step(tokens.clone(), committed, remasked, confidence.clone(), nfe, evaluations.clone())


def reveal(
    policy: UnmaskingPolicy, write: "Writer", logits: Tensor, tokens: Tensor, candidates: Candidates, dues: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (B, T) bool, and in row-major order their tokens and probabilities, given logits (B, T, V).

    If the network has no say in the positions, tokens are drawn for them alone; else for all candidates, since the
    confidence that decides is that of the token drawn.
    """
    if policy.is_blind:
        chosen = policy.choose(candidates, dues, tokens)
        return chosen, *write(logits, tokens, chosen, candidates.generators)[:2]
    where = candidates.where
    written, confidence, p = write(logits, tokens, where, candidates.generators)
    candidates.p, candidates.confidence = p, confidence
    chosen = policy.choose(candidates, dues, tokens)
    return chosen, written[chosen[where]], confidence[chosen[where]]


# ------------------------------------------------------------------------------------------------- tokens
@dataclass
class Writer:
    """Which tokens: draws them from logits, never a special one."""

    mask_token_id: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float

    def __call__(
        self, logits: Tensor, tokens: Tensor, where: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """logits (B, T, V), tokens and where (B, T) -> drawn tokens (N,), their probabilities (N,), and p (N, V).

        p are the network's own probabilities, float64: a foreign predictor may give special tokens a share of them.
        """
        V = logits.shape[-1]
        logits = logits[where].double()  # (N, V)
        if self.repetition_penalty != 1.0:
            seen = torch.zeros(len(tokens), max(V, int(tokens.max()) + 1), dtype=torch.bool, device=tokens.device)
            seen = seen.scatter_(1, tokens, True)[:, :V]  # (B, V)
            logits = penalize_repetition(logits, seen[where.nonzero()[:, 0]], self.repetition_penalty)
        p = logits.softmax(-1)
        never = range(3) if self.mask_token_id == MASK_ID else [self.mask_token_id]
        logits[:, [i for i in never if i < V]] = -torch.inf
        if self.temperature == 0:
            drawn = logits.argmax(-1)
        else:
            u = noise(generators, where)[where]
            drawn = draw(probabilities(logits, self.temperature, self.top_k, self.top_p), u)
        return drawn, p.gather(1, drawn[:, None])[:, 0], p


# ------------------------------------------------------------------------------------------------- guidance
class Guidance:
    """`predict`, guided by what it says without the given tokens if cfg_scale > 0: one call with every row twice."""

    def __init__(self, predict: Predict, tokens: Tensor, mask_token_id: int, cfg_scale: float):
        self.predict, self.mask_token_id, self.cfg_scale = predict, mask_token_id, cfg_scale
        self.rows_per_row = 1 if cfg_scale == 0 else 2
        self.given = tokens != mask_token_id
        if mask_token_id == MASK_ID:  # padding is no prompt: it stays what it is
            self.given &= torch.arange(tokens.shape[1], device=tokens.device) >= left_padding(tokens)[:, None]

    @torch.no_grad()
    def __call__(self, tokens: Tensor, rows: list[int]) -> Tensor:
        """Logits of the given rows of tokens (B, T): (len(rows), T, V)."""
        if self.cfg_scale == 0:
            return self.predict(tokens[rows])
        unconditional = tokens[rows].masked_fill(self.given[rows], self.mask_token_id)
        c, u = self.predict(torch.cat([tokens[rows], unconditional])).chunk(2)
        guided = u + (self.cfg_scale + 1) * (c - u)
        return torch.where(c == -torch.inf, c, guided)  # -inf - -inf is no number
