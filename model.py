"""The Transformer and the two language models made of it: `LLaDAModel` (mask predictor) and `GPT` (causal).

Both are the same network with the same number of parameters. They differ only in `causal`: which positions a position
may see. A position is described by its token and by its neighbourhood: n-gram tables and a short convolution, causal in
GPT, centred in LLaDA. On a small budget most of what can be learned is in these local statistics.

Letters: B batch, T positions, V vocabulary, C embedding, H heads, L layers, N chosen positions.
"""

import torch
from torch import Tensor, nn

from config import ModelConfig
from layers import NGRAMS, Block, Context, KeyValueCache, NgramEmbedding, linear, norm, rotary_table

NEVER_PREDICTED = 3  # ids 0, 1, 2 are [PAD], [MASK], [START]: their logits are -inf by construction (MDLM's SUBS)


class RotaryEncoder(nn.Module):
    """Tokens (B, T) -> hidden states (B, T, C), or (N, C) of the positions `at` (N,), counted through all rows."""

    def __init__(self, config: ModelConfig, causal: bool):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        base = config.ngram_base or config.vocab_size
        self.ngrams = NgramEmbedding(
            base, config.n_embd, config.ngram_rows, config.ngram_width, config.ngram_dropout, causal
        )
        self.blocks = nn.ModuleList(
            Block(config.n_embd, config.n_head, config.dropout, causal, layer) for layer in range(config.n_layer)
        )
        rotations = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("rotations", rotations, persistent=False)
        self.causal = causal

    def make_context(self, T: int, cache: KeyValueCache | None = None) -> Context:
        """The context of a call with T positions, after those in the cache."""
        offset = cache.length if cache is not None else 0
        mask = None
        if self.causal and offset and T > 1:  # the kernel's own causal mask has no offset
            keys = torch.arange(offset + T, device=self.rotations.device)
            mask = keys <= keys[offset:, None]  # (T, S)
        return Context(self.rotations[offset : offset + T], mask, self.causal and not offset, cache)

    def forward(self, tokens: Tensor, context: Context, at: Tensor | None = None) -> Tensor:
        x = norm(self.embedding(tokens) + self.ngrams(tokens, context))
        for block in self.blocks[:-1]:
            x = block(x, context)
        x = self.blocks[-1].mix(x, context)
        if at is not None:  # the rest works on each position alone: only the chosen ones are computed
            x = x.flatten(0, 1).index_select(0, at)
        if context.cache is not None:
            context.cache.length += tokens.shape[1]
        return norm(self.blocks[-1].think(x))


ENCODERS = {"rotary": RotaryEncoder}  # extras/vanilla.py adds PyTorch's


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
        self.register_buffer("never", torch.arange(config.vocab_size) < NEVER_PREDICTED, persistent=False)

    def forward(self, tokens: Tensor, at: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, V), or (N, V) for the N positions `at`, counted through all rows.

        cache (causal models only): `tokens` follow those in it, and are added to it. Raises ValueError for more than
        block_size positions.
        """
        T = tokens.shape[1] + (cache.length if cache is not None else 0)
        if T > self.config.block_size:
            raise ValueError(f"{T} positions do not fit the model's block_size of {self.config.block_size}")
        context = self.encoder.make_context(tokens.shape[1], cache)
        hidden = self.encoder(tokens, context, at)  # (B, T, C) or (N, C)
        return linear(hidden, self.head).float().masked_fill(self.never, -torch.inf)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.never.device

    def new_cache(self, batch_size: int, max_len: int) -> KeyValueCache | None:
        """An empty cache for batch_size rows of up to max_len positions; None for an encoder that can use none."""
        config = self.config
        if config.arch != "rotary":
            return None
        head_dim = config.n_embd // config.n_head
        return KeyValueCache(batch_size, config.n_layer, config.n_head, head_dim, max_len, self.device)

    def num_parameters(self, trainable: bool = False) -> int:
        """All parameters, or those that are not frozen."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

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


def least_bytes(name: str, config: ModelConfig) -> int:
    """Memory that a model takes at least, a few percent below what it does take: from its sizes, nothing is built."""
    V, C, W = config.vocab_size, config.n_embd, config.ngram_width or config.n_embd
    tables = W * config.ngram_rows * len(NGRAMS[MODELS[name].causal]) if config.arch == "rotary" else 0
    positions = config.block_size * (C // config.n_head)
    return 4 * (C * (2 * V + 12 * C * config.n_layer) + tables + positions)
