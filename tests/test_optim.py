"""Orthogonalization against the SVD, Muon against its definition, n-gram steps, and the schedule."""

import pytest
import torch
from toy import random_model, seeded

from optim import Muon, build_optimizers, learning_rate_factor, orthogonalize, set_learning_rate


def noise(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded())


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_orthogonalize_is_the_polar_factor_of_the_svd(shape):
    """The result is U V^T up to the iteration's error in the singular values; its directions are exact."""
    matrices = noise(*shape)
    singular_values = torch.linalg.svdvals(orthogonalize(matrices))
    assert 0.4 < singular_values.min() < singular_values.max() < 1.6
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    in_its_own_basis = u.mT @ orthogonalize(matrices) @ vt.mT
    off_diagonal = in_its_own_basis - torch.diag_embed(in_its_own_basis.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-3


def test_muon_steps_are_orthogonalized_nesterov_momentum():
    weights = [torch.nn.Parameter(noise(8, 8)), torch.nn.Parameter(noise(24, 8)), torch.nn.Parameter(noise(8, 8) + 1)]
    before = [w.detach().clone() for w in weights]
    muon = Muon([{"params": weights[1:2], "parts": 3}, {"params": weights[::2]}], lr=0.1, weight_decay=0.5)
    momenta = [torch.zeros_like(w) for w in weights]
    for step in range(3):
        gradients = [noise(*w.shape) * (step + 1) + i for i, w in enumerate(weights)]
        for w, g in zip(weights, gradients, strict=True):
            w.grad = g.clone()
        muon.step()
        for i, g in enumerate(gradients):
            momenta[i] = 0.95 * momenta[i] + 0.05 * g
            update = 0.05 * g + 0.95 * momenta[i]
            parts = torch.cat([orthogonalize(part[None])[0] for part in update.split(8)])  # one, or q, k and v
            before[i] = before[i] * (1 - 0.1 * 0.5) - 0.1 * parts
    for w, expected in zip(weights, before, strict=True):
        assert torch.allclose(w, expected, atol=1e-4)
    tall = torch.nn.Parameter(torch.zeros(32, 8))
    tall.grad = noise(32, 8)
    Muon([tall], lr=1.0).step()
    assert torch.allclose(tall, -2.0 * orthogonalize(noise(32, 8)[None])[0], atol=1e-4)  # 2 = sqrt(32 / 8): larger


@pytest.mark.parametrize("arch", ["rotary", "vanilla"])
def test_every_parameter_has_exactly_one_optimizer(arch):
    model = random_model("gpt", arch=arch)
    optimizers = build_optimizers(model, tokens_per_step=6)
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))
    if arch == "rotary":
        matrices = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
        assert {id(p) for n, p in model.named_parameters() if "blocks" in n and "conv" not in n} == matrices
    set_learning_rate(optimizers, 0.5)
    for optimizer in optimizers:
        assert all(group["lr"] == 0.5 * group["initial_lr"] for group in optimizer.param_groups)


def test_schedule_warms_up_stays_and_falls_to_zero():
    factors = [learning_rate_factor(i / 1000) for i in range(1001)]
    assert 0 < factors[0] < 0.01
    assert max(factors) == 1
    assert factors[30] == factors[390] == 1
    assert factors[700] == pytest.approx(0.5)
    assert factors[1000] == 0
    assert learning_rate_factor(1.2) == 0


def test_ngram_tables_take_gradient_steps_whether_sparse_or_dense():
    """ngram_lr is per token: a row moves by it times the sum of its gradients of each token's loss, no other row does.

    The loss of a step is the mean over its tokens.
    """
    tables = []
    for sparse in (True, False):
        model = random_model("gpt")
        optimizers = build_optimizers(model, tokens_per_step=6, ngram_lr=3.0)
        bag = model.encoder.ngrams.tables
        bag.sparse = sparse
        losses = model(torch.tensor([[5, 6, 5, 6, 5, 6]]))[..., 3:].logsumexp(-1)
        (sum_of_gradients,) = torch.autograd.grad(losses.sum(), bag.weight, retain_graph=True)
        losses.mean().backward()
        gradient, before = sum_of_gradients.to_dense().clone(), bag.weight.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.allclose(bag.weight, before - 3.0 * gradient, atol=1e-6)
        assert 0 < (gradient.abs().sum(1) > 0).sum() <= 6 * len(model.encoder.ngrams.first_rows)
        tables.append(bag.weight.detach())
    assert torch.allclose(*tables, atol=1e-6)
