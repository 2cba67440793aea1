"""The causal counterpart of `diffusion` and `sampler`: loss, exact likelihood, decoding, beam search.

Everything here speaks in token ids and reads prompts exactly as they are given: [START] is a token like any other, the
caller puts it first where a text truly begins (the text level, `generate.py`, does).

Letters: B batch, T positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from drawing import draw, penalize_repetition, probabilities, row_generators, uniforms
from model import GPT, KeyValueCache
from tokenizer import END_ID, PAD_ID


# ------------------------------------------------------------------------------------------------- loss, likelihood
def causal_inputs(sequences: Tensor, start_token_id: int) -> Tensor:
    """(B, T) -> (B, T): [START] and all but the last token, so that position t predicts sequences[:, t].

    [START] opens every window: GPT and LLaDA score the same T characters.
    """
    start = torch.full_like(sequences[:, :1], start_token_id)
    return torch.cat([start, sequences[:, :-1]], dim=1)


def compute_gpt_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Next-token cross-entropy of logits (B, T, V) against targets (B, T): exact, nats/token, mean over B T."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.inference_mode()
def exact_nll(
    predict: Callable[[Tensor], Tensor],
    windows: Tensor,
    start_token_id: int,
    batch_size: int = 128,
    tick: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """The chain rule: windows (N, T) -> (N, T) negative log-likelihoods of their tokens, exact, in nats/token.

    predict is any causal tokens (B, T) -> logits (B, T, V). The mean over a whole validation set is what LLaDA's bound
    (likelihood.py) compares with. `batch_size` windows are read at a time, which does not change the result; after
    each batch tick(windows read) is called.
    """
    nll = []
    for targets in windows.split(batch_size):
        logits = predict(causal_inputs(targets, start_token_id))  # (B, T, V)
        nll.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))  # (B, T)
        tick(len(targets))
    return torch.cat(nll)


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

    While no window moves, each new token costs one column of the key/value cache; when one does, its positions change
    and all are read again. So slide=1 beyond the context is a full recomputation a token, slide=N one in N tokens.
    Each row's logits are those it would get alone.

    Raises ValueError for an empty or unreadable prompt, a context_len outside 1..block_size, a slide outside
    1..context_len.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Tensor],
        room: int,
        context_len: int | None = None,
        slide: int = 1,
        use_cache: bool = True,
    ):
        """prompts: B tensors of ids, (T,) each, lengths may differ. room: how many tokens will be appended at most."""
        if not model.causal:
            raise ValueError(f"writing from left to right needs a causal model, and this is {model.name}")
        config = model.config
        self.context_len = config.block_size if context_len is None else context_len
        if not 1 <= self.context_len <= config.block_size:
            raise ValueError(f"context_len must be in 1..{config.block_size} (block_size), got {context_len}")
        if not 1 <= slide <= self.context_len:
            raise ValueError(f"slide must be in 1..{self.context_len} (context_len), got {slide}")
        if not len(prompts) or not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt of ids holds at least one: begin a text with [START]")
        if not all(0 <= prompt.min() and prompt.max() < config.vocab_size for prompt in prompts):
            raise ValueError(f"the ids of a prompt must be in 0..{config.vocab_size - 1}")
        self.model, self.slide = model, slide
        self.end = max(map(len, prompts))
        self.first = [self.end - len(prompt) for prompt in prompts]
        device = next(model.parameters()).device
        self.tokens = torch.full((len(prompts), self.end + room), PAD_ID, device=device)  # (B, end + room)
        for row, prompt in zip(self.tokens, prompts, strict=True):
            row[self.end - len(prompt) : self.end] = prompt
        self.starts = None  # first column of each row's window, as the cache knows it
        self.pad = None
        self.cache = None
        if use_cache and config.arch != "vanilla":  # nn.TransformerEncoder has no cache: recompute
            self.cache = KeyValueCache(config, len(prompts), self.context_len, device)

    def next_logits(self) -> Tensor:
        """(B, V): what each text's model says comes next."""
        starts = [first + window_start(self.end - first, self.context_len, self.slide) for first in self.first]
        left = min(starts)
        if starts != self.starts:
            self.starts = starts
            self.pad = None if max(starts) == left else torch.tensor(starts, device=self.tokens.device) - left
            if self.cache is not None:
                self.cache.clear()
        known = left + (self.cache.length if self.cache is not None else 0)
        return self.model(self.tokens[:, known : self.end], pad=self.pad, cache=self.cache)[:, -1]

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


# ------------------------------------------------------------------------------------------------- drawing
def decode(
    model: GPT,
    prompts: Sequence[Tensor],
    *,
    max_out_tokens: int,
    context_len: int | None = None,
    slide: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Continue B prompts of ids, (T,) each and of any lengths: yields the next token of each, (B,), as it is drawn.

    A row ends with [END], or when stop(its written ids) says so, and is [PAD] from then on; the iterator ends with the
    last row. Every new token sees the last `context_len` (default: block_size) tokens of its text, see SlidingContext
    for `slide`. temperature 0 is greedy; the repetition penalty counts prompt and written tokens. `generator`: see
    drawing.row_generators; a row's text does not depend on the batch. Raises ValueError, at once, for bad values.
    """
    check_writing(max_out_tokens, repetition_penalty)
    probabilities(torch.zeros(1, 2), temperature, top_k, top_p)  # raises for what it does not accept
    context = SlidingContext(model, prompts, max_out_tokens, context_len, slide, use_cache)
    generators = row_generators(generator, context.tokens)

    def choose(logits: Tensor) -> Tensor:
        """(B, V) logits -> (B,) tokens."""
        if repetition_penalty != 1:
            seen = seen_tokens(context.tokens, logits.shape[-1])
            logits = penalize_repetition(logits, seen, repetition_penalty)
        if temperature == 0:
            return logits.argmax(-1)
        p = probabilities(logits, temperature, top_k, top_p)
        return draw(p, uniforms(generators)[:, 0].to(p.device))

    return write(context, choose, max_out_tokens, stop)


@torch.inference_mode()
def write(
    context: SlidingContext,
    choose: Callable[[Tensor], Tensor],
    max_out_tokens: int,
    stop: Callable[[list[int]], bool] | None,
) -> Iterator[Tensor]:
    """The loop of `decode`: ask for logits, choose, append, until every row has ended."""
    written: list[list[int]] = [[] for _ in context.tokens]
    ended = [False for _ in context.tokens]
    for _ in range(max_out_tokens):
        tokens = choose(context.next_logits())
        if any(ended):
            tokens = tokens.masked_fill(torch.tensor(ended, device=tokens.device), PAD_ID)
        yield tokens
        for row, token in enumerate(tokens.tolist()):
            written[row].append(token)
            ended[row] = ended[row] or token == END_ID or (stop is not None and stop(written[row]))
        if all(ended):
            return
        context.append(tokens)


def seen_tokens(tokens: Tensor, vocab_size: int) -> Tensor:
    """(B, T) ids -> (B, V): which tokens each row holds."""
    return torch.zeros(len(tokens), vocab_size, dtype=torch.bool, device=tokens.device).scatter_(1, tokens, True)


def check_writing(max_out_tokens: int, repetition_penalty: float) -> None:
    """Raise ValueError for values out of range."""
    if max_out_tokens < 0:
        raise ValueError(f"max_out_tokens must be at least 0, got {max_out_tokens}")
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty must be greater than 0, got {repetition_penalty}")


# ------------------------------------------------------------------------------------------------- beam search
@torch.inference_mode()
def beam_search(
    model: GPT,
    prompt: Tensor,
    *,
    num_beams: int,
    max_out_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    repetition_penalty: float = 1.0,
    num_return: int = 1,
    context_len: int | None = None,
    slide: int = 1,
) -> list[tuple[Tensor, float]]:
    """The likeliest continuations of prompt (T,) that `num_beams` beams find: (ids, score) pairs, best first.

    ids hold the prompt and what was written, [END] included if it came. score = sum of the log-probabilities (nats) of
    the n written tokens / n ** length_penalty, as in transformers' generate(num_beams=...), whose results these are.
    early_stopping: True stops with num_beams finished texts; False when the best running beam, at its present length,
    cannot enter them; "never" when it could not even at full length. The repetition penalty acts on log-probabilities,
    which makes scores of penalized texts no likelihoods. Fewer than num_return pairs come back if fewer texts exist.
    Raises ValueError for values out of range.
    """
    check_writing(max_out_tokens, repetition_penalty)
    check_beams(num_beams, num_return, early_stopping)
    context = SlidingContext(model, [prompt], max_out_tokens, context_len, slide)
    scores = torch.zeros(1, device=context.tokens.device)  # (beams,) log-probabilities: one beam until the first step
    finished: list[tuple[float, Tensor]] = [] if max_out_tokens else [(0.0, context.tokens[0])]
    for n in range(1, max_out_tokens + 1):
        log_probs = context.next_logits().log_softmax(-1)  # (beams, V)
        if repetition_penalty != 1.0:
            seen = seen_tokens(context.tokens[:, : context.end], log_probs.shape[-1])
            log_probs = penalize_repetition(log_probs, seen, repetition_penalty)
        best, beams, tokens = best_continuations(scores[:, None] + log_probs, 2 * num_beams)
        possible = best > -torch.inf
        ends = (tokens == END_ID) | (n == max_out_tokens)
        for rank in (ends & possible)[:num_beams].nonzero()[:, 0].tolist():
            ids = torch.cat([context.tokens[beams[rank], : context.end], tokens[rank : rank + 1]])
            finished.append((best[rank].item() / n**length_penalty, ids))
        finished = sorted(finished, key=lambda pair: -pair[0])[:num_beams]

        running = (possible & ~ends).nonzero()[:num_beams, 0]
        if not len(running):
            break
        scores = best[running]
        if len(finished) == num_beams:
            length = max_out_tokens if early_stopping == "never" and length_penalty > 0 else n
            if early_stopping is True or scores[0].item() / length**length_penalty <= finished[-1][0]:
                break
        context.select(beams[running])
        context.append(tokens[running])
    return [(ids, score) for score, ids in finished[:num_return]]


def best_continuations(scores: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(beams, V) -> the n best scores, whose beams they continue, and with which tokens; all (n,), best first.

    Of n = twice the beams, should all the better half be [END], as many are left to go on with.
    """
    best, index = scores.flatten().topk(min(n, scores.numel()))
    return best, index // scores.shape[1], index % scores.shape[1]


def check_beams(num_beams: int, num_return: int, early_stopping: bool | str) -> None:
    """Raise ValueError for values out of range."""
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    if not 1 <= num_return <= num_beams:
        raise ValueError(f"num_return must be in 1..{num_beams} (num_beams), got {num_return}")
    if early_stopping not in (False, True, "never"):
        raise ValueError(f'early_stopping must be False, True or "never", got {early_stopping!r}')
