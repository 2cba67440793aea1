"""The console: messages, one-line errors, Ctrl-C, argument types, progress.

A program's result goes to standard output; everything else goes to standard error.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from utils.errors import ArgumentError, check_number

SECONDS_PER_UPDATE = 0.2  # of a progress bar on a terminal
SECONDS_PER_LINE = 10.0  # of the lines that replace the bar elsewhere


def say(*words) -> None:
    """Print to standard error and flush."""
    print(*words, file=sys.stderr, flush=True)


def run_program(main: Callable[[], None]) -> None:
    """Run a program's main(). Bad input exits with code 2 after one line; Ctrl-C exits with code 130.

    Only ValueError and OSError count as bad input: this project raises them with messages that name the argument or
    the file. Any other exception is a defect and keeps its traceback.
    """
    folder, _, program = sys.argv[0].rpartition("/")
    if program == "__main__.py":
        program = f"python -m {folder.rpartition('/')[2]}"
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        say(f"\n{program}: stopped")
        sys.exit(130)
    except BrokenPipeError:  # whatever read our output has ended (`| head`)
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        say(f"{program}: error: {file}{error.strerror or error}")
        sys.exit(2)
    except ValueError as error:
        say(f"{program}: error: {error}")
        sys.exit(2)


# ------------------------------------------------------------------------------------------------- arguments
class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage message."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {message} (see --help)")
        sys.exit(2)

    @contextmanager
    def naming_flags(self) -> Iterator[None]:
        """Show an ArgumentError raised inside the block as the flag it came from.

        If its argument is a destination of this parser, it becomes a ValueError "--the-flag problem".

        >>> parser = Parser()
        >>> _ = parser.add_argument("--top-k", type=int)
        >>> with parser.naming_flags():
        ...     raise ArgumentError("top_k", "must be at least 1, got 0")
        Traceback (most recent call last):
        ValueError: --top-k must be at least 1, got 0
        """
        try:
            yield
        except ArgumentError as error:
            for action in self._actions:
                if action.dest == error.argument and action.option_strings:
                    raise ValueError(f"{action.option_strings[0]} {error.problem}") from None
            raise


def number(kind: type, **bounds) -> Callable[[str], float]:
    """An argparse type: an int or float within `bounds`, which are those of `check_number`.

    >>> number(int, low=1)("3")
    3
    """

    def parse(text: str):
        try:
            value = kind(text)
            check_number("value", value, **bounds)
        except ArgumentError as error:
            raise argparse.ArgumentTypeError(error.problem) from None
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}") from None
        return value

    return parse


POSITIVE_INT = number(int, low=1)
SEED = number(int, low=0, high=2**63 - 1)


# ------------------------------------------------------------------------------------------------- long work
@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield stopping(), true once Ctrl-C was pressed, so that a loop can end after a whole step.

    A second Ctrl-C raises KeyboardInterrupt as usual.
    """
    pressed = False

    def on_interrupt(*_) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def progress(total: float, what: str, visible: bool = True) -> Iterator[Callable]:
    """Yield update(completed, note=""): a progress bar on a terminal, a line every ten seconds elsewhere.

    `note` is a string, or a function that returns one and is called only when the note is shown. Use a function if the
    note is costly, for example because it waits for a GPU.
    """
    if not visible:
        yield lambda completed, note="": None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, note="")

            def show_bar(completed: float, note: str) -> None:
                bar.update(task, completed=completed, note=note)

            yield throttled(show_bar, SECONDS_PER_UPDATE)
    else:

        def show_line(completed: float, note: str) -> None:
            say(f"{what}: {100 * completed / total:.0f} %  {note}".rstrip())

        yield throttled(show_line, SECONDS_PER_LINE)


def throttled(show: Callable[[float, str], None], seconds: float) -> Callable:
    """update(completed, note) that calls `show` at most once in so many seconds."""
    last = time.monotonic()

    def update(completed: float, note: str | Callable[[], str] = "") -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            show(completed, note() if callable(note) else note)

    return update


def track(items: Iterable, what: str, visible: bool = True) -> Iterator:
    """Iterate over `items` under a progress display."""
    items = list(items)
    with progress(max(len(items), 1), what, visible) as update:
        for i, item in enumerate(items):
            yield item
            update(i + 1)
