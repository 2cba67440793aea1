"""Two models on one text, in nats: likelihood, where it hurts, and what writing in fewer steps costs.

Everything comes back as plain values, ready for metrics.json.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from autoregressive import exact_nll
from console import progress
from diffusion import MIN_T, compute_llada_loss, forward_process
from likelihood import (
    Likelihood,
    Predict,
    curve_of,
    likelihood_bound,
    monotone,
    optimal_schedules,
    pairs_needed,
    policy_likelihood,
    schedule_bound,
    standard_error,
)
from model import Transformer
from tokenizer import MASK_ID, SPECIAL_TOKENS, START_ID
from unmasking import SCHEDULES, UnmaskingPolicy

Tick = Callable[[int], None]  # told how many windows a network has just read


# ------------------------------------------------------------------------------------------------- likelihood
def score(model: Transformer, windows: list[Tensor], pairs: int, seed: int, tick: Tick) -> Likelihood:
    """Negative log-likelihood of the same characters by either model: exact for GPT, a bound for LLaDA."""
    size = batch_size(windows[0])
    if model.causal:
        return Likelihood.exact([exact_nll(model, part, START_ID, size, tick).cpu() for part in windows])
    return likelihood_bound(model, windows, MASK_ID, pairs, size, torch.Generator().manual_seed(seed), tick)


def batch_size(windows: Tensor) -> int:
    """How many windows to read at once: few on a CPU, whose caches they should fit, many elsewhere."""
    return 32 if windows.device.type == "cpu" else 256


def figures(result: Likelihood, model: Transformer) -> dict:
    """A model's entry in metrics.json. perplexity is per character; bits and nats measure the same."""
    return {
        "nats_per_char": result.nats_per_char,
        "ci95": finite(result.ci95),
        "ci95_of_masks": result.mask_error if math.isfinite(result.mask_error) else None,
        "bits_per_char": result.nats_per_char / math.log(2),
        "perplexity": math.exp(result.nats_per_char),
        "is_bound": result.is_bound,
        "chars": int(result.lengths.sum()),
        "windows": len(result.lengths),
        "params": model.num_parameters(),
    }


def finite(interval: tuple[float, float]) -> list[float] | None:
    """An interval as JSON can hold it; None if one window gave none."""
    return list(interval) if all(map(math.isfinite, interval)) else None


def difference(a: Likelihood, b: Likelihood) -> dict:
    """nats/char of a minus b on the same windows: paired, so the interval is narrower than the two apart."""
    nats = a.window_nats - b.window_nats
    mean, half = float(nats.sum() / a.lengths.sum()), 1.96 * standard_error(nats, a.lengths)
    return {"nats_per_char": mean, "ci95": finite((mean - half, mean + half))}


def where_it_hurts(results: dict[str, Likelihood], windows: list[Tensor], characters: str) -> tuple[dict, dict]:
    """nats/char of each model at each position of a full window, and on each character of the text."""
    full, tokens = len(windows[0]), torch.cat([part.flatten() for part in windows]).cpu()
    counts = torch.bincount(tokens, minlength=len(SPECIAL_TOKENS) + len(characters))[len(SPECIAL_TOKENS) :]
    positions, by_character = {}, {c: {"count": n} for c, n in zip(characters, counts.tolist(), strict=True) if n}
    for name, result in results.items():
        positions[name] = result.token_nats[:full, : windows[0].shape[1]].mean(0).tolist()
        nats = torch.cat([row[:n] for row, n in zip(result.token_nats, result.lengths.tolist(), strict=True)])
        totals = torch.zeros(len(counts) + len(SPECIAL_TOKENS), dtype=torch.float64).index_add_(0, tokens, nats)
        for c, total in zip(characters, totals[len(SPECIAL_TOKENS) :].tolist(), strict=True):
            if c in by_character:
                by_character[c][name] = total / by_character[c]["count"]
    return positions, by_character


# ------------------------------------------------------------------------------------------------- steps
def compare_schedules(bound: Likelihood) -> dict[str, list[dict]]:
    """Upper bounds in nats/char of K-step schedules with random positions, K = 1, 2, 4, ..., T, from c(m) alone.

    ci95 of a schedule by bootstrap over windows.
    """
    T = len(bound.curve) - 1
    budgets = [2**k for k in range(T.bit_length()) if 2**k < T] + [T]
    priced = {
        name: [(counts, schedule_bound(bound.curve, counts)) for K in budgets for counts in [SCHEDULES[name](T, K)]]
        for name in ("uniform", "cosine")
    } | best_schedules(bound, budgets)
    return {
        name: [
            {
                "steps": steps,
                "nfe": sum(n > 0 for n in counts),
                "nats_per_char": nats / T,
                "ci95": finite(((nats - 1.96 * error) / T, (nats + 1.96 * error) / T)),
                "counts": counts,
            }
            for steps, (counts, nats), error in zip(
                budgets, rows, bootstrap_errors(bound, [counts for counts, _ in rows]), strict=True
            )
        ]
        for name, rows in priced.items()
    }


def best_schedules(bound: Likelihood, budgets: list[int]) -> dict[str, list[tuple[list[int], float]]]:
    """The optimal schedule of each number of steps, and its bound in nats/window.

    A schedule priced on the very c(m) that chose it looks too good: it has picked the counts where c(m) came out low by
    chance. So what it costs beyond T steps is that of schedules chosen on every other window and priced on the rest.
    Nothing if there are too few windows for that.
    """
    a, b = (curve_of(*(x[half::2] for x in bound.draws)) for half in range(2))
    if (a + b).isnan().any():
        return {}
    chosen = optimal_schedules(monotone(bound.curve))
    halves = [(optimal_schedules(monotone(chooser)), pricer) for chooser, pricer in ((a, b), (b, a))]
    extra = [
        sum(schedule_bound(pricer, schedules[K - 1]) - float(pricer.sum()) for schedules, pricer in halves) / 2
        for K in budgets
    ]
    total = float(bound.curve.sum())
    return {"optimal": [(chosen[K - 1], total + nats) for K, nats in zip(budgets, extra, strict=True)]}


def bootstrap_errors(bound: Likelihood, schedules: list[list[int]], resamples: int = 200) -> list[float]:
    """Standard errors of `schedule_bound` for each schedule, nats/window: windows drawn with replacement, again and
    again; resamples that miss a count are left out. NaN for fewer than two windows."""
    generator, N = torch.Generator().manual_seed(0), len(bound.draws[0])
    values = []
    for _ in range(resamples if N > 1 else 0):
        some = torch.randint(N, (N,), generator=generator)
        curve = curve_of(*(x[some] for x in bound.draws))
        if not curve.isnan().any():
            values.append([schedule_bound(curve, counts) for counts in schedules])
    return torch.tensor(values).std(0).tolist() if len(values) > 1 else [math.nan] * len(schedules)


def compare_policies(
    model: Transformer, windows: Tensor, limit: int, policies: list[UnmaskingPolicy], reference: Likelihood, tick: Tick
) -> list[dict]:
    """Exact nats/char of each policy against its NFE, on at most `limit` of the full windows (N, T), evenly spaced.

    A window that is hard for one sampler is hard for all: what the reference, which scored every window, found special
    about these few is taken out again by regression. It takes a degree of freedom: few windows have wide intervals.
    """
    N, T = windows.shape
    some = torch.linspace(0, N - 1, min(N, limit)).long()
    known = reference.window_nats[:N] / T
    x = known[some] - known.mean()
    centred, size = x - x.mean(), batch_size(windows)
    rows = []
    for policy in policies:
        result, nfe = policy_likelihood(model, windows[some.to(windows.device)], policy, MASK_ID, size, tick)
        nats = result.window_nats / T
        adjusted = nats - x * (centred * nats).sum() / centred.square().sum().clamp(min=1e-12)
        mean, freedom = float(adjusted.mean()), len(some) - 2
        half = math.inf
        if freedom > 0:
            error = standard_error(adjusted, torch.ones(len(some))) * ((freedom + 1) / freedom) ** 0.5
            half = student_t(freedom) * error
        rows.append({
            "order": policy.order,
            "threshold": policy.threshold,
            "nfe": float(nfe.double().mean()),
            "nats_per_char": mean,
            "ci95": finite((mean - half, mean + half)),
        })
    return rows


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by the Cornish-Fisher expansion: 3 % low at 2 degrees of freedom.

    >>> round(student_t(14), 3)  # exactly 2.145
    2.145
    """
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


@torch.inference_mode()
def uniform_t_bound(
    predict: Predict, windows: Tensor, mask_token_id: int, draws: int, generator: torch.Generator | None = None
) -> float:
    """The same bound in nats/token by plain Monte Carlo: the training loss at `draws` independent uniform t a window.

    Only here to be compared with.
    """
    total = 0.0
    for _ in range(draws):
        t = MIN_T + (1 - MIN_T) * torch.rand(len(windows), generator=generator)
        masked, mask = forward_process(windows, t, mask_token_id, generator)
        total += compute_llada_loss(predict(masked), windows, mask, t).item()
    return total / draws


def compare_estimators(model: Transformer, windows: Tensor, seed: int, repeats: int = 30) -> None:
    """Print the variance, for each network evaluation, of plain uniform-t Monte Carlo and of the paired estimator.

    Both score the same windows (N, T) again and again with fresh masks; two evaluations a window each time, and the
    variance is over those repeats: it holds nothing of the choice of windows.
    """
    generator = torch.Generator().manual_seed(seed)
    N, T = windows.shape
    pairs = pairs_needed(N, T, 1)
    plain, paired = [], []
    with progress(repeats, "compare estimators") as update:
        for i in range(repeats):
            plain.append(uniform_t_bound(model, windows, MASK_ID, 2, generator))
            bound = likelihood_bound(model, [windows], MASK_ID, pairs, batch_size(windows), generator)
            paired.append(bound.nats_per_char)
            update(i + 1, "")
    plain, paired = torch.tensor(plain).double(), torch.tensor(paired).double()
    per_evaluation = plain.var() * 2, paired.var() * (2 * pairs + 1 / N)
    print(f"{repeats} repeats on {N} windows of {T} characters; variance x evaluations a window, (nats/char)^2")
    print(f"plain uniform-t Monte Carlo  mean {plain.mean():.4f}  {per_evaluation[0]:.3g}")
    print(f"stratified complementary     mean {paired.mean():.4f}  {per_evaluation[1]:.3g}")
    print(f"ratio {per_evaluation[0] / per_evaluation[1]:.1f}")
