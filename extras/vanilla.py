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


def sinusoids(T: int, C: int) -> Tensor:
    """(T, C) positions, sine and cosine in turns ("Attention is all you need", section 3.5)."""
    angles = torch.arange(T)[:, None] * torch.exp(torch.arange(0, C, 2) * (-math.log(10000.0) / C))  # (T, C/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class VanillaEncoder(nn.Module):
    """Tokens (B, T) -> hidden states (B, T, C), or (N, C) of the positions `at` (N,), counted through all rows."""

    def __init__(self, config: ModelConfig, causal: bool):
        super().__init__()
        self.causal, self.n_embd = causal, config.n_embd
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.register_buffer("positions", sinusoids(config.block_size, config.n_embd), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(
            config.n_embd, config.n_head, 4 * config.n_embd, dropout=config.dropout, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.n_layer, enable_nested_tensor=False)

    def make_context(self, T: int, cache: KeyValueCache | None = None) -> Context:
        """The context of a call with T positions; its rotations are not used. cache: always None."""
        mask = torch.ones(T, T, dtype=torch.bool, device=self.positions.device).tril() if self.causal else None
        return Context(self.positions, mask)

    def forward(self, tokens: Tensor, context: Context, at: Tensor | None = None) -> Tensor:
        x = self.dropout(self.embedding(tokens) * math.sqrt(self.n_embd) + self.positions[: tokens.shape[1]])
        hidden = self.encoder(x, mask=None if context.mask is None else ~context.mask)  # true: may NOT be seen
        return hidden if at is None else hidden.flatten(0, 1).index_select(0, at)


ENCODERS["vanilla"] = VanillaEncoder
