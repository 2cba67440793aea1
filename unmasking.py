"""Which masked positions to reveal next, and how many: the unmasking policy of a masked diffusion model.

An order gives every candidate a score, the highest is revealed first. A schedule fixes how many are revealed at each
step; an adaptive rule may reveal more, where the model is sure. Each is one small function, registered under the name
it has on the command line, so that a new sampler is ten lines.

Letters: B rows, T positions, V vocabulary, N candidates (all rows together), M candidates of one row, K steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from drawing import PAD_ID, noise


# ------------------------------------------------------------------------------------------------- which positions
@dataclass
class Candidates:
    """The masked positions that may be revealed now. `p` and `confidence` are None for orders that need no network."""

    where: Tensor  # (B, T) bool, true N times: the current block of each row
    stratum: Tensor  # (B, T) the step at which the sweep and the strided order write a position
    generators: list[torch.Generator] | None = None  # one a row
    p: Tensor | None = None  # (N, V) float64 probabilities of the network, row-major as in `where`
    confidence: Tensor | None = None  # (N,) probability of the token that would be written


def random_order(candidates: Candidates) -> Tensor:
    """A fresh uniform score: LLaDA's random remasking; with the `ancestral` schedule, ancestral sampling."""
    return noise(candidates.generators, candidates.where)[candidates.where]


def confidence_order(candidates: Candidates) -> Tensor:
    """Probability of the token that would be written: LLaDA's low-confidence remasking (arXiv 2502.09992, Alg. 5)."""
    return candidates.confidence


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


def stratum_order(candidates: Candidates) -> Tensor:
    """By stratum (see STRATA), left to right inside one."""
    T = candidates.where.shape[1]
    return -candidates.stratum[candidates.where].double() - candidates.where.nonzero()[:, 1].double() / T


ORDERS: dict[str, Callable[[Candidates], Tensor]] = {
    "random": random_order,
    "confidence": confidence_order,
    "margin": margin_order,
    "entropy": entropy_order,
    "left": left_order,
    "strided": stratum_order,
    "sweep": stratum_order,
}
BLIND_ORDERS = ("random", "left", "strided", "sweep")  # they do not look at the network's output


def entropy(p: Tensor) -> Tensor:
    """(N, V) probabilities -> (N,) nats."""
    return -torch.xlogy(p, p).sum(-1)


@lru_cache
def bit_reversal(steps: int) -> tuple[int, ...]:
    """Each step halves the gaps that the steps before it left.

    If S is no power of two, the residues keep the order of their reversed bits.
    bit_reversal(8) -> (0, 4, 2, 6, 1, 5, 3, 7); bit_reversal(6) -> (0, 3, 2, 5, 1, 4).
    """
    bits = (steps - 1).bit_length()
    residues = sorted(range(steps), key=lambda r: int(f"{r:0{bits}b}"[::-1], 2))
    return tuple(sorted(range(steps), key=residues.__getitem__))


def in_turn(steps: int) -> tuple[int, ...]:
    """A pen at every S-th position, all moving on to the right together: each character's left neighbours are known."""
    return tuple(range(steps))


# S -> the step at which the j-th masked position is written, by j mod S. Positions written together are S apart:
# characters that stand far apart hardly depend on each other. So S evaluations do, whatever the length of the text.
STRATA: dict[str, Callable[[int], tuple[int, ...]]] = {"strided": bit_reversal, "sweep": in_turn}


# ------------------------------------------------------------------------------------------------- how many
def uniform_schedule(masked: int, steps: int) -> list[int]:
    """Equal counts, the remainder to the first steps (LLaDA). (10, 4) -> [3, 3, 2, 2]."""
    return [masked // steps + (k < masked % steps) for k in range(steps)]


def cosine_schedule(masked: int, steps: int) -> list[int]:
    """After step k of K the share cos(pi/2 k/K) is masked, so few come first (MaskGIT, arXiv 2202.04200).

    (10, 4) -> [1, 2, 4, 3].
    """
    left = [math.floor(masked * math.cos(math.pi / 2 * k / steps)) for k in range(steps)] + [0]
    return [before - after for before, after in pairwise(left)]


SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {
    "uniform": uniform_schedule,
    "cosine": cosine_schedule,
    "ancestral": uniform_schedule,  # its expectation: the sampler draws the counts, each token on its own
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


RULES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {  # (M,) (M,), in order -> (M,) still good
    "threshold": threshold_rule,
    "factor": factor_rule,
    "entropy_bound": entropy_bound_rule,
}


# ------------------------------------------------------------------------------------------------- the policy
class Due(NamedTuple):
    """One step of a row's plan: bring the masked positions of `block` down to `target`; time runs from t to s."""

    block: int
    target: int
    t: float  # share of the block that is masked before
    s: float  # and after


@dataclass
class Plan:
    """A row's steps, fixed before the first: `block` and `stratum` (T,) of each masked position, block -1 elsewhere."""

    block: Tensor
    stratum: Tensor
    steps: list[Due]

    def next(self, masked: Tensor, start: int = 0) -> int | None:
        """The first step from `start` on that has something to reveal, given what is masked (T,); None at the end."""
        counts = torch.bincount(self.block[masked], minlength=1).tolist()
        for i in range(start, len(self.steps)):
            if self.steps[i].block < len(counts) and counts[self.steps[i].block] > self.steps[i].target:
                return i
        return None


@dataclass(frozen=True)
class UnmaskingPolicy:
    """Which positions are revealed at each step. Raises ValueError for what does not go together.

    steps: the most network evaluations a row may cost (None: one for each masked position). order: a name in ORDERS.
    schedule: a name in SCHEDULES, or the counts themselves. block_length: positions are revealed in blocks of so many,
    from the first masked one to the right, each with its share of the steps (LLaDA's semi-autoregressive remasking).
    threshold, factor, entropy_bound: at most one; reveal more than the schedule asks for, in order, as long as the
    rule holds.
    """

    steps: int | None = None
    order: str = "confidence"
    schedule: str | tuple[int, ...] = "uniform"
    block_length: int | None = None
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be {', '.join(SCHEDULES)} or a list of counts, got {self.schedule!r}")
        if not isinstance(self.schedule, str) and (not self.schedule or min(self.schedule) < 1):
            raise ValueError(f"a schedule is a list of counts of at least 1, got {list(self.schedule)}")
        for name in ("steps", "block_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        rules = [name for name in RULES if getattr(self, name) is not None]
        if len(rules) > 1:
            raise ValueError(f"{' and '.join(rules)} decide the same thing: give one of them")
        if self.order in STRATA and self.schedule != "uniform":
            raise ValueError(f"the {self.order} order has its own schedule, one stratum a step: leave schedule out")
        if self.schedule == "ancestral" and (self.order != "random" or rules):
            raise ValueError("the ancestral schedule goes with order random and no adaptive rule")
        if not isinstance(self.schedule, str) and self.steps not in (None, len(self.schedule)):
            raise ValueError(f"{len(self.schedule)} counts make {len(self.schedule)} steps, not {self.steps}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a probability, got {self.threshold}")
        for name in ("factor", "entropy_bound"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def rule(self) -> str | None:
        """The adaptive rule, if there is one."""
        return next((name for name in RULES if getattr(self, name) is not None), None)

    @property
    def is_blind(self) -> bool:
        """Whether the positions are known before the network is asked."""
        return self.order in BLIND_ORDERS and self.rule is None

    def plan(self, masked: Tensor) -> Plan:
        """The steps of one row, masked (T,) at the start."""
        positions = masked.nonzero()[:, 0]
        block = torch.full_like(masked, -1, dtype=torch.long)
        stratum, steps = torch.zeros_like(block), []
        if not len(positions):
            return Plan(block, stratum, steps)
        labels = (positions - positions[0]) // (self.block_length or len(masked))
        labels = labels.unique(return_inverse=True)[1]  # a block that is visible already takes no steps
        block[positions] = labels
        sizes = labels.bincount().tolist()
        for b, size in enumerate(sizes):
            share = size if self.steps is None else self.steps // len(sizes) + (b < self.steps % len(sizes))
            counts, its_strata = self.counts(size, max(share, 1))
            stratum[positions[labels == b]] = its_strata.to(stratum)
            left, before = size, 1.0
            for k, count in enumerate(counts):
                left -= count
                after = 1 - (k + 1) / len(counts) if self.schedule == "ancestral" else left / size
                steps.append(Due(b, left, before, after))
                before = after
        return Plan(block, stratum, steps)

    def counts(self, size: int, steps: int) -> tuple[list[int], Tensor]:
        """How many of a block's `size` positions are revealed at each step, and the stratum (size,) of each."""
        if self.order in STRATA:
            step_of = STRATA[self.order](steps)
            stratum = torch.tensor([step_of[j % steps] for j in range(size)])
            return stratum.bincount(minlength=steps).tolist(), stratum
        counts = SCHEDULES[self.schedule](size, steps) if isinstance(self.schedule, str) else list(self.schedule)
        if sum(counts) != size:
            raise ValueError(f"the schedule reveals {sum(counts)} positions, but {size} are masked")
        return counts, torch.zeros(size, dtype=torch.long)

    def choose(self, candidates: Candidates, due: list[int], tokens: Tensor | None = None) -> Tensor:
        """(B, T) bool: at least due[b] candidates of row b, the first in order, and what the adaptive rule adds.

        Left padding in `tokens` (B, T) is cut off first: torch.topk breaks ties by the length of the row, and a row's
        text must not depend on its batch.
        """
        scores = torch.full(candidates.where.shape, -torch.inf, dtype=torch.float64, device=candidates.where.device)
        scores[candidates.where] = ORDERS[self.order](candidates).to(scores)
        starts = [0] * len(due) if tokens is None else left_padding(tokens).tolist()
        chosen = torch.zeros_like(candidates.where)
        if self.rule is not None:
            confidence, entropies = torch.zeros_like(scores), torch.zeros_like(scores)
            confidence[candidates.where], entropies[candidates.where] = candidates.confidence, entropy(candidates.p)
        for row, (n, start) in enumerate(zip(due, starts, strict=True)):
            if self.rule is not None:
                M = int(candidates.where[row].sum())
                ordered = start + scores[row, start:].topk(M).indices
                good = RULES[self.rule](confidence[row, ordered], entropies[row, ordered], getattr(self, self.rule))
                chosen[row, ordered[: max(n, int(good.long().cumprod(0).sum()))]] = True
            else:
                chosen[row, start + scores[row, start:].topk(n).indices] = True
        return chosen

    def __call__(self, logits: Tensor, masked: Tensor, step: int) -> Tensor:
        """Teacher-forced, for the exact likelihood of windows that were all masked at first: (B, T) bool to reveal.

        logits (B, T, V), masked (B, T). Confidence is that of the likeliest token. Raises ValueError for the random
        order: what it reveals does not follow from what is visible.
        """
        if self.order == "random":
            raise ValueError("the random order is not a deterministic policy: it has no exact likelihood")
        plan = self.plan(torch.ones_like(masked[0]))
        dues = [plan.steps[plan.next(row)] for row in masked]
        where = masked & (plan.block == torch.tensor([due.block for due in dues], device=masked.device)[:, None])
        p = None if self.is_blind else logits[where].double().softmax(-1)
        candidates = Candidates(where, plan.stratum.expand_as(masked), None, p, None if p is None else p.amax(-1))
        return self.choose(candidates, [int(row.sum()) - due.target for row, due in zip(where, dues, strict=True)])


def left_padding(tokens: Tensor) -> Tensor:
    """(B,) how many [PAD] each row of tokens (B, T) begins with."""
    return (tokens == PAD_ID).long().cumprod(1).sum(1)
