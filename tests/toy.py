"""A predictor small enough to enumerate: any table of conditionals over V letters and T positions."""

import itertools

import torch
from torch import Tensor

V, T, MASK = 3, 4, 3  # letters 0, 1, 2; id 3 is [MASK]


class TablePredictor:
    """predict(tokens): for each of the 4^T partly masked strings its own random (T, V) table, in float64."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn((V + 1) ** T, T, V, generator=generator, dtype=torch.float64)

    def __call__(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]  # a shorter string reads the table as if 0s followed
        places = (V + 1) ** torch.arange(length)
        return self.table[(tokens * places).sum(1), :length]


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
