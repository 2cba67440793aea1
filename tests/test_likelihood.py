"""Bound, masking curve, schedules and policy likelihoods against enumeration (V = 3, T = 4)."""

import itertools
import math

import pytest
import torch
import toy
from toy import MASK, T, TablePredictor, V, all_masks, all_strings, cross_entropies, nats_in_order, seeded, subset_bound

from diffusion import MIN_T, compute_llada_loss, forward_process
from likelihood import bound_from_masks, complementary_masks, likelihood_bound, policy_likelihood, schedule_bound


def bound(predict, windows, **settings):
    """Of windows of several lengths."""
    parts = [likelihood_bound(predict, part, MASK, **settings) for part in windows]
    return parts[0].join(parts)


# ------------------------------------------------------------------------------------------------- the bound
def test_all_masks_give_the_exact_bound_and_curve_and_the_price_of_schedules():
    """A schedule's price by hand: over all ordered ways to reveal T positions in groups of 1, 2 and 1."""
    predict, x = TablePredictor(), all_strings()[37]
    masks = all_masks()
    result = bound_from_masks(predict, x[None], masks[None, :-1], MASK, batch_size=3)  # [-1] is all masked
    assert result.window_nats.item() == pytest.approx(subset_bound(predict, x), rel=1e-12)
    assert result.token_nats.sum().item() == pytest.approx(subset_bound(predict, x), rel=1e-12)
    ce = cross_entropies(predict, x, masks).sum(1) / masks.sum(1)
    expected = [0.0, *(ce[masks.sum(1) == m].mean().item() for m in range(1, T + 1))]
    assert result.curve.tolist() == pytest.approx(expected, rel=1e-12)

    orders = list(itertools.permutations(range(T)))
    total = sum(nats_in_order(predict, x, (order[:1], order[1:3], order[3:])) for order in orders)
    assert schedule_bound(result.curve, [1, 2, 1]) == pytest.approx(total / len(orders), rel=1e-12)
    assert schedule_bound(result.curve, [0, 1, 0, 2, 1, 0]) == pytest.approx(total / len(orders), rel=1e-12)
    assert schedule_bound(result.curve, [1] * T) == pytest.approx(result.curve.sum().item(), rel=1e-12)
    assert schedule_bound(result.curve, [T]) == pytest.approx(T * result.curve[T].item(), rel=1e-12)
    for bad in ([2, 1], [5], [], [5, -1]):
        with pytest.raises(ValueError, match="schedule"):
            schedule_bound(result.curve, bad)


def test_pairs_are_complementary_and_every_mask_has_its_exact_probability():
    """l uniform on 1..T-1 and, given l, all C(T, l) masks alike: for each of the two masks of a pair taken together."""
    for length in (4, 5):  # even and odd: the middle count is its own complement, or there is none
        masks = complementary_masks(30_000, length, 2, seeded())  # (N, 4, length)
        assert (masks[:, ::2] ^ masks[:, 1::2]).all()
        keys = (masks * 2 ** torch.arange(length)).sum(-1)
        rates = torch.bincount(keys.flatten(), minlength=2**length).double() / keys.numel()
        for key in range(2**length):
            m = key.bit_count()
            expected = 0 if m in (0, length) else 1 / ((length - 1) * math.comb(length, m))
            assert abs(rates[key] - expected) <= 5 * (expected / keys.numel()) ** 0.5
    smaller = complementary_masks(10, 101, 5, seeded()).sum(-1)[:, ::2]  # (10, 5) in 1..50
    assert torch.bincount(smaller.flatten(), minlength=51)[1:].tolist() == [1] * 50  # stratified over windows
    assert ((smaller - 1) // 10 == torch.arange(5)).all()  # and inside each


def test_the_estimators_mean_is_the_exact_bound_and_plain_monte_carlo_has_more_variance():
    """Within 5 standard errors at a fixed seed. Plain: the training loss, at uniform t, as many evaluations."""
    predict, windows, short, generator = TablePredictor(), all_strings(), all_strings(3)[5:6], seeded()
    exact, exact_short = sum(subset_bound(predict, x) for x in windows), subset_bound(predict, short[0])
    paired, plain = [], []
    for _ in range(200):
        paired.append(bound(predict, [windows, short], pairs=1, generator=generator).nats_per_char)
        t = MIN_T + (1 - MIN_T) * torch.rand(2 * len(windows), generator=generator)
        twice = windows.repeat(2, 1)
        masked, mask = forward_process(twice, t, MASK, generator)
        plain.append(compute_llada_loss(predict(masked), twice, mask, t).item())
    paired, plain = torch.tensor(paired).double(), torch.tensor(plain).double()
    mean = (exact + exact_short) / (windows.numel() + short.numel())
    assert abs(paired.mean() - mean) <= 5 * paired.std() / len(paired) ** 0.5
    assert abs(plain.mean() - exact / windows.numel()) <= 5 * plain.std() / len(plain) ** 0.5
    assert 0 < paired.var() < plain.var() / 3


def test_results_do_not_depend_on_the_batch_size_and_add_up():
    windows, predict = [all_strings()[:20], all_strings(2)[:1]], TablePredictor()
    results = [bound(predict, windows, pairs=3, batch_size=size, generator=seeded(2)) for size in (1, 5, 1000)]
    for other in results[1:]:
        for name in ("window_nats", "token_nats", "curve"):
            assert torch.equal(getattr(results[0], name), getattr(other, name))
    assert other.window_nats[:20].mean().item() == pytest.approx(other.curve.sum().item(), rel=1e-12)
    assert other.token_nats.sum().item() == pytest.approx(other.window_nats.sum().item(), rel=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_every_character_counts_once_and_a_uniform_predictor_scores_log_v(length):
    windows = [all_strings(), all_strings(length)[:1]]
    result = bound(toy.uniform, windows, pairs=1, batch_size=16, generator=seeded())
    assert result.characters.sum() == sum(part.numel() for part in windows)
    assert result.nats_per_char == pytest.approx(math.log(V), rel=1e-12)
    assert result.token_nats[-1, length:].abs().sum() == 0
    assert result.ci95[1] - result.ci95[0] < 1e-9
    assert result.is_bound


def test_masks_that_leave_a_count_out_are_refused():
    masks = all_masks()[None]
    for bad in (masks[masks.sum(-1) != 2][None], masks):  # all masked is not theirs to draw
        with pytest.raises(ValueError, match="every count"):
            bound_from_masks(toy.uniform, all_strings()[:1], bad, MASK)


def test_the_interval_over_windows_is_honest():
    """Fresh windows of two lengths and masks: the spread of the estimates is what their intervals claim."""
    generator, predict, estimates, errors = seeded(4), TablePredictor(), [], []
    for _ in range(150):
        N = int(torch.randint(4, 9, (), generator=generator))
        windows = [all_strings(n)[torch.randint(V**n, (k,), generator=generator)] for n, k in ((4, N), (2, 12 - N))]
        result = bound(predict, windows, pairs=1, generator=generator)
        estimates.append(result.nats_per_char)
        errors.append((result.ci95[1] - result.ci95[0]) / 2 / 2.2)  # 11 degrees of freedom
    ratio = torch.tensor(errors).square().mean().sqrt() / torch.tensor(estimates).std()
    assert 0.85 < ratio < 1.3


# ------------------------------------------------------------------------------------------------- policies
def by_confidence(logits, masked):
    """One position at a time, where the likeliest token is likeliest."""
    confidence = logits.softmax(-1).amax(-1).masked_fill(~masked, -1)
    return torch.zeros_like(masked).scatter(1, confidence.argmax(1, keepdim=True), True)


def above_threshold(logits, masked):
    """All positions of confidence 0.6 or more, and the best one in any case."""
    return by_confidence(logits, masked) | (logits.softmax(-1).amax(-1) > 0.6) & masked


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


def test_a_policy_is_the_chain_rule_and_must_go_on():
    predict, x = TablePredictor(), all_strings()[50]
    left_to_right = lambda logits, masked: masked & (masked.cumsum(1) == 1)  # noqa: E731
    result, _ = policy_likelihood(predict, x[None], left_to_right, MASK)
    masks = torch.arange(T) >= torch.arange(T)[:, None]
    assert torch.allclose(result.token_nats[0], cross_entropies(predict, x, masks).diagonal(), rtol=1e-12)
    assert not result.is_bound
    nothing, visible = torch.zeros(1, T, dtype=torch.bool), torch.arange(T)[None] < 2
    for same_each_time in (nothing, visible):
        with pytest.raises(ValueError, match="policy"):
            policy_likelihood(toy.uniform, x[None], lambda *_, chosen=same_each_time: chosen, MASK)
