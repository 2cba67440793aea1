"""Show a text being written, on standard error: in place on a terminal, one line a step elsewhere.

The view follows either model at a pace an eye can follow. Its seconds are those of the model alone, without the time
that drawing and pausing take. race.py shows two texts side by side.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

from torch import Tensor

from generation.history import History, Status, record_decoding, record_filling, timed
from generation.infilling import GenerationState
from generation.screen import (
    MASK,
    OTHER_MASK,
    REMASKED,
    SHADES,
    STYLES,
    Screen,
    Scroller,
    glyph,
    glyphs,
    in_lines,
    is_screen,
    styled_text,
)
from model import GPT
from tokenizer import PAD_ID, START_ID, Tokenizer
from utils.console import counted, printable, say

PAUSE = 0.12  # seconds that a step stands at least
PAUSES = 50  # the most that all steps of a text together are delayed by, in pauses


class Recorder:
    """Passes on what a model writes, and keeps the history of the first text. A context manager, as `View` is.

    hidden: how many positions of the beginning are not shown. seconds: computing time of all texts so far.
    """

    def __init__(self, hidden: int = 0):
        self.hidden = hidden
        self.history: History | None = None
        self.seconds = 0.0
        self.latest: list = []  # what the model gave last, if anything

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def filling(
        self, states: Iterable[GenerationState], template: Tensor, tokenizer: Tokenizer, label: str = "LLaDA"
    ) -> Iterator[GenerationState]:
        """Pass on the states of `fill_masks` or `write_streams` and show the first text. template: (T,) its ids first.

        Raises ValueError if the texts differ in length.
        """
        window = None
        for history in record_filling(self.tapped(states), template, tokenizer, label):
            if self.latest:
                window = current_window(self.latest[0], history) or window
            self.show(history, window)
            yield from self.latest
        self.finish(tokenizer.decode(self.latest[0].texts[0][self.hidden :]))

    def decoding(self, columns: Iterable[Tensor], model: GPT, prompt: Tensor, tokenizer: Tokenizer) -> Iterator[Tensor]:
        """Pass on the columns of `autoregressive.decode` and show the first text. prompt: (T,) its ids."""
        ids = [i for i in prompt.tolist() if i != START_ID]
        columns = self.tapped(columns)
        for history in record_decoding(columns, model, prompt, tokenizer):
            self.show(history)
            ids += [int(column[0]) for column in self.latest]
            yield from self.latest
        self.finish(tokenizer.decode(ids[self.hidden :]))
        if self.latest and int(self.latest[0][0]) == PAD_ID:  # other texts are longer
            yield from self.latest
            yield from columns

    def tapped(self, items: Iterable) -> Iterator:
        """Pass the items on; `latest` holds the one that was passed on last."""
        for item, self.seconds in timed(items):
            self.latest = [item]
            yield item

    def show(self, history: History, window: range | None = None) -> None:
        """The state of the text has changed. window: the positions that the network sees, if these are not all."""
        self.history = history

    def finish(self, text: str) -> None:
        """The first text is complete."""


class View(Recorder):
    """A view of one text while it is written. On a terminal its finished text stays, if it is to.

    pause: seconds that a step stands at least. All steps together are delayed by PAUSES pauses at most, evenly.
    steps: how many steps there will be (GPT: the characters to write). None: from the masks, where there are any.

    Whether to print the finished text: see `text_stands`.
    """

    def __init__(self, pause: float = PAUSE, steps: int | None = None, hidden: int = 0, stays: bool = True):
        super().__init__(hidden)
        self.pause, self.steps, self.stays = pause, steps, stays
        self.delay_left = PAUSES * pause
        self.due = 0.0
        self.scroller = Scroller(hidden)
        self.exits = ExitStack()

    def __enter__(self):
        self.screen = self.exits.enter_context(Screen()) if is_screen() else None
        return self

    def __exit__(self, *error) -> None:
        self.exits.__exit__(*error)

    def show(self, history: History, window: range | None = None) -> None:
        """Show the latest state. window: the positions that the network sees, if these are not all."""
        self.history = history
        if self.screen is None:
            if history.step:
                say(plain_line(history, self.hidden))
            return
        self.wait()
        if self.screen.is_due():
            self.screen.draw(lambda width, height: self.lines(width, height, window))
        self.due = time.monotonic() + min(self.pause, self.delay_left / max(1, self.steps_left()))

    def wait(self) -> None:
        """Sleep until the previous step has stood long enough."""
        delay = min(self.due - time.monotonic(), self.delay_left)
        if delay > 0:
            self.delay_left -= delay
            time.sleep(delay)

    def steps_left(self) -> float:
        """About how many steps will follow."""
        if self.steps is not None:
            return self.steps - self.history.step
        masked = sum(cell.token is None for cell in self.history.cells)
        written = self.history.start.count(None) - masked
        return masked * self.history.step / written if written > 0 else 1

    def lines(self, width: int, height: int, window: range | None) -> list:
        """The text, a status line and, where there is room, the legend."""
        from rich.text import Text

        history, scroller = self.history, self.scroller
        status = [
            f"step {history.step}",
            counted(history.nfe, "network evaluation"),
            f"{history.seconds:.2f} s",
            f"window {window.start + 1}-{window.stop} of {len(history.cells)}" if window else "",
            scroller.part,
        ]
        below = [Text(line, "dim") for line in in_lines(status, width)] + legend(width)
        below = below[: max(1, height // 3)]  # a low screen is for the text
        return [*scroller.lines(history, width, height - 1 - len(below), window), Text(), *below]

    def finish(self, text: str) -> None:
        """Leave the finished text, which is `text`, on the screen."""
        if self.screen is None:
            return
        self.wait()
        if not self.stays:
            return
        from rich.text import Text

        styled = styled_text(glyphs(self.history, self.hidden, settled=True))
        if styled.plain != printable(text):  # a character in several tokens: the cells cannot show it
            styled = Text(printable(text))
        self.screen.leave(styled)


def legend(width: int) -> list:
    """What the styles mean, as a list of one rich Text, or of none if it does not fit."""
    words = [
        ("given", STYLES[Status.GIVEN]),
        (f"{MASK} masked", STYLES[Status.MASKED]),
        ("just written", STYLES[Status.WRITTEN]),
        (f"{REMASKED} masked again", STYLES[Status.REMASKED]),
    ]
    line = [part for word in words for part in (word, ("  ", ""))]
    line += [("confidence ", "dim"), *(("■", shade) for shade in SHADES)]
    return [styled_text(line)] if sum(len(part) for part, _ in line) <= width else []


def current_window(state: GenerationState, history: History) -> range | None:
    """The window in which the latest step wrote: None if it is the whole text, or the step wrote nothing."""
    revealed = state.step.revealed[0]
    written = [position for position, cell in history.frames[-1].changes.items() if cell.token is not None]
    if len(revealed) >= len(history.cells) or not written:
        return None
    start = min(written) - int(revealed.nonzero()[0])  # both are the first character that was written
    return range(start, start + len(revealed))


def plain_line(history: History, hidden: int = 0, length: int = 400) -> str:
    """The network evaluations and the text on one line; of a long text, `length` characters around the last change."""
    now = history.step + 1  # nothing is marked
    end = max(history.frames[-1].changes, default=0) + 1
    start = max(hidden, end - length)
    parts = [OTHER_MASK if cell.token is None else glyph(cell, now)[0] for cell in history.cells[start:][:length]]
    dots = "…" if start > hidden else "", "…" if len(history.cells) - start > length else ""
    return f"{history.nfe:4} {dots[0]}{''.join(parts)}{dots[1]}".replace("\n", "⏎")
