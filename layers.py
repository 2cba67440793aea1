"""The layers of the network, each `forward(x, context)`: attention, short convolution, n-gram tables, key/value cache.

A `Context` is what a layer needs to know of a call besides its input. It is made once per call of the model.
Layers take sizes and know no configuration. What a new layer adds to its input is zero.

Letters: B batch, T positions, S positions that attention sees, V vocabulary, C embedding, H heads, D = C / H, L layers,
K taps of the convolution, W numbers in a row of an n-gram table.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAPS = 5  # K, positions that the convolution sees: t-4..t (causal) or t-2..t+2 (centred)
NGRAMS = {  # causal? -> the offsets of the tokens that make each kind of n-gram
    True: ((-1, 0), (-2, -1, 0), (-3, -2, -1, 0), (-4, -3, -2, -1, 0), (-2, -1)),
    False: ((-1, 0, 1), (-2, -1, 0, 1), (-1, 0, 1, 2), (-3, -2, -1, 0, 1), (-1, 0, 1, 2, 3)),
}
REACH = -min(map(min, NGRAMS[True]))  # how many earlier tokens the causal n-grams need


# ------------------------------------------------------------------------------------------------- context and cache
class KeyValueCache:
    """What a causal model keeps of the columns it has processed, preallocated so that nothing is concatenated.

    `keys`, `values`: L tensors (B, H, max_len, D); `inputs` (L, B, K-1, C): the last inputs of each layer's
    convolution; `tokens` (B, REACH): the last tokens, for the n-grams; `length`: columns filled.
    """

    def __init__(self, batch_size: int, n_layer: int, n_head: int, head_dim: int, max_len: int, device="cpu"):
        shape = batch_size, n_head, max_len, head_dim
        self.keys = [torch.empty(shape, device=device) for _ in range(n_layer)]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.inputs = torch.zeros(n_layer, batch_size, TAPS - 1, n_head * head_dim, device=device)
        self.tokens = torch.zeros(batch_size, REACH, device=device, dtype=torch.long)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) keys and values after the `length` stored ones; return all of them, (B, H, S, D)."""
        end = self.length + k.shape[2]
        keys, values = self.keys[layer].narrow(2, 0, end), self.values[layer].narrow(2, 0, end)
        keys.narrow(2, self.length, k.shape[2]).copy_(k)
        values.narrow(2, self.length, v.shape[2]).copy_(v)
        return keys, values

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes a copy of row rows[b] (beam search); the number of rows may change."""
        self.keys, self.values = ([x[rows] for x in stored] for stored in (self.keys, self.values))
        self.inputs, self.tokens = self.inputs[:, rows], self.tokens[rows]


@dataclass
class Context:
    """What the layers need to know of a call. Made once per call of the model; no layer knows what made it."""

    rotations: Tensor  # (T, D/2, 2) of the positions of x
    mask: Tensor | None = None  # (T, S) bool: which positions each one sees; None: all, or those up to it
    is_causal: bool = False  # each sees those up to it (the attention kernel makes that mask itself)
    cache: KeyValueCache | None = None  # what came before x, which is added to it


# ------------------------------------------------------------------------------------------------- functions
def norm(x: Tensor) -> Tensor:
    """Layer norm without parameters. RMSNorm is as good; on CPUs layer norm is a single fused kernel."""
    return F.layer_norm(x, x.shape[-1:])


def rotary_table(block_size: int, head_dim: int) -> Tensor:
    """Cosine and sine of t w_d, (block_size, D/2, 2): RoFormer's rotations (arXiv 2104.09864, eq. 15)."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)  # (D/2,)
    angles = torch.arange(block_size)[:, None] * frequencies  # (T, D/2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate each pair of channels of x (B, T, H, D) by its position's angle, rotations (T, D/2, 2).

    In eager mode this is one complex product. Compilers generate no complex code but fuse the four real products.
    """
    pairs, rotations = x.float().unflatten(-1, (-1, 2)), rotations[:, None]  # (B, T, H, D/2, 2), (T, 1, D/2, 2)
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations)).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), rotations.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(x) without bias. A single row, compiled, is written as a sum of products.

    On CPUs the generated loop is four times as fast as the libraries' matrix-vector product, which is most of the time
    of decoding a token with the cache.
    """
    if torch.compiler.is_compiling() and x.shape[:-1].numel() == 1:
        return (x[..., None, :] * layer.weight).sum(-1)
    return layer(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Scaled dot-product attention of queries (B, H, T, D) to keys and values (B, H, S, D): (B, H, T, D)."""
    if torch.compiler.is_compiling() and q.shape[2] == 1 and mask is None:  # fuses with the operations around it
        weights = ((q * k).sum(-1, keepdim=True) / math.sqrt(q.shape[-1])).softmax(dim=2)  # (B, H, S, 1)
        return (weights * v).sum(2, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


# ------------------------------------------------------------------------------------------------- layers
class NgramEmbedding(nn.Module):
    """The sum of an embedding for each kind of n-gram around a position, from hashed tables that start at zero.

    The row of an n-gram is the number that its tokens spell in `base`, modulo the rows. Every kind has its own table,
    so that a rare long n-gram never shares a row with a frequent short one. With base = V, different n-grams are
    different numbers. A base that stays when V grows keeps the rows of the old n-grams.

    width > 0: rows of that many numbers, mapped up to C by one matrix. Most of a model's size is in these tables.
    """

    def __init__(self, base: int, n_embd: int, rows: int, width: int, dropout: float, causal: bool):
        super().__init__()
        kinds = NGRAMS[causal]
        self.left, self.right, self.rows = -min(map(min, kinds)), max(map(max, kinds)), rows
        digits = torch.zeros(len(kinds), self.left + 1 + self.right, dtype=torch.long)  # (kinds, window) place values
        for row, offsets in zip(digits, kinds, strict=True):
            for place, offset in enumerate(reversed(offsets)):
                row[self.left + offset] = pow(base, place, rows)
        self.register_buffer("digits", digits, persistent=False)
        self.register_buffer("first_rows", rows * torch.arange(len(kinds)), persistent=False)
        zeros = torch.zeros(rows * len(kinds), width or n_embd)
        self.tables = nn.EmbeddingBag.from_pretrained(zeros, freeze=False, mode="sum")
        self.up = nn.Linear(width, n_embd, bias=False) if width else nn.Identity()
        for weight in self.up.parameters():
            nn.init.normal_(weight, std=n_embd**-0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        """tokens (B, T) -> (B, T, C). Left of a text without a cache stand [PAD]s (0), as right of LLaDA's."""
        B, T = tokens.shape
        if context.cache is None:
            tokens = F.pad(tokens, (self.left, self.right))
        else:
            tokens = torch.cat([context.cache.tokens, tokens], dim=1)
            context.cache.tokens.copy_(tokens[:, -self.left :])
        windows = tokens.unfold(1, self.left + 1 + self.right, 1)  # (B, T, window)
        rows = (windows[..., None, :] * self.digits).sum(-1) % self.rows + self.first_rows  # (B, T, kinds)
        if torch.compiler.is_compiling() and B * T == 1:  # compilers cannot fuse the bag's kernel
            return self.up(self.tables.weight[rows].sum(-2))
        return self.up(self.dropout(self.tables(rows.flatten(0, 1)).view(B, T, -1)))


class ShortConvolution(nn.Module):
    """A depthwise convolution over K neighbouring positions that starts at zero."""

    def __init__(self, n_embd: int, causal: bool, layer: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_embd, TAPS))
        self.padding, self.layer = TAPS - 1 if causal else TAPS // 2, layer

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, T, C) -> (B, T, C). Left of a text without a cache stand zeros."""
        (_, T, C), padding = x.shape, self.padding
        if context.cache is not None:
            before = context.cache.inputs[self.layer]
            x, padding = torch.cat([before, x], dim=1), 0
            before.copy_(x[:, T:])
            if T == 1:  # a single window needs no convolution kernel
                return (x * self.weight.T).sum(1, keepdim=True)
        # As a channels-last image one pixel high: the fastest depthwise convolution on CPUs.
        x = x.transpose(1, 2).unsqueeze(2)  # (B, C, 1, T)
        x = F.conv2d(x, self.weight[:, None, None], padding=(0, padding), groups=C)
        return x.squeeze(2).transpose(1, 2)[:, :T]


class Attention(nn.Module):
    """Multi-head self-attention with RoPE and QK-norm; no biases, no dropout inside; the projection starts at zero."""

    def __init__(self, n_embd: int, n_head: int, layer: int):
        super().__init__()
        self.n_head, self.layer = n_head, layer  # the cache holds the keys and values of each layer
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        (B, T, C), H = x.shape, self.n_head
        qk, v = linear(x, self.qkv).view(B, T, 3 * H, C // H).split((2 * H, H), dim=2)
        qk = rotate(norm(qk), context.rotations).to(v.dtype)  # QK-norm (arXiv 2302.05442), then RoPE
        q, k, v = (heads.transpose(1, 2) for heads in (*qk.split(H, dim=2), v))  # (B, H, T, D) each
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        out = attend(q, k, v, context.mask, context.is_causal)
        return linear(out.transpose(1, 2).reshape(B, T, C), self.proj)


class MLP(nn.Module):
    """C -> 4C -> C with ReLU^2 (Primer, arXiv 2109.08668): better than GELU here, and cheap on CPUs."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.proj = nn.Linear(4 * n_embd, n_embd, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(F.relu(linear(x, self.fc)).square(), self.proj)


class Block(nn.Module):
    """One layer: `mix` lets positions see each other, `think` works on each alone. Both add to x."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, causal: bool, layer: int):
        super().__init__()
        self.conv = ShortConvolution(n_embd, causal, layer)
        self.attention = Attention(n_embd, n_head, layer)
        self.mlp = MLP(n_embd)
        self.dropout = nn.Dropout(dropout)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.conv(x, context)
        return x + self.dropout(self.attention(norm(x), context))

    def think(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        return x + self.dropout(self.mlp(norm(x)))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.think(self.mix(x, context))
