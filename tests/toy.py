"""Predictors small enough to enumerate, over V letters and T positions, small random models, and what is counted."""

import itertools
import math

import torch
from torch import Tensor

from checkpoint import new_model
from config import ModelConfig

V, T, MASK = 3, 4, 3  # letters 0, 1, 2; id 3 is [MASK]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(name: str, *, seed: int = 0, std: float = 0.35, **sizes):
    """A small model of which every weight is random: a new one ignores its input, as its last layers start at zero."""
    usual = {"vocab_size": 12, "block_size": 16, "n_embd": 16, "n_head": 2, "n_layer": 2, "ngram_rows": 101}
    model, generator = new_model(name, ModelConfig(**usual | sizes)).eval(), seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, std, generator=generator)
    return model


class TablePredictor:
    """predict(tokens): for each of the 4^T partly masked strings its own random (T, V) table, in float64."""

    def __init__(self, seed: int = 0):
        self.table = torch.randn((V + 1) ** T, T, V, generator=seeded(seed), dtype=torch.float64)

    def __call__(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]  # a shorter string reads the table as if 0s followed
        places = (V + 1) ** torch.arange(length)
        return self.table[(tokens * places).sum(1), :length]


class TrueConditionals(TablePredictor):
    """The table holds log p of each masked position, given the visible ones, of a joint distribution `p` (V^T,)."""

    def __init__(self, seed: int = 3):
        joint = torch.randn((V,) * T, generator=seeded(seed), dtype=torch.float64).mul(1.3).exp()
        self.p, self.table = (joint / joint.sum()).flatten(), torch.zeros((V + 1) ** T, T, V, dtype=torch.float64)
        for number, row in enumerate(itertools.product(range(V + 1), repeat=T)):
            row = row[::-1]  # the first letter counts least in a number of the table
            visible = joint[tuple(slice(None) if token == MASK else slice(token, token + 1) for token in row)]
            for i in (i for i in range(T) if row[i] == MASK):
                self.table[number, i] = (visible.sum([j for j in range(T) if j != i]) / visible.sum()).log()


def uniform(tokens: Tensor) -> Tensor:
    """Knows nothing: equal logits."""
    return torch.zeros(*tokens.shape, V, dtype=torch.float64)


def all_strings(length: int = T) -> Tensor:
    return torch.tensor(list(itertools.product(range(V), repeat=length)))  # (V^T, T)


def all_masks(length: int = T) -> Tensor:
    """Every nonempty mask: (2^T - 1, T)."""
    return torch.tensor(list(itertools.product([False, True], repeat=length)))[1:]


def cross_entropies(predict, x: Tensor, masks: Tensor) -> Tensor:
    """CE_i(M) of one string x (T,) under each mask (K, T): (K, T), 0 where visible. Written out, on purpose."""
    log_p = predict(x.expand(len(masks), -1).masked_fill(masks, MASK)).log_softmax(-1)
    return torch.stack([-log_p[:, i, x[i]] for i in range(len(x))], 1) * masks


def nats_in_order(predict, x: Tensor, groups) -> float:
    """-log p of x (T,) when groups of its positions are revealed one after the other: the chain rule along an order."""
    mask, nats = torch.ones(1, len(x), dtype=torch.bool), 0.0
    for group in groups:
        nats += cross_entropies(predict, x, mask)[0, list(group)].sum().item()
        mask[0, list(group)] = False
    return nats


def subset_bound(predict, x: Tensor) -> float:
    """Sum over nonempty M of sum_i CE_i(M) / (|M| C(T, |M|))."""
    length = len(x)
    masks = all_masks(length)
    weights = torch.tensor([1 / (m * math.comb(length, m)) for m in masks.sum(1).tolist()], dtype=torch.float64)
    return float((cross_entropies(predict, x, masks).sum(1) * weights).sum())


def assert_frequencies(strings: Tensor, expected: Tensor) -> None:
    """strings (N, T) are drawn with probabilities expected (V^T,), in the order of `all_strings`: a chi-square test."""
    assert abs(float(expected.sum()) - 1) < 1e-6
    observed = torch.bincount((strings * V ** torch.arange(T - 1, -1, -1)).sum(1), minlength=V**T)
    statistic = ((observed - len(strings) * expected) ** 2 / (len(strings) * expected)).sum()  # 80 degrees of freedom
    assert statistic < 125  # exceeded once in a thousand seeds, were the two equal; the seeds are fixed
