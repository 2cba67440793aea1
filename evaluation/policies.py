"""Unmasking schedules and policies of LLaDA: loss against the number of network evaluations (NFE).

Schedules reveal positions in random order: their losses are upper bounds and follow from the masking curve c(m) alone.
Policies are scored by teacher forcing: exact where the positions follow from what is visible, else an upper bound.
"""

import math

import torch
from torch import Tensor

from data import Rows
from evaluation.likelihoods import finite, mean_and_interval
from generation.infilling import mask_predictor
from likelihood import Likelihood, curve_of, monotone, optimal_schedules, policy_likelihood, schedule_bound
from model import LLaDAModel
from tokenizer import MASK_ID
from trainer import scoring_batch_size
from unmasking import SCHEDULES, UnmaskingPolicy, random_positions

RESAMPLES = 200  # of the bootstrap
Figure = tuple[float, list[float] | None]  # nats/char and its 95 % interval


# ------------------------------------------------------------------------------------------------- schedules
def compare_schedules(bound: Likelihood, characters: float) -> dict[str, list[dict]]:
    """Upper bounds in nats/char of schedules of K = 1, 2, 4, ..., T steps with positions in random order.

    characters: the mean number in a window; it is taken as known, and has no part in the intervals.
    Intervals are from a bootstrap over windows. `optimal` is missing if there are too few windows.
    """
    T = len(bound.curve) - 1
    budgets = [2**k for k in range(T.bit_length()) if 2**k < T] + [T]
    schedules = {name: [SCHEDULES[name](T, K) for K in budgets] for name in ("uniform", "cosine")}
    nats = {name: [schedule_bound(bound.curve, counts) for counts in rows] for name, rows in schedules.items()}
    optimal = best_schedules(bound, budgets)
    if optimal is not None:
        schedules["optimal"], nats["optimal"] = optimal
    entries = {}
    for name, rows in schedules.items():
        columns = zip(budgets, rows, nats[name], bootstrap_errors(bound, rows), strict=True)
        entries[name] = [
            {
                "steps": steps,
                "nfe": sum(n > 0 for n in counts),
                "nats_per_char": total / characters,
                "ci95": finite(((total - 1.96 * error) / characters, (total + 1.96 * error) / characters)),
                "is_bound": True,
                "counts": counts,
            }
            for steps, counts, total, error in columns
        ]
    return entries


def best_schedules(bound: Likelihood, budgets: list[int]) -> tuple[list[list[int]], list[float]] | None:
    """The optimal schedule of each number of steps, and its upper bound in nats/window. None with too few windows.

    A schedule scored on the very c(m) that it was chosen by looks too good: it has chosen counts where c(m) was low by
    chance. So its loss beyond that of T steps is that of schedules chosen on one half of the windows and scored on the
    other half.
    """
    halves = [curve_of(*(x[first::2] for x in bound.draws)) for first in range(2)]
    if sum(halves).isnan().any():
        return None
    extra = torch.zeros(len(budgets), dtype=torch.float64)
    for chooser, scorer in (halves, halves[::-1]):
        schedules = optimal_schedules(monotone(chooser))
        losses = torch.tensor([schedule_bound(scorer, schedules[K - 1]) for K in budgets])
        extra += (losses - scorer.sum()) / 2
    chosen = optimal_schedules(monotone(bound.curve))
    return [chosen[K - 1] for K in budgets], (bound.curve.sum() + extra).tolist()


def bootstrap_errors(bound: Likelihood, schedules: list[list[int]]) -> list[float]:
    """Standard errors of `schedule_bound` of each schedule in nats/window, from windows drawn with replacement.

    Resamples without a mask of some count are left out. NaN for fewer than two windows.
    """
    generator, N = torch.Generator().manual_seed(0), len(bound.draws[0])
    values = []
    for _ in range(RESAMPLES if N > 1 else 0):
        drawn = torch.randint(N, (N,), generator=generator)
        curve = curve_of(*(x[drawn] for x in bound.draws))
        if not curve.isnan().any():
            values.append([schedule_bound(curve, counts) for counts in schedules])
    return torch.tensor(values).std(0).tolist() if len(values) > 1 else [math.nan] * len(schedules)


# ------------------------------------------------------------------------------------------------- policies
def compare_policies(
    model: LLaDAModel, rows: Rows, limit: int, policies: list[UnmaskingPolicy], bound: Likelihood, seed: int
) -> list[dict]:
    """nats/char of each policy on at most `limit` of the N windows in `rows`, and its difference to policies[0].

    Differences are paired over the same windows. `bound` scored all N windows: a policy's figure is that of the bound
    plus the mean difference between the two, so that it stands for all windows. The last row is the random order with T
    steps, of which `bound` is the upper bound.
    """
    (N, T), predict, size = rows.tokens.shape, mask_predictor(model), scoring_batch_size(model)
    chosen = torch.linspace(0, N - 1, min(N, limit)).long()
    texts, characters = rows.tokens[chosen.to(rows.tokens.device)].cpu(), rows.characters.cpu()
    known = bound.window_nats[:N]
    entries, reference = [], None
    for policy in policies:
        is_bound = not policy.has_exact_likelihood
        reveal = random_positions(policy, torch.Generator().manual_seed(seed)) if is_bound else policy
        result, nfe = policy_likelihood(predict, texts, reveal, MASK_ID, batch_size=size, is_bound=is_bound)
        nats = result.window_nats
        reference = nats if reference is None else reference
        figure = level_on_all_windows(nats, known, chosen, characters)
        difference = mean_and_interval(nats - reference, characters[chosen])
        entries.append(policy_entry(policy, float(nfe.double().mean()), len(chosen), is_bound, figure, difference))
    figure = mean_and_interval(known, characters)
    difference = mean_and_interval(known[chosen] - reference, characters[chosen])
    random = UnmaskingPolicy(steps=T, order="random")
    return [*entries, policy_entry(random, T, len(chosen), True, figure, difference)]


def level_on_all_windows(nats: Tensor, known: Tensor, chosen: Tensor, characters: Tensor) -> Figure:
    """nats/char of a policy on all N windows, with its 95 % interval.

    nats (n,) of the windows are the policy's on the `chosen` ones, known (N,) those of the bound on all of them, which
    have characters (N,). The figure is that of `known` plus the paired difference. Its interval adds the variances of
    the two (two-phase sampling).
    """
    if len(chosen) == len(known):
        return mean_and_interval(nats, characters)
    mean, all_windows = mean_and_interval(known, characters)
    difference, few_windows = mean_and_interval(nats - known[chosen], characters[chosen])
    if few_windows is None:
        return mean + difference, None
    half = math.hypot(all_windows[1] - mean, few_windows[1] - difference)
    return mean + difference, [mean + difference - half, mean + difference + half]


def policy_entry(
    policy: UnmaskingPolicy, nfe: float, windows: int, is_bound: bool, figure: Figure, difference: Figure
) -> dict:
    """A policy's entry in metrics.json: its figure, and its difference to the reference policy, in nats/char."""
    row = {"order": policy.order, "steps": policy.steps, "threshold": policy.threshold, "nfe": nfe}
    row["nats_per_char"], row["ci95"] = figure
    row["is_bound"], row["windows"] = is_bound, windows
    row["difference"], row["difference_ci95"] = difference
    return row
