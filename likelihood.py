"""Likelihoods under a masked diffusion model, in nats: bound, masking curve, schedules, exact policy likelihood.

Positions revealed in random order. M is the masked set of a window x of T tokens, CE_i(M) = -log p(x_i | x outside M):
    c_x(m) = mean over all M with |M| = m of the mean over i in M of CE_i(M).
The upper bound is -log p(x) <= c_x(1) + ... + c_x(T): a random order reveals one token with m masked, for each m.
The mean of c_x over windows is the masking curve c(m). It gives the bound of any schedule: for a schedule that reveals
n_k tokens at once while m_k are masked, the bound is the sum over k of n_k c(m_k).

Positions revealed by a policy. If the positions follow from what is visible, exactly one order leads to each text, and
the chain rule along it is the exact probability of the text under that sampler (DUEL, arXiv 2603.01367).

The network is not known here: `predict(tokens) -> logits` is any function of (B, T) tokens that treats rows separately.
Letters: B batch, N windows, K masks a window, T positions, V vocabulary, m masked positions. All figures are in nats.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Predict = Callable[[Tensor], Tensor]  # tokens (B, T) -> logits (B, T, V)
Policy = Callable[[Tensor, Tensor], Tensor]  # logits (B, T, V), masked (B, T) -> to reveal (B, T)
DRAWS_PER_COUNT = 2  # masks for every count m, at least: each is compared with the mean of the others


# ------------------------------------------------------------------------------------------------- results
@dataclass
class Likelihood:
    """Negative log-likelihood of N windows in nats; `is_bound`: an upper bound, else exact.

    `token_nats` (N, T) is each token's share (0 beyond a window's end and where nothing is counted), `window_nats` (N,)
    each window's total, `characters` (N,) the characters of text that its counted tokens are. `curve` (T + 1,), only of
    `likelihood_bound`, is the masking curve of all windows of the first length, c(0) = 0.
    """

    token_nats: Tensor
    window_nats: Tensor
    characters: Tensor
    is_bound: bool
    curve: Tensor | None = None

    @property
    def nats_per_char(self) -> float:
        """Total nats over total characters: every character counts once, whatever its window."""
        return float(self.window_nats.sum() / self.characters.sum())

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % interval of `nats_per_char` over windows: the unit, as characters (and draws) inside one correlate."""
        half = half_width95(self.window_nats, self.characters)
        return self.nats_per_char - half, self.nats_per_char + half

    @classmethod
    def from_token_nats(cls, token_nats: list[Tensor], is_bound: bool = False) -> "Likelihood":
        """From the (N, T) nats of each token, a list with one tensor for each window length. A token is a character."""
        parts = map(Tensor.double, token_nats)
        return cls.join([cls(x, x.sum(1), torch.full((len(x),), x.shape[1]), is_bound) for x in parts])

    def per(self, characters: Tensor) -> "Likelihood":
        """The same for windows of `characters` (N,) characters: a token may be several of them, or none."""
        return replace(self, characters=characters.cpu())

    @classmethod
    def join(cls, parts: list["Likelihood"]) -> "Likelihood":
        """Windows of several lengths as one; the curve is that of the first part. Raises ValueError for no parts."""
        if not parts:
            raise ValueError("there is no text to score")
        T = max(part.token_nats.shape[1] for part in parts)
        token_nats = torch.cat([F.pad(part.token_nats, (0, T - part.token_nats.shape[1])) for part in parts])
        window_nats, characters = (torch.cat([getattr(p, x) for p in parts]) for x in ("window_nats", "characters"))
        return cls(token_nats, window_nats, characters, parts[0].is_bound, parts[0].curve)


def half_width95(window_nats: Tensor, characters: Tensor) -> float:
    """Half the width of the 95 % interval of sum(window_nats) / sum(characters), a ratio of means over windows.

    By Student's t; infinite for one window.
    """
    N = len(window_nats)
    if N < 2:
        return math.inf
    residuals = window_nats - characters * (window_nats.sum() / characters.sum())
    standard_error = float((residuals.square().sum() * N / (N - 1)).sqrt() / characters.sum())
    return student_t(N - 1) * standard_error


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: from 3 degrees of freedom on the Cornish-Fisher expansion, there 1 % too low.

    >>> round(student_t(14), 3), round(student_t(63), 3)  # exactly 2.145 and 1.998
    (2.145, 1.998)
    """
    if freedom < 3:
        return {1: 12.706, 2: 4.303}[freedom]
    z, f = 1.959964, freedom
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + terms[0] / f + terms[1] / f**2 + terms[2] / f**3


# ------------------------------------------------------------------------------------------------- the bound
def complementary_masks(n_windows: int, T: int, pairs: int, generator: torch.Generator | None = None) -> Tensor:
    """(N, 2 * pairs, T) masks: for each window, pairs of a mask of l positions and its complement of T - l.

    l is uniform on 1..T-1, hence T - l is too: either mask alone gives an unbiased estimate, and together they mask
    every position once. l is stratified over all pairs of all windows, evenly inside each window. A pair {l, T - l} is
    drawn by its smaller half, so u in [0, 1) maps to l = 1 + floor(u (T - 1) / 2): for even T the middle, its own
    complement, is half as likely as the others, as it should be. Needs T >= 2.
    """
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    ranks = torch.randperm(n_windows, generator=generator)[:, None]  # which sub-stratum belongs to which window
    u = (torch.arange(pairs) + (ranks + offset) / n_windows) / pairs  # (N, pairs): one in each of N * pairs intervals
    counts = 1 + (u * (T - 1) / 2).long()  # (N, pairs), in 1..T/2
    order = torch.rand(n_windows, pairs, T, generator=generator).argsort(-1)
    masks = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, torch.arange(T) < counts[..., None])
    return torch.stack([masks, ~masks], dim=2).flatten(1, 2)


@torch.inference_mode()
def bound_from_masks(
    predict: Predict, windows: Tensor, masks: Tensor, mask_token_id: int, batch_size: int = 128
) -> Likelihood:
    """The bound of windows (N, T) from masks (N, K, T) of 1..T-1 positions each; the full mask is added here.

    A fully masked window looks the same whatever its text: one evaluation gives c_x(T) of all windows, exactly. For
    m < T, c(m) is the mean over the masks with that count, and the bound is the sum of c(m): with all masks of each
    count it is exact, with `complementary_masks` unbiased. c(m) is also a control variate: each mask is compared with
    the mean of the others with its count. A window's estimate keeps what is particular to the window and drops what
    only came from the counts it happened to draw. Raises ValueError if a count in 1..T-1 was drawn fewer than twice.
    """
    (N, T), K = windows.shape, masks.shape[1]
    counts = masks.sum(-1)  # (N, K)
    drawn = torch.bincount(counts.flatten(), minlength=T)  # (T,)
    if (drawn[1:] < DRAWS_PER_COUNT).any() or len(drawn) > T or drawn[0]:
        raise ValueError(f"masks must mask every count of 1..{T - 1} positions at least twice, and neither 0 nor all")
    all_masked = target_nats(predict(torch.full_like(windows[:1], mask_token_id)), windows)  # (N, T)
    token_nats = all_masked / T
    means = torch.empty(N * K, dtype=torch.float64)  # the mean cross-entropy of each mask
    for rows, nats in masked_nats(predict, windows, masks, mask_token_id, batch_size):
        m = counts.flatten()[rows]
        means[rows] = nats.sum(1) / m
        token_nats.index_add_(0, rows // K, nats * (N / (m * drawn[m]).double())[:, None])
    totals = torch.zeros(T, dtype=torch.float64).index_add_(0, counts.flatten(), means)
    curve = torch.cat([totals / drawn.clamp(min=1), all_masked.mean()[None]])  # c(0) = 0, c(1), ..., c(T)
    others = (drawn / (drawn - 1).clamp(min=1))[counts]  # turns x - mean into x - mean of the others
    particular = ((means.view(N, K) - curve[counts]) * others).sum(1) / max(K, 1)
    window_nats = all_masked.mean(1) + curve[1:T].sum() + (T - 1) * particular
    return Likelihood(token_nats, window_nats, torch.full((N,), T), True, curve)


def target_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of targets (B, T) under logits (B or 1, T, V): (B, T) float64 nats, on the CPU."""
    log_p = logits.log_softmax(-1).expand(len(targets), -1, -1)
    return -log_p.gather(-1, targets[..., None])[..., 0].cpu().double()


def masked_nats(
    predict: Predict, windows: Tensor, masks: Tensor, mask_token_id: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For windows (N, T) under masks (N, K, T), `batch_size` masks at a time: which of the N K masks, (b,), and the
    nats (b, T) of the tokens under them, 0 where they are visible."""
    K, masks = masks.shape[1], masks.flatten(0, 1)
    for start in range(0, len(masks), batch_size):
        mask = masks[start : start + batch_size]
        rows = torch.arange(start, start + len(mask))
        targets = windows[rows // K]
        logits = predict(targets.masked_fill(mask.to(targets.device), mask_token_id))  # (b, T, V)
        yield rows, target_nats(logits, targets).masked_fill(~mask, 0.0)


def likelihood_bound(
    predict: Predict,
    windows: Tensor,
    mask_token_id: int,
    *,
    pairs: int = 8,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
) -> Likelihood:
    """Upper bound on the negative log-likelihood of windows (N, T): every token is scored.

    `2 * pairs` evaluations a window, and one for all. Few windows get as many more pairs as give every count its
    DRAWS_PER_COUNT. The same generator state gives the same masks, whatever the batch size.
    """
    N, T = windows.shape
    pairs = max(pairs, math.ceil(DRAWS_PER_COUNT * (T - 1) / N)) if T > 1 else 0  # T = 1: the full mask is the only one
    return bound_from_masks(predict, windows, complementary_masks(N, T, pairs, generator), mask_token_id, batch_size)


@torch.inference_mode()
def conditional_bound(
    predict: Predict,
    windows: Tensor,
    free: Tensor,
    mask_token_id: int,
    *,
    pairs: int = 8,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
) -> Likelihood:
    """Upper bound on -log p of the tokens of windows (N, T) where free (N, T) is true, given the other tokens.

    As `likelihood_bound`, for rows that differ in what is given. With n free positions it is the cross-entropy of one
    token under the full mask plus n - 1 times that under masks of l of them, l uniform on 1..n-1, in complementary
    pairs. Unbiased. `2 * pairs + 1` evaluations a window. Every row needs a free position.
    """
    (N, T), n = windows.shape, free.sum(1, keepdim=True).cpu()  # (N, 1)
    free = free.cpu()
    u = (torch.arange(pairs) + torch.rand(N, 1, generator=generator)) / pairs  # (N, pairs), stratified
    counts = 1 + (u * (n - 1)).long()  # in 1..n-1
    order = torch.rand(N, pairs, T, generator=generator).masked_fill(~free[:, None], 2.0).argsort(-1)
    first = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, torch.arange(T) < counts[..., None])
    masks = torch.cat([first, free[:, None] & ~first, free[:, None]], dim=1)  # (N, K, T), the full mask last
    weights = (n - 1) / (2 * pairs) / masks.sum(-1).clamp(min=1)  # (N, K) of each masked token's cross-entropy
    weights[:, -1] = 1 / n[:, 0]
    token_nats = torch.zeros(N, T, dtype=torch.float64)
    for rows, nats in masked_nats(predict, windows, masks, mask_token_id, batch_size):
        token_nats.index_add_(0, rows // masks.shape[1], nats * weights.flatten()[rows, None])
    return Likelihood(token_nats, token_nats.sum(1), n[:, 0], is_bound=True)


# ------------------------------------------------------------------------------------------------- schedules
def schedule_bound(curve: Tensor, schedule: list[int]) -> float:
    """Upper bound in nats/window of writing T tokens in len(schedule) steps, schedule[k] of them at step k.

    curve (T + 1,) is c(m). T steps of one token give the bound itself; one step of T tokens, T c(T).
    An empty step costs and reveals nothing. Raises ValueError for a schedule that does not add up to T.
    """
    n = torch.tensor(schedule)
    if n.sum() != len(curve) - 1 or (n < 0).any():
        raise ValueError(f"a schedule for {len(curve) - 1} tokens must be counts of 0 or more with that sum")
    masked = n.flip(0).cumsum(0).flip(0)  # (K,) still masked when step k begins
    return float((n * curve[masked]).sum())


# ------------------------------------------------------------------------------------------------- policies
@torch.inference_mode()
def policy_likelihood(
    predict: Predict, windows: Tensor, policy: Policy, mask_token_id: int, batch_size: int = 128, is_bound: bool = False
) -> tuple[Likelihood, Tensor]:
    """Likelihood of windows (N, T) under an unmasking policy (DUEL, arXiv 2603.01367, Alg. 1).

    Teacher-forced: from a fully masked window, the policy names the positions to reveal; their true tokens are scored
    and shown. The result is exact if the positions follow from what is visible. Pass is_bound=True for a policy that
    draws its positions at random: -log p given the drawn order is, on average over orders, at least -log of the mean
    of p over orders (Jensen), so the result is an upper bound in expectation.

    predict must give -inf to every id that the sampler never writes: the likelihood is that of drawing from p.
    Returns the likelihood and (N,) each window's number of network evaluations (NFE). Raises ValueError if the policy
    names a visible position, or none.
    """
    token_nats, nfe = torch.zeros(windows.shape, dtype=torch.float64), torch.zeros(len(windows), dtype=torch.long)
    for start in range(0, len(windows), batch_size):
        targets = windows[start : start + batch_size]
        rows = torch.arange(start, start + len(targets))
        masked = torch.ones_like(targets, dtype=torch.bool)
        while len(rows):
            logits = predict(targets.masked_fill(masked, mask_token_id))
            reveal = policy(logits, masked)
            if (reveal & ~masked).any() or not reveal.any(1).all():
                raise ValueError("a policy must reveal at least one masked position of each row, and no visible one")
            token_nats[rows] += target_nats(logits, targets).masked_fill(~reveal.cpu(), 0.0)
            nfe[rows] += 1
            masked &= ~reveal
            unfinished = masked.any(1)
            rows, targets, masked = rows[unfinished.cpu()], targets[unfinished], masked[unfinished]
    return Likelihood.from_token_nats([token_nats], is_bound), nfe
