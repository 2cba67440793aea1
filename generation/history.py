"""The history of one text that a model writes, and what its readers share.

`Recorder` makes a history from the states (write.py) of any model. `Replay` goes through it and turns each step into
lines of runs, which terminal, race and GIF draw. The page has its own player.
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from typing import NamedTuple

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
    """Characters that look alike: one position of a replay, or a part of a line."""

    text: str
    status: Status
    shade: int = 0  # 0..3: the quarter in which the network's probability of them was


def visible(token: str | None) -> str:
    """What stands for a token: nothing for a special one, symbols for masks and control characters."""
    if token is None:
        return MASK
    return "" if token in SPECIAL_TOKENS else printable(token).replace("\t", " ")


class Replay:
    """A history from before its first step on: `cells`, one for each position, are the text after `step` steps.

    whole: it is complete. Then characters stand where those of the finished text do, which itself marks nothing as new.

    >>> replay = Replay(History("LLaDA", ["a", None], [Frame(1, 0.1, {1: ("b", 0.9)}, {})]))
    >>> [[(run.text, run.status.value) for run in line] for line in replay.advance().lines(80)]
    [[('a', 'given'), ('b', 'written')]]
    """

    def __init__(self, history: History, whole: bool = False):
        self.history, self.step, self.frame = history, 0, Frame(0, 0.0, {}, {})  # the latest one
        self.cells = [Run(visible(t), Status.MASKED if t is None else Status.GIVEN) for t in history.start]
        self.ends = [cell.text for cell in Replay(history).advance().cells] if whole else []

    def advance(self, step: int | None = None) -> "Replay":
        """Go on to a later step, by default to the last one."""
        for frame in self.history.frames[self.step : step]:
            self.settle()
            self.step, self.frame = self.step + 1, frame
            missing = max([*frame.written, *frame.beliefs], default=-1) + 1 - len(self.cells)
            self.cells += [Run(MASK, Status.MASKED)] * missing
            for i, (token, p) in frame.written.items():
                status = Status.WRITTEN if self.cells[i].status is Status.MASKED else Status.CORRECTED
                self.cells[i] = Run(visible(token), status, min(SHADES - 1, int(SHADES * p)))
        if self.ends and self.step == len(self.history.frames):
            self.settle()
        return self

    def settle(self) -> None:
        """What the latest step wrote is no longer new."""
        for i in self.frame.written:
            self.cells[i] = self.cells[i]._replace(status=Status.SETTLED)

    def lines(self, columns: int) -> list[list[Run]]:
        """The text as lines that break between words. A line feed is seen at the step at which it is written."""
        ends, characters, lines = self.ends or [cell.text for cell in self.cells], [], []
        for cell, end in zip(self.cells, ends, strict=False):  # one behind the cells is not there yet
            text = MASK * len(end) if cell.status is Status.MASKED else cell.text.ljust(len(end))[: len(end)]
            text = text.replace("\n", NEWLINE) if cell.status in (Status.WRITTEN, Status.CORRECTED) else text
            characters += [cell._replace(text=char) for char in text]
        left = iter(characters)
        for row in layout("".join(ends), columns):
            line = [run for end, run in zip(row, left, strict=False) if (end, run.text) != ("\n", "\n")][:columns]
            looks = groupby(line, lambda run: run[1:])
            lines.append([Run("".join(run.text for run in group).replace("\n", " "), *look) for look, group in looks])
        return lines


def layout(text: str, columns: int) -> list[str]:
    """The rows of a text: they end at line feeds, and between words where they would be too long.

    A space that does not fit hangs over the end of its row.

    >>> layout("to be", 4), layout("ab\\nc", 9)
    (['to ', 'be'], ['ab\\n', 'c'])
    """
    from rich.cells import cell_len  # some characters are two columns wide

    rows = [""]
    for word in re.findall(r"[^ \n]+|[ \n]", text):
        for part in [word] if cell_len(word) <= columns else word:  # longer words break anywhere
            is_full = rows[-1] and part not in " \n" and cell_len(rows[-1] + part) > columns
            if is_full or rows[-1].endswith("\n"):
                rows.append("")
            rows[-1] += part
    return rows


class Recorder:
    """Makes the `history` of the first text of a batch. start: its (T,) ids before the first step; those before `first`
    are left out.

    A model that looks at one mask at a time writes from left to right: its text begins without masks and grows.
    """

    def __init__(self, start: Tensor, tokenizer: Tokenizer, label: str, first: int = 0):
        self.before, self.token_of, self.first = start[first:].tolist(), tokenizer.id_to_char, first
        self.history = History(label, [])

    def add(self, state: State) -> None:
        """A frame for the state, unless the network looked at no mask."""
        looked, text = (state.masked[0] - self.first).tolist(), state.texts[0][self.first :].tolist()
        if not self.history.frames:
            given = [i for i, token in enumerate(self.before) if token != MASK_ID]
            end = max([-1, *given, *(looked if len(looked) > 1 else ())]) + 1
            self.history.start = [None if i == MASK_ID else self.token_of[i] for i in self.before[:end]]
        if not looked:  # a window without masks
            return
        values, ids = state.probabilities[0].topk(NUM_BELIEFS)  # (m, NUM_BELIEFS)
        beliefs = {
            position: tuple((self.token_of[j], p) for j, p in zip(*likeliest, strict=True) if p > 0)
            for position, *likeliest in zip(looked, ids.tolist(), values.tolist(), strict=True)
        }
        probabilities = dict(zip(looked, state.probabilities[0], strict=True))  # position -> (V,)
        written = {  # what is cut behind an [END] follows from it
            i: (self.token_of[new], float(probabilities[i][new]) if i in probabilities else 1.0)
            for i, (old, new) in enumerate(zip(self.before, text, strict=True))
            if old != new
        }
        self.history.frames.append(Frame(state.nfe, state.seconds, written, beliefs))
        self.before = text
