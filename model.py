"""The Transformer and the two language models made of it: `LLaDAModel` (mask predictor) and `GPT` (causal).

Both are the same network with the same number of parameters. They differ only in `causal`: which positions a position
may see. A position is described by its token and by its neighbourhood: n-gram tables and a short convolution, causal in
GPT, centred in LLaDA. On a small budget most of what can be learned is in these local statistics.

Letters: B batch, T positions, V vocabulary, C embedding, H heads, L layers, N chosen positions.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from layers import Block, KeyValueCache, NgramEmbedding, attention_mask, linear, norm, rotary_table, select
from utils.errors import ArgumentError, check_number

NEVER_PREDICTED = 3  # ids 0, 1, 2 are [PAD], [MASK], [START]: their logits are -inf by construction (MDLM's SUBS)


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to rebuild a network. Raises ArgumentError for sizes that cannot be built."""

    vocab_size: int  # V
    block_size: int  # the context length: the largest T
    n_embd: int = 128  # C
    n_head: int = 4  # H
    n_layer: int = 4  # L
    dropout: float = 0.0
    arch: str = "rotary"  # or "vanilla"
    ngram_dropout: float = 0.0  # of the n-gram tables, which overfit first
    ngram_rows: int = 65521  # of each table, a prime: pairs of up to 255 tokens never share a row, longer n-grams may

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_embd", "n_head", "n_layer", "ngram_rows"):
            check_number(name, getattr(self, name), low=1)
        for name in ("dropout", "ngram_dropout"):
            check_number(name, getattr(self, name), low=0, below=1)
        if self.n_embd % (2 * self.n_head):
            raise ArgumentError(
                "n_embd", f"must be a multiple of 2 * n_head, got {self.n_embd} with n_head {self.n_head}"
            )
        if self.arch not in ENCODERS:
            raise ArgumentError("arch", f"must be one of {', '.join(ENCODERS)}, got {self.arch!r}")

    to_dict = asdict


# ------------------------------------------------------------------------------------------------- arch="rotary"
class RotaryEncoder(nn.Module):
    """Tokens (B, T) -> hidden states (B, T, C), or (N, C) of the positions `at` (N,): the default network."""

    def __init__(self, config: ModelConfig, causal: bool):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.ngrams = NgramEmbedding(config.vocab_size, config.n_embd, config.ngram_rows, config.ngram_dropout, causal)
        self.blocks = nn.ModuleList(
            Block(config.n_embd, config.n_head, config.dropout, causal, layer) for layer in range(config.n_layer)
        )
        rotations = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("rotations", rotations, persistent=False)

    def forward(
        self, tokens: Tensor, pad: Tensor | None = None, cache: KeyValueCache | None = None, at: Tensor | None = None
    ) -> Tensor:
        offset, T = (cache.length if cache is not None else 0), tokens.shape[1]
        rotations = self.rotations[offset : offset + T]  # (T, D/2)
        is_text = None
        if pad is not None:  # n-grams and convolution see zeros left of a text, as they do left of an unpadded row
            is_text = (torch.arange(offset, offset + T, device=tokens.device) >= pad[:, None])[..., None]  # (B, T, 1)
            tokens = tokens * is_text[..., 0]
        x = norm(self.embedding(tokens) + self.ngrams(tokens, cache.tokens if cache is not None else None))
        for block in self.blocks:
            x = x if is_text is None else x * is_text
            # The last layer's projection and MLP are computed only at the chosen positions.
            x = block(x, rotations, pad, cache, at if block is self.blocks[-1] else None)
        if cache is not None:
            cache.length += T
        return norm(x)


# ------------------------------------------------------------------------------------------------- arch="vanilla"
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

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). Row b's text starts at column pad[b], which is position 0."""
        positions = torch.arange(x.shape[1], device=x.device)
        if pad is not None:
            positions = (positions - pad[:, None]).clamp(min=0)  # (B, T)
        return self.dropout(x + self.table[positions])


class VanillaEncoder(nn.Module):
    """Tokens (B, T) -> hidden states (B, T, C), or (N, C) of the positions `at` (N,): PyTorch's textbook encoder.

    The reference to compare the default with. It has no key/value cache; a given `cache` raises ValueError.
    """

    def __init__(self, config: ModelConfig, causal: bool):
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
    name: str  # on the command line and in checkpoints

    def __init__(self, config: ModelConfig):
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

        pad (B,): how many columns at the left of each row are padding. cache (causal models only): `tokens` follow
        those in it, and are added to it. Raises ValueError for more than block_size positions.
        """
        T = tokens.shape[1] + (cache.length if cache is not None else 0)
        if T > self.config.block_size:
            raise ValueError(f"{T} positions do not fit the model's block_size of {self.config.block_size}")
        if at is not None:  # as indices: a compiled encoder cannot have shapes that depend on data
            at = at.flatten().nonzero()[:, 0]
        hidden = self.encoder(tokens, pad, cache, at)  # (B, T, C) or (N, C)
        return linear(hidden, self.head).float().masked_fill(self.never, -torch.inf)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.head.weight.device

    def new_cache(self, batch_size: int, max_len: int) -> KeyValueCache:
        """An empty key/value cache for batch_size rows of up to max_len positions, on the model's device."""
        config = self.config
        head_dim = config.n_embd // config.n_head
        return KeyValueCache(batch_size, config.n_layer, config.n_head, head_dim, max_len, self.device)

    def num_parameters(self) -> int:
        """Trainable parameters, embeddings included."""
        return sum(p.numel() for p in self.parameters())

    def num_looked_up(self) -> int:
        """How many of the parameters are rows of embeddings and n-gram tables: looked up, not multiplied."""
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))

    def flops_per_token(self, T: int) -> float:
        """Training FLOPs per token of a window of T, forward and backward: 6 per weight and 12 C T per layer.

        From PaLM, arXiv 2204.02311, appendix B. Embeddings are looked up, not multiplied, and count nothing. The masked
        half of causal attention counts like the other.
        """
        weights = self.num_parameters() - self.num_looked_up()
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * T


class GPT(Transformer):
    """The causal baseline: position t sees tokens 0..t and predicts token t + 1."""

    causal, name = True, "gpt"


class LLaDAModel(Transformer):
    """The mask predictor (LLaDA, arXiv 2502.09992): every position sees all others and predicts its own token."""

    causal, name = False, "llada"


MODELS = {"llada": LLaDAModel, "gpt": GPT}


def main() -> None:
    """Print the shapes and the parameter counts of both models in both architectures."""
    tokens = torch.zeros(2, 16, dtype=torch.long)
    print(f"tokens {tuple(tokens.shape)}")
    for arch in ENCODERS:
        for name, model_class in MODELS.items():
            model = model_class(ModelConfig(vocab_size=69, block_size=128, arch=arch))
            print(f"{name:5} {arch:7} -> logits {tuple(model(tokens).shape)}  {model.num_parameters():,} parameters, "
                  f"{model.num_looked_up():,} of them looked up")  # fmt: skip


if __name__ == "__main__":
    main()
