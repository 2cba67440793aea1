"""One writer for all models: `write(model, starts, config, generator)` yields the texts after every step.

A start is the ids of a text with [MASK] wherever something is to be written: a prompt, a suffix and an infilling
template are one thing. LLaDA fills masks anywhere, window by window; GPT those at the end, token by token. Whoever
reads the states need not know which model made them.

Letters: B texts, T tokens, V vocabulary, n positions written at a step, m masked positions that the network saw.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive import decode
from config import DecodingConfig, SamplingConfig
from logits import row_generators
from model import GPT, LLaDAModel, Transformer
from sampler import make_plan, reverse_process
from tokenizer import END_ID, MASK_ID, NEVER_WRITTEN, START_ID
from utils.errors import ArgumentError

END_BLOCK = 8  # positions in a block where the orders of confidence write texts that may end


@dataclass
class State:
    """The texts after a step. `texts` are changed in place by later steps: copy what is to be kept."""

    texts: list[Tensor]  # B of (T,): ids, [MASK] where nothing is written yet
    written: list[Tensor]  # B of (n,): the positions written at this step
    masked: list[Tensor]  # B of (m,): the positions for which the network gave probabilities at this step
    probabilities: list[Tensor]  # B of (m, V), float64: these probabilities
    nfe: int  # network evaluations so far, of all texts together


@singledispatch
def write(
    model: Transformer,
    starts: Sequence[Tensor],
    config: SamplingConfig | DecodingConfig,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Iterator[State]:
    """Write the [MASK]s of B starts, (T,) ids each; yield the state after every step.

    config: SamplingConfig (LLaDA) or DecodingConfig (GPT). A text does not depend on its batch; `generator`: see
    `logits.row_generators`. A model of texts that end may write [END]: [END]s fill the rest of the text.
    Raises ArgumentError or ValueError before the first step for settings or starts that do not fit.
    """
    raise TypeError(f"no writer for {type(model).__name__}")


def groups_of(keys: Sequence) -> list[list[int]]:
    """The numbers of the texts with equal keys, which are written as one batch."""
    return [[b for b, key in enumerate(keys) if key == k] for k in sorted(set(keys))]


def check_starts(starts: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the starts, on the CPU."""
    if not len(starts) or not all(len(start) for start in starts):
        raise ValueError("there is nothing to write: a text needs at least one character or [MASK]")
    return [start.to("cpu", copy=True) for start in starts]


def known_before_masks(text: Tensor) -> int | None:
    """How many tokens are given, if all masks stand at the end of the text; else None."""
    known = int((text != MASK_ID).sum())
    return None if (text[:known] == MASK_ID).any() else known


def at_rows(count: int, rows: Sequence[int], values: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """`count` tensors: values[i] at rows[i], empty ones like `like` elsewhere."""
    found = dict(zip(rows, values, strict=True))
    return [found.get(b, like[:0]) for b in range(count)]


# ------------------------------------------------------------------------------------------------- LLaDA
@write.register
def fill(model: LLaDAModel, starts, config: SamplingConfig, generator=None) -> Iterator[State]:
    """LLaDA: texts up to block_size are one window, longer ones are filled window by window, each beginning
    config.slide tokens after the one before. A text that may end is one window."""
    texts, size = check_starts(starts), model.config.block_size
    slide = max(1, size // 2) if config.slide is None else config.slide
    if not 1 <= slide <= size:
        raise ArgumentError("slide", f"must be in 1..{size} (block_size), got {slide}")
    ends = model.config.segments != "window"
    if ends and max(map(len, texts)) > size - 1:
        raise ValueError(f"a text of {max(map(len, texts))} tokens is too long: this model writes at most {size - 1}")
    may_end = [ends and known_before_masks(text) is not None for text in texts]
    for text in texts:
        check_windows(config, text == MASK_ID, window_starts(len(text), size, slide), size)
    generators, nfe = row_generators(generator, texts), 0
    for rows in groups_of([(len(text), end) for text, end in zip(texts, may_end, strict=True)]):
        predict, sampling = mask_predictor(model, may_end[rows[0]]), config
        batch, own = torch.stack([texts[b] for b in rows]), [generators[b] for b in rows]
        whole = (config.block_length, config.schedule) == (None, "uniform")
        if may_end[rows[0]] and "confidence" in config.order and whole:
            # A confidence order would reveal the far-right [END]s first, and so write scraps of text: fill in blocks.
            T = batch.shape[1]
            sampling = replace(config, block_length=max(END_BLOCK, -(-T // (config.steps or T))))
        free = batch == MASK_ID
        for first in window_starts(batch.shape[1], size, slide):
            columns, before = slice(first, first + size), nfe
            window = batch[:, columns]
            for step in reverse_process(predict, window, MASK_ID, sampling, never=NEVER_WRITTEN, generator=own):
                batch[:, columns] = step.tokens
                if may_end[rows[0]]:
                    cut_at_end(batch, free)
                for text, row in zip([texts[b] for b in rows], batch, strict=True):
                    text[columns] = row[columns]
                revealed, masked = ([first + row.nonzero()[:, 0] for row in x] for x in (step.revealed, step.masked))
                p = step.probabilities.split([len(positions) for positions in masked])
                nfe, where = before + step.nfe, (at_rows(len(texts), rows, x, texts[0]) for x in (revealed, masked))
                yield State(texts, *where, at_rows(len(texts), rows, p, step.probabilities), nfe)


def window_starts(length: int, block_size: int, slide: int) -> list[int]:
    """Where the windows over a text begin: every `slide` characters, the last one at its end.

    >>> window_starts(10, block_size=10, slide=3), window_starts(15, block_size=10, slide=3)
    ([0], [0, 3, 5])
    """
    last = max(0, length - block_size)
    return [*range(0, last, slide), last]


def check_windows(config: SamplingConfig, masked: Tensor, starts: list[int], block_size: int) -> None:
    """Raise ArgumentError unless the plan fits every window of a text with masked (T,): those before it fill theirs."""
    patterns, filled = set(), 0
    for start in starts:
        window = masked[start : start + block_size].clone()
        window[: max(0, filled - start)] = False
        filled = start + block_size
        if window.numpy().tobytes() not in patterns:  # most windows of a long text look the same
            patterns.add(window.numpy().tobytes())
            make_plan(window[None], config)


def mask_predictor(model: LLaDAModel, may_end: bool = False) -> Callable[[Tensor], Tensor]:
    """predict(tokens) for `reverse_process`: tokens (B, T) on any device -> logits (B, T, V) on the CPU.

    A model of texts that end reads each row as it learned them: [START], the text, [END]s up to block_size. The id V
    stands for a character that the model does not know: the network reads [MASK] there, while the sampler sees a given
    token. Unless the text may end, [END] has logit -inf. Tokens are drawn on the CPU in float64, which some devices do
    not have.
    """
    size, ends = model.config.block_size, model.config.segments != "window"

    def predict(tokens: Tensor) -> Tensor:
        x, T = tokens.masked_fill(tokens == model.config.vocab_size, MASK_ID), tokens.shape[1]
        if ends:
            x = F.pad(F.pad(x, (1, 0), value=START_ID), (0, size - 1 - T), value=END_ID)
        logits = model(x.to(model.device)).cpu()[:, int(ends) : int(ends) + T]
        if not may_end:
            logits[..., END_ID] = -torch.inf
        return logits

    return predict


def cut_at_end(texts: Tensor, free: Tensor) -> None:
    """Write [END]s behind the first written one of texts (B, T), once no mask is before it. free (B, T): not given."""
    complete = (texts != MASK_ID).cummin(1).values  # no mask up to here
    ended = ((texts == END_ID) & free & complete).cummax(1).values
    texts.masked_fill_(ended & free & (texts != MASK_ID), END_ID)


# ------------------------------------------------------------------------------------------------- GPT
def continued(starts: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Copies of the starts and how many tokens of each are given. Raises ValueError for a token behind a mask."""
    texts = check_starts(starts)
    known = [known_before_masks(text) for text in texts]
    if None in known:
        raise ValueError("GPT continues a text: no token may stand behind a [MASK]; LLaDA fills gaps")
    return texts, known


@write.register
def continue_from_left(model: GPT, starts, config: DecodingConfig, generator=None) -> Iterator[State]:
    """GPT: one token a step. [START] opens every text. Texts whose starts are of one form are a batch."""
    texts, known = continued(starts)
    prompts = [F.pad(text[:n], (1, 0), value=START_ID) for text, n in zip(texts, known, strict=True)]
    generators, nfe = row_generators(generator, prompts), 0  # a longer text begins as a shorter one
    for rows in groups_of([(len(text), n) for text, n in zip(texts, known, strict=True)]):
        n, T = known[rows[0]], len(texts[rows[0]])
        batch, own = torch.stack([prompts[b] for b in rows]), [generators[b] for b in rows]
        position = torch.tensor([n])
        for tokens, p in decode(model, batch, config, max_out_tokens=T - n, generator=own):
            for b, token in zip(rows, tokens.tolist(), strict=True):
                texts[b][position] = token
            nfe += 1
            positions = at_rows(len(texts), rows, [position] * len(rows), position)
            yield State(texts, positions, positions, at_rows(len(texts), rows, p.split(1), p), nfe)
            position = position + 1
        for b in rows:
            texts[b][texts[b] == MASK_ID] = END_ID  # all of them have ended
    if nfe == 0:
        yield State(texts, *([text[:0] for text in texts] for _ in range(3)), nfe)
