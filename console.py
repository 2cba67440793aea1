"""How the programs of this project talk to people: one-line errors, Ctrl-C, checked arguments, progress.

Text that was asked for goes to standard output; everything said about it goes to standard error.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn


def say(*words) -> None:
    """Print to standard error, at once."""
    print(*words, file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a program's main. Bad input ends it with one line and exit code 2; Ctrl-C, quietly, with 130.

    Only ValueError and OSError count as bad input: they are what this project raises, with a message that names the
    flag or file and the fix. Anything else is a defect of ours and keeps its traceback.
    """
    program = sys.argv[0].rsplit("/", 1)[-1]
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        say(f"\n{program}: stopped")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left (`| head`)
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        say(f"{program}: error: {where}{error.strerror or error}")
        sys.exit(2)
    except ValueError as error:
        say(f"{program}: error: {error}")
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line: what is wrong, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {message} (see --help)")
        sys.exit(2)


def number(kind: type, low=None, high=None, above=None, below=None) -> Callable[[str], float]:
    """An argparse type: int or float with low <= x <= high, above < x < below; anything else is an error line."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}") from None
        bounds = [
            (low, "at least", lambda bound: value >= bound),
            (high, "at most", lambda bound: value <= bound),
            (above, "greater than", lambda bound: value > bound),
            (below, "less than", lambda bound: value < bound),
        ]
        for bound, words, holds in bounds:
            if bound is not None and not holds(bound):  # NaN holds nowhere
                raise argparse.ArgumentTypeError(f"must be {words} {bound}, got {text}")
        if value != value or value in (float("inf"), float("-inf")):
            raise argparse.ArgumentTypeError(f"must be finite, got {text}")
        return value

    return parse


POSITIVE_INT = number(int, low=1)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield stopping(): true once Ctrl-C was pressed, so that work can end at a good place. A second one interrupts."""
    pressed = False

    def note(*_) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def progress(total: float, what: str, visible: bool = True) -> Iterator[Callable[[float, str], None]]:
    """Yield update(completed, note): a bar on a terminal, a line every ten seconds elsewhere. Writes to stderr."""
    if not visible:
        yield lambda completed, note="": None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True)
        with bar:
            task = bar.add_task(what, total=total, note="")
            yield lambda completed, note="": bar.update(task, completed=completed, note=note)
    else:
        last = time.monotonic()

        def update(completed: float, note: str = "") -> None:
            nonlocal last
            if time.monotonic() - last >= 10:
                last = time.monotonic()
                say(f"{what}: {100 * completed / total:.0f} %  {note}".rstrip())

        yield update


def track(items: Iterable, what: str, visible: bool = True) -> Iterator:
    """Iterate over a sized `items` under a progress display."""
    items = list(items)
    with progress(max(len(items), 1), what, visible) as update:
        for i, item in enumerate(items):
            yield item
            update(i + 1, "")
