"""The console: text in and out, one-line errors, Ctrl-C, the parser of command lines, progress.

A program's result goes to standard output; everything else goes to standard error. Texts are exact in files and pipes.
On a terminal, and wherever they are quoted (messages, tables, reports), symbols stand for their control characters.
"""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

from utils.errors import ArgumentError, check_number

VERSION = "1.0"
SECONDS_PER_UPDATE = 0.2  # of a progress bar on a terminal
SECONDS_PER_LINE = 10.0  # of the lines that replace the bar elsewhere
BAR_WIDTH = 20
# What a terminal would act on: C0 but tab and newline, DEL, C1, marks that reorder text; and lone surrogates
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
OTHER_NAMES = {  # flags of other programs of the field -> ours
    **dict.fromkeys(("--max-new-tokens", "--max-out-tokens", "--max-tokens", "--gen-length"), "--length"),
    **dict.fromkeys(("--num-steps", "--sampling-steps", "--diffusion-steps", "--max-iters"), "--steps"),
    **dict.fromkeys(("--ckpt", "--ckpt-path", "--model-path"), "--checkpoint"),
    **dict.fromkeys(("--n-samples", "--num-return-sequences"), "--num-samples"),
    **dict.fromkeys(("--out-dir", "--output-dir"), "--out"),
    "--learning-rate": "--lr",
    "--num-beams": "--beams",
    "--remasking": "--remask",
}


# ------------------------------------------------------------------------------------------------- text in and out
def say(*words) -> None:
    """Print to standard error, `printable`: names of files and quoted texts are anybody's. Flush."""
    print(printable(" ".join(map(str, words))), file=sys.stderr, flush=True)


def fail(program: str, problem: str) -> NoReturn:
    """Print an error as one line on standard error and exit with code 2."""
    say(f"{program}: error: {problem}".replace("\n", symbol(10)))
    sys.exit(2)


def write(text: str, end: str = "") -> None:
    """Print a program's result: at once and `printable` on a terminal, exact to a file or a pipe."""
    on_terminal = sys.stdout.isatty()
    print(printable(text) if on_terminal else text, end=end, flush=on_terminal)


def printable(text: str) -> str:
    r"""The text with a visible symbol for each control character but tab and newline: a terminal would obey them.

    >>> printable("\x1b[2J\r\x9b a\tb")
    '␛[2J␍� a\tb'
    """
    return UNPRINTABLE.sub(lambda match: symbol(ord(match[0])), text)


def symbol(code: int) -> str:
    """The picture of a C0 control character or DEL (U+2400...), the replacement character for any other."""
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def counted(count: int, noun: str) -> str:
    """A number and its noun, in the plural unless it is 1.

    >>> counted(1, "network evaluation"), counted(2000, "character")
    ('1 network evaluation', '2,000 characters')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def encoding_problem(text: str) -> str | None:
    """What is wrong with text from the command line or from standard input that was not valid there, else None.

    Python gives bytes that it cannot decode as lone surrogates (PEP 383).
    """
    for position, char in enumerate(text):
        if "\ud800" <= char <= "\udfff":
            return (
                f"byte 0x{ord(char) & 0xFF:02X} at position {position} is not valid {sys.getfilesystemencoding()}, "
                "the encoding of this terminal"
            )
    return None


# ------------------------------------------------------------------------------------------------- the program
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
        fail(program, f"{file}{error.strerror or error}")
    except ValueError as error:
        fail(program, str(error))


@contextmanager
def immediate_interrupt() -> Iterator[None]:
    """End the process on Ctrl-C inside the block, with exit code 130 and without a word.

    It is for imports: libraries written in C swallow a KeyboardInterrupt that falls into theirs, or turn it into
    another error.
    """
    previous = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


# ------------------------------------------------------------------------------------------------- arguments
class ShowVersion(argparse.Action):
    """--version. The versions are looked up only when it is given, as that takes a while."""

    def __call__(self, parser: argparse.ArgumentParser, *_) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            torch = f"torch {version('torch')}"
        except PackageNotFoundError:
            torch = "torch is not installed"
        print(f"{parser.prog} {VERSION} (Python {sys.version.split()[0]}, {torch})")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage message, and suggest the nearest flag or choice.

    Flags may be typed with underscores. examples: command lines for the end of --help, one a line.
    """

    def __init__(self, *, examples: str = "", **settings):
        super().__init__(**settings)
        self.examples = examples
        no_setting = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        self.add_argument("--version", action=ShowVersion, nargs=0, help="show the versions and exit", **no_setting)

    def format_help(self) -> str:
        examples = "".join(f"  {line}\n" for line in self.examples.strip().splitlines())
        return super().format_help() + (f"\nexamples:\n{examples}" if examples else "")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse's, but there is nothing unknown: it is an error here, where a subcommand knows its flags."""
        words = [self.with_hyphens(word) for word in (sys.argv[1:] if args is None else args)]
        namespace, unknown = super().parse_known_args(words, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0].replace("_", "-")
            other = OTHER_NAMES.get(flag)
            found = f"; did you mean {other}?" if other in self.flags else suggestion(flag, self.flags)
            if not flag.startswith("-"):
                found = "; put quotes around a text with spaces"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{found}")
        return namespace, unknown

    @property
    def flags(self) -> list[str]:
        """All flags."""
        return [flag for action in self._actions for flag in action.option_strings]

    def with_hyphens(self, word: str) -> str:
        """--top_k=5 -> --top-k=5, if there is such a flag."""
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        return f"{flag}{equals}{value}" if flag in self.flags else word

    def _check_value(self, action: argparse.Action, value) -> None:  # called by argparse for each value
        if action.choices is not None and value not in action.choices:
            names = list(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"{value!r} is not one of {', '.join(names)}{suggestion(str(value), names)}"
            )

    def error(self, message: str) -> NoReturn:
        fail(self.prog, f"{message} (see --help)")

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


def suggestion(word: str, names: Sequence[str]) -> str:
    """A question that names the nearest of the names, or nothing if none is near.

    >>> suggestion("LLaMA", ["llada", "gpt"]), suggestion("conf", ["entropy", "confidence"]), suggestion("x", ["gpt"])
    ('; did you mean llada?', '; did you mean confidence?', '')
    """
    from difflib import get_close_matches

    word = word.lower()
    near = [name for name in names if name.startswith(word)] or get_close_matches(word, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


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


def valid_text(text: str) -> str:
    """An argparse type: text that is valid in the terminal's encoding."""
    if problem := encoding_problem(text):
        raise argparse.ArgumentTypeError(problem)
    return text


POSITIVE_INT = number(int, low=1)
SEED = number(int, low=0, high=2**63 - 1)


# ------------------------------------------------------------------------------------------------- long work
@contextmanager
def deferred_interrupt(*signals: int) -> Iterator[Callable[[], bool]]:
    """Yield stopping(), true once Ctrl-C was pressed or one of the signals came, so that a loop can end after a step.

    The second time each of them acts as usual: a second Ctrl-C raises KeyboardInterrupt.
    """
    received = False
    previous: dict[int, object] = {}

    def on_signal(number: int, _) -> None:
        nonlocal received
        received = True
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, *signals):
        previous[number] = signal.signal(number, on_signal)
    try:
        yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def progress(total: float, what: str, visible: bool = True, unit: str = "") -> Iterator[Callable]:
    """Yield update(completed, note=""): a progress bar on a terminal, a line every ten seconds elsewhere.

    Both show the share that is done, the rate if `unit` says what is counted, the time left, and the note: a string,
    or a function that returns one and is called only when the note is shown. Use a function if the note is costly, for
    example because it waits for a GPU.
    """
    if not visible:
        yield lambda completed, note="": None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = TextColumn("{task.description}"), BarColumn(BAR_WIDTH), TaskProgressColumn()
        note_column = TextColumn("{task.fields[note]}", markup=False)
        with Progress(*columns, note_column, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, note="")

            def show_bar(completed: float, note: str) -> None:
                bar.update(task, completed=completed, note=note)

            yield throttled(show_bar, SECONDS_PER_UPDATE, total, unit)
    else:

        def show_line(completed: float, note: str) -> None:
            say(f"{what}: {100 * completed / total:.0f} %  {note}".rstrip())

        yield throttled(show_line, SECONDS_PER_LINE, total, unit)


def throttled(show: Callable[[float, str], None], seconds: float, total: float, unit: str) -> Callable:
    """update(completed, note) that calls `show` at most once in so many seconds, with the pace before the note."""
    last, first = time.monotonic(), None

    def update(completed: float, note: str | Callable[[], str] = "") -> None:
        nonlocal last, first
        now = time.monotonic()
        if first is None:  # what a resumed run had done before does not count
            first = now, completed
        if now - last >= seconds:
            last = now
            words = pace(now - first[0], completed - first[1], total - completed, unit)
            show(completed, ", ".join(filter(None, [*words, note() if callable(note) else note])))

    return update


def pace(seconds: float, done: float, left: float, unit: str = "") -> list[str]:
    """The rate, if there is a unit, and the time left, when `done` took so many seconds.

    >>> pace(2.0, done=3000, left=97500, unit="tokens"), pace(10.0, done=5, left=20)
    (['1,500 tokens/s', '0:01:05 left'], ['0:00:40 left'])
    """
    if seconds <= 0 or done <= 0:
        return []
    rate = done / seconds
    speed = [f"{rate:,.{int(rate < 10)}f} {unit}/s"] if unit else []
    return [*speed, f"{timedelta(seconds=round(left / rate))} left"]


def track(items: Iterable, what: str, visible: bool = True) -> Iterator:
    """Iterate over `items` under a progress display."""
    items = list(items)
    with progress(max(len(items), 1), what, visible) as update:
        update(0)
        for i, item in enumerate(items):
            yield item
            update(i + 1)
