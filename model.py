"""The Transformer, and the two language models made of it: `LLaDAModel` (mask predictor) and `GPT` (causal).

They are one network with one difference, `causal`: which positions a position may see. Parameter counts are equal.

Letters:  B batch, T positions, V vocabulary, C embedding, H heads, D = C / H, L layers, K taps of the convolution.
A position is described by what it is and by its neighbourhood: n-gram tables (looked up) and a short convolution
(learned), causal in GPT, centred in LLaDA. On a small budget these local statistics are most of what there is to learn;
attention is then free for the rest.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

NEVER_PREDICTED = 3  # ids 0, 1, 2 are [PAD], [MASK], [START]: their logits are -inf by construction (MDLM's SUBS)
TAPS = 5  # positions the depthwise convolution sees: t-4..t (GPT) or t-2..t+2 (LLaDA)
NGRAMS = {  # causal? -> the offsets of the tokens that make each kind of n-gram
    True: ((-1, 0), (-2, -1, 0), (-3, -2, -1, 0), (-4, -3, -2, -1, 0), (-2, -1)),
    False: ((-1, 0, 1), (-2, -1, 0, 1), (-1, 0, 1, 2), (-3, -2, -1, 0, 1), (-1, 0, 1, 2, 3)),
}
REACH = -min(map(min, NGRAMS[True]))  # how far back GPT's n-grams look


@dataclass
class TransformerConfig:
    """Everything needed to rebuild a network. Raises ValueError for sizes that cannot be built."""

    vocab_size: int
    block_size: int  # the context: the largest T
    n_embd: int = 128  # C
    n_head: int = 4  # H
    n_layer: int = 4  # L
    dropout: float = 0.0
    arch: str = "rotary"  # or "vanilla"
    ngram_dropout: float = 0.0  # of the n-gram tables, which overfit first
    ngram_rows: int = 65521  # of each table, a prime: pairs of up to 255 tokens never share a row, longer n-grams may

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_embd", "n_head", "n_layer", "ngram_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd must be a multiple of 2 * n_head, got {self.n_embd} with n_head {self.n_head}")
        for name in ("dropout", "ngram_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.arch not in ENCODERS:
            raise ValueError(f"arch must be one of {', '.join(ENCODERS)}, got {self.arch!r}")

    to_dict = asdict


class GPTConfig(TransformerConfig):
    """The causal model's sizes."""


class LLaDAConfig(TransformerConfig):
    """The mask predictor's sizes."""


# ------------------------------------------------------------------------------------------------- what may see what
def attention_mask(T: int, offset: int, pad: Tensor | None, causal: bool, device) -> Tensor | None:
    """Which keys each query may see: bool, broadcastable to (B, 1, T, offset + T); None means all of them.

    The T queries stand at columns offset..offset+T-1. The first pad[b] columns of row b are padding and hidden from
    everyone but themselves (a query needs at least one key, or its softmax is 0/0).
    """
    if pad is None and (not causal or T == 1):
        return None
    queries = torch.arange(offset, offset + T, device=device)[:, None]  # (T, 1)
    keys = torch.arange(offset + T, device=device)  # (S,)
    visible = keys <= queries if causal else torch.ones_like(keys <= queries)  # (T, S)
    if pad is None:
        return visible
    return visible & (keys >= pad[:, None, None, None]) | (keys == queries)  # (B, 1, T, S)


class KeyValueCache:
    """What a causal model remembers of the columns it has read, preallocated: nothing is concatenated in the loop.

    `keys`, `values`: L times (B, H, max_len, D); `inputs` (L, B, K-1, C) the last inputs of each layer's convolution;
    `tokens` (B, REACH) the last tokens, for the n-grams; `length` columns are filled, left padding included.
    """

    def __init__(self, config: TransformerConfig, batch_size: int, max_len: int, device="cpu", dtype=torch.float32):
        L, H, D = config.n_layer, config.n_head, config.n_embd // config.n_head
        self.keys = [torch.zeros(batch_size, H, max_len, D, device=device, dtype=dtype) for _ in range(L)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.inputs = torch.zeros(L, batch_size, TAPS - 1, config.n_embd, device=device, dtype=dtype)
        self.tokens = torch.zeros(batch_size, REACH, device=device, dtype=torch.long)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) keys and values after the `length` known ones; return all of them, (B, H, S, D)."""
        end = self.length + k.shape[2]
        keys, values = self.keys[layer].narrow(2, 0, end), self.values[layer].narrow(2, 0, end)
        keys.narrow(2, self.length, k.shape[2]).copy_(k)
        values.narrow(2, self.length, v.shape[2]).copy_(v)
        return keys, values

    def reorder(self, rows: Tensor, shared: int = 0) -> None:
        """Row b becomes a copy of row rows[b] (beam search); there may be more rows than before, or fewer.

        Columns below `shared` are the same in all rows already and stay where they are.
        """
        for stored in (self.keys, self.values):
            for layer, x in enumerate(stored):
                if len(rows) != len(x):
                    stored[layer] = x[rows]
                else:
                    x[:, :, shared : self.length] = x[rows, :, shared : self.length]
        self.inputs, self.tokens = self.inputs[:, rows], self.tokens[rows]

    def clear(self) -> None:
        """Forget everything: the next tokens are the first."""
        self.length = 0
        self.inputs.zero_()
        self.tokens.zero_()


# ------------------------------------------------------------------------------------------------- arch="rotary"
def norm(x: Tensor) -> Tensor:
    """Layer norm without parameters. RMSNorm would do as well; on CPUs this one is a single fused kernel."""
    return F.layer_norm(x, x.shape[-1:])


def rotary_table(block_size: int, head_dim: int) -> Tensor:
    """Cosine and sine of t w_d, (block_size, D/2, 2): RoFormer's rotations (arXiv 2104.09864, eq. 15)."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)  # (D/2,)
    angles = torch.arange(block_size)[:, None] * frequencies  # (T, D/2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair of channels of x (B, T, H, D) by its position's angle, rotations (T, D/2, 2): a complex product.

    As one operation where each runs by itself; compilers generate no complex code but fuse the four real products.
    """
    pairs, rotations = x.float().unflatten(-1, (-1, 2)), rotations[:, None]  # (B, T, H, D/2, 2), (T, 1, D/2, 2)
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations)).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), rotations.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(x), without bias. A single row, compiled, is a sum of products.

    The generated loop reads the weights as fast as memory gives them, four times as fast as the libraries' products of
    a matrix and a vector on CPUs: nearly all of what a cached token costs.
    """
    if torch.compiler.is_compiling() and x.shape[:-1].numel() == 1:
        return (x[..., None, :] * layer.weight).sum(-1)
    return layer(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Scaled dot-product attention of queries (B, H, T, D) to keys and values (B, H, S, D): (B, H, T, D).

    A single query, compiled, is a weighted mean, which fuses with what comes before and after it.
    """
    if torch.compiler.is_compiling() and q.shape[2] == 1 and mask is None:
        weights = ((q * k).sum(-1, keepdim=True) / math.sqrt(q.shape[-1])).softmax(dim=2)  # (B, H, S, 1)
        return (weights * v).sum(2, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def select(x: Tensor, at: Tensor | None) -> Tensor:
    """x (B, T, C), or of its B T positions those with the numbers `at` (N,): (N, C)."""
    return x if at is None else x.flatten(0, 1).index_select(0, at)


class NgramEmbedding(nn.Module):
    """The sum of an embedding for each kind of n-gram around a position, from hashed tables that start at zero.

    The row of an n-gram is the number that its tokens spell in base V, modulo the rows. Every kind has its own table: a
    rare long n-gram may share a row with other rare ones, but not with a frequent short one.
    """

    def __init__(self, config: TransformerConfig, causal: bool):
        super().__init__()
        kinds, self.rows = NGRAMS[causal], config.ngram_rows
        self.left, self.right = -min(map(min, kinds)), max(map(max, kinds))
        digits = torch.zeros(len(kinds), self.left + 1 + self.right, dtype=torch.long)  # (n, W) what a token counts
        for row, offsets in zip(digits, kinds, strict=True):
            for place, offset in enumerate(reversed(offsets)):
                row[self.left + offset] = pow(config.vocab_size, place, self.rows)
        self.register_buffer("digits", digits, persistent=False)
        self.register_buffer("first_rows", self.rows * torch.arange(len(kinds)), persistent=False)
        zeros = torch.zeros(self.rows * len(kinds), config.n_embd)
        self.tables = nn.EmbeddingBag.from_pretrained(zeros, freeze=False, mode="sum")
        self.dropout = nn.Dropout(config.ngram_dropout)

    def forward(self, tokens: Tensor, before: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, C). `before` (B, left) are the tokens left of them (else [PAD] = 0), moved on in place."""
        B, T = tokens.shape
        if before is None:
            tokens = F.pad(tokens, (self.left, self.right))
        else:
            tokens = torch.cat([before, tokens], dim=1)
            before.copy_(tokens[:, T:])
        windows = tokens.unfold(1, self.left + 1 + self.right, 1)  # (B, T, W)
        rows = (windows[:, :, None] * self.digits).sum(-1) % self.rows + self.first_rows  # (B, T, n)
        if torch.compiler.is_compiling() and B * T == 1:  # a compiler calls the bag's kernel but writes its own sum
            return self.tables.weight[rows].sum(2)
        return self.dropout(self.tables(rows.flatten(0, 1)).view(B, T, -1))


class NeighbourConvolution(nn.Module):
    """A depthwise convolution over K neighbouring positions that starts at zero."""

    def __init__(self, config: TransformerConfig, causal: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_embd, TAPS))
        self.padding = TAPS - 1 if causal else TAPS // 2

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). `before` (B, K-1, C) are the inputs left of x (else 0), moved on in place."""
        (_, T, C), padding = x.shape, self.padding
        if before is not None:
            x, padding = torch.cat([before, x], dim=1), 0
            before.copy_(x[:, T:])
            if T == 1:  # one window: a product is all there is to do
                return (x * self.weight.T).sum(1, keepdim=True)
        # A channels-last image one pixel high: the fastest depthwise convolution CPUs have.
        x = x.transpose(1, 2).unsqueeze(2)  # (B, C, 1, T)
        x = F.conv2d(x, self.weight[:, None, None], padding=(0, padding), groups=C)
        return x.squeeze(2).transpose(1, 2)[:, :T]


class Attention(nn.Module):
    """Multi-head self-attention with RoPE and QK-norm; no biases, no dropout inside; the projection starts at zero."""

    def __init__(self, config: TransformerConfig, causal: bool, layer: int):
        super().__init__()
        self.n_head, self.causal, self.layer = config.n_head, causal, layer
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(
        self, x: Tensor, rotations: Tensor, pad: Tensor | None, cache: KeyValueCache | None, at: Tensor | None
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (N, C) of the positions `at` (N,), counted through all rows."""
        (B, T, C), H = x.shape, self.n_head
        qk, v = linear(x, self.qkv).view(B, T, 3 * H, C // H).split((2 * H, H), dim=2)
        qk = rotate(norm(qk), rotations).to(v.dtype)  # QK-norm (arXiv 2302.05442), then RoPE
        q, k, v = (heads.transpose(1, 2) for heads in (*qk.split(H, dim=2), v))  # (B, H, T, D) each
        offset = 0
        if cache is not None:
            offset = cache.length
            k, v = cache.extend(self.layer, k, v)
        is_causal = self.causal and offset == 0 and pad is None  # the usual triangle, which SDPA need not be shown
        mask = None if is_causal else attention_mask(T, offset, pad, self.causal, x.device)
        out = attend(q, k, v, mask, is_causal).transpose(1, 2).reshape(B, T, C)
        return linear(select(out, at), self.proj)


class MLP(nn.Module):
    """C -> 4C -> C with ReLU^2 (Primer, arXiv 2109.08668: better than GELU here, and cheap on CPUs)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(F.relu(linear(x, self.fc)).square(), self.proj)


class Block(nn.Module):
    """One layer: convolution over neighbours, attention, MLP, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, causal: bool, layer: int):
        super().__init__()
        self.layer = layer
        self.conv = NeighbourConvolution(config, causal)
        self.attention = Attention(config, causal, layer)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotations: Tensor, pad: Tensor | None, cache: KeyValueCache | None, at: Tensor | None
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (N, C) of the positions `at` (N,), counted through all rows."""
        x = x + self.conv(x, cache.inputs[self.layer] if cache is not None else None)
        x = select(x, at) + self.dropout(self.attention(norm(x), rotations, pad, cache, at))
        return x + self.dropout(self.mlp(norm(x)))


class RotaryEncoder(nn.Module):
    """Tokens (B, T) -> hidden states (B, T, C), or (N, C) at the positions `at` (N,): the modern stack, the default."""

    def __init__(self, config: TransformerConfig, causal: bool):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.ngrams = NgramEmbedding(config, causal)
        self.blocks = nn.ModuleList(Block(config, causal, layer) for layer in range(config.n_layer))
        rotations = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("rotations", rotations, persistent=False)

    def forward(
        self, tokens: Tensor, pad: Tensor | None = None, cache: KeyValueCache | None = None, at: Tensor | None = None
    ) -> Tensor:
        offset, T = (cache.length if cache is not None else 0), tokens.shape[1]
        rotations = self.rotations[offset : offset + T]  # (T, D/2)
        real = None
        if pad is not None:  # left of a text n-grams and convolution must find what they find left of a row: zeros
            real = (torch.arange(offset, offset + T, device=tokens.device) >= pad[:, None])[..., None]  # (B, T, 1)
            tokens = tokens * real[..., 0]
        x = norm(self.embedding(tokens) + self.ngrams(tokens, cache.tokens if cache is not None else None))
        for block in self.blocks:
            x = x if real is None else x * real
            # The last projection and MLP are only paid for where they are used.
            x = block(x, rotations, pad, cache, at if block is self.blocks[-1] else None)
        if cache is not None:
            cache.length += T
        return norm(x)


# ------------------------------------------------------------------------------------------------- arch="vanilla"
class PositionalEncoding(nn.Module):
    """Adds sinusoids to (B, T, C) embeddings ("Attention is all you need", section 3.5)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        angles = torch.arange(config.block_size)[:, None] * torch.exp(
            torch.arange(0, config.n_embd, 2) * (-math.log(10000.0) / config.n_embd)
        )  # (T, C/2)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (T, C), sin and cos interleaved
        self.register_buffer("table", table, persistent=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """Row b's text starts at column pad[b]: that column is position 0."""
        positions = torch.arange(x.shape[1], device=x.device)
        if pad is not None:
            positions = (positions - pad[:, None]).clamp(min=0)  # (B, T)
        return self.dropout(x + self.table[positions])


class VanillaEncoder(nn.Module):
    """Tokens (B, T) -> hidden states (B, T, C), or (N, C) at the positions `at` (N,): PyTorch's textbook encoder, the
    readable reference and yardstick."""

    def __init__(self, config: TransformerConfig, causal: bool):
        super().__init__()
        self.causal, self.n_head, self.n_embd = causal, config.n_head, config.n_embd
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = PositionalEncoding(config)
        layer = nn.TransformerEncoderLayer(
            config.n_embd, config.n_head, 4 * config.n_embd, dropout=config.dropout, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.n_layer, enable_nested_tensor=False)

    def forward(
        self, tokens: Tensor, pad: Tensor | None = None, cache: KeyValueCache | None = None, at: Tensor | None = None
    ) -> Tensor:
        if cache is not None:
            raise ValueError('arch="vanilla" has no key/value cache: nn.TransformerEncoder cannot use one')
        x = self.positions(self.embedding(tokens) * math.sqrt(self.n_embd), pad)
        mask = attention_mask(tokens.shape[1], 0, pad, self.causal, tokens.device)
        if mask is not None:
            mask = ~mask  # nn.TransformerEncoder marks what may NOT be seen, (T, T) or (B * H, T, T)
            if mask.dim() == 4:
                mask = mask.expand(-1, self.n_head, -1, -1).flatten(0, 1)
        return select(self.encoder(x, mask=mask), at)


ENCODERS = {"rotary": RotaryEncoder, "vanilla": VanillaEncoder}


# ------------------------------------------------------------------------------------------------- the two models
class Transformer(nn.Module):
    """Tokens (B, T) -> logits (B, T, V), float32; [PAD], [MASK] and [START] have logit -inf everywhere."""

    causal: bool
    name: str  # the command line's word for it

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.encoder = ENCODERS[config.arch](config, self.causal)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)
        never = torch.arange(config.vocab_size) < NEVER_PREDICTED
        self.register_buffer("never", never, persistent=False)

    def forward(
        self,
        tokens: Tensor,
        at: Tensor | None = None,
        pad: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """(B, T) int64 -> (B, T, V), or (N, V) for the N positions where `at` (B, T) is true.

        pad (B,): how many columns at the left of each row are padding. cache: continue after what it holds
        (causal models only) and add `tokens` to it. Raises ValueError beyond block_size.
        """
        T = tokens.shape[1] + (cache.length if cache is not None else 0)
        if T > self.config.block_size:
            raise ValueError(f"{T} positions do not fit the model's block_size of {self.config.block_size}")
        if at is not None:  # as numbers: a compiled encoder wants no shapes that depend on data
            at = at.flatten().nonzero()[:, 0]
        hidden = self.encoder(tokens, pad, cache, at)  # (B, T, C) or (N, C)
        return linear(hidden, self.head).float().masked_fill(self.never, -torch.inf)

    def num_parameters(self) -> int:
        """Trainable parameters, embeddings included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> float:
        """Training FLOPs a token of a window of T, both passes: 6 a weight, 12 C T a layer (PaLM, appendix B).

        Embeddings are looked up, not multiplied; the causal model's masked half of the attention is counted as well.
        """
        looked_up = sum(m.weight.numel() for m in self.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
        weights = self.num_parameters() - looked_up
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * T


class GPT(Transformer):
    """The causal baseline: position t sees tokens 0..t and predicts token t + 1."""

    causal, name = True, "gpt"


class LLaDAModel(Transformer):
    """The mask predictor (LLaDA, arXiv 2502.09992): every position sees every other and predicts its own token."""

    causal, name = False, "llada"


MODELS = {model.name: model for model in (LLaDAModel, GPT)}
CONFIGS = {"llada": LLaDAConfig, "gpt": GPTConfig}


def main() -> None:
    """Show the shapes and the parameter counts of both models in both architectures."""
    tokens = torch.zeros(2, 16, dtype=torch.long)
    print(f"tokens {tuple(tokens.shape)}")
    for arch in ENCODERS:
        for name, model_class in MODELS.items():
            model = model_class(CONFIGS[name](vocab_size=69, block_size=128, arch=arch))
            print(f"{name:5} {arch:7} -> logits {tuple(model(tokens).shape)}  {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
