"""The mathematics of masking, by enumeration (V = 3, T = 4)."""

import itertools
import math

import pytest
import torch
from toy import MASK, T, TablePredictor, V, all_masks, all_strings, cross_entropies

from data import Rows
from diffusion import (
    MIN_T,
    SWEEP_STEPS,
    DiffusionObjective,
    compute_llada_loss,
    forward_process,
    sample_t,
    sweep_masks,
)
from likelihood import policy_likelihood
from sampler import reverse_process
from unmasking import STRIDE, UnmaskingPolicy


def chain_rule_bound(predict, x) -> float:
    """Mean over all T! orders of the chain rule along that order."""
    total = 0.0
    for order in itertools.permutations(range(T)):
        mask = torch.ones(1, T, dtype=torch.bool)
        for i in order:
            total += cross_entropies(predict, x, mask)[0, i].item()
            mask[0, i] = False
    return total / math.factorial(T)


def subset_bound(predict, x) -> float:
    """Sum over nonempty M of sum_i CE_i(M) / (|M| C(T, |M|))."""
    masks = all_masks()
    weights = torch.tensor([1 / (m * math.comb(T, m)) for m in masks.sum(1).tolist()], dtype=torch.float64)
    return float((cross_entropies(predict, x, masks).sum(1) * weights).sum())


def integrated_loss(predict, x) -> float:
    """Integral over t in (0, 1] of E[compute_llada_loss] * T, the expectation over all 2^T masks, t by Gauss-Legendre.

    P(M | t) / t is a polynomial in t of degree T - 1 for nonempty M: two nodes more than enough make it exact.
    """
    masks = all_masks()
    x = x.expand(len(masks), -1)
    logits = predict(x.masked_fill(masks, MASK))
    total = 0.0
    for node, weight in zip(*(map(float, row) for row in legendre_nodes()), strict=True):
        for k, mask in enumerate(masks):
            m = int(mask.sum())
            chance = node**m * (1 - node) ** (T - m)
            loss = compute_llada_loss(logits[k : k + 1], x[k : k + 1], mask[None], node)
            total += weight * chance * float(loss) * T
    return total


def legendre_nodes():
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(T)
    return (nodes + 1) / 2, weights / 2


@pytest.mark.parametrize("seed", range(3))
def test_loss_integral_is_the_subset_sum_is_the_mean_over_all_orders(seed):
    predict = TablePredictor(seed)
    for x in all_strings()[::7]:
        exact = chain_rule_bound(predict, x)
        assert subset_bound(predict, x) == pytest.approx(exact, rel=1e-12)
        assert integrated_loss(predict, x) == pytest.approx(exact, rel=1e-12)


def test_the_bound_is_above_the_nll_of_the_random_order_model():
    """Jensen: the mean over orders of -log p is at least -log of the mean p; the mean p sums to 1 over all strings."""
    predict, total = TablePredictor(0), 0.0
    for x in all_strings():
        p = 0.0
        for order in itertools.permutations(range(T)):
            mask, nats = torch.ones(1, T, dtype=torch.bool), 0.0
            for i in order:
                nats += cross_entropies(predict, x, mask)[0, i].item()
                mask[0, i] = False
            p += math.exp(-nats) / math.factorial(T)
        assert chain_rule_bound(predict, x) >= -math.log(p)
        total += p
    assert total == pytest.approx(1, rel=1e-12)


def test_loss_by_hand_and_packed_logits_agree():
    """Two masked of four: (CE_1 / t + CE_2 / t) / (B T), whatever the count of masked; (N, V) logits give the same."""
    logits = torch.zeros(2, T, V)
    targets = torch.zeros(2, T, dtype=torch.long)
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = True
    t = torch.tensor([0.5, 0.25])
    expected = (math.log(V) / 0.5 + math.log(V) / 0.25) / 8
    assert compute_llada_loss(logits, targets, mask, t).item() == pytest.approx(expected)
    assert compute_llada_loss(logits[mask], targets, mask, t).item() == pytest.approx(expected)


def test_forward_process_marginals():
    """Each token is hidden with its own row's t, independently: frequencies within 5 standard errors."""
    n, t = 20_000, torch.tensor([0.0, 0.1, 0.5, 1.0])
    sequences = torch.arange(8).remainder(V).expand(n * 4, 8)
    generator = torch.Generator().manual_seed(0)
    masked, mask = forward_process(sequences, t.repeat(n), MASK, generator)
    assert (masked[mask] == MASK).all()
    assert (masked[~mask] == sequences[~mask]).all()
    rates = mask.view(n, 4, 8).double().mean(0)  # (4, 8)
    assert ((rates - t[:, None]).abs() <= 5 * (t * (1 - t) / n).sqrt()[:, None]).all()
    both = (mask[:, 0] & mask[:, 1]).view(n, 4).double().mean(0)
    assert ((both - t**2).abs() <= 5 * (t**2 * (1 - t**2) / n).sqrt() + 1e-12).all()


def test_sample_t_is_stratified_and_uniform():
    generator = torch.Generator().manual_seed(0)
    batches = torch.stack([sample_t(16, generator) for _ in range(500)])  # (500, 16)
    assert batches.min() >= MIN_T
    assert batches.max() <= 1
    strata = ((batches - MIN_T) / (1 - MIN_T) * 16).clamp(max=15.999).long().sort(1).values
    assert (strata == torch.arange(16)).all()  # one t in each sixteenth
    assert abs(batches[:, 0].mean() - 0.5) < 5 * (1 / 12 / 500) ** 0.5  # each place in the batch is uniform too


@pytest.mark.parametrize("t", [-0.1, 1.5, torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.5, float("nan")])])
def test_forward_process_rejects_what_is_no_probability(t):
    with pytest.raises(ValueError, match="t "):
        forward_process(torch.zeros(2, T, dtype=torch.long), t, MASK)


# ------------------------------------------------------------------------------------------------- sweeps
def test_the_loss_of_sweeps_without_decay_is_the_exact_likelihood_of_the_sampler():
    """Mean over the 2 steps k of a sweep that begins at its first position; and of one that begins at its second."""
    predict, policy = TablePredictor(), UnmaskingPolicy(order="sweep", steps=2)
    generator = torch.Generator().manual_seed(0)
    masks, weights = sweep_masks(torch.ones(64, T, dtype=torch.bool), generator, steps=2, decay=0.0)
    rows = {tuple(mask.tolist()): w for mask, w in zip(masks, weights, strict=True)}
    odd = (False, True, False, True)
    assert set(rows) == {(True,) * T, odd, tuple(not m for m in odd)}
    for x in all_strings()[::5]:
        exact = policy_likelihood(predict, x[None], policy, MASK)[0].window_nats.item()
        nats = [cross_entropies(predict, x, torch.tensor([m]))[0] for m in ((True,) * T, odd)]
        first = [torch.tensor([2.0, 0, 2, 0]), rows[odd]]  # the full mask is at step 0 of both sweeps
        assert sum(float((w * n).sum()) for w, n in zip(first, nats, strict=True)) / 2 == pytest.approx(exact, abs=1e-6)


def test_sweeps_look_as_the_default_sampler_meets_a_text():
    """After a prompt, with 8 of 16 steps over: the masks are those of reverse_process; weights decay with the turn."""
    assert SWEEP_STEPS == STRIDE
    may_mask = torch.arange(100)[None].expand(400, -1) >= 7
    masks, weights = sweep_masks(may_mask, torch.Generator().manual_seed(0))
    states = [step.tokens[0] == MASK for step in reverse_process(
        lambda tokens: torch.zeros(*tokens.shape, 3), torch.where(may_mask[:1], MASK, 0), MASK, order="sweep", steps=16
    )]  # fmt: skip
    seen = {mask.numpy().tobytes() for mask in masks}
    assert len(seen & {state.numpy().tobytes() for state in states[:-1]}) > 8
    assert not (masks & ~may_mask).any()
    torch.testing.assert_close(weights.sum(1), torch.full((400,), 93.0))
    assert (weights[~masks] == 0).all()
    mask, weight = masks[0], weights[0]
    ratios = (weight[mask] / weight.max()).log() / math.log(0.7)
    torch.testing.assert_close(ratios, ratios.round(), atol=1e-3, rtol=0)


def test_sweeps_are_a_share_of_the_training_batch_and_of_nothing_else():
    rows = Rows(torch.randint(4, 9, (8, 64)), torch.full((8,), 64))
    generator = torch.Generator().manual_seed(0)
    batch = DiffusionObjective(0.75).make_batch(rows, generator, is_training=True)
    assert [int(row.unique().numel()) > 2 for row in batch.weights] == [True] * 6 + [False] * 2
    plain, same = (DiffusionObjective(share).make_batch(rows, torch.Generator().manual_seed(1)) for share in (0.75, 0))
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
