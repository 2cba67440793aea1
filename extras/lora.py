"""Low-rank adapters: fine-tuning that trains a thousandth of the weights (LoRA, arXiv 2106.09685; `--lora-rank`).

Every attention and MLP weight W (R, C) is read as W + (alpha / r) B A, with B (R, r) and A (r, C); all else is frozen,
but for the rows of ids that the weights were not trained on, which no adapter could learn.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

from model import Transformer

LORA_ALPHA = 16.0  # the adapters' part of a weight is (LORA_ALPHA / rank) B A


class LowRank(nn.Module):
    """The parametrization of a weight. B starts at zero, so the weight is unchanged at first, bit for bit.

    A's entries have variance 1/C: A x is of the size of x. The product is formed each time the weight is read: merge
    the adapters before decoding long texts.
    """

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
        self.b = nn.Parameter(torch.zeros(rows, rank))
        self.scale = LORA_ALPHA / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a)


def matrices(model: Transformer) -> Iterator[tuple[nn.Module, str]]:
    """The (module, name of its weight) of all attention and MLP weights, of either architecture."""
    for name, module in model.encoder.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield module, "in_proj_weight"
        elif isinstance(module, nn.Linear) and name != "ngrams.up":
            yield module, "weight"


def add_adapters(model: Transformer) -> None:
    """Give the model adapters of rank config.lora_rank, and freeze everything else.

    With new ids, from config.ngram_base on, embedding and head are trained as well: the gradient of the old rows is 0.
    """
    model.requires_grad_(False)
    for module, name in list(matrices(model)):
        register_parametrization(module, name, LowRank(getattr(module, name), model.config.lora_rank))
    old, V = model.config.ngram_base or model.config.vocab_size, model.config.vocab_size
    if old < V:
        for weight in (model.encoder.embedding.weight, model.head.weight):
            weight.requires_grad_(True)
            is_new = (torch.arange(V) >= old)[:, None]
            weight.register_hook(lambda gradient, is_new=is_new: gradient * is_new.to(gradient.device))


def merge_adapters(model: Transformer) -> None:
    """Add the adapters to their weights: the outputs are the same up to rounding."""
    for module, name in list(matrices(model)):
        if is_parametrized(module, name):
            remove_parametrizations(module, name, leave_parametrized=True)
    model.requires_grad_(True)
    model.config = replace(model.config, lora_rank=0)
