"""Bound, masking curve, schedules and policy likelihoods against enumeration (V = 3, T = 4)."""

import itertools
import math

import pytest
import torch
from test_diffusion import subset_bound
from toy import MASK, T, TablePredictor, V, all_masks, all_strings, cross_entropies, uniform

from evaluation.likelihoods import uniform_t_bound
from likelihood import (
    Likelihood,
    bound_from_masks,
    complementary_masks,
    likelihood_bound,
    monotone,
    optimal_schedules,
    policy_likelihood,
    schedule_bound,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------- the bound
def test_enumerating_all_masks_gives_the_exact_bound_and_curve():
    predict, x = TablePredictor(), all_strings()[37]
    masks = all_masks()
    result = bound_from_masks(predict, x[None], masks[None, :-1], MASK, batch_size=3)  # [-1] is all masked
    assert result.window_nats.item() == pytest.approx(subset_bound(predict, x), rel=1e-12)
    assert result.token_nats.sum().item() == pytest.approx(subset_bound(predict, x), rel=1e-12)
    ce = cross_entropies(predict, x, masks).sum(1) / masks.sum(1)
    for m in range(1, T + 1):
        assert result.curve[m].item() == pytest.approx(ce[masks.sum(1) == m].mean().item(), rel=1e-12)


def test_pairs_are_complementary_and_every_mask_has_its_exact_probability():
    """l uniform on 1..T-1 and, given l, all C(T, l) masks alike: for each of the two masks of a pair taken together."""
    for length in (4, 5):  # even and odd: the middle count is its own complement, or there is none
        masks = complementary_masks(30_000, length, 2, seeded(0))  # (N, 4, length)
        assert (masks[:, ::2] ^ masks[:, 1::2]).all()
        keys = (masks * 2 ** torch.arange(length)).sum(-1)
        rates = torch.bincount(keys.flatten(), minlength=2**length).double() / keys.numel()
        for key in range(2**length):
            m = key.bit_count()
            expected = 0 if m in (0, length) else 1 / ((length - 1) * math.comb(length, m))
            assert abs(rates[key] - expected) <= 5 * (expected / keys.numel()) ** 0.5


def test_counts_are_stratified_over_windows_and_inside_each():
    masks = complementary_masks(10, 101, 5, seeded(0))
    smaller = masks.sum(-1)[:, ::2]  # (10, 5) in 1..50
    assert torch.bincount(smaller.flatten(), minlength=51)[1:].tolist() == [1] * 50
    assert ((smaller - 1) // 10 == torch.arange(5)).all()


def test_estimator_mean_is_the_exact_bound():
    """At a fixed seed the mean over 200 runs is within 5 standard errors; the last window, shorter, included."""
    predict = TablePredictor()
    windows = [all_strings()[::9], all_strings(3)[5:6]]
    chars = windows[0].numel() + 3
    exact = sum(subset_bound(predict, x) for x in windows[0]) + short_bound(predict, windows[1][0])
    generator = seeded(0)
    runs = torch.tensor(
        [likelihood_bound(predict, windows, MASK, pairs=1, generator=generator).nats_per_char for _ in range(200)]
    ).double()
    assert runs.std() > 0
    assert abs(runs.mean() - exact / chars) <= 5 * runs.std() / len(runs) ** 0.5


def test_plain_monte_carlo_estimates_the_same_bound_with_more_variance():
    predict, windows = TablePredictor(), all_strings()
    exact = sum(subset_bound(predict, x) for x in windows) / windows.numel()
    generator = seeded(0)
    plain = torch.tensor([uniform_t_bound(predict, windows, MASK, 2, generator) for _ in range(150)]).double()
    bounds = [likelihood_bound(predict, [windows], MASK, pairs=1, generator=generator) for _ in range(150)]
    paired = [bound.nats_per_char for bound in bounds]
    assert abs(plain.mean() - exact) <= 5 * plain.std() / len(plain) ** 0.5
    assert torch.tensor(paired).var() < plain.var() / 3


def short_bound(predict, x) -> float:
    masks = all_masks(3)
    return sum(
        float(cross_entropies(predict, x, mask[None]).sum()) / (m * math.comb(3, m))
        for mask in masks
        for m in [int(mask.sum())]
    )


def test_curve_and_token_shares_add_up_to_the_bound():
    result = likelihood_bound(TablePredictor(), [all_strings()], MASK, pairs=2, batch_size=7, generator=seeded(1))
    assert result.window_nats.mean().item() == pytest.approx(result.curve.sum().item(), rel=1e-12)
    assert result.token_nats.sum().item() == pytest.approx(result.window_nats.sum().item(), rel=1e-12)
    assert result.curve[0] == 0


def test_results_do_not_depend_on_the_batch_size():
    windows = [all_strings()[:20], all_strings(2)[:1]]
    results = [
        likelihood_bound(TablePredictor(), windows, MASK, pairs=3, batch_size=size, generator=seeded(2))
        for size in (1, 5, 1000)
    ]
    for other in results[1:]:
        assert torch.equal(results[0].window_nats, other.window_nats)
        assert torch.equal(results[0].token_nats, other.token_nats)
        assert torch.equal(results[0].curve, other.curve)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_every_character_counts_once_and_a_uniform_predictor_scores_log_v(length):
    windows = [all_strings(), all_strings(length)[:1]]
    result = likelihood_bound(uniform, windows, MASK, pairs=1, batch_size=16, generator=seeded(0))
    assert result.characters.sum() == sum(part.numel() for part in windows)
    assert result.nats_per_char == pytest.approx(math.log(V), rel=1e-12)
    assert result.token_nats[-1, length:].abs().sum() == 0
    low, high = result.ci95
    assert high - low < 1e-9
    assert result.is_bound


def test_masks_that_leave_a_count_out_are_refused():
    masks = all_masks()[None]
    with pytest.raises(ValueError, match="every count"):
        bound_from_masks(uniform, all_strings()[:1], masks[masks.sum(-1) != 2][None], MASK)
    with pytest.raises(ValueError, match="every count"):
        bound_from_masks(uniform, all_strings()[:1], masks, MASK)  # all masked is not theirs to draw
    with pytest.raises(ValueError, match="no text"):
        likelihood_bound(uniform, [], MASK)


def test_the_interval_over_windows_is_honest():
    """Fresh windows and masks each time: the spread of the estimates is what their intervals claim, and no less."""
    generator, predict, estimates, errors = seeded(4), TablePredictor(), [], []
    for _ in range(150):
        windows = all_strings()[torch.randint(V**T, (12,), generator=generator)]
        result = likelihood_bound(predict, [windows], MASK, pairs=1, batch_size=128, generator=generator)
        estimates.append(result.nats_per_char)
        errors.append((result.ci95[1] - result.ci95[0]) / 2 / 1.96)
    ratio = torch.tensor(errors).square().mean().sqrt() / torch.tensor(estimates).std()
    assert 0.85 < ratio < 1.3


def test_the_masks_share_of_the_interval_is_the_spread_over_fresh_masks():
    predict, windows = TablePredictor(), all_strings()[::2]
    results = [likelihood_bound(predict, [windows], MASK, pairs=3, generator=seeded(seed)) for seed in range(400)]
    spread = 1.96 * torch.tensor([result.nats_per_char for result in results]).std().item()
    claimed = sum(result.mask_error for result in results) / len(results)
    assert 0.9 * spread < claimed < 1.5 * spread  # strata make the true spread the smaller one, if anything
    assert likelihood_bound(predict, [windows], MASK, pairs=1).mask_error == math.inf
    assert Likelihood.from_token_nats([torch.ones(2, 3)]).mask_error == 0.0


def test_interval_covers_the_mean_over_a_population_of_windows():
    """Windows are drawn from a population of unequal lengths: about 95 % of the intervals hold its nats/char."""
    generator, hits = seeded(3), 0
    for _ in range(400):
        lengths = torch.randint(2, 9, (60,), generator=generator)
        nats = lengths * (1.5 + 0.5 * torch.randn(60, generator=generator, dtype=torch.float64))
        low, high = Likelihood(nats[:, None], nats, lengths, is_bound=False).ci95
        hits += low <= 1.5 <= high
    assert 0.95 - 5 * (0.05 * 0.95 / 400) ** 0.5 <= hits / 400 <= 0.99


# ------------------------------------------------------------------------------------------------- schedules
def test_schedule_bound_is_the_expected_price_of_random_reveals():
    """By hand, over all ordered ways to reveal T positions in groups of 1, 2 and 1."""
    predict, x = TablePredictor(), all_strings()[11]
    curve = bound_from_masks(predict, x[None], all_masks()[None, :-1], MASK).curve
    total, orders = 0.0, list(itertools.permutations(range(T)))
    for order in orders:
        mask = torch.ones(1, T, dtype=torch.bool)
        for group in (order[:1], order[1:3], order[3:]):
            total += cross_entropies(predict, x, mask)[0, list(group)].sum().item()
            mask[0, list(group)] = False
    assert schedule_bound(curve, [1, 2, 1]) == pytest.approx(total / len(orders), rel=1e-12)
    assert schedule_bound(curve, [0, 1, 0, 2, 1, 0]) == schedule_bound(curve, [1, 2, 1])
    assert schedule_bound(curve, [1] * T) == pytest.approx(curve.sum().item(), rel=1e-12)
    assert schedule_bound(curve, [T]) == pytest.approx(T * curve[T].item(), rel=1e-12)


def test_optimal_schedules_match_brute_force():
    length = 7
    for seed in range(5):
        curve = torch.rand(length + 1, generator=seeded(seed), dtype=torch.float64)  # not even monotone
        for steps, schedule in enumerate(optimal_schedules(curve), 1):
            compositions = (c for c in itertools.product(range(1, length + 1), repeat=steps) if sum(c) == length)
            best = min(schedule_bound(curve, list(c)) for c in compositions)
            assert len(schedule) == steps
            assert schedule_bound(curve, schedule) == pytest.approx(best, rel=1e-12)


def test_monotone_curve_joins_the_middles_of_pooled_violators():
    curve = torch.tensor([0, 4.0, 2.0, 1.5, 5.0, 4.0], dtype=torch.float64)  # pools 2.5 of three and 4.5 of two
    assert monotone(curve).tolist() == pytest.approx([0, 2.5, 2.5, 3.3, 4.1, 4.5])
    curve = torch.rand(50, generator=seeded(0), dtype=torch.float64).cumsum(0) - 0.3 * torch.arange(50)
    smooth = monotone(curve)[1:]
    assert (smooth.diff() >= 0).all()
    rising = curve.sort().values
    assert torch.allclose(monotone(rising)[1:], rising[1:])


@pytest.mark.parametrize("schedule", [[2, 1], [5], [], [5, -1]])
def test_schedules_that_do_not_write_the_window_are_refused(schedule):
    with pytest.raises(ValueError, match="schedule"):
        schedule_bound(torch.ones(T + 1), schedule)


# ------------------------------------------------------------------------------------------------- policies
def by_confidence(logits, masked, step):
    """One position at a time, where the likeliest token is likeliest."""
    confidence = logits.softmax(-1).amax(-1).masked_fill(~masked, -1)
    return torch.zeros_like(masked).scatter(1, confidence.argmax(1, keepdim=True), True)


def above_threshold(logits, masked, step):
    """All positions of confidence 0.6 or more, and the best one in any case."""
    return by_confidence(logits, masked, step) | (logits.softmax(-1).amax(-1) > 0.6) & masked


@pytest.mark.parametrize("policy", [by_confidence, above_threshold])
@pytest.mark.parametrize("seed", range(3))
def test_policy_likelihoods_sum_to_one_over_all_strings(policy, seed):
    result, nfe = policy_likelihood(TablePredictor(seed), all_strings(), policy, MASK, batch_size=10)
    assert (-result.window_nats).exp().sum().item() == pytest.approx(1, rel=1e-12)
    if policy is by_confidence:
        assert (nfe == T).all()
    else:
        assert nfe.unique().numel() > 1  # each string at its own pace
    again, _ = policy_likelihood(TablePredictor(seed), all_strings(), policy, MASK, batch_size=81)
    assert torch.equal(result.token_nats, again.token_nats)


def test_left_to_right_policy_is_the_chain_rule():
    predict, x = TablePredictor(), all_strings()[50]

    def left_to_right(logits, masked, step):
        return torch.arange(T).expand_as(masked) == step

    result, _ = policy_likelihood(predict, x[None], left_to_right, MASK)
    masks = torch.arange(T) >= torch.arange(T)[:, None]
    assert torch.allclose(result.token_nats[0], cross_entropies(predict, x, masks).diagonal(), rtol=1e-12)
    assert not result.is_bound


def test_policies_that_stall_or_look_at_visible_positions_are_refused():
    x = all_strings()[:2]
    with pytest.raises(ValueError, match="policy"):
        policy_likelihood(uniform, x, lambda logits, masked, step: torch.zeros_like(masked), MASK)
    with pytest.raises(ValueError, match="policy"):
        policy_likelihood(uniform, x, lambda logits, masked, step: (torch.arange(T) < 2).expand(2, T), MASK)
