"""The Transformer and the two language models made of it: `LLaDAModel` (mask predictor) and `GPT` (causal).

Both are the same network with the same number of parameters. They differ only in `causal`: which positions a position
may see. A position is described by its token and by its neighbourhood: n-gram tables and a short convolution, causal in
GPT, centred in LLaDA. On a small budget most of what can be learned is in these local statistics.

Letters: B batch, T positions, V vocabulary, C embedding, H heads, L layers, N chosen positions.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from layers import (
    BORDER_NGRAMS,
    NGRAMS,
    Block,
    BorderEmbedding,
    KeyValueCache,
    LowRank,
    NgramEmbedding,
    SplitRows,
    Streams,
    add_low_rank,
    attention_mask,
    linear,
    norm,
    rotary_table,
    select,
)
from utils.errors import ArgumentError, check_number

NEVER_PREDICTED = 3  # ids 0, 1, 2 are [PAD], [MASK], [START]: their logits are -inf by construction (MDLM's SUBS)
LARGEST, MOST_LAYERS = 1 << 24, 1000  # sizes beyond these are mistakes
SEGMENTS = ("window", "speech", "paragraph", "line", "pairs")  # what a row of training text is, see data.py


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
    segments: str = "window"  # what a row of its training text was: what the model writes between [START] and [END]
    ngram_base: int | None = None  # base of the n-gram hashes (None: V). Set when V grows: ids from it on are new
    parallel: int = 1  # GPT: the streams in which it writes a window at once, see `layers.Streams`
    lora_rank: int = 0  # of the low-rank adapters; 0: none. All other weights are frozen, but for the rows of new ids

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_embd", "n_head", "n_layer", "ngram_rows"):
            check_number(name, getattr(self, name), low=1, high=MOST_LAYERS if name == "n_layer" else LARGEST)
        for name in ("dropout", "ngram_dropout"):
            check_number(name, getattr(self, name), low=0, below=1)
        if self.n_embd % (2 * self.n_head):
            raise ArgumentError(
                "n_embd", f"must be a multiple of 2 * n_head, got {self.n_embd} with n_head {self.n_head}"
            )
        if self.arch not in ENCODERS:
            raise ArgumentError("arch", f"must be one of {', '.join(ENCODERS)}, got {self.arch!r}")
        if self.segments not in SEGMENTS:
            raise ArgumentError("segments", f"must be one of {', '.join(SEGMENTS)}, got {self.segments!r}")
        if self.ngram_base is not None:
            check_number("ngram_base", self.ngram_base, low=1)
        check_number("lora_rank", self.lora_rank, low=0, high=self.n_embd)
        check_number("parallel", self.parallel, low=1, high=max(1, self.block_size // 2))
        if self.parallel > 1 and (self.arch == "vanilla" or self.segments != "window"):
            problem = "streams need the rotary network" if self.arch == "vanilla" else "texts that end have one stream"
            raise ArgumentError("parallel", f"must be 1, got {self.parallel}: {problem}")

    to_dict = asdict


# ------------------------------------------------------------------------------------------------- arch="rotary"
class RotaryEncoder(nn.Module):
    """Tokens (B, T) -> hidden states (B, T, C), or (N, C) of the positions `at` (N,): the default network."""

    def __init__(self, config: ModelConfig, causal: bool):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        base = config.ngram_base or config.vocab_size
        self.ngrams = NgramEmbedding(base, config.n_embd, config.ngram_rows, config.ngram_dropout, causal)
        self.blocks = nn.ModuleList(
            Block(config.n_embd, config.n_head, config.dropout, causal, layer) for layer in range(config.n_layer)
        )
        self.border = None
        if config.parallel > 1:
            self.border = BorderEmbedding(base, config.n_embd, config.ngram_rows, config.ngram_dropout)
        rotations = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("rotations", rotations, persistent=False)

    def forward(
        self,
        tokens: Tensor,
        pad: Tensor | None = None,
        cache: KeyValueCache | None = None,
        at: Tensor | None = None,
        streams: Streams | None = None,
    ) -> Tensor:
        offset, T = (cache.length if cache is not None else 0), tokens.shape[1]
        if streams is not None and cache is not None:  # position k of each stream
            k = (offset - streams.prefix) // T
            rotations = self.rotations[streams.prefix + k :: streams.length][:T]
        else:
            rotations = self.rotations[offset : offset + T]  # (T, D/2)
        is_text = None
        if pad is not None:  # n-grams and convolution see zeros left of a text, as they do left of an unpadded row
            is_text = (torch.arange(offset, offset + T, device=tokens.device) >= pad[:, None])[..., None]  # (B, T, 1)
            tokens = tokens * is_text[..., 0]
        if streams is None:
            ngrams = self.ngrams(tokens, cache.tokens if cache is not None else None)
        elif cache is None:
            ngrams = streams.join(*map(self.ngrams, streams.split(tokens))) + self.border(tokens, streams)
        else:
            ngrams = self.ngrams(tokens, cache.tokens) + self.border.step(streams, k, cache)
        x = norm(self.embedding(tokens) + ngrams)
        for block in self.blocks:
            x = x if is_text is None else x * is_text
            # The last layer's projection and MLP are computed only at the chosen positions.
            x = block(x, rotations, pad, cache, at if block is self.blocks[-1] else None, streams)
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

    The reference to compare the default with. It has no key/value cache, a given `cache` raises ValueError; and no
    streams, which ModelConfig refuses.
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
        self,
        tokens: Tensor,
        pad: Tensor | None = None,
        cache: KeyValueCache | None = None,
        at: Tensor | None = None,
        streams: Streams | None = None,
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
        if config.parallel > 1 and not self.causal:
            raise ArgumentError("parallel", "is for GPT: LLaDA writes in several places anyway")
        self.config = config
        self.encoder = ENCODERS[config.arch](config, self.causal)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)
        # Streams do not end: none could know that another one has.
        never = torch.arange(config.vocab_size) < NEVER_PREDICTED + (config.parallel > 1)
        self.register_buffer("never", never, persistent=False)
        if config.lora_rank:
            self._adapt()

    def _adapt(self, generator: torch.Generator | None = None) -> None:
        """Add adapters of rank config.lora_rank, and freeze everything else but the rows of ids from ngram_base on.

        Those are tokens that the weights were not trained on. No adapter could learn their rows.
        """
        add_low_rank(self.encoder, self.config.lora_rank, generator)
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, LowRank):
                module.requires_grad_(True)
        if (self.config.ngram_base or self.config.vocab_size) < self.config.vocab_size:
            for module in (self.encoder.embedding, self.head):
                register_parametrization(module, "weight", SplitRows(self.config.ngram_base))
                module.parametrizations.weight.original1.requires_grad_(True)

    def forward(
        self,
        tokens: Tensor,
        at: Tensor | None = None,
        pad: Tensor | None = None,
        cache: KeyValueCache | None = None,
        streams: Streams | None = None,
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
        hidden = self.encoder(tokens, pad, cache, at, streams)  # (B, T, C) or (N, C)
        return linear(hidden, self.head).float().masked_fill(self.never, -torch.inf)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.head.weight.device

    def set_streams(self, n: int) -> None:
        """Write, and be scored, in n streams from now on. GPTs that were trained with streams can do so in any number.

        Raises ArgumentError for another model, and for more streams than half of the context has positions.
        """
        if getattr(self.encoder, "border", None) is None:
            raise ArgumentError("streams", "needs a GPT that was trained with --parallel")
        check_number("streams", n, low=1, high=self.config.block_size // 2)
        self.config = replace(self.config, parallel=n)

    def new_cache(self, batch_size: int, max_len: int) -> KeyValueCache:
        """An empty key/value cache for batch_size rows of up to max_len positions, on the model's device."""
        config = self.config
        head_dim = config.n_embd // config.n_head
        return KeyValueCache(batch_size, config.n_layer, config.n_head, head_dim, max_len, self.device)

    @property
    def fills_masks(self) -> bool:
        """Whether it writes in several places of a text at once: LLaDA, and GPT with several streams."""
        return not self.causal or self.config.parallel > 1

    @property
    def is_segmented(self) -> bool:
        """Whether the model writes texts that end: utterances or answers, and not windows of running text."""
        return self.config.segments != "window"

    def num_parameters(self) -> int:
        """All parameters, embeddings and adapters included."""
        return sum(p.numel() for p in self.parameters())

    def num_trainable(self) -> int:
        """The parameters that are not frozen: all of them, or with lora_rank > 0 those of `lora_state`."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def num_looked_up(self) -> int:
        """How many of the parameters are rows of embeddings and n-gram tables: looked up, not multiplied."""
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))

    def flops_per_token(self, T: int) -> float:
        """Training FLOPs per token of a window of T, forward and backward: 6 per weight and 12 C T per layer.

        From PaLM, arXiv 2204.02311, appendix B. Embeddings are looked up, not multiplied, and count nothing. The masked
        half of causal attention counts like the other. So does a weight with an adapter like one without: its gradient
        is computed first, and that of the adapter from it. The product B A is formed once a step, not for each token,
        and counts nothing.
        """
        adapters = sum(p.numel() for m in self.modules() if isinstance(m, LowRank) for p in m.parameters())
        weights = self.num_parameters() - self.num_looked_up() - adapters
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
    V, C = config.vocab_size, config.n_embd
    kinds = len(NGRAMS[MODELS[name].causal]) + (len(BORDER_NGRAMS) if config.parallel > 1 else 0)
    tables = config.ngram_rows * kinds if config.arch == "rotary" else 0
    positions = config.block_size * (C // config.n_head)
    return 4 * (C * (2 * V + tables + 12 * C * config.n_layer) + positions)


# ------------------------------------------------------------------------------------------------- fine-tuning
def merged_state(model: Transformer) -> dict[str, Tensor]:
    """The state_dict of the model without parametrizations: their weights as they are read, under their plain names."""
    state = {}
    for name, tensor in model.state_dict().items():
        path, _, parametrization = name.partition(".parametrizations.")
        if parametrization:
            weight = parametrization.partition(".")[0]
            name, tensor = f"{path}.{weight}", getattr(model.get_submodule(path), weight).detach()
        state[name] = tensor
    return state


def rebuilt(model: Transformer, state: dict[str, Tensor], **changes) -> Transformer:
    """A new model of the same kind on the CPU, with this state and these changes of the configuration."""
    with torch.random.fork_rng(devices=[]):  # its initial weights are replaced: leave the generator as it was
        new = type(model)(replace(model.config, **changes))
    new.load_state_dict(state)
    return new.train(model.training)


def add_lora(model: Transformer, rank: int, generator: torch.Generator | None = None) -> Transformer:
    """A copy with low-rank adapters on its attention and MLP weights and with the same outputs, bit for bit.

    Only the adapters require gradients, and the rows of tokens that `extend_vocabulary` added. If the model has
    adapters already, they are merged first. Raises ArgumentError for a rank outside 1..n_embd.
    """
    check_number("lora_rank", rank, low=1)
    adapted = merge_lora(model).cpu()
    adapted.config = replace(adapted.config, lora_rank=rank)
    adapted._adapt(generator)
    return adapted.to(model.device)


def merge_lora(model: Transformer) -> Transformer:
    """A copy without adapters, each added to its weight: lora_rank 0, the same outputs up to rounding."""
    return rebuilt(model, merged_state(model), lora_rank=0).to(model.device)


def adapt(base: Transformer, config: ModelConfig, generator: torch.Generator | None = None) -> Transformer:
    """The network `base` with another configuration: for a larger vocabulary, with adapters, for other rows of text.

    The other sizes must be equal. Adapters of another rank are merged first, those of the same rank are kept. Streams
    can be added, whose n-grams start at zero, and taken away.
    """
    if config.parallel != base.config.parallel:
        new = type(base)(replace(merge_lora(base).config, parallel=config.parallel))
        new.load_state_dict(merged_state(base), strict=False)
        base = new.to(base.device)
    grown = extend_vocabulary(base, config.vocab_size, generator)
    if config.lora_rank != grown.config.lora_rank:
        grown = add_lora(grown, config.lora_rank, generator) if config.lora_rank else merge_lora(grown)
    return rebuilt(grown, grown.state_dict(), **(config.to_dict() | {"ngram_base": grown.config.ngram_base}))


def lora_state(model: Transformer) -> dict[str, Tensor]:
    """All that is trained in a model with adapters: these and the rows of new tokens, by their names in the state_dict.

    `model.load_state_dict(model.state_dict() | adapters)` puts them into a model that `add_lora` made.
    """
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def extend_vocabulary(model: Transformer, vocab_size: int, generator: torch.Generator | None = None) -> Transformer:
    """A copy with new ids after the old ones, whose rows, n-grams and logits stay as they are, bit for bit.

    A new id's row of the head is the mean of those of the old ids. Its logit is then the mean of their logits. So it is
    at most as likely as they are on average (Jensen), and never forbidden: the loss on old text grows by at most
    log(1 + new / old). Its embedding is the mean too (Hewitt 2021, "Initializing new word embeddings"), with noise of a
    tenth of their standard deviation, so that new ids differ. "Old ids" are those that can be predicted.

    Adapters are merged. Returns the model itself if it has this vocabulary already. Raises ArgumentError if it has a
    larger one.
    """
    check_number("vocab_size", vocab_size, low=model.config.vocab_size)
    new = vocab_size - model.config.vocab_size
    if not new:
        return model
    state = {name: tensor.cpu() for name, tensor in merged_state(model).items()}
    embedding, head = state["encoder.embedding.weight"], state["head.weight"]  # (V, C) each
    std, mean = torch.std_mean(embedding[NEVER_PREDICTED:], dim=0)
    noise = torch.randn(new, len(mean), generator=generator)
    state["encoder.embedding.weight"] = torch.cat([embedding, mean + 0.1 * std * noise])
    state["head.weight"] = torch.cat([head, head[NEVER_PREDICTED:].mean(0).expand(new, -1)])
    base = model.config.ngram_base or model.config.vocab_size
    return rebuilt(model, state, vocab_size=vocab_size, ngram_base=base, lora_rank=0).to(model.device)


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
