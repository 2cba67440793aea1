"""PyTorch's textbook encoder, as the plan that this project began from has it: `train.py --arch vanilla`.

It is the reference to compare the default network with: sinusoidal positions, post-norm nn.TransformerEncoder, no
n-grams, no convolution, no key/value cache.
"""

import math

import torch
from torch import Tensor, nn

from config import ModelConfig
from layers import Context, KeyValueCache
from model import ENCODERS


class PositionalEncoding(nn.Module):
    """Adds sinusoids to (B, T, C) embeddings ("Attention is all you need", section 3.5)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        angles = torch.arange(config.block_size)[:, None] * torch.exp(
            torch.arange(0, config.n_embd, 2) * (-math.log(10000.0) / config.n_embd)
        )  # (T, C/2)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (T, C), sin and cos interleaved
        self.register_buffer("table", table, persistent=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.dropout(x + self.table[: x.shape[1]])


class VanillaEncoder(nn.Module):
    """Tokens (B, T) -> hidden states (B, T, C), or (N, C) of the positions `at` (N,), counted through all rows."""

    def __init__(self, config: ModelConfig, causal: bool):
        super().__init__()
        self.causal, self.n_embd = causal, config.n_embd
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = PositionalEncoding(config)
        layer = nn.TransformerEncoderLayer(
            config.n_embd, config.n_head, 4 * config.n_embd, dropout=config.dropout, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.n_layer, enable_nested_tensor=False)

    def make_context(self, T: int, cache: KeyValueCache | None = None) -> Context:
        """The context of a call with T positions; its rotations are not used. Raises ValueError for a cache."""
        if cache is not None:
            raise ValueError('arch="vanilla" has no key/value cache: nn.TransformerEncoder cannot use one')
        mask = torch.ones(T, T, dtype=torch.bool, device=self.positions.table.device).tril() if self.causal else None
        return Context(self.positions.table, mask)

    def forward(self, tokens: Tensor, context: Context, at: Tensor | None = None) -> Tensor:
        x = self.positions(self.embedding(tokens) * math.sqrt(self.n_embd))
        hidden = self.encoder(x, mask=None if context.mask is None else ~context.mask)  # true: may NOT be seen
        return hidden if at is None else hidden.flatten(0, 1).index_select(0, at)


ENCODERS["vanilla"] = VanillaEncoder
