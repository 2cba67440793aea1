"""Drawing on a terminal: the symbols and styles of a text's characters, line breaks, scrolling, the screen itself.

Every state of a character has a colour of its own and, for terminals without colours, a symbol or a weight of its own.
The shade of a written character is the network's confidence in it.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter

from generation.history import Cell, History, Status
from tokenizer import SPECIAL_TOKENS
from utils.console import printable

FRAME_SECONDS = 1 / 50  # between two drawings, at least
DRAWING_SHARE = 0.2  # of the time, at most: long texts are drawn less often

MASK, OTHER_MASK, REMASKED, NEWLINE = "░", "·", "▒", "↵"  # OTHER_MASK: outside of the window that is being filled
TAB_SIZE = 8
DOT = " · "
STYLES = {
    Status.GIVEN: "bold color(33)",
    Status.MASKED: "dim",
    Status.WRITTEN: "bold reverse",
    Status.REMASKED: "bold color(170)",
    Status.SETTLED: "",
}
SHADES = ("color(167)", "color(173)", "color(137)", "color(71)")  # confidence in quarters: red to green

Glyph = tuple[str, str]  # what is shown for one position, and its rich style
Line = list[Glyph]


# ------------------------------------------------------------------------------------------------- characters
def glyph(cell: Cell, now: int, inside: bool = True) -> Glyph:
    """What to show for a position after step `now`. inside: whether it is in the window that is being filled."""
    status = cell.status(now)
    style = STYLES[status]
    if cell.token is None:
        return REMASKED if status is Status.REMASKED else MASK if inside else OTHER_MASK, style
    text = "" if cell.token in SPECIAL_TOKENS else printable(cell.token)
    if status is not Status.GIVEN:
        style = f"{style} {SHADES[min(len(SHADES) - 1, int(len(SHADES) * cell.confidence))]}"
    if status is Status.WRITTEN and text.startswith("\n"):
        text = NEWLINE + text  # a line break alone would not be seen
    return text, style if inside else f"{style} dim"


def glyphs(history: History, hidden: int = 0, window: range | None = None, settled: bool = False) -> list[Glyph]:
    """A glyph for each position from `hidden` on. settled: mark no change, for a finished text."""
    cells, now = history.cells, history.step + settled
    return [glyph(cells[i], now, window is None or i in window) for i in range(hidden, len(cells))]


def styled_text(line: Line):
    """Glyphs as rich Text."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="crop", end="\n")
    for style, run in groupby(line, key=itemgetter(1)):
        text.append("".join(part for part, _ in run), style)
    return text


def wrapped(glyphs: Sequence[Glyph], width: int) -> tuple[list[Line], list[int]]:
    """The lines of a text, at most `width` columns wide, and the line on which each glyph ends.

    Lines break at any character, as a terminal does it: words are not known before they are written.

    >>> wrapped([("a", ""), ("b", ""), ("\\n", ""), ("c", "")], width=1)
    ([[('a', '')], [('b', '')], [('c', '')]], [0, 1, 2, 2])
    """
    from rich.cells import cell_len  # some characters take two columns, some none

    lines, line_of, column = [[]], [], 0
    for text, style in glyphs:
        if text.startswith(NEWLINE + "\n") and column >= width:
            text = text[1:]  # no room for the mark: it must not add a line
        for char in text:
            if char == "\n":
                lines.append([])
                column = 0
                continue
            if char == "\t":
                char = " " * min(TAB_SIZE - column % TAB_SIZE, max(1, width - column))
            size = cell_len(char)
            if column + size > width:
                lines.append([])
                column = 0
            lines[-1].append((char, style))
            column += size
        line_of.append(len(lines) - 1)
    return lines, line_of


class Scroller:
    """The part of a text that a screen has room for. It moves only as far as the latest change needs to be seen."""

    def __init__(self, hidden: int = 0):
        self.hidden = hidden
        self.top = 0
        self.part = ""  # which lines were shown, if not all

    def lines(
        self, history: History, width: int, height: int, window: range | None = None, settled: bool = False
    ) -> list:
        """At most `height` lines, rich Texts. Other arguments: see `glyphs`."""
        lines, line_of = wrapped(glyphs(history, self.hidden, window, settled), width)
        changed = history.frames[-1].changes if history.frames else [first_mask(history)]
        changed_lines = [line_of[i - self.hidden] for i in changed if 0 <= i - self.hidden < len(line_of)]
        if changed_lines:
            last = max(changed_lines)
            first = max(min(changed_lines), last - height + 1)
            self.top = max(min(self.top, first), last - height + 1)
        self.top = max(0, min(self.top, len(lines) - height))
        shown = lines[self.top : self.top + height]
        self.part = f"lines {self.top + 1}-{self.top + len(shown)} of {len(lines)}" if len(shown) < len(lines) else ""
        return [styled_text(line) for line in shown]


def first_mask(history: History) -> int:
    """The first position without a token, or the last position if there is none."""
    masked = (i for i, cell in enumerate(history.cells) if cell.token is None)
    return next(masked, len(history.cells) - 1)


def in_lines(parts: Sequence[str], width: int) -> list[str]:
    """The parts that are not empty, with dots between, in as few lines as hold them.

    >>> in_lines(["step 3", "3 network evaluations", "", "0.1 s"], 30), in_lines(["step 3", "0.1 s"], 12)
    (['step 3 · 3 evaluations · 0.1 s'], ['step 3', '0.1 s'])
    """
    first, *others = filter(None, parts)
    if len(DOT.join([first, *others])) > width:
        others = [part.replace("network ", "") for part in others]
    lines = [first]
    for part in others:
        if len(lines[-1] + DOT + part) <= width:
            lines[-1] += DOT + part
        else:
            lines.append(part)
    return lines


# ------------------------------------------------------------------------------------------------- the screen
def is_screen() -> bool:
    """Whether standard error is a terminal that can show text that changes in place."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def text_stands() -> bool:
    """Whether the finished text of a view stands on standard output too: on the same terminal as standard error.

    If so, it must not be printed again.
    """
    return is_screen() and sys.stdout.isatty() and os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())


class Screen:
    """Some lines that change in place on standard error, cleared in the end. A context manager."""

    def __enter__(self):
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        # Printing stays as it is: redirected, the text for a pipe would come out here.
        self.live = Live(
            console=self.console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self.drawn = self.cost = 0.0
        self.live.start()
        return self

    def __exit__(self, *_) -> None:
        self.live.stop()

    @property
    def size(self) -> tuple[int, int]:
        """Columns, and lines that can be drawn."""
        return self.console.width, max(2, self.console.height - 1)

    def is_due(self) -> bool:
        """Whether the last drawing is old enough for another."""
        return time.monotonic() - self.drawn >= max(FRAME_SECONDS, self.cost / DRAWING_SHARE)

    def draw(self, make_lines: Callable[[int, int], list]) -> None:
        """Replace the lines by make_lines(columns, lines), rich Texts."""
        from rich.console import Group

        start = time.monotonic()
        self.live.update(Group(*make_lines(*self.size)), refresh=True)
        self.drawn = time.monotonic()
        self.cost = self.drawn - start

    def leave(self, *texts) -> None:
        """End the view and print rich Texts, which stay."""
        self.live.stop()
        for text in texts:
            self.console.print(text, soft_wrap=True)
