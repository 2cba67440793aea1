"""Histories on a terminal, on standard error: a text while it is written (`View`), and a race (`race`).

What happens to a character has a colour of its own and, for terminals without colours, a symbol or a weight. The colour
of a written character is the network's probability of it. Elsewhere than on a terminal, each step is a plain line.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import zip_longest

from generation.history import NEWLINE, History, Replay, Run, Status
from utils.console import counted, say

PAUSE, PAUSES = 0.12, 50  # seconds that a step is shown; how many of them all steps are delayed by, at most
FRAME_SECONDS, DRAWING_SHARE = 1 / 50, 0.2  # between two drawings, at least; share of the time, at most
REPLAY_SECONDS = 8.0  # of a race
DIVIDER = " │ "
STYLES = {
    Status.GIVEN: "bold color(33)",
    Status.MASKED: "dim",
    Status.WRITTEN: "bold reverse",
    Status.CORRECTED: "underline reverse",
    Status.SETTLED: "",
}
COLORS = ("color(167)", "color(173)", "color(137)", "color(71)")  # of the shades: red to green


def is_screen() -> bool:
    """Whether standard error is a terminal that can show text that changes in place."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def text_stands() -> bool:
    """Whether the finished text of a view stands on standard output too, which is the same terminal: not to print."""
    return is_screen() and sys.stdout.isatty() and os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())


# ------------------------------------------------------------------------------------------------- drawing
def style_of(run: Run) -> str:
    """Its rich style."""
    colored = run.status not in (Status.GIVEN, Status.MASKED)
    return f"{STYLES[run.status]} {COLORS[run.shade] if colored else ''}".strip()


def drawn(replay: Replay, columns: int) -> list:
    """The lines of a text as rich Text."""
    from rich.text import Text

    return [Text.assemble(*((run.text, style_of(run)) for run in line)) for line in replay.lines(columns)]


def side_by_side(replays: Sequence[Replay], width: int, height: int = 0, now: float = math.inf) -> list:
    """The texts, each below its model, clock and cost. height: how many lines fit, the last ones of each text."""
    from rich.text import Text

    columns, panes = (width - len(DIVIDER) * (len(replays) - 1)) // len(replays), []
    for replay in replays:
        seconds = min(now, replay.history.frames[-1].seconds) if replay.history.frames else 0.0
        title = f"{replay.history.label} {seconds:.2f} s, {counted(replay.frame.nfe, 'evaluation')}"
        panes.append([Text(title, "bold"), *drawn(replay, columns)[-max(0, height - 1) :]])
    rows = [[line.copy() for line in row] for row in zip_longest(*panes, fillvalue=Text())]
    for line in (line for row in rows for line in row):
        line.align("left", columns)
    return [Text.assemble((DIVIDER, "dim"), no_wrap=True).join(row) for row in rows]


def plain_line(replay: Replay, length: int = 400) -> str:
    """Network evaluations and the end of the text on one line."""
    text = "".join(cell.text for cell in replay.cells).replace("\n", NEWLINE)
    return f"{replay.frame.nfe:4} {'…' * (len(text) > length)}{text[-length:]}"


class Screen:
    """Lines that change in place on standard error until it is closed."""

    def __init__(self):
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        as_it_is = {"redirect_stdout": False, "redirect_stderr": False}  # else the text for a pipe would come out here
        self.live = Live(console=self.console, auto_refresh=False, transient=True, **as_it_is)
        self.drawn = self.cost = 0.0
        self.live.start()

    def draw(self, replays: Sequence[Replay], now: float = math.inf) -> None:
        """Show texts side by side, if the last drawing is old enough."""
        from rich.console import Group

        start = time.monotonic()
        if start - self.drawn >= max(FRAME_SECONDS, self.cost / DRAWING_SHARE):
            size = self.console.width, max(2, self.console.height - 1)
            self.live.update(Group(*side_by_side(replays, *size, now)), refresh=True)
            self.drawn = time.monotonic()
            self.cost = self.drawn - start

    def leave(self, lines: Sequence) -> None:
        """Print lines that stay."""
        self.close()
        for line in lines:
            line.rstrip()
            self.console.print(line, soft_wrap=True)

    def close(self) -> None:
        self.live.stop()


# ------------------------------------------------------------------------------------------------- the two views
class View:
    """A text while it is written, until it is closed; `show` after every step.

    pause: seconds that a step is shown, at least. All steps together are delayed by PAUSES pauses at most, so that the
    steps of a long text become ever faster. Whether to print the finished text: see `text_stands`.
    """

    def __init__(self, pause: float = PAUSE):
        self.pause, self.left, self.due, self.replay = pause, PAUSES * pause, 0.0, None
        self.screen = Screen() if is_screen() else None

    def show(self, history: History) -> None:
        """Show the latest state."""
        self.replay = (self.replay or Replay(history)).advance()
        if self.screen is None:
            say(plain_line(self.replay))
            return
        time.sleep(max(0.0, self.due - time.monotonic()))
        self.screen.draw([self.replay])
        pause = min(self.pause, 2 * self.left / PAUSES)
        self.left, self.due = self.left - pause, time.monotonic() + pause

    def finish(self) -> None:
        """The text is complete and stays."""
        if self.screen and self.replay:
            time.sleep(max(0.0, self.due - time.monotonic()))
            finished = Replay(self.replay.history, whole=True).advance()
            self.screen.leave(drawn(finished, self.screen.console.width))

    def close(self) -> None:
        if self.screen:
            self.screen.close()


def race(histories: Sequence[History]) -> None:
    """Replay histories, each measured alone, side by side on one clock; their texts stay. Only on a terminal."""
    if not is_screen():
        return
    replays, now = [Replay(history, whole=True) for history in histories], 0.0
    end = max(history.frames[-1].seconds for history in histories if history.frames)
    say(f"{end:.2f} s are shown in {REPLAY_SECONDS:g} s")
    with closing(Screen()) as screen:
        start = time.monotonic()
        while now < end:
            now = min(end, (time.monotonic() - start) * end / REPLAY_SECONDS)
            for replay in replays:
                replay.advance(sum(frame.seconds <= now for frame in replay.history.frames))
            screen.draw(replays, now)
            time.sleep(FRAME_SECONDS)
        screen.leave(side_by_side(replays, screen.console.width))
