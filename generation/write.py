"""One writer for all models: `write(model, starts, config, generator)` yields the texts after every step.

A start is the ids of a text with [MASK] wherever something is to be written: a prompt, a suffix and an infilling
template are one thing. LLaDA fills masks anywhere, window by window; GPT those at the end, token by token. Whoever
reads the states need not know which model made them.

Letters: B texts, T tokens, V vocabulary, n positions written at a step, m masked positions that the network saw.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

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
    seconds: float = 0.0  # so far, without what the caller did between the steps


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
    texts = [start.to("cpu", copy=True) for start in starts]
    if not texts or not all(map(len, texts)):
        raise ValueError("there is nothing to write: a text needs at least one character or [MASK]")
    write_texts, seconds, begin = continue_texts if isinstance(model, GPT) else fill_texts, 0.0, time.perf_counter()
    for state in write_texts(model, texts, config, generator):
        seconds += time.perf_counter() - begin
        state.seconds = seconds
        yield state
        begin = time.perf_counter()


def state_of(texts: list[Tensor], rows: list[int], written, masked, probabilities, nfe: int) -> State:
    """The state after a step of the texts with the numbers `rows`; of the others, nothing was written or looked at."""

    def of_all(values: Sequence[Tensor]) -> list[Tensor]:
        found = dict(zip(rows, values, strict=True))
        return [found.get(b, values[0][:0]) for b in range(len(texts))]

    return State(texts, of_all(written), of_all(masked), of_all(probabilities), nfe)


def groups_of(keys: Sequence) -> list[list[int]]:
    """The numbers of the texts with equal keys, which are written as one batch."""
    return [[b for b, key in enumerate(keys) if key == k] for k in sorted(set(keys))]


def known_before_masks(text: Tensor) -> int | None:
    """How many tokens are given, if all masks stand at the end of the text; else None."""
    known = int((text != MASK_ID).sum())
    return None if (text[:known] == MASK_ID).any() else known


# ------------------------------------------------------------------------------------------------- LLaDA
def fill_texts(model: LLaDAModel, texts: list[Tensor], config: SamplingConfig, generator) -> Iterator[State]:
    """LLaDA: texts up to block_size are one window, longer ones are filled window by window, each beginning
    config.slide tokens after the one before. A text that may end is one window."""
    size, ends = model.config.block_size, model.config.segments != "window"
    slide = max(1, size // 2) if config.slide is None else config.slide
    if not 1 <= slide <= size:
        raise ArgumentError("slide", f"must be in 1..{size} (block_size), got {slide}")
    if ends and max(map(len, texts)) > size - 1:
        raise ValueError(f"a text of {max(map(len, texts))} tokens is too long: this model writes at most {size - 1}")
    for text in texts:
        check_windows(config, text == MASK_ID, size, slide)
    may_end = [ends and known_before_masks(text) is not None for text in texts]
    generators, nfe = row_generators(generator, texts), 0
    for rows in groups_of([(len(text), end) for text, end in zip(texts, may_end, strict=True)]):
        batch, own, end = torch.stack([texts[b] for b in rows]), [generators[b] for b in rows], may_end[rows[0]]
        for b, row in zip(rows, batch, strict=True):
            texts[b] = row  # a view: what is written to the batch is written to the text
        predict, sampling, free, T = mask_predictor(model, end), config, batch == MASK_ID, batch.shape[1]
        if end and "confidence" in config.order and config.block_length is None and config.schedule == "uniform":
            # A confidence order would reveal the far-right [END]s first, and so write scraps of text: fill in blocks.
            sampling = replace(config, block_length=max(END_BLOCK, -(-T // (config.steps or T))))
        for first in window_starts(T, size, slide):
            window, before = batch[:, first : first + size], nfe
            for step in reverse_process(predict, window, MASK_ID, sampling, never=NEVER_WRITTEN, generator=own):
                window.copy_(step.tokens)
                if end:
                    cut_at_end(batch, free)
                nfe = before + step.nfe
                written, masked = ([first + row.nonzero()[:, 0] for row in x] for x in (step.revealed, step.masked))
                yield state_of(texts, rows, written, masked, step.probabilities.split([*map(len, masked)]), nfe)


def window_starts(length: int, block_size: int, slide: int) -> list[int]:
    """Where the windows over a text begin: every `slide` characters, the last one at its end.

    >>> window_starts(10, block_size=10, slide=3), window_starts(15, block_size=10, slide=3)
    ([0], [0, 3, 5])
    """
    last = max(0, length - block_size)
    return [*range(0, last, slide), last]


def check_windows(config: SamplingConfig, masked: Tensor, block_size: int, slide: int) -> None:
    """Raise ArgumentError unless the plan fits every window of a text with masked (T,): those before it fill theirs."""
    windows, filled = {}, 0
    for start in window_starts(len(masked), block_size, slide):
        window = masked[start : start + block_size].clone()
        window[: max(0, filled - start)] = False
        windows[window.numpy().tobytes()] = window  # most windows of a long text look the same
        filled = start + block_size
    make_plan(torch.stack([*windows.values()]), config)


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
def continue_texts(model: GPT, texts: list[Tensor], config: DecodingConfig, generator) -> Iterator[State]:
    """GPT: one token a step. [START] opens every text. Texts whose starts are of one form are a batch."""
    known = [known_before_masks(text) for text in texts]
    if None in known:
        raise ValueError("GPT continues a text: no token may stand behind a [MASK]; LLaDA fills gaps")
    prompts = [F.pad(text[:n], (1, 0), value=START_ID) for text, n in zip(texts, known, strict=True)]
    generators, nfe = row_generators(generator, prompts), 0  # a longer text begins as a shorter one
    for rows in groups_of([(len(text), n) for text, n in zip(texts, known, strict=True)]):
        position, end = known[rows[0]], len(texts[rows[0]])
        batch, own = torch.stack([prompts[b] for b in rows]), [generators[b] for b in rows]
        for tokens, p in decode(model, batch, config, max_out_tokens=end - position, generator=own):
            for b, token in zip(rows, tokens.tolist(), strict=True):
                texts[b][position] = token
            nfe, written = nfe + 1, [torch.tensor([position])] * len(rows)
            yield state_of(texts, rows, written, written, p.split(1), nfe)
            position += 1
        for b in rows:
            texts[b][texts[b] == MASK_ID] = END_ID  # all of them have ended
    if nfe == 0:  # no text has a mask
        yield State(texts, *([text[:0] for text in texts] for _ in range(3)), nfe)
