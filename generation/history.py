"""The history of one text that a model writes: what changed at each step, for the live view, the page and the GIF.

`record_filling` (LLaDA) and `record_decoding` (GPT) follow the generation and yield the same growing `History` after
every step, so that all views work with both models. A history is plain Python: no tensors, no network.

Letters: T positions, V vocabulary, n positions written at a step.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from generation.infilling import GenerationState
from model import GPT
from tokenizer import MASK_ID, PAD_ID, START_ID, Tokenizer

NUM_CANDIDATES = 5  # kept for each written position


class Status(StrEnum):
    """What a cell is at some step."""

    GIVEN = "given"  # part of the prompt or template
    MASKED = "masked"
    WRITTEN = "written"  # at this very step
    REMASKED = "remasked"  # at this very step
    SETTLED = "settled"  # written at an earlier step


@dataclass(frozen=True)
class Cell:
    """One position: its token and how it got there."""

    token: str | None  # None: masked
    step: int = 0  # of its last change; 0: before the first step
    confidence: float = 0.0  # the network's probability of the token when it was written; 1 if given, 0 if masked
    candidates: tuple[tuple[str, float], ...] = ()  # the likeliest tokens and their probabilities, likeliest first

    def status(self, now: int) -> Status:
        """What the cell is after step `now`.

        >>> Cell("a", step=3).status(3).value, Cell("a", step=3).status(4).value, Cell(None, step=3).status(3).value
        ('written', 'settled', 'remasked')
        """
        if self.token is None:
            return Status.REMASKED if 0 < self.step == now else Status.MASKED
        if self.step == 0:
            return Status.GIVEN
        return Status.WRITTEN if self.step == now else Status.SETTLED


@dataclass(frozen=True)
class Frame:
    """One step: only what it changed."""

    changes: dict[int, Cell]  # position -> its new cell; a position just past the end makes the text longer
    nfe: int  # network evaluations so far
    seconds: float  # computing time so far, without what the caller did between the steps


@dataclass
class History:
    """The states of one text: `start` before the first step, then a frame a step; `cells` is the latest state.

    >>> history = History("LLaDA", ["a", None])
    >>> history.add(Frame({1: Cell("b", step=1, confidence=0.9)}, nfe=1, seconds=0.1))
    >>> [[cell.token for cell in history.cells_at(step)] for step in (0, 1)]
    [['a', None], ['a', 'b']]
    """

    label: str  # of the model
    start: list[str | None]  # (T,) the given tokens; None: masked
    frames: list[Frame] = field(default_factory=list)

    def __post_init__(self):
        self.cells = self.cells_at(len(self.frames))

    def add(self, frame: Frame) -> None:
        """Append a step, and update `cells`. Its cells must carry the number of this step, counted from 1."""
        self.frames.append(frame)
        apply(self.cells, frame)

    def cells_at(self, step: int) -> list[Cell]:
        """The state after so many steps, from the frames."""
        cells = [Cell(token, confidence=float(token is not None)) for token in self.start]
        for frame in self.frames[:step]:
            apply(cells, frame)
        return cells

    @property
    def step(self) -> int:
        """Steps so far."""
        return len(self.frames)

    @property
    def nfe(self) -> int:
        """Network evaluations so far."""
        return self.frames[-1].nfe if self.frames else 0

    @property
    def seconds(self) -> float:
        """Computing time so far."""
        return self.frames[-1].seconds if self.frames else 0.0


def apply(cells: list[Cell], frame: Frame) -> None:
    """Change a state in place to the one after `frame`."""
    for position, cell in sorted(frame.changes.items()):
        cells[position : position + 1] = [cell]


# ------------------------------------------------------------------------------------------------- recording
def record_filling(
    states: Iterable[GenerationState], template: Tensor, tokenizer: Tokenizer, label: str = "LLaDA", row: int = 0
) -> Iterator[History]:
    """Follow `fill_masks`: yield the history of text `row` at once, and again after every step.

    template: (T,) ids of that text, as given to `fill_masks`. All texts of the batch must be of one length, else
    ValueError is raised. Always the same object is yielded; what is to be kept of it must be copied.
    """
    token_of = tokenizer.id_to_char
    history = History(label, [None if i == MASK_ID else token_of[i] for i in template.tolist()])
    yield history
    before = template.cpu()
    for state, seconds in timed(states):
        step, text, now = state.step, state.texts[row].clone(), history.step + 1
        if len(step.tokens) != len(state.texts):
            raise ValueError("a history needs texts of one length: their windows must move together")
        # The step speaks of columns of the window. Its i-th revealed column is the i-th masked position that changed.
        written = ((before == MASK_ID) & (text != MASK_ID)).nonzero()[:, 0].tolist()
        remasked = ((before != MASK_ID) & (text == MASK_ID)).nonzero()[:, 0].tolist()
        confidence = step.confidence[row, step.revealed[row]].tolist()
        candidates = top_candidates(step.probabilities[step.revealed.nonzero()[:, 0] == row], tokenizer)
        changes = {position: Cell(None, now) for position in remasked}
        for position, *cell in zip(written, confidence, candidates, strict=True):
            changes[position] = Cell(token_of[int(text[position])], now, *cell)
        history.add(Frame(changes, state.nfe, seconds))
        before = text
        yield history


def record_decoding(
    columns: Iterable[Tensor], model: GPT, prompt: Tensor, tokenizer: Tokenizer, label: str = "GPT", row: int = 0
) -> Iterator[History]:
    """Follow `autoregressive.decode`: yield the history of text `row` at once, and again after every token.

    prompt: (T,) ids of that text, as given to `decode`; its [START] is not shown. The text grows by one position a
    step. A forward hook on the model reads the probabilities: nothing else may call the model in a step.
    """
    token_of = tokenizer.id_to_char
    history = History(label, [token_of[i] for i in prompt.tolist() if i != START_ID])
    yield history
    latest, nfe = None, 0

    def keep(model: GPT, inputs: tuple, output: Tensor) -> None:
        nonlocal latest, nfe
        latest, nfe = output[row, -1].detach(), nfe + 1  # (V,)

    hook = model.register_forward_hook(keep)
    try:
        for column, seconds in timed(columns):
            token = int(column[row])
            if token == PAD_ID:  # the text has ended, and others of its batch have not
                return
            p = latest.cpu().double().softmax(-1)
            cell = Cell(token_of[token], history.step + 1, float(p[token]), *top_candidates(p[None], tokenizer))
            history.add(Frame({len(history.cells): cell}, nfe, seconds))
            yield history
    finally:
        hook.remove()


def top_candidates(p: Tensor, tokenizer: Tokenizer) -> list[tuple[tuple[str, float], ...]]:
    """Probabilities (n, V) -> for each position the NUM_CANDIDATES likeliest tokens that are possible at all."""
    best = torch.topk(p, min(NUM_CANDIDATES, p.shape[-1]))
    return [
        tuple((tokenizer.id_to_char[i], q) for i, q in zip(ids, probabilities, strict=True) if q > 0)
        for ids, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def timed(items: Iterable) -> Iterator[tuple]:
    """Each item with the seconds that it and those before it took to compute; the caller's own time does not count."""
    seconds, iterator = 0.0, iter(items)
    while True:
        start = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        seconds += time.perf_counter() - start
        yield item, seconds
