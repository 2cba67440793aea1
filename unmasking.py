"""Unmasking policies: which masked positions are revealed next, and how many.

The defaults here are LLaDA's; the commands and generation/ use the sweep (`text_sampling` in generation/infilling.py).

An order gives every candidate position a score; the highest score is revealed first. A schedule fixes how many are
revealed at each step. An adaptive rule may reveal more, where the model is confident. Each is one small function,
registered under its name on the command line.

Letters: B rows, T positions, V vocabulary, N candidates (all rows together), M candidates of one row, K or S steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from logits import noise
from utils.errors import ArgumentError, check_number

STRIDE = 16  # default of the sweep and strided orders: network evaluations a block, and the distance in positions


# ------------------------------------------------------------------------------------------------- which positions
@dataclass
class Candidates:
    """The masked positions that may be revealed now; `p` and `drawn_p` are None for orders that do not use them."""

    where: Tensor  # (B, T) bool, true N times: the masked positions of each row's current block
    turn: Tensor  # (B, T) the step at which the sweep and strided orders reveal each position
    generators: list[torch.Generator] | None = None  # one a row
    p: Tensor | None = None  # (N, V) float64 probabilities of the network, row-major as in `where`
    drawn_p: Tensor | None = None  # (N,) the share of p of the token that was drawn at each candidate


def random_order(candidates: Candidates) -> Tensor:
    """A fresh uniform score: LLaDA's random remasking; with the `ancestral` schedule, ancestral sampling."""
    return noise(candidates.generators, candidates.where)[candidates.where]


def drawn_confidence_order(candidates: Candidates) -> Tensor:
    """Probability of the token that was drawn: LLaDA's low-confidence remasking (arXiv 2502.09992, Alg. 5)."""
    return candidates.drawn_p


def confidence_order(candidates: Candidates) -> Tensor:
    """Probability of the likeliest token. Equal to `drawn_confidence` at temperature 0."""
    return candidates.p.amax(-1)


def margin_order(candidates: Candidates) -> Tensor:
    """Probability of the likeliest token minus that of the second (arXiv 2502.06768)."""
    first, second = candidates.p.topk(2, dim=-1).values.unbind(-1)
    return first - second


def entropy_order(candidates: Candidates) -> Tensor:
    """Least entropy first."""
    return -entropy(candidates.p)


def left_order(candidates: Candidates) -> Tensor:
    """Left to right."""
    return -candidates.where.nonzero()[:, 1].double()


def turn_order(candidates: Candidates) -> Tensor:
    """By turn (see TURNS), left to right among equal turns."""
    T = candidates.where.shape[1]
    return -candidates.turn[candidates.where].double() - candidates.where.nonzero()[:, 1].double() / T


ORDERS: dict[str, Callable[[Candidates], Tensor]] = {  # name -> (N,) scores
    "random": random_order,
    "drawn_confidence": drawn_confidence_order,
    "confidence": confidence_order,
    "margin": margin_order,
    "entropy": entropy_order,
    "left": left_order,
    "strided": turn_order,
    "sweep": turn_order,
}
NETWORK_FREE_ORDERS = ("random", "left", "strided", "sweep")  # they do not use the network's output
EXACT_ORDERS = ("confidence", "margin", "entropy", "left", "strided", "sweep")  # positions follow from what is visible


def entropy(p: Tensor) -> Tensor:
    """(N, V) probabilities -> (N,) nats."""
    return -torch.xlogy(p, p).sum(-1)


@lru_cache
def bit_reversed_turns(steps: int) -> tuple[int, ...]:
    """Each step halves the gaps that the steps before it left.

    If S is no power of two, the residues keep the order of their reversed bits.

    >>> bit_reversed_turns(8), bit_reversed_turns(6)
    ((0, 4, 2, 6, 1, 5, 3, 7), (0, 3, 2, 5, 1, 4))
    """
    bits = (steps - 1).bit_length()
    residues = sorted(range(steps), key=lambda r: int(f"{r:0{bits}b}"[::-1], 2))
    return tuple(sorted(range(steps), key=residues.__getitem__))


def sweep_turns(steps: int) -> tuple[int, ...]:
    """Step k of S reveals masked positions k, k + S, k + 2S, ...: after step 0, each left neighbour is visible."""
    return tuple(range(steps))


# S -> the step that reveals the j-th masked position, by j mod S. Positions revealed together are S apart, and tokens
# far apart hardly depend on each other. Related: dilated unmasking (arXiv 2506.19037), parallelized autoregression of
# images (arXiv 2412.15119).
TURNS: dict[str, Callable[[int], tuple[int, ...]]] = {"strided": bit_reversed_turns, "sweep": sweep_turns}


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


SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {  # (masked, steps) -> counts
    "uniform": uniform_schedule,
    "cosine": cosine_schedule,
    "ancestral": uniform_schedule,  # the expected counts: the sampler reveals each token independently
}


def threshold_rule(confidence: Tensor, entropies: Tensor, threshold: float) -> Tensor:
    """All whose confidence reaches the threshold (Fast-dLLM, arXiv 2505.22618, Alg. 1)."""
    return confidence >= threshold


def factor_rule(confidence: Tensor, entropies: Tensor, factor: float) -> Tensor:
    """The largest n with (n + 1) (1 - confidence of the n-th) < factor (Fast-dLLM, arXiv 2505.22618, Alg. 1)."""
    n = torch.arange(1, len(confidence) + 1, device=confidence.device)
    return (n + 1) * (1 - confidence) < factor


def entropy_bound_rule(confidence: Tensor, entropies: Tensor, bound: float) -> Tensor:
    """As long as the entropies, the largest left out, sum to at most `bound` nats (EB-Sampler, arXiv 2505.24857)."""
    return entropies.cumsum(0) - entropies.cummax(0).values <= bound


RULES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {  # (M,) (M,), best score first -> (M,) may be revealed
    "threshold": threshold_rule,
    "factor": factor_rule,
    "entropy_bound": entropy_bound_rule,
}


# ------------------------------------------------------------------------------------------------- the policy
class ScheduledStep(NamedTuple):
    """One step of a row: reveal masked positions of `block` until `remaining` are left; time runs from t to s."""

    block: int
    remaining: int
    t: float  # share of the block that is masked before the step
    s: float  # and after it


class RowSchedule(NamedTuple):
    """A row's steps, fixed before the first one."""

    block: Tensor  # (T,) the block of each masked position, -1 elsewhere
    turn: Tensor  # (T,) the step of its block at which the sweep and strided orders reveal a position
    steps: list[ScheduledStep]

    def next_step(self, masked: Tensor) -> ScheduledStep:
        """The first step that has something to reveal, given masked (T,) with at least one true."""
        counts = torch.bincount(self.block[masked], minlength=len(self.steps)).tolist()
        return next(step for step in self.steps if counts[step.block] > step.remaining)


@dataclass(frozen=True)
class UnmaskingPolicy:
    """Which positions are revealed at each step.

    steps: the most network evaluations a row may cost, shared among its blocks. None: STRIDE a block for the sweep and
        strided orders, one for each masked position for the others.
    order: a name in ORDERS. schedule: a name in SCHEDULES, or the counts of each block themselves.
    block_length: reveal in blocks of so many positions, from the first masked position to the right (LLaDA's
        semi-autoregressive remasking).
    threshold, factor, entropy_bound: at most one of them. Reveal more than the schedule asks for, best score first, as
        long as the rule holds. Confidence is the likeliest token's probability, except with order drawn_confidence.

    The defaults are LLaDA's. Raises ArgumentError for values that are out of range or do not go together.
    """

    steps: int | None = None
    order: str = "drawn_confidence"
    schedule: str | tuple[int, ...] = "uniform"
    block_length: int | None = None
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ArgumentError("order", f"must be one of {', '.join(ORDERS)}, got {self.order!r}")
        self._check_schedule()
        for name in ("steps", "block_length"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=1)
        rules = [name for name in RULES if getattr(self, name) is not None]
        if len(rules) > 1:
            raise ArgumentError(rules[0], f"does not go with {rules[1]}: give one of them")
        for name in rules:
            check_number(name, getattr(self, name), low=0, high=1 if name == "threshold" else None)
        if self.schedule == "ancestral" and (self.order != "random" or rules):
            raise ArgumentError("schedule", "ancestral goes with order random and no adaptive rule")

    def _check_schedule(self) -> None:
        if isinstance(self.schedule, str):
            if self.schedule not in SCHEDULES:
                raise ArgumentError(
                    "schedule", f"must be {', '.join(SCHEDULES)} or a list of counts, got {self.schedule!r}"
                )
        else:
            object.__setattr__(self, "schedule", tuple(self.schedule))  # a list would not be hashable
            if not self.schedule or min(self.schedule) < 1:
                raise ArgumentError("schedule", f"must be a list of counts of at least 1, got {list(self.schedule)}")
            if self.steps is not None:
                raise ArgumentError("steps", "does not go with a list of counts, which fixes the steps of each block")
        if self.order in TURNS and self.schedule != "uniform":
            raise ArgumentError("schedule", f"does not go with the {self.order} order, which fixes the counts itself")

    @property
    def rule(self) -> str | None:
        """The adaptive rule, if there is one."""
        return next((name for name in RULES if getattr(self, name) is not None), None)

    @property
    def needs_network(self) -> bool:
        """Whether the positions depend on the network's output."""
        return self.order not in NETWORK_FREE_ORDERS or self.rule is not None

    @property
    def acts_at_every_step(self) -> bool:
        """Whether something can happen at steps at which the schedule reveals nothing."""
        return self.schedule == "ancestral"

    @property
    def has_exact_likelihood(self) -> bool:
        """Whether the positions follow from what is visible, so that `policy_likelihood` is exact.

        Exact for drawing at temperature 1 from a predictor that gives -inf to every id that is never written.
        """
        return self.order in EXACT_ORDERS

    def plan(self, masked: Tensor) -> RowSchedule:
        """The steps of one row, masked (T,) at the start. Raises ArgumentError if the settings do not fit the row."""
        positions = masked.nonzero()[:, 0]
        block = torch.full_like(masked, -1, dtype=torch.long)
        turn, steps = torch.zeros_like(block), []
        if not len(positions):
            return RowSchedule(block, turn, steps)
        labels = (positions - positions[0]) // (self.block_length or len(masked))
        labels = labels.unique(return_inverse=True)[1]  # a block without masks takes no steps
        block[positions] = labels
        sizes = labels.bincount().tolist()
        for b, (size, budget) in enumerate(zip(sizes, self._steps_of_blocks(sizes), strict=True)):
            counts, turns = self._counts_and_turns(size, budget)
            turn[positions[labels == b]] = turns.to(turn)
            remaining, t = size, 1.0
            for k, count in enumerate(counts):
                remaining -= count
                s = 1 - (k + 1) / len(counts) if self.schedule == "ancestral" else remaining / size
                steps.append(ScheduledStep(b, remaining, t, s))
                t = s
        return RowSchedule(block, turn, steps)

    def _steps_of_blocks(self, sizes: list[int]) -> list[int]:
        """How many steps each block of a row gets."""
        if self.steps is None:
            return [min(size, STRIDE) if self.order in TURNS else size for size in sizes]
        if self.steps < len(sizes):
            raise ArgumentError("steps", f"must be at least {len(sizes)}, one for each block, got {self.steps}")
        budgets = uniform_schedule(self.steps, len(sizes))
        if self.acts_at_every_step:
            return budgets
        # Each of twice as many steps as positions reveals one at most, with every schedule: more would change nothing.
        return [min(budget, 2 * size) for budget, size in zip(budgets, sizes, strict=True)]

    def _counts_and_turns(self, size: int, steps: int) -> tuple[list[int], Tensor]:
        """How many of a block's `size` positions are revealed at each step, and the turn (size,) of each position."""
        if self.order in TURNS:
            turn_of = TURNS[self.order](steps)
            turns = torch.tensor([turn_of[j % steps] for j in range(size)])
            return turns.bincount(minlength=steps).tolist(), turns
        counts = SCHEDULES[self.schedule](size, steps) if isinstance(self.schedule, str) else list(self.schedule)
        if sum(counts) != size:
            raise ArgumentError("schedule", f"reveals {sum(counts)} positions, but {size} are masked")
        return counts, torch.zeros(size, dtype=torch.long)

    def choose(self, candidates: Candidates, counts: list[int], first_columns: list[int] | None = None) -> Tensor:
        """(B, T) bool: at least counts[b] candidates of row b, best score first, and what the adaptive rule adds.

        first_columns: where each row's text begins, right of its padding. Padding is cut off, because torch.topk breaks
        ties by the length of the row, and a row's text must not depend on its batch.
        """
        scores = torch.full(candidates.where.shape, -torch.inf, dtype=torch.float64, device=candidates.where.device)
        scores[candidates.where] = ORDERS[self.order](candidates).to(scores)
        if self.rule is not None:
            confidence, entropies = torch.zeros_like(scores), torch.zeros_like(scores)
            drawn = self.order == "drawn_confidence"
            confidence[candidates.where] = candidates.drawn_p if drawn else candidates.p.amax(-1)
            entropies[candidates.where] = entropy(candidates.p)
        chosen = torch.zeros_like(candidates.where)
        for row, n in enumerate(counts):
            first = first_columns[row] if first_columns is not None else 0
            if self.rule is not None:
                M = int(candidates.where[row].sum())
                ordered = first + scores[row, first:].topk(M).indices
                good = RULES[self.rule](confidence[row, ordered], entropies[row, ordered], getattr(self, self.rule))
                chosen[row, ordered[: max(n, int(good.long().cumprod(0).sum()))]] = True
            else:
                chosen[row, first + scores[row, first:].topk(n).indices] = True
        return chosen

    def __call__(self, logits: Tensor, masked: Tensor, step: int) -> Tensor:
        """The policy as `likelihood.policy_likelihood` calls it, for windows that were fully masked at first.

        logits (B, T, V), masked (B, T) -> (B, T) bool to reveal. Raises ValueError for an order without an exact
        likelihood: what it reveals does not follow from what is visible.
        """
        if not self.has_exact_likelihood:
            raise ValueError(f"with these settings and order {self.order} there is no exact likelihood")
        return self.teacher_forced(logits, masked, None)

    def teacher_forced(self, logits: Tensor, masked: Tensor, generators: list[torch.Generator] | None) -> Tensor:
        """(B, T) positions to reveal, given logits (B, T, V) and masked (B, T), of windows fully masked at first."""
        schedule = self.plan(torch.ones_like(masked[0]))
        steps = [schedule.next_step(row) for row in masked]
        where = masked & (schedule.block == torch.tensor([step.block for step in steps], device=masked.device)[:, None])
        p = logits[where].double().softmax(-1) if self.needs_network else None
        counts = [int(row.sum()) - step.remaining for row, step in zip(where, steps, strict=True)]
        return self.choose(Candidates(where, schedule.turn.expand_as(masked), generators, p), counts)


def random_positions(
    policy: UnmaskingPolicy, generator: torch.Generator
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The random order as a policy for `policy_likelihood(..., is_bound=True)`: it draws the positions as it goes.

    The result is an upper bound in expectation over the drawn orders, not exact. Raises ValueError for another order,
    and for the ancestral schedule, whose counts are random too.
    """
    if policy.order != "random" or policy.schedule == "ancestral":
        raise ValueError("random_positions is for order random with fixed counts")

    def draw_positions(logits: Tensor, masked: Tensor, step: int) -> Tensor:
        return policy.teacher_forced(logits, masked, [generator] * len(masked))

    return draw_positions
