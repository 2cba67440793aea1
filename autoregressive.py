"""GPT's counterpart of diffusion.py and sampler.py: training loss, exact likelihood, decoding, beam search.

All functions take and return token ids. Prompts are read exactly as given: [START] is a token like any other, and the
caller puts it first where a text begins (generation/write.py does).

Letters: B batch, T positions, V vocabulary, N windows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import BeamConfig, DecodingConfig
from data import Rows
from likelihood import Likelihood, Predict
from logits import draw_tokens, penalize_repetition, row_generators
from model import GPT
from tokenizer import END_ID, PAD_ID, START_ID
from utils.errors import ArgumentError, check_number

IGNORED = -100  # a target that counts nowhere


# ------------------------------------------------------------------------------------------------- loss, likelihood
def causal_inputs(sequences: Tensor, start_token_id: int) -> Tensor:
    """(B, T) -> (B, T): [START] and all but the last token, so that position t predicts sequences[:, t].

    [START] opens every window: GPT and LLaDA score the same T characters.
    """
    start = torch.full_like(sequences[:, :1], start_token_id)
    return torch.cat([start, sequences[:, :-1]], dim=1)


def compute_gpt_loss(logits: Tensor, targets: Tensor, units: Tensor | None = None) -> Tensor:
    """Next-token cross-entropy of logits (B, T, V) against targets (B, T): exact, in nats/token, mean over B T.

    Targets that are IGNORED do not count. With `units` (B,), the sum is divided by their sum: with each row's
    characters of text, the loss is in nats/character.
    """
    reduction = "mean" if units is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)
    return loss if units is None else loss / units.sum()


@torch.inference_mode()
def exact_nll(predict: Predict, windows: Tensor, start_token_id: int, batch_size: int = 128) -> Tensor:
    """The chain rule: windows (N, T) -> (N, T) negative log-likelihoods of their tokens, exact, in nats/token.

    predict: any causal function of tokens (B, T) that returns logits (B, T, V), called with `batch_size` windows.
    """
    nll = None  # one tensor for all: small results kept between large logits would leave holes in memory
    for start in range(0, len(windows), batch_size):
        targets = windows[start : start + batch_size]
        logits = predict(causal_inputs(targets, start_token_id))  # (B, T, V)
        nll = logits.new_empty(windows.shape) if nll is None else nll
        nll[start : start + batch_size] = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return nll


class CausalBatch(NamedTuple):
    """What one training step needs, B rows each."""

    inputs: Tensor  # (B, T) [START] and all tokens but the last
    targets: Tensor  # (B, T) the token that follows each input; IGNORED where none is to be predicted
    units: Tensor  # (B,) the mean number of characters in a row of the whole batch: its parts weigh alike

    def on(self, device: torch.device) -> "CausalBatch":
        """The batch on a device."""
        return CausalBatch(*(x.to(device, non_blocking=True) for x in self))


@dataclass(frozen=True)
class CausalObjective:
    """GPT's training objective and evaluation, with the methods of diffusion.DiffusionObjective."""

    is_bound: ClassVar[bool] = False
    scores: ClassVar[tuple[str, ...]] = ("val_loss",)

    def make_batch(self, rows: Rows, generator: torch.Generator, purpose: str = "val_loss") -> CausalBatch:
        """Rows -> inputs and targets; nothing is random. [PAD] at the right and what is given are no targets."""
        units = rows.characters.float().mean().expand(len(rows.tokens))
        targets = rows.tokens.masked_fill(~rows.counted, IGNORED)
        return CausalBatch(causal_inputs(rows.tokens, START_ID), targets, units)

    def predict(self, model: Callable[..., Tensor], batch: CausalBatch) -> Tensor:
        """Logits (B, T, V) for `loss`."""
        return model(batch.inputs)

    def loss(self, logits: Tensor, batch: CausalBatch) -> Tensor:
        """Exact negative log-likelihood in nats/character, the mean over the batch."""
        return compute_gpt_loss(logits, batch.targets, batch.units)

    def weighted_targets(self, batch: CausalBatch) -> tuple[Tensor, Tensor]:
        """(B T,) targets and weights: `loss` is the sum of weights times cross-entropies."""
        targets = batch.targets.flatten()
        return targets.clamp(min=0), (targets != IGNORED) / batch.units.sum()

    def likelihood(
        self, predict: Predict, batches: list[Rows], *, pairs: int = 8, batch_size: int = 128, seed: int = 0
    ) -> Likelihood:
        """Exact likelihood of rows, in nats/character: of segments with their [END]s, of pairs given their prompts.

        Raises ValueError if there is no text. `pairs` and `seed` are those of the diffusion bound, without effect here.
        """
        scores = [exact_nll(predict, rows.tokens, START_ID, batch_size) for rows in batches]
        nats = [nll.masked_fill(~rows.counted, 0.0).cpu() for nll, rows in zip(scores, batches, strict=True)]
        return Likelihood.from_token_nats(nats).per(torch.cat([rows.characters for rows in batches]))


# ------------------------------------------------------------------------------------------------- sliding context
class SlidingContext:
    """B growing texts of one length, each read through a window of its last `context_len` tokens.

    While the window does not move, each new token adds one column to the key/value cache. When it moves, the positions
    in it change and the whole window is computed again: beyond the context, slide=1 recomputes for each token, slide=N
    for one token in N.

    Raises ArgumentError for a context_len outside 1..block_size or a slide outside 1..context_len, and ValueError for
    prompts that are empty or hold unknown ids.
    """

    def __init__(self, model: GPT, prompts: Tensor, max_out_tokens: int, config: DecodingConfig | BeamConfig):
        """prompts: (B, T) ids. max_out_tokens: how many `append`s to expect. No config.slide: half of the context."""
        block_size, vocab_size = model.config.block_size, model.config.vocab_size
        self.context_len = block_size if config.context_len is None else config.context_len
        if not 1 <= self.context_len <= block_size:
            raise ArgumentError("context_len", f"must be in 1..{block_size} (block_size), got {self.context_len}")
        self.slide = max(1, self.context_len // 2) if config.slide is None else config.slide
        if not 1 <= self.slide <= self.context_len:
            raise ArgumentError("slide", f"must be in 1..{self.context_len} (context_len), got {self.slide}")
        if not prompts.numel():
            raise ValueError("a prompt needs at least one id: begin a text with [START]")
        if not 0 <= prompts.min() <= prompts.max() < vocab_size:
            raise ValueError(f"the ids of a prompt must be in 0..{vocab_size - 1}")
        self.model, self.end = model, prompts.shape[1]
        # Room for all of it, (B, end + max_out_tokens): a text that grew would be copied whole at every token.
        self.tokens = F.pad(prompts.to(model.device), (0, max_out_tokens), value=PAD_ID)
        self.start, self.cache = -1, None  # first column of the window, as the cache knows it: there is none yet

    @property
    def texts(self) -> Tensor:
        """(B, end) the prompts and what has been appended."""
        return self.tokens[:, : self.end]

    def next_logits(self) -> Tensor:
        """(B, V): logits of each text's next token."""
        # Where the window begins: 0 while the text fits, then the next multiple of slide.
        start = max(0, -(-(self.end - self.context_len) // self.slide) * self.slide)
        if start != self.start:
            self.start, self.cache = start, self.model.new_cache(len(self.tokens), self.context_len)
        known = start + (0 if self.cache is None else self.cache.length)
        return self.model(self.tokens[:, known : self.end], cache=self.cache)[:, -1]

    def append(self, tokens: Tensor) -> None:
        """Write (B,) tokens at the end of the texts."""
        self.tokens[:, self.end] = tokens
        self.end += 1

    def select(self, rows: Tensor) -> None:
        """Row b becomes a copy of row rows[b]; there may be more rows than before, or fewer."""
        if self.cache is not None:
            self.cache.reorder(rows)
        self.tokens = self.tokens[rows]


# ------------------------------------------------------------------------------------------------- decoding
@torch.inference_mode()
def decode(
    model: GPT,
    prompts: Tensor,
    config: DecodingConfig | None = None,
    *,
    max_out_tokens: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
    **settings,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Continue prompts of ids (B, T): yield the next token of each, (B,), and the network's probabilities (B, V).

    `settings` are fields of DecodingConfig and replace those of `config`. A row ends with [END], and holds [END] from
    then on; the iterator ends with the last row, or after max_out_tokens. The repetition penalty counts the tokens of
    the prompt as well. `generator`: see logits.row_generators; a row's text does not depend on the batch.
    Raises ArgumentError for bad values, and ValueError for a prompt that cannot be read, at the first token.
    """
    config = replace(config or DecodingConfig(), **settings)
    check_number("max_out_tokens", max_out_tokens, low=0)
    context = SlidingContext(model, prompts, max_out_tokens, config)
    generators = row_generators(generator, prompts)
    ended = torch.zeros(len(prompts), 1, dtype=torch.bool)
    for _ in range(max_out_tokens):
        logits = penalize_repetition(context.next_logits().cpu(), context.texts, config.repetition_penalty)
        logits = logits.double()  # (B, V)
        tokens = draw_tokens(logits, torch.ones_like(ended), generators, config).masked_fill(ended[:, 0], END_ID)
        yield tokens, logits.softmax(-1)
        ended |= tokens[:, None] == END_ID
        if ended.all():
            return
        context.append(tokens)


# ------------------------------------------------------------------------------------------------- beam search
@torch.inference_mode()
def beam_search(
    model: GPT, prompt: Tensor, config: BeamConfig | None = None, *, max_out_tokens: int, **settings
) -> list[tuple[Tensor, float]]:
    """The likeliest continuations of prompt (T,) that the beams find: (ids, score) pairs, best first.

    ids hold the prompt and what was written, [END] included if it came; score: see BeamConfig, whose fields `settings`
    are. The results are those of transformers. Fewer than num_return pairs come back if fewer texts exist.
    Raises ArgumentError for bad values and ValueError for a prompt that cannot be read.
    """
    config = replace(config or BeamConfig(), **settings)
    check_number("max_out_tokens", max_out_tokens, low=0)
    context = SlidingContext(model, prompt[None], max_out_tokens, config)
    scores = torch.zeros(1, device=context.texts.device)  # (beams,) log-probabilities: one beam until the first step
    finished: list[tuple[float, Tensor]] = [] if max_out_tokens else [(0.0, context.texts[0])]
    for n in range(1, max_out_tokens + 1):
        log_probs = context.next_logits().log_softmax(-1)  # (beams, V)
        log_probs = penalize_repetition(log_probs, context.texts, config.repetition_penalty)
        # Twice as many as beams: even if the better half all end in [END], enough are left to continue.
        best, index = (scores[:, None] + log_probs).flatten().topk(min(2 * config.num_beams, log_probs.numel()))
        beams, tokens = index // log_probs.shape[1], index % log_probs.shape[1]
        possible = best > -torch.inf
        ends = (tokens == END_ID) | (n == max_out_tokens)
        for rank in (ends & possible)[: config.num_beams].nonzero()[:, 0].tolist():
            ids = torch.cat([context.texts[beams[rank]], tokens[rank : rank + 1]])
            finished.append((best[rank].item() / n**config.length_penalty, ids))
        finished = sorted(finished, key=lambda pair: -pair[0])[: config.num_beams]

        running = (possible & ~ends).nonzero()[: config.num_beams, 0]
        if not len(running):
            break
        scores = best[running]
        if len(finished) == config.num_beams:  # can no running beam improve them any more?
            at_full_length = config.early_stopping == "never" and config.length_penalty > 0
            bound = scores[0].item() / (max_out_tokens if at_full_length else n) ** config.length_penalty
            if config.early_stopping == "yes" or bound <= finished[-1][0]:
                break
        context.select(beams[running])
        context.append(tokens[running])
    return [(ids, score) for score, ids in finished[: config.num_return]]
