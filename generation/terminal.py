"""Histories on a terminal, on standard error: a text while it is written (`View`), and a race (`race`).

What happens to a character has a colour of its own and, for terminals without colours, a symbol or a weight. The colour
of a written character is the network's probability of it. Elsewhere than on a terminal, each step is a plain line.
"""

import os
import sys
import time
from collections.abc import Sequence

from generation.history import NEWLINE, History, Replay, Run, Status
from utils.console import counted, say

PAUSES = 50  # how many pauses of the first step's length delay all steps, at most
FRAME_SECONDS, DRAWING_SHARE = 1 / 50, 0.2  # between two drawings, at least; share of the time, at most
REPLAY_SECONDS = 8.0  # of a race
DIVIDER = 3  # columns between two texts
STYLES = {
    Status.GIVEN: "bold color(33)",
    Status.MASKED: "dim",
    Status.WRITTEN: "bold reverse ",
    Status.CORRECTED: "underline reverse ",
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
    return STYLES[run.status] if run.status in (Status.GIVEN, Status.MASKED) else STYLES[run.status] + COLORS[run.shade]


def drawn(replay: Replay, columns: int, height: int = 0):
    """A text as rich Text. height: how many lines fit, the last ones (0: all)."""
    from rich.text import Text

    lines = (Text.assemble(*((run.text, style_of(run)) for run in line)) for line in replay.lines(columns)[-height:])
    return Text("\n").join(lines)


def side_by_side(replays: Sequence[Replay], width: int, height: int = 0):
    """The texts as a rich Table, each below its model, clock and cost. height: how many of its lines fit (0: all)."""
    from rich.box import MINIMAL
    from rich.table import Table

    columns = (width - DIVIDER * (len(replays) - 1)) // len(replays)
    table, titles = Table(box=MINIMAL, show_edge=False, show_header=False, pad_edge=False), []
    for replay in replays:
        cost = f"{replay.frame.seconds:.2f} s, {counted(replay.frame.nfe, 'evaluation')}"
        titles.append(f"{replay.history.label} {cost}")
        table.add_column(width=columns, no_wrap=True)
    table.add_row(*titles, style="bold")
    table.add_row(*(drawn(replay, columns, max(0, height - 1)) for replay in replays))
    return table


def screen():
    """What changes in place on standard error until it is stopped: a rich Live."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    as_it_is = {"redirect_stdout": False, "redirect_stderr": False}  # else the text for a pipe would come out here
    return Live(console=console, auto_refresh=False, transient=True, **as_it_is)


def draw(live, replays: Sequence[Replay]) -> None:
    """Show texts side by side, as much of them as fits."""
    live.update(side_by_side(replays, live.console.width, max(2, live.console.height - 1)), refresh=True)


def plain_line(replay: Replay, length: int = 400) -> str:
    """Network evaluations and the end of the text on one line."""
    text = "".join(cell.text for cell in replay.cells).replace("\n", NEWLINE)
    return f"{replay.frame.nfe:4} {'…' * (len(text) > length)}{text[-length:]}"


# ------------------------------------------------------------------------------------------------- the two views
class View:
    """A text while it is written, within a `with` block; `show` after every step. A finished text stays.

    pause: seconds that the first step is shown; each one is shown a little shorter than the one before, so that all of
    them are delayed by PAUSES pauses at most. Whether to print the finished text: see `text_stands`.
    """

    def __init__(self, pause: float):
        self.pause, self.due, self.replay, self.live = pause, 0.0, None, screen() if is_screen() else None

    def show(self, history: History) -> None:
        """Show the latest state, unless a drawing has just been made."""
        self.replay = (self.replay or Replay(history)).advance()
        if self.live is None:
            say(plain_line(self.replay))
            return
        start = time.monotonic()
        if start >= self.due:
            draw(self.live, [self.replay])
            self.due = start + max(FRAME_SECONDS, (time.monotonic() - start) / DRAWING_SHARE)
        time.sleep(self.pause)
        self.pause *= 1 - 1 / PAUSES

    def __enter__(self) -> "View":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, error, *_) -> None:
        if self.live:
            self.live.stop()
        if self.live and self.replay and error is None:
            finished = Replay(self.replay.history, whole=True).advance()
            self.live.console.print(drawn(finished, self.live.console.width), soft_wrap=True)


def race(histories: Sequence[History]) -> None:
    """Replay histories, each measured alone, side by side on one clock; their texts stay. Only on a terminal."""
    if not is_screen():
        return
    replays, now = [Replay(history, whole=True) for history in histories], 0.0
    end = max(history.frames[-1].seconds for history in histories)
    say(f"{end:.2f} s are shown in {REPLAY_SECONDS:g} s")
    with screen() as live:
        start = time.monotonic()
        while now < end:
            now = min(end, (time.monotonic() - start) * end / REPLAY_SECONDS)
            for replay in replays:
                replay.advance(sum(frame.seconds <= now for frame in replay.history.frames))
            draw(live, replays)
            time.sleep(FRAME_SECONDS)
    live.console.print(side_by_side(replays, live.console.width), soft_wrap=True)
