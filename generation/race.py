"""A race in the terminal: several models write from one prompt, side by side, each with its own clock.

Each model is measured alone, because models that run at once slow each other down. What is shown is a replay of the
measurements on one clock, slower or faster than real time by a factor that the screen states.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice, zip_longest

from generation.history import History
from generation.screen import FRAME_SECONDS, Screen, Scroller, glyphs, in_lines, is_screen, styled_text, wrapped
from tokenizer import SPECIAL_TOKENS
from utils.console import counted, say

REPLAY_SECONDS = 8.0  # at most
FACTORS = (1000, 500, 200, 100, 50, 20, 10, 5, 2, 1)  # by which a replay may be slower; faster ones are their inverses
WARM_UP_STEPS = 3  # before a measurement: the first calls of a network are slower than all others
MIN_PANE = 34  # columns; if there are fewer for each text, they stand one below the other
DIVIDER = " │ "

Run = Callable[[], Iterator[History]]  # starts to write: record_filling(...) or record_decoding(...), with its own seed


def race(runs: Sequence[Run], hidden: Sequence[int] | None = None) -> list[History]:
    """Measure each run alone, replay all together on standard error, and return their histories.

    Each run is called twice: for a few steps that warm the model up, and to be measured. hidden: how many positions of
    the beginning of each are not shown. On a terminal the texts stay, elsewhere only a summary is printed; whether to
    print the texts: see `screen.text_stands`.
    """
    histories, hidden = [], hidden or [0] * len(runs)
    for run in runs:
        with closing(run()) as warm_up:
            for _ in islice(warm_up, WARM_UP_STEPS + 1):
                pass
        *_, history = run()
        histories.append(history)
        say(f"{history.label}: measured alone")
    if is_screen():
        with Screen() as screen:
            replay(screen, histories, hidden)
            screen.leave(*finished(histories, hidden, screen.size[0]))
            screen.console.print(*summary(histories), sep="\n")  # in lines that break between words
    else:
        say("\n".join(summary(histories)))
    return histories


def slowdown(seconds: float) -> float:
    """How much slower than real time `seconds` are to be replayed; below 1: faster.

    >>> slowdown(0.3), slowdown(6.0), slowdown(30.0)
    (20, 1, 0.2)
    """
    factors = (*FACTORS, *(1 / factor for factor in reversed(FACTORS)))
    return next((factor for factor in factors if seconds * factor <= REPLAY_SECONDS), factors[-1])


def pace(factor: float) -> str:
    """What the replay's speed is, in words.

    >>> pace(20), pace(1), pace(0.2)
    ('20 times slower', 'in real time', '5 times faster')
    """
    if factor == 1:
        return "in real time"
    return f"{factor:g} times slower" if factor > 1 else f"{1 / factor:g} times faster"


def replay(screen: Screen, histories: Sequence[History], hidden: Sequence[int]) -> None:
    """Show the histories grow on a common clock."""
    end = max(history.seconds for history in histories)
    factor = slowdown(end)
    shown = [History(history.label, history.start) for history in histories]
    scrollers = [Scroller(n) for n in hidden]
    start = time.monotonic()

    def lines(width: int, height: int) -> list:
        from rich.text import Text

        columns = columns_of(width, len(shown))
        clock = [f"{now:.2f} s", f"replayed {pace(factor)}", "each measured alone"]
        below = [Text(line, "dim") for line in in_lines(clock, width)]
        rows = len(shown) if columns == width else 1
        room = max(1, (height - 1 - len(below)) // rows - 1)  # below each title
        panes = [
            [title(part, whole, now, columns), *scroller.lines(part, columns, room, settled=part.step == whole.step)]
            for part, whole, scroller in zip(shown, histories, scrollers, strict=True)
        ]
        return [*arranged(panes, columns, width), Text(), *below]

    now = -1.0
    while now < end:
        now = min(end, (time.monotonic() - start) / factor)
        for part, history in zip(shown, histories, strict=True):
            while part.step < history.step and history.frames[part.step].seconds <= now:
                part.add(history.frames[part.step])
        screen.draw(lines)
        time.sleep(FRAME_SECONDS)


def title(part: History, whole: History, now: float, columns: int):
    """The line above a text as rich Text: the model, its clock, its network evaluations, a mark once it is finished."""
    label = f"{part.label} ✓" if part.step == whole.step else part.label
    parts = [label, f"{min(now, whole.seconds):.2f} s", counted(part.nfe, "network evaluation")]
    return styled_text([(in_lines(parts, columns)[0], "bold")])


def columns_of(width: int, texts: int) -> int:
    """Columns for each of the texts: a share of the width, or all of it if the texts stand one below the other.

    >>> columns_of(80, 2), columns_of(60, 2)
    (38, 60)
    """
    share = (width - len(DIVIDER) * (texts - 1)) // texts
    return share if share >= MIN_PANE else width


def arranged(panes: Sequence[Sequence], columns: int, width: int) -> list:
    """The lines of the panes, rich Texts, side by side if they take a part of the width, else one below the other."""
    from rich.text import Text

    if columns == width:
        return [line for pane in panes for line in pane]
    rows = []
    for lines in zip_longest(*panes, fillvalue=Text()):
        for line in lines[:-1]:
            line.align("left", columns)
        rows.append(Text.assemble((DIVIDER, "dim"), no_wrap=True, end="\n").join(lines))
    return rows


def finished(histories: Sequence[History], hidden: Sequence[int], width: int) -> list:
    """What stays of the race: the titles and the whole texts, as lines of rich Text."""
    columns = columns_of(width, len(histories))
    panes = [
        [title(h, h, h.seconds, columns), *map(styled_text, wrapped(glyphs(h, n, settled=True), columns)[0])]
        for h, n in zip(histories, hidden, strict=True)
    ]
    return arranged(panes, columns, width)


def summary(histories: Sequence[History]) -> list[str]:
    """A line a model: what it wrote, how fast, and at which cost."""
    lines = []
    for history in histories:
        written = sum(len(cell.token) for cell in history.cells if cell.step and cell.token not in SPECIAL_TOKENS)
        speed = f"{written / history.seconds:,.0f} characters/s" if history.seconds else ""
        time_taken = f"{counted(written, 'character')} in {history.seconds:.2f} s"
        lines.append(f"{history.label}: {time_taken}, {speed}, {counted(history.nfe, 'network evaluation')}")
    return lines
