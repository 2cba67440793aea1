"""The history of one text that a model writes, and what its readers share. Plain Python: no tensors, no network.

`Recorder` makes a history from the states (write.py) of any model. `Replay` goes through it and turns each step into
lines of runs, which terminal, race and GIF draw. The page has its own player.
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from generation.write import State
from tokenizer import MASK_ID, SPECIAL_TOKENS, Tokenizer
from utils.console import printable

NUM_BELIEFS = 5  # tokens kept for each masked position
MASK, NEWLINE = "░", "↵"
SHADES = 4  # of probability


@dataclass(frozen=True)
class Frame:
    """One step. A position just past the end of the text makes it longer."""

    nfe: int  # network evaluations so far
    seconds: float  # computing time so far, without what the caller did between the steps
    written: dict[int, tuple[str, float]]  # position -> its new token, and the probability that the network gave it
    beliefs: dict[int, tuple[tuple[str, float], ...]]  # of every position that was masked: its likeliest tokens


@dataclass
class History:
    """One text: its tokens before the first step, None where it is masked, and a frame for each step."""

    label: str  # of the model
    start: list[str | None]
    frames: list[Frame] = field(default_factory=list)


class Status(StrEnum):
    """What a position is after some step."""

    GIVEN = "given"  # part of the prompt or template
    MASKED = "masked"
    WRITTEN = "written"  # at this very step, for the first time
    CORRECTED = "corrected"  # at this very step, and it held another token before
    SETTLED = "settled"  # written at an earlier step


class Run(NamedTuple):
    """Characters that look alike."""

    text: str
    status: Status
    shade: int  # 0..3: the quarter in which the network's probability of them was


@dataclass
class Cell:
    """One position of a replay."""

    token: str | None = None  # None: masked
    status: Status = Status.MASKED
    shade: int = 0

    @property
    def text(self) -> str:
        """What stands for the token: nothing for a special one, symbols for control characters."""
        if self.token is None:
            return MASK
        return "" if self.token in SPECIAL_TOKENS else printable(self.token).replace("\t", " ")


class Replay:
    """A history from before its first step on: `cells` are the text after `step` steps.

    whole: it is complete. Then characters stand where those of the finished text do, which itself marks nothing as new.

    >>> replay = Replay(History("LLaDA", ["a", None], [Frame(1, 0.1, {1: ("b", 0.9)}, {})]))
    >>> [[(run.text, run.status.value) for run in line] for line in replay.advance().lines(80)]
    [[('a', 'given'), ('b', 'written')]]
    """

    def __init__(self, history: History, whole: bool = False):
        self.history, self.step = history, 0
        self.cells = [Cell(token, Status.MASKED if token is None else Status.GIVEN) for token in history.start]
        self.ends = [cell.text for cell in Replay(history).advance().cells] if whole else []

    def advance(self, step: int | None = None) -> "Replay":
        """Go on to a later step, by default to the last one."""
        for frame in self.history.frames[self.step : step]:
            self.settle()
            self.step += 1
            missing = max([*frame.written, *frame.beliefs], default=-1) + 1 - len(self.cells)
            self.cells += [Cell() for _ in range(missing)]
            for i, (token, p) in frame.written.items():
                status = Status.WRITTEN if self.cells[i].token is None else Status.CORRECTED
                self.cells[i] = Cell(token, status, min(SHADES - 1, int(SHADES * p)))
        if self.ends and self.is_over:
            self.settle()
        return self

    def settle(self) -> None:
        """What the latest step wrote is no longer new."""
        for i in self.frame.written:
            self.cells[i].status = Status.SETTLED

    @property
    def frame(self) -> Frame:
        """The latest step."""
        return self.history.frames[self.step - 1] if self.step else Frame(0, 0.0, {}, {})

    @property
    def is_over(self) -> bool:
        return self.step == len(self.history.frames)

    def lines(self, columns: int) -> list[list[Run]]:
        """The text as lines that break between words. A line feed is seen at the step at which it is written."""
        texts = self.ends or [cell.text for cell in self.cells]
        places = layout("".join(texts), columns)
        lines = [[] for _ in range(places[-1][0] + 1 if places else 1)]
        characters = [(i, k) for i, text in enumerate(texts) for k in range(len(text))]
        for (i, k), (row, column) in zip(characters, places, strict=True):
            if i < len(self.cells) and column < columns:
                cell = self.cells[i]
                char = MASK if cell.token is None else cell.text[k : k + 1] or " "
                if char == "\n" and cell.status in (Status.WRITTEN, Status.CORRECTED):
                    char = NEWLINE
                if (char, texts[i][k]) != ("\n", "\n"):
                    lines[row].append(Run(char.replace("\n", " "), cell.status, cell.shade))
        looks = [groupby(line, lambda run: run[1:]) for line in lines]
        return [[Run("".join(run.text for run in group), *look) for look, group in line] for line in looks]


class Recorder:
    """Makes the `history` of the first text of a batch. start: its (T,) ids before the first step; those before `first`
    are left out.

    A model that looks at one of several masks writes from left to right: its text begins without masks and grows.
    """

    def __init__(self, start: Tensor, tokenizer: Tokenizer, label: str, first: int = 0):
        self.before, self.token_of, self.first = start.tolist(), tokenizer.id_to_char, first
        self.history = History(label, [])

    def add(self, state: State, seconds: float) -> None:
        """A frame for the state, unless it is about other texts of the batch."""
        looked, text, first = state.masked[0].tolist(), state.texts[0].tolist(), self.first
        if not self.history.frames:
            given = max((i for i, token in enumerate(self.before) if token != MASK_ID), default=-1) + 1
            end = given if len(looked) == 1 < self.before.count(MASK_ID) else max([given, *(i + 1 for i in looked)])
            self.history.start = [None if i == MASK_ID else self.token_of[i] for i in self.before[first:end]]
        if not looked:
            return
        p = dict(zip(looked, state.probabilities[0], strict=True))  # position -> (V,)
        best = {i: torch.topk(q, min(NUM_BELIEFS, len(q))) for i, q in p.items()}
        beliefs = {
            i - first: tuple((self.token_of[j], q) for j, q in zip(ids.tolist(), values.tolist(), strict=True) if q > 0)
            for i, (values, ids) in best.items()
        }
        written = {  # what is cut behind an [END] follows from it
            i - first: (self.token_of[new], float(p[i][new]) if i in p else 1.0)
            for i, (old, new) in enumerate(zip(self.before, text, strict=True))
            if old != new
        }
        self.history.frames.append(Frame(state.nfe, seconds, written, beliefs))
        self.before = text


def layout(text: str, columns: int) -> list[tuple[int, int]]:
    """(row, column) of each character: lines end at line feeds, and between words where they would be too long.

    A space that does not fit hangs over the end of its line.

    >>> layout("to be", 4), layout("ab\\nc", 9)
    ([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], [(0, 0), (0, 1), (0, 2), (1, 0)])
    """
    from rich.cells import cell_len  # some characters are two columns wide

    places, row, column = [], 0, 0
    for word in re.findall(r"[^ \n]+|[ \n]", text):
        if word not in " \n" and column and column + cell_len(word) > columns:
            row, column = row + 1, 0
        for char in word:
            if char not in " \n" and column and column + cell_len(char) > columns:  # a word longer than a line
                row, column = row + 1, 0
            places.append((row, column))
            row, column = (row + 1, 0) if char == "\n" else (row, column + cell_len(char))
    return places
