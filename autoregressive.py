"""GPT's counterpart of diffusion.py and sampler.py: training loss, exact likelihood, decoding, beam search.

All functions take and return token ids. Prompts are read exactly as given: [START] is a token like any other, and the
caller puts it first where a text begins (generation/text.py does).

Letters: B batch, T positions, V vocabulary, N windows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Rows
from layers import Streams
from likelihood import Likelihood, Predict
from logits import LogitsConfig, draw, penalize_repetition, probabilities, row_generators, uniforms
from model import GPT
from tokenizer import END_ID, PAD_ID, START_ID
from utils.errors import ArgumentError, check_number

IGNORED = -100  # a target that counts nowhere
PREFIX_SHARE = 0.5  # of the training batches of a model with streams: they begin with a random prefix


# ------------------------------------------------------------------------------------------------- loss, likelihood
def causal_inputs(sequences: Tensor, start_token_id: int, streams: Streams | None = None) -> Tensor:
    """(B, T) -> (B, T): [START] and all but the last token, so that position t predicts sequences[:, t].

    [START] opens every window: GPT and LLaDA score the same T characters. It also opens every stream but the first,
    which follows the prefix.
    """
    start = torch.full_like(sequences[:, :1], start_token_id)
    inputs = torch.cat([start, sequences[:, :-1]], dim=1)
    if streams is not None:
        inputs[:, streams.prefix + streams.length :: streams.length] = start_token_id
    return inputs


def equal_streams(T: int, parallel: int, prefix: int = 0) -> Streams | None:
    """T positions as `parallel` streams of equal length after a prefix, which is made longer for what does not divide.

    None, which means from left to right, for one stream or where there is no position for each.
    """
    length = (T - prefix) // parallel
    return Streams(T - parallel * length, length) if parallel > 1 and length else None


def compute_gpt_loss(logits: Tensor, targets: Tensor, units: Tensor | None = None) -> Tensor:
    """Next-token cross-entropy of logits (B, T, V) against targets (B, T): exact, in nats/token, mean over B T.

    Targets that are IGNORED do not count. With `units` (B,), the sum is divided by their sum: with each row's
    characters of text, the loss is in nats/character.
    """
    if units is None:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return losses / units.sum()


@torch.inference_mode()
def exact_nll(
    predict: Callable[..., Tensor],
    windows: Tensor,
    start_token_id: int,
    batch_size: int = 128,
    streams: Streams | None = None,
) -> Tensor:
    """The chain rule: windows (N, T) -> (N, T) negative log-likelihoods of their tokens, exact, in nats/token.

    predict: any causal function of tokens (B, T) that returns logits (B, T, V). `batch_size` windows are evaluated at
    a time; it does not change the result. streams: the likelihood of writing in streams; predict gets them too.
    """
    nll, arguments = [], {} if streams is None else {"streams": streams}
    for targets in windows.split(batch_size):
        logits = predict(causal_inputs(targets, start_token_id, streams), **arguments)  # (B, T, V)
        nll.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))  # (B, T)
    return torch.cat(nll)


class CausalBatch(NamedTuple):
    """What one training step needs, B rows each."""

    inputs: Tensor  # (B, T) [START] and all tokens but the last
    targets: Tensor  # (B, T) the token that follows each input; IGNORED where none is to be predicted
    units: Tensor  # (B,) the mean number of characters in a row of the whole batch: its parts weigh alike
    prefix: Tensor  # (B,) the positions before the streams, in all rows the same; all positions: no streams


@dataclass(frozen=True)
class CausalObjective:
    """GPT's training objective and evaluation, with the methods of diffusion.DiffusionObjective.

    parallel: the number of streams in which it writes a window.
    """

    parallel: int = 1
    is_bound: ClassVar[bool] = False

    def make_batch(
        self, rows: Rows, generator: torch.Generator | None = None, is_training: bool = False
    ) -> CausalBatch:
        """Rows -> inputs and targets. Random is only, in training, the length of the prefix before streams.

        [PAD] stands at the right, where no position before it sees it, and is no target; neither is what is given.
        """
        (B, T), prefix = rows.tokens.shape, 0
        if is_training and self.parallel > 1 and torch.rand((), generator=generator) < PREFIX_SHARE:
            prefix = int(torch.randint(1, max(2, T // 2 + 1), (), generator=generator))
        streams = equal_streams(T, self.parallel, prefix)
        units = rows.characters.float().mean().expand(B)
        targets = rows.tokens.masked_fill(~rows.counted, IGNORED)
        inputs = causal_inputs(rows.tokens, START_ID, streams)
        return CausalBatch(inputs, targets, units, torch.full((B,), streams.prefix if streams else T))

    def predict(self, model: Callable[..., Tensor], batch: CausalBatch) -> Tensor:
        """Logits (B, T, V) for `loss`."""
        T, prefix = batch.inputs.shape[1], int(batch.prefix[0])
        if prefix == T:
            return model(batch.inputs)
        return model(batch.inputs, streams=equal_streams(T, self.parallel, prefix))

    def loss(self, logits: Tensor, batch: CausalBatch) -> Tensor:
        """Exact negative log-likelihood in nats/character, the mean over the batch."""
        return compute_gpt_loss(logits, batch.targets, batch.units)

    def likelihood(
        self, predict: Predict, batches: list[Rows], *, pairs: int = 8, batch_size: int = 128, seed: int = 0
    ) -> Likelihood:
        """Exact likelihood of rows, in nats/character: of segments with their [END]s, of pairs given their prompts.

        `pairs` and `seed` belong to the diffusion bound; they are not used. Raises ValueError if there is no text.
        """
        batches = [rows for rows in batches if rows.tokens.numel()]
        if not batches:
            raise ValueError("there is no text to score")
        nats = [
            exact_nll(
                predict, rows.tokens, START_ID, batch_size, equal_streams(rows.tokens.shape[1], self.parallel)
            ).masked_fill(~rows.counted, 0.0).cpu()
            for rows in batches
        ]
        return Likelihood.from_token_nats(nats).per(torch.cat([rows.characters for rows in batches]))


# ------------------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class DecodingConfig(LogitsConfig):
    """How `decode` writes: temperature, top_k, top_p and repetition_penalty of LogitsConfig, and the context.

    context_len: tokens the model sees (None: the model's block_size). slide: once the text is longer than that, the
    window moves on by so many tokens at a time; 1 always shows the last context_len tokens, larger values are faster.
    use_cache: keep keys and values of earlier tokens; the text is the same without. Raises ValueError for values out of
    range; `SlidingContext` checks the context against the model.
    """

    context_len: int | None = None
    slide: int = 1
    use_cache: bool = True


@dataclass(frozen=True)
class BeamConfig:
    """How `beam_search` searches. The arguments are those of transformers' generate(num_beams=...).

    length_penalty: a score is the sum of log-probabilities (nats) / length ** length_penalty. early_stopping: True
    stops with num_beams finished texts; False when the best running beam, at its present length, cannot enter them;
    "never" when it could not even at full length. repetition_penalty acts on log-probabilities: with it, scores are no
    likelihoods. num_return: texts to return, at most num_beams. context_len, slide: see DecodingConfig.
    Raises ArgumentError.
    """

    num_beams: int = 5
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    repetition_penalty: float = 1.0
    num_return: int = 1
    context_len: int | None = None
    slide: int = 1

    def __post_init__(self):
        check_number("num_beams", self.num_beams, low=1)
        check_number("length_penalty", self.length_penalty, low=-10, high=10)  # length ** 1000 would overflow
        check_number("repetition_penalty", self.repetition_penalty, above=0)
        if not 1 <= self.num_return <= self.num_beams:
            raise ArgumentError("num_return", f"must be in 1..{self.num_beams} (num_beams), got {self.num_return}")
        if self.early_stopping not in (False, True, "never"):
            raise ArgumentError("early_stopping", f'must be False, True or "never", got {self.early_stopping!r}')


# ------------------------------------------------------------------------------------------------- sliding context
def window_start(length: int, context_len: int, slide: int) -> int:
    """Where the window over a text of `length` tokens begins: 0 while it fits, then the next multiple of `slide`.

    >>> [window_start(length, context_len=4, slide=1) for length in (3, 4, 5, 6)]
    [0, 0, 1, 2]
    >>> [window_start(length, context_len=4, slide=3) for length in (4, 5, 6, 7, 8)]
    [0, 3, 3, 3, 6]
    """
    return max(0, -(-(length - context_len) // slide) * slide)


class SlidingContext:
    """B growing texts, each read through a window of its last `context_len` tokens.

    The texts stand in one buffer, padded at the left so that all of them end at the same column:

        tokens  . . T O M _ _    first = [2, 0], where each text begins
                J A M E S _ _    end = 5, where the next token goes

    While no window moves, each new token adds one column to the key/value cache. When a window moves, the positions in
    it change and the whole window is computed again: beyond the context, slide=1 recomputes for each token, slide=N for
    one token in N. Each row's logits are those it would get alone.

    Raises ArgumentError for a context_len outside 1..block_size or a slide outside 1..context_len, and ValueError for
    a prompt that is empty or holds unknown ids, and for a model that is not causal.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Tensor],
        max_out_tokens: int,
        context_len: int | None = None,
        slide: int = 1,
        use_cache: bool = True,
    ):
        """prompts: B tensors of ids, (T,) each, lengths may differ. max_out_tokens: how many `append`s to expect."""
        if not model.causal:
            raise ValueError(f"decoding from left to right needs a causal model, and this is {model.name}")
        config = model.config
        self.context_len = config.block_size if context_len is None else context_len
        if not 1 <= self.context_len <= config.block_size:
            raise ArgumentError("context_len", f"must be in 1..{config.block_size} (block_size), got {context_len}")
        if not 1 <= slide <= self.context_len:
            raise ArgumentError("slide", f"must be in 1..{self.context_len} (context_len), got {slide}")
        if not len(prompts) or not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt needs at least one id: begin a text with [START]")
        if not all(0 <= prompt.min() and prompt.max() < config.vocab_size for prompt in prompts):
            raise ValueError(f"the ids of a prompt must be in 0..{config.vocab_size - 1}")
        self.model, self.slide = model, slide
        self.end = max(map(len, prompts))
        self.first = [self.end - len(prompt) for prompt in prompts]
        size = len(prompts), self.end + max_out_tokens
        self.tokens = torch.full(size, PAD_ID, device=model.device)  # (B, end + max_out_tokens)
        for row, prompt in zip(self.tokens, prompts, strict=True):
            row[self.end - len(prompt) : self.end] = prompt
        self.starts = None  # first column of each row's window, as the cache knows it
        self.pad = None
        self.cache = None
        if use_cache and config.arch != "vanilla":  # nn.TransformerEncoder has no cache: recompute
            self.cache = model.new_cache(len(prompts), self.context_len)

    def next_logits(self) -> Tensor:
        """(B, V): logits of each text's next token."""
        starts = [first + window_start(self.end - first, self.context_len, self.slide) for first in self.first]
        left = min(starts)
        if starts != self.starts:
            self.starts = starts
            self.pad = None if max(starts) == left else torch.tensor(starts, device=self.tokens.device) - left
            if self.cache is not None:
                self.cache.clear()
        known = left + (self.cache.length if self.cache is not None else 0)
        return self.model(self.tokens[:, known : self.end], pad=self.pad, cache=self.cache)[:, -1]

    def penalize(self, logits: Tensor, penalty: float) -> Tensor:
        """(B, V) logits after the repetition penalty for all tokens of each text."""
        if penalty == 1:
            return logits
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, self.tokens[:, : self.end], True)
        return penalize_repetition(logits, seen, penalty)

    def append(self, tokens: Tensor) -> None:
        """Write (B,) tokens at the end of the texts."""
        self.tokens[:, self.end] = tokens
        self.end += 1

    def select(self, rows: Tensor) -> None:
        """Row b becomes a copy of row rows[b]; there may be more rows than before, or fewer. Needs equal lengths."""
        if self.cache is not None:
            same = (self.tokens[:, : self.end] == self.tokens[0, : self.end]).all(0)  # columns all rows agree on
            shared = int(same.long().cumprod(0).sum()) - min(self.starts)
            self.cache.reorder(rows, max(0, shared))
        self.tokens = self.tokens[rows]
        self.first, self.starts = self.first[:1] * len(rows), self.starts[:1] * len(rows)


# ------------------------------------------------------------------------------------------------- decoding
def decode(
    model: GPT,
    prompts: Sequence[Tensor],
    config: DecodingConfig | None = None,
    *,
    max_out_tokens: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    **settings,
) -> Iterator[Tensor]:
    """Continue B prompts of ids, (T,) each and of any lengths: yields the next token of each, (B,), as it is drawn.

    `settings` are fields of DecodingConfig and replace those of `config`. A row ends with [END], or when
    stop(the ids written in this row) is true, and holds [PAD] from then on; the iterator ends with the last row, or
    after max_out_tokens. The repetition penalty counts the tokens of the prompt as well. `generator`: see
    logits.row_generators; a row's text does not depend on the batch. Raises ArgumentError for bad values, and
    ValueError for a prompt that cannot be read, at the call and not at the first token.
    """
    config = replace(config or DecodingConfig(), **settings)
    check_number("max_out_tokens", max_out_tokens, low=0)
    context = SlidingContext(model, prompts, max_out_tokens, config.context_len, config.slide, config.use_cache)
    generators = row_generators(generator, context.tokens, PAD_ID)
    return decoding_loop(context, config, generators, max_out_tokens, stop)


@torch.inference_mode()
def decoding_loop(
    context: SlidingContext,
    config: DecodingConfig,
    generators: list[torch.Generator],
    max_out_tokens: int,
    stop: Callable[[list[int]], bool] | None,
) -> Iterator[Tensor]:
    """The loop of `decode`: logits, one token a row, append, until every row has ended."""
    written: list[list[int]] = [[] for _ in context.tokens]
    ended = [False for _ in context.tokens]
    for _ in range(max_out_tokens):
        tokens = draw_next(context, config, generators)
        if any(ended):
            tokens = tokens.masked_fill(torch.tensor(ended, device=tokens.device), PAD_ID)
        yield tokens
        for row, token in enumerate(tokens.tolist()):
            written[row].append(token)
            ended[row] = ended[row] or token == END_ID or (stop is not None and stop(written[row]))
        if all(ended):
            return
        context.append(tokens)


def draw_next(context: SlidingContext, config: DecodingConfig, generators: list[torch.Generator]) -> Tensor:
    """(B,): the next token of each row. Temperature 0 takes the likeliest and draws no random number."""
    logits = context.penalize(context.next_logits(), config.repetition_penalty)  # (B, V)
    if config.temperature == 0:
        return logits.argmax(-1)
    return draw(probabilities(logits, config), uniforms(generators)).to(context.tokens.device)


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
    context = SlidingContext(model, [prompt], max_out_tokens, config.context_len, config.slide)
    scores = torch.zeros(1, device=context.tokens.device)  # (beams,) log-probabilities: one beam until the first step
    finished: list[tuple[float, Tensor]] = [] if max_out_tokens else [(0.0, context.tokens[0])]
    for n in range(1, max_out_tokens + 1):
        log_probs = context.penalize(context.next_logits().log_softmax(-1), config.repetition_penalty)  # (beams, V)
        best, beams, tokens = best_continuations(scores[:, None] + log_probs, 2 * config.num_beams)
        possible = best > -torch.inf
        ends = (tokens == END_ID) | (n == max_out_tokens)
        for rank in (ends & possible)[: config.num_beams].nonzero()[:, 0].tolist():
            ids = torch.cat([context.tokens[beams[rank], : context.end], tokens[rank : rank + 1]])
            finished.append((best[rank].item() / n**config.length_penalty, ids))
        finished = sorted(finished, key=lambda pair: -pair[0])[: config.num_beams]

        running = (possible & ~ends).nonzero()[: config.num_beams, 0]
        if not len(running):
            break
        scores = best[running]
        if search_is_over(config, [score for score, _ in finished], scores[0].item(), n, max_out_tokens):
            break
        context.select(beams[running])
        context.append(tokens[running])
    return [(ids, score) for score, ids in finished[: config.num_return]]


def best_continuations(scores: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(beams, V) -> the n best scores, the beams they continue, and the tokens they add; all (n,), best first.

    n is twice the number of beams: even if the better half all end in [END], enough are left to continue.
    """
    best, index = scores.flatten().topk(min(n, scores.numel()))
    return best, index // scores.shape[1], index % scores.shape[1]


def search_is_over(config: BeamConfig, finished: list[float], best_running: float, length: int, limit: int) -> bool:
    """Whether no running beam can improve the finished texts any more, by the rule of config.early_stopping.

    finished: scores of the finished texts, best first. best_running: the largest log-probability of a running beam,
    which has `length` written tokens of `limit`.
    """
    if len(finished) < config.num_beams:
        return False
    if config.early_stopping is True:
        return True
    if config.early_stopping == "never" and config.length_penalty > 0:
        length = limit
    return best_running / length**config.length_penalty <= finished[-1]
