"""The layers of the default network (arch="rotary"): attention, short convolution, n-gram tables, key/value cache.

At the end: the parametrizations of weights that fine-tuning uses, for both architectures.

Layers take sizes and know no configuration. Parameters that project onto the residual stream start at zero.

Letters: B batch, T positions, S positions that attention sees, V vocabulary, C embedding, H heads, D = C / H, L layers,
K taps of the convolution, N chosen positions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

TAPS = 5  # K, positions that the convolution sees: t-4..t (causal) or t-2..t+2 (centred)
NGRAMS = {  # causal? -> the offsets of the tokens that make each kind of n-gram
    True: ((-1, 0), (-2, -1, 0), (-3, -2, -1, 0), (-4, -3, -2, -1, 0), (-2, -1)),
    False: ((-1, 0, 1), (-2, -1, 0, 1), (-1, 0, 1, 2), (-3, -2, -1, 0, 1), (-1, 0, 1, 2, 3)),
}
REACH = -min(map(min, NGRAMS[True]))  # how many earlier tokens the causal n-grams need
BORDER = 8  # the last positions of a stream, which have n-grams with the beginning of the next stream
BORDER_NGRAMS = ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2))  # tokens to the left, and of the next stream
LEFT, RIGHT = (max(sizes) for sizes in zip(*BORDER_NGRAMS, strict=True))


# ------------------------------------------------------------------------------------------------- streams
@dataclass(frozen=True)
class Streams:
    """A window that is written in several places at once: `prefix` positions from left to right, then n streams.

    Each stream has `length` positions. At step k position k of every stream is written. It may depend on the prefix and
    on the positions before k of all streams:

        prefix 2, length 3:   position   0  1  2  3  4  5  6  7
                              step       -  -  0  1  2  0  1  2
    """

    prefix: int
    length: int

    def steps(self, T: int, device=None) -> Tensor:
        """(T,) the step at which each position is read; those of the prefix have negative ones, in order."""
        positions = torch.arange(T, device=device) - self.prefix
        return torch.where(positions < 0, positions, positions % self.length)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, ...) -> what is read without a gap: prefix and first stream (B, prefix + length, ...), and the other
        streams (B * (n - 1), length, ...)."""
        end = self.prefix + self.length
        return x[:, :end], x[:, end:].reshape(-1, self.length, *x.shape[2:])

    @property
    def border(self) -> int:
        """The position at which a stream's border begins: there the next stream's first tokens are known."""
        return max(self.length - BORDER, RIGHT)

    def join(self, first: Tensor, others: Tensor) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([first, others.reshape(len(first), -1, *first.shape[2:])], dim=1)


# ------------------------------------------------------------------------------------------------- mask and cache
def attention_mask(
    T: int, offset: int, pad: Tensor | None, causal: bool, device, streams: Streams | None = None
) -> Tensor | None:
    """Which keys each query may see: bool, broadcastable to (B, 1, T, offset + T); None means all of them.

    The T queries stand at columns offset..offset+T-1. The first pad[b] columns of row b are padding. A padding column
    is visible only to itself: a query needs at least one key, or its softmax is 0/0. With streams, a causal query sees
    the keys that are read before it or with it.
    """
    if streams is not None:
        steps = streams.steps(T, device)
        return steps <= steps[:, None]
    if pad is None and (not causal or T == 1):
        return None
    queries = torch.arange(offset, offset + T, device=device)[:, None]  # (T, 1)
    keys = torch.arange(offset + T, device=device)  # (S,)
    visible = keys <= queries if causal else torch.ones_like(keys <= queries)  # (T, S)
    if pad is None:
        return visible
    return visible & (keys >= pad[:, None, None, None]) | (keys == queries)  # (B, 1, T, S)


class KeyValueCache:
    """What a causal model keeps of the columns it has processed, preallocated so that nothing is concatenated.

    `keys`, `values`: L tensors (B, H, max_len, D); `inputs` (L, B, K-1, C): the last inputs of each layer's
    convolution; `tokens` (B, REACH): the last tokens, for the n-grams; `length`: columns filled, left padding included.
    With streams, columns are in the order in which they were read.
    """

    def __init__(self, batch_size: int, n_layer: int, n_head: int, head_dim: int, max_len: int, device="cpu"):
        shape = batch_size, n_head, max_len, head_dim
        self.keys = [torch.zeros(shape, device=device) for _ in range(n_layer)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.inputs = torch.zeros(n_layer, batch_size, TAPS - 1, n_head * head_dim, device=device)
        self.tokens = torch.zeros(batch_size, REACH, device=device, dtype=torch.long)
        self.beginnings: Tensor | None = None  # (B, n, RIGHT) the first tokens of each stream, once there are streams
        self.length = 0

    def open_streams(self, n: int) -> None:
        """Continue every row in n streams: the first follows what is there, the others see it through attention alone.

        `inputs` and `tokens` get n rows for each row: (L, B * n, K-1, C) and (B * n, REACH).
        """
        B = len(self.tokens)
        self.tokens = F.pad(self.tokens[:, None], (0, 0, 0, n - 1)).flatten(0, 1)
        self.inputs = F.pad(self.inputs[:, :, None], (0, 0, 0, 0, 0, n - 1)).flatten(1, 2)
        self.beginnings = torch.zeros(B, n, RIGHT, device=self.tokens.device, dtype=torch.long)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) keys and values after the `length` stored ones; return all of them, (B, H, S, D)."""
        end = self.length + k.shape[2]
        keys, values = self.keys[layer].narrow(2, 0, end), self.values[layer].narrow(2, 0, end)
        keys.narrow(2, self.length, k.shape[2]).copy_(k)
        values.narrow(2, self.length, v.shape[2]).copy_(v)
        return keys, values

    def reorder(self, rows: Tensor, shared: int = 0) -> None:
        """Row b becomes a copy of row rows[b] (beam search); the number of rows may change.

        Columns below `shared` are equal in all rows and are not copied unless the number of rows changes.
        """
        for stored in (self.keys, self.values):
            for layer, x in enumerate(stored):
                if len(rows) != len(x):
                    stored[layer] = x[rows]
                else:
                    x[:, :, shared : self.length] = x[rows, :, shared : self.length]
        self.inputs, self.tokens = self.inputs[:, rows], self.tokens[rows]

    def clear(self) -> None:
        """Empty the cache: the next tokens are the first."""
        self.length = 0
        self.inputs.zero_()
        self.tokens.zero_()


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
    """Scaled dot-product attention of queries (B, H, T, D) to keys and values (B, H, S, D): (B, H, T, D).

    A single query, compiled, is written as a weighted mean, which fuses with the operations around it.
    """
    if torch.compiler.is_compiling() and q.shape[2] == 1 and mask is None:
        weights = ((q * k).sum(-1, keepdim=True) / math.sqrt(q.shape[-1])).softmax(dim=2)  # (B, H, S, 1)
        return (weights * v).sum(2, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def select(x: Tensor, at: Tensor | None) -> Tensor:
    """x (B, T, C), or (N, C) of the positions `at` (N,), which are counted through all rows."""
    return x if at is None else x.flatten(0, 1).index_select(0, at)


class NgramTables(nn.Module):
    """Embeddings of n-grams, from hashed tables that start at zero.

    The row of an n-gram is the number that its tokens spell in this base, modulo the rows. Every kind has its own
    table, so that a rare long n-gram never shares a row with a frequent short one. With base = V, different n-grams are
    different numbers. A base that stays when V grows keeps the rows of the old n-grams.
    """

    def __init__(self, kinds: list[list[int]], width: int, base: int, n_embd: int, rows: int, dropout: float):
        """kinds: the columns, of `width` ones, that make each kind of n-gram."""
        super().__init__()
        self.rows = rows
        digits = torch.zeros(len(kinds), width, dtype=torch.long)  # (n, W) place values
        for row, columns in zip(digits, kinds, strict=True):
            for place, column in enumerate(reversed(columns)):
                row[column] = pow(base, place, rows)
        self.register_buffer("digits", digits, persistent=False)
        self.register_buffer("first_rows", rows * torch.arange(len(kinds)), persistent=False)
        zeros = torch.zeros(rows * len(kinds), n_embd)
        self.tables = nn.EmbeddingBag.from_pretrained(zeros, freeze=False, mode="sum")
        self.dropout = nn.Dropout(dropout)

    def lookup(self, windows: Tensor) -> Tensor:
        """windows (..., W) of tokens -> (..., C), the sum over all kinds."""
        rows = (windows[..., None, :] * self.digits).sum(-1) % self.rows + self.first_rows  # (..., n)
        if torch.compiler.is_compiling() and rows.numel() == len(self.digits):  # compilers cannot fuse the bag's kernel
            return self.tables.weight[rows].sum(-2)
        embeddings = self.tables(rows.flatten(0, -2))  # (positions, C)
        return self.dropout(embeddings.view(*windows.shape[:-1], embeddings.shape[-1]))


class NgramEmbedding(NgramTables):
    """The sum of an embedding for each kind of n-gram around a position."""

    def __init__(self, base: int, n_embd: int, rows: int, dropout: float, causal: bool):
        kinds = NGRAMS[causal]
        self.left, self.right = -min(map(min, kinds)), max(map(max, kinds))
        columns = [[self.left + offset for offset in offsets] for offsets in kinds]
        super().__init__(columns, self.left + 1 + self.right, base, n_embd, rows, dropout)

    def forward(self, tokens: Tensor, before: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, C). `before` (B, left): the tokens on the left (default: [PAD] = 0), updated in place.

        Streams: tokens (B, n), one of each, and `before` (B * n, left).
        """
        B, T = tokens.shape
        if before is None:
            tokens = F.pad(tokens, (self.left, self.right))
        else:
            tokens = torch.cat([before, tokens.reshape(len(before), -1)], dim=1)
            before.copy_(tokens[:, -self.left :])
        return self.lookup(tokens.unfold(1, self.left + 1 + self.right, 1)).view(B, T, -1)


class BorderEmbedding(NgramTables):
    """The sum of an embedding for each kind of n-gram across the right border of a stream.

    It is made of the last tokens of a stream, the first ones of the next stream, and how many positions lie between.
    """

    def __init__(self, base: int, n_embd: int, rows: int, dropout: float):
        kinds = [[*range(LEFT - left, LEFT + right), LEFT + RIGHT] for left, right in BORDER_NGRAMS]
        super().__init__(kinds, LEFT + RIGHT + 1, base, n_embd, rows, dropout)

    def forward(self, tokens: Tensor, streams: Streams) -> Tensor:
        """tokens (B, T), of streams (B, n, length) at the end -> (B, T, C); 0 at positions far from a border."""
        (B, T), first = tokens.shape, streams.border
        if first >= streams.length:
            return torch.zeros(B, T, self.tables.embedding_dim, device=tokens.device)
        x = tokens[:, streams.prefix :].view(B, -1, streams.length)
        left = F.pad(x[:, :-1], (LEFT - 1, 0)).unfold(2, LEFT, 1)[:, :, first:]  # (B, n - 1, D, LEFT)
        e = self.near_border(left, x[:, 1:, 1 : RIGHT + 1], torch.arange(streams.length - first, 0, -1))  # BORDER..1
        e = F.pad(e, (0, 0, first, 0, 0, 1)).flatten(1, 2)  # (B, n * length, C)
        return F.pad(e, (0, 0, streams.prefix, 0))

    def step(self, streams: Streams, k: int, cache: KeyValueCache) -> Tensor | float:
        """The same for position k of every stream, (B, n, C), from what the cache keeps of the tokens; it is there too.

        The first tokens of the streams are kept in the cache here.
        """
        B, n, _ = cache.beginnings.shape
        tokens = cache.tokens.view(B, n, -1)
        if 1 <= k <= RIGHT:
            cache.beginnings[..., k - 1] = tokens[..., -1]
        if k < streams.border:
            return 0.0
        distance = torch.tensor([streams.length - k])
        e = self.near_border(tokens[:, :-1, None, -LEFT:], cache.beginnings[:, 1:], distance)
        return F.pad(e[:, :, 0], (0, 0, 0, 1))

    def near_border(self, left: Tensor, right: Tensor, distance: Tensor) -> Tensor:
        """left (B, n - 1, D, LEFT), right (B, n - 1, RIGHT), distance (D,) to the border -> (B, n - 1, D, C)."""
        D = len(distance)
        right = right[:, :, None].expand(-1, -1, D, -1)
        distance = distance.to(left.device)[:, None].expand(*left.shape[:3], 1)
        return self.lookup(torch.cat([left, right, distance], dim=-1))


class ShortConvolution(nn.Module):
    """A depthwise convolution over K neighbouring positions that starts at zero."""

    def __init__(self, n_embd: int, causal: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_embd, TAPS))
        self.padding = TAPS - 1 if causal else TAPS // 2

    def forward(self, x: Tensor, before: Tensor | None = None, streams: Streams | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). `before` (B, K-1, C): the inputs left of x (default: 0), updated in place.

        With both, x (B, n, C) is one position of each stream, and `before` (B * n, K-1, C).
        """
        if streams is not None and before is None:
            return streams.join(*map(self.forward, streams.split(x)))
        if streams is not None:
            return self.forward(x.flatten(0, 1)[:, None], before).view_as(x)
        (_, T, C), padding = x.shape, self.padding
        if before is not None:
            x, padding = torch.cat([before, x], dim=1), 0
            before.copy_(x[:, T:])
            if T == 1:  # a single window needs no convolution kernel
                return (x * self.weight.T).sum(1, keepdim=True)
        # As a channels-last image one pixel high: the fastest depthwise convolution on CPUs.
        x = x.transpose(1, 2).unsqueeze(2)  # (B, C, 1, T)
        x = F.conv2d(x, self.weight[:, None, None], padding=(0, padding), groups=C)
        return x.squeeze(2).transpose(1, 2)[:, :T]


class Attention(nn.Module):
    """Multi-head self-attention with RoPE and QK-norm; no biases, no dropout inside; the projection starts at zero.

    `layer` is the number of the layer, under which its keys and values stand in the cache.
    """

    def __init__(self, n_embd: int, n_head: int, causal: bool, layer: int):
        super().__init__()
        self.n_head, self.causal, self.layer = n_head, causal, layer
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(
        self,
        x: Tensor,
        rotations: Tensor,
        pad: Tensor | None,
        cache: KeyValueCache | None,
        at: Tensor | None,
        streams: Streams | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (N, C) of the positions `at` (N,), which are counted through all rows."""
        (B, T, C), H = x.shape, self.n_head
        qk, v = linear(x, self.qkv).view(B, T, 3 * H, C // H).split((2 * H, H), dim=2)
        qk = rotate(norm(qk), rotations).to(v.dtype)  # QK-norm (arXiv 2302.05442), then RoPE
        q, k, v = (heads.transpose(1, 2) for heads in (*qk.split(H, dim=2), v))  # (B, H, T, D) each
        offset = 0
        if cache is not None:
            offset = cache.length
            k, v = cache.extend(self.layer, k, v)
        is_causal = self.causal and offset == 0 and pad is None and streams is None  # SDPA makes that mask itself
        sees_all = streams is not None and cache is not None  # whatever was read so far, in all streams
        mask = None if is_causal or sees_all else attention_mask(T, offset, pad, self.causal, x.device, streams)
        out = attend(q, k, v, mask, is_causal).transpose(1, 2).reshape(B, T, C)
        return linear(select(out, at), self.proj)


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
    """One layer: short convolution, attention and MLP, each added to the residual stream."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, causal: bool, layer: int):
        super().__init__()
        self.layer = layer
        self.conv = ShortConvolution(n_embd, causal)
        self.attention = Attention(n_embd, n_head, causal, layer)
        self.mlp = MLP(n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rotations: Tensor,
        pad: Tensor | None,
        cache: KeyValueCache | None,
        at: Tensor | None,
        streams: Streams | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (N, C) of the positions `at` (N,), which are counted through all rows."""
        x = x + self.conv(x, cache.inputs[self.layer] if cache is not None else None, streams)
        x = select(x, at) + self.dropout(self.attention(norm(x), rotations, pad, cache, at, streams))
        return x + self.dropout(self.mlp(norm(x)))


# ------------------------------------------------------------------------------------------------- parametrizations
LORA_ALPHA = 16.0  # the adapters' scale is LORA_ALPHA / rank


class LowRank(nn.Module):
    """LoRA (arXiv 2106.09685): W (R, C) -> W + (alpha / r) B A, with B (R, r) and A (r, C), as a parametrization of W.

    B starts at zero, so the weight is unchanged at first, bit for bit. A's entries have variance 1/C: A x is of the
    size of x. The product is formed each time the weight is read: merge the adapters before decoding long texts.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator | None = None):
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) / math.sqrt(columns))
        self.b = nn.Parameter(torch.zeros(rows, rank))
        self.scale = LORA_ALPHA / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a)


class SplitRows(nn.Module):
    """A weight kept in two parts, the rows of old tokens and the rows of new ones, so that one part can be frozen."""

    def __init__(self, old: int):
        super().__init__()
        self.old = old

    def forward(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old, new])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts, from which `register_parametrization` makes the parameters original0 and original1."""
        return weight[: self.old].clone(), weight[self.old :].clone()


def matrices(encoder: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The (module, name of its weight) of all attention and MLP weights, of either architecture."""
    for module in encoder.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield module, "in_proj_weight"
        elif isinstance(module, nn.Linear):
            yield module, "weight"


def add_low_rank(encoder: nn.Module, rank: int, generator: torch.Generator | None = None) -> None:
    """Give every attention and MLP weight an adapter."""
    for module, name in list(matrices(encoder)):
        register_parametrization(module, name, LowRank(getattr(module, name), rank, generator))
