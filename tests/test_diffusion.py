"""The mathematics of masking, by enumeration (V = 3, T = 4)."""

import itertools
import math

import numpy as np
import pytest
import torch
from toy import MASK, T, TablePredictor, V, all_masks, all_strings, cross_entropies, nats_in_order, seeded, subset_bound

import diffusion
from config import SamplingConfig
from data import Rows
from diffusion import DiffusionObjective, compute_llada_loss, density_of_t, forward_process, sample_t, sweep_masks
from likelihood import policy_likelihood
from sampler import policy_of, reverse_process
from tokenizer import MASK_ID


def text_rows(B: int, T: int) -> Rows:
    """Running text of which every token is a character."""
    return Rows(torch.randint(4, 9, (B, T), generator=seeded()), torch.full((B,), T))


def integrated_loss(predict, x) -> float:
    """Integral over t in (0, 1] of E[compute_llada_loss] * T, the expectation over all 2^T masks, t by Gauss-Legendre.

    P(M | t) / t is a polynomial in t of degree T - 1 for nonempty M: two nodes more than enough make it exact.
    """
    masks, total = all_masks(), 0.0
    x = x.expand(len(masks), -1)
    logits = predict(x.masked_fill(masks, MASK))
    for node, weight in zip(*np.polynomial.legendre.leggauss(T), strict=True):
        t = (node + 1) / 2
        for k, mask in enumerate(masks):
            chance = t ** int(mask.sum()) * (1 - t) ** int((~mask).sum())
            loss = compute_llada_loss(logits[k : k + 1], x[k : k + 1], mask[None], float(t))
            total += weight / 2 * chance * float(loss) * T
    return total


def test_loss_integral_is_the_subset_sum_is_the_mean_over_all_orders():
    """And Jensen: it is at least -log of the mean p over orders, which sums to 1 over all strings."""
    predict, total = TablePredictor(), 0.0
    for x in all_strings():
        nats = [nats_in_order(predict, x, [[i] for i in order]) for order in itertools.permutations(range(T))]
        bound, p = np.mean(nats), np.mean(np.exp(-np.array(nats)))
        assert subset_bound(predict, x) == pytest.approx(bound, rel=1e-12)
        assert integrated_loss(predict, x) == pytest.approx(bound, rel=1e-12)
        assert bound >= -math.log(p)
        total += p
    assert total == pytest.approx(1, rel=1e-12)


def test_the_loss_by_hand_in_all_its_forms():
    """Two masked of four: (CE_1 / t + CE_2 / t) / (B T), whatever the count of masked, and in nats per unit.

    Logits of all positions or of the masked ones, t of all shapes.
    """
    logits = torch.randn(2, T, V, generator=seeded())
    targets, mask = torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = True
    ce = -logits.log_softmax(-1)[..., 0]
    expected = float(ce[0, 0] / 0.5 + ce[1, 1] / 0.25)
    t = torch.tensor([0.5, 0.25])
    for some_logits, some_t in itertools.product((logits, logits[mask]), (t, t[:, None].expand(2, T))):
        loss = compute_llada_loss(some_logits, targets, mask, some_t)
        assert loss.item() == pytest.approx(expected / 8)
        per_unit = compute_llada_loss(some_logits, targets, mask, some_t, torch.tensor([3.0, 2.0]))
        assert per_unit.item() == pytest.approx(expected / 5)
    assert compute_llada_loss(logits, targets, mask, 0.5).item() == pytest.approx(float(ce[mask].sum() / 0.5 / 8))


def test_the_objective_takes_logits_of_the_masked_positions_and_leaves_the_mask_on_the_cpu():
    """So that nothing has to wait for a GPU."""
    objective = DiffusionObjective(0.5)
    batch = objective.make_batch(text_rows(8, 64), seeded(), "train_loss")
    logits = torch.randn(8, 64, 9)
    loss = objective.loss(logits, batch)
    chosen = objective.predict(lambda tokens, at: logits.flatten(0, 1)[at], batch)
    torch.testing.assert_close(objective.loss(chosen, batch), loss)
    targets, weights = objective.weighted_targets(batch)
    losses = torch.nn.functional.cross_entropy(chosen, targets, reduction="none")
    torch.testing.assert_close((losses * weights).sum(), loss)
    there = batch.on(torch.device("meta"))
    assert there.mask is batch.mask
    assert {x.device.type for x in there._replace(mask=there.divisors)} == {"meta"}


def test_forward_process_marginals():
    """Each token is hidden with its own row's t, independently: frequencies within 5 standard errors."""
    n, t = 20_000, torch.tensor([0.0, 0.1, 0.5, 1.0])
    sequences = torch.arange(8).remainder(V).expand(n * 4, 8)
    masked, mask = forward_process(sequences, t.repeat(n), MASK, seeded())
    assert torch.equal(masked, sequences.masked_fill(mask, MASK))
    rates = mask.view(n, 4, 8).double().mean(0)  # (4, 8)
    assert ((rates - t[:, None]).abs() <= 5 * (t * (1 - t) / n).sqrt()[:, None]).all()
    both = (mask[:, 0] & mask[:, 1]).view(n, 4).double().mean(0)
    assert ((both - t**2).abs() <= 5 * (t**2 * (1 - t**2) / n).sqrt() + 1e-12).all()
    for bad in (-0.1, 1.5, torch.tensor([0.5, float("nan")])):
        with pytest.raises(ValueError, match="t "):
            forward_process(torch.zeros(2, T, dtype=torch.long), bad, MASK)


def test_t_is_stratified_and_uniform_or_drawn_and_weighed_by_its_density():
    generator = seeded()
    batches = torch.stack([sample_t(16, generator) for _ in range(500)])  # (500, 16)
    assert diffusion.MIN_T <= batches.min() <= batches.max() <= 1
    strata = ((batches - diffusion.MIN_T) / (1 - diffusion.MIN_T) * 16).clamp(max=15.999).long().sort(1).values
    assert (strata == torch.arange(16)).all()  # one t in each sixteenth
    assert abs(batches[:, 0].mean() - 0.5) < 5 * (1 / 12 / 500) ** 0.5  # each place in the batch is uniform too
    t = sample_t(100_000, generator, power=2.0)  # t = u^2
    assert (t < 0.25).double().mean() == pytest.approx(0.5, abs=0.01)
    for power in (1, 2):  # E of f(t) / density is the integral of f
        assert (t**power / density_of_t(t, 2.0)).mean().item() == pytest.approx(1 / (power + 1), abs=2e-3)
    batch = DiffusionObjective().make_batch(text_rows(4000, 16), generator)
    assert (batch.mask / batch.divisors).mean().item() == pytest.approx(1, abs=0.01)  # an evenly weighted cross-entropy


# ------------------------------------------------------------------------------------------------- sweeps
def sweeps_from(first: int, may_mask: torch.Tensor, steps: int, decay: float, monkeypatch):
    """Masks and weights (S, T) of every step k of a sweep over may_mask (T,) whose first position is `first`."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda *args, **kwargs: torch.full((steps, 1), first))
        patch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
        masks, t = sweep_masks(may_mask.expand(steps, -1), seeded(), steps, decay)
    return masks, 1 / t


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize(("n", "steps"), [(250, 16), (10, 16), (4, 2), (16, 16), (1, 3)])
def test_each_position_counts_once_in_the_mean_over_the_steps(monkeypatch, n, steps, decay):
    """For any number of positions: where S steps do not divide it, or where some of them reveal nothing."""
    may_mask = torch.arange(n + 7) >= 7
    sweeps = [sweeps_from(first, may_mask, steps, decay, monkeypatch) for first in range(steps)]
    masks, weights = (torch.stack(x) for x in zip(*sweeps, strict=True))  # (first, k, T)
    assert not (masks & ~may_mask).any()
    torch.testing.assert_close(weights.mean((0, 1)), may_mask.float(), rtol=1e-5, atol=0)
    if decay == 0:  # wherever the sweep begins
        torch.testing.assert_close(weights.mean(1), may_mask.float().expand(steps, -1), rtol=1e-6, atol=0)
        assert set(weights.unique().tolist()) <= {0.0, float(steps)}
    else:
        assert torch.equal(weights > 0, masks)
        ahead = (weights[masks] / weights.max()).log() / math.log(decay)
        torch.testing.assert_close(ahead, ahead.round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("steps", [2, 3, 4, 7])
def test_the_loss_of_sweeps_without_decay_is_the_exact_likelihood_of_the_sampler(monkeypatch, steps):
    """By enumeration: mean over the steps k of sweeps that begin at any of their positions."""
    predict = TablePredictor()
    for first in range(steps):
        masks, weights = sweeps_from(first, torch.ones(T, dtype=torch.bool), steps, 0.0, monkeypatch)
        turns = [(i + first) % steps for i in range(T)]
        groups = [[i for i in range(T) if turns[i] == k] for k in sorted(set(turns))]
        for x in all_strings()[::9]:
            exact = nats_in_order(predict, x, groups)
            assert (weights * cross_entropies(predict, x, masks)).sum().item() / steps == pytest.approx(exact, abs=1e-6)
            if first == 0:
                policy = policy_of(SamplingConfig(steps=steps, correct=0))
                likelihood, _ = policy_likelihood(predict, x[None], policy, MASK)
                assert likelihood.window_nats.item() == pytest.approx(exact)


def test_sweeps_look_as_the_sampler_meets_a_text(monkeypatch):
    may_mask = torch.arange(100) >= 7
    masks, _ = sweeps_from(0, may_mask, diffusion.TRAINED_STEPS, 0.7, monkeypatch)
    tokens = torch.where(may_mask, MASK, 0)[None]
    config = SamplingConfig(steps=diffusion.TRAINED_STEPS, correct=0)
    steps = reverse_process(lambda tokens: torch.zeros(*tokens.shape, V), tokens, MASK, config)
    assert torch.equal(masks, torch.cat([step.masked for step in steps]))


def test_sweeps_are_a_share_of_the_training_batch_and_of_nothing_else():
    objective, rows = DiffusionObjective(0.75), text_rows(8, 64)
    assert objective.scores == ("val_loss", "sampler_loss")
    assert DiffusionObjective().scores == ("val_loss",)
    for purpose, sweeps in (("train_loss", 6), ("sampler_loss", 8), ("val_loss", 0)):
        batch = objective.make_batch(rows, seeded(), purpose)
        assert [bool(row.isinf().any()) for row in batch.divisors] == [True] * sweeps + [False] * (8 - sweeps)
        assert torch.equal(batch.inputs, batch.targets.masked_fill(batch.mask, MASK_ID))
    plain, same = (DiffusionObjective(share).make_batch(rows, seeded(1)) for share in (0.75, 0))
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
