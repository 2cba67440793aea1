"""The console: text in and out, one-line errors, Ctrl-C, the parser of command lines, progress.

A program's result goes to standard output; everything else goes to standard error. Texts are exact in files and pipes.
On a terminal, and wherever they are quoted (messages, tables, reports), symbols stand for their control characters.
"""

import argparse
import difflib
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

from utils.errors import ArgumentError, check_number

SECONDS_PER_UPDATE, SECONDS_PER_LINE = 0.2, 10.0  # of a progress display: on a terminal, elsewhere
# What a terminal would act on (control characters but tab and newline, marks that reorder text), and lone surrogates
HIDDEN = (*range(0x80, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
SYMBOLS = {code: chr(0x2400 + code) for code in range(0x20) if code not in (9, 10)}
SYMBOLS |= {0x7F: "\u2421"} | dict.fromkeys(HIDDEN, "\ufffd")
erase = ""  # what the next message begins with: on a terminal it takes the place of a progress display


# ------------------------------------------------------------------------------------------------- text in and out
def say(*words, end: str = "\n") -> None:
    """Print to standard error, `printable`. Once nobody can read it (a broken pipe), messages are dropped.

    On a terminal lines break at spaces, where it would break them inside words. A command stays whole, to be copied.
    """
    global erase
    text = printable(" ".join(map(str, words)))
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        wrapper = textwrap.TextWrapper(width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        lines = [line if len(line) <= width or "python " in line else wrapper.fill(line) for line in text.split("\n")]
        text = "\n".join(lines)
    text, erase = erase + text, ""
    try:
        print(text, file=sys.stderr, flush=True, end=end)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def fail(program: str, problem: str) -> NoReturn:
    """Print an error as one line on standard error and exit with code 2."""
    say(f"{program}: error: {problem}".replace("\n", "\u240a"))
    sys.exit(2)


def print_out(text: str, end: str = "") -> None:
    """Print a program's result: at once and `printable` on a terminal, exact to a file or a pipe."""
    on_terminal = sys.stdout.isatty()
    print(printable(text) if on_terminal else text, end=end, flush=on_terminal)


def printable(text: str) -> str:
    r"""The text with a visible symbol for each control character but tab and newline: a terminal would obey them.

    >>> printable("\x1b[2J\r\x9b a\tb")
    '␛[2J␍� a\tb'
    """
    return text.translate(SYMBOLS)


def counted(count: int, noun: str) -> str:
    """A number and its noun: "1 step", "2,000 steps"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


# ------------------------------------------------------------------------------------------------- the program
def run_program(main: Callable[[], None]) -> None:
    """Run a program's main(). Bad input exits with code 2 after one line; Ctrl-C exits with code 130.

    Bad input is ValueError and OSError: this project raises them with messages that name the argument or the file. Any
    other exception is a defect and keeps its traceback. A standard stream that was closed is empty.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for as long as the program runs)
    program = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        say(f"\n{program}: stopped")
        sys.exit(130)
    except BrokenPipeError:  # whatever read our output has ended (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        fail(program, f"{file}{error.strerror or error}")
    except ValueError as error:
        fail(program, str(error))


@contextmanager
def handling(handler: Callable[[int, object], None], *signals: int) -> Iterator[dict]:
    """Call handler(signal, frame) inside the block for these signals; yields what they do otherwise."""
    previous = {number: signal.signal(number, handler) for number in signals}
    try:
        yield previous
    finally:
        for number, usual in previous.items():
            signal.signal(number, usual)


def immediate_interrupt():
    """End the process on Ctrl-C inside the block, with exit code 130: imports of C libraries swallow its exception."""
    return handling(lambda *_: os._exit(130), signal.SIGINT)


@contextmanager
def deferred_interrupt(*signals: int) -> Iterator[Callable[[], int]]:
    """Yield stopping(): 0, or after Ctrl-C or one of the signals its number, for a loop that ends after a step.

    Its program exits with code 128 + stopping(). The second time each of them acts as usual.
    """
    received = 0

    def on_signal(number: int, _) -> None:
        nonlocal received
        received = int(number)
        signal.signal(number, previous[number])

    with handling(on_signal, signal.SIGINT, *signals) as previous:
        yield lambda: received


# ------------------------------------------------------------------------------------------------- arguments
class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage message, and suggest the nearest flag.

    Flags may be typed with underscores, and only once. examples: command lines for the end of --help, one a line.
    """

    def __init__(self, *, examples: str = "", **settings):
        lines = "examples:\n" + textwrap.indent(examples.strip(), "  ") if examples else None
        super().__init__(epilog=lines, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse's, but what is unknown is an error."""
        words = sys.argv[1:] if args is None else args
        words = [re.sub(r"^--[\w-]+(?=$|=)", lambda flag: flag[0].replace("_", "-"), word) for word in words]
        actions = [self._option_string_actions.get(word.partition("=")[0]) for word in words]
        for action in filter(None, actions):
            if actions.count(action) > 1:
                self.error(f"{action.option_strings[0]} is given twice")
        namespace, unknown = super().parse_known_args(words, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        fail(self.prog, f"{message} (see --help)")

    @contextmanager
    def naming_flags(self) -> Iterator[None]:
        """Show an ArgumentError from inside the block with its flag: "top_k must be ..." as "--top-k must be ..."."""
        try:
            yield
        except ArgumentError as error:
            flags = [a.option_strings[0] for a in self._actions if a.dest == error.argument and a.option_strings]
            raise ValueError(f"{[*flags, error.argument][0]} {error.problem}") from None


def number(kind: type, **bounds) -> Callable[[str], float]:
    """An argparse type: an int or float within `bounds`, which are those of `check_number`."""

    def parse(text: str):
        try:
            value = kind(text)
            check_number("value", value, **bounds)
        except ArgumentError as error:
            raise argparse.ArgumentTypeError(error.problem) from None
        return value

    parse.__name__ = kind.__name__  # which argparse puts into "invalid int value: 'x'"
    return parse


def valid_text(text: str) -> str:
    """An argparse type: text that is valid in the terminal's encoding."""
    if wrong := re.search("[\ud800-\udfff]", text):  # Python's form of a byte that it cannot decode (PEP 383)
        where = f"byte 0x{ord(wrong[0]) & 0xFF:02X} at position {wrong.start()}"
        raise argparse.ArgumentTypeError(f"{where} is not valid {sys.getfilesystemencoding()}")
    return text


# ------------------------------------------------------------------------------------------------- progress
@contextmanager
def progress(total: float, what: str, visible: bool = True) -> Iterator[Callable]:
    """Yield update(completed, note): a line that changes on a terminal, a new one every ten seconds elsewhere.

    It shows the share that is done, the time left and note(), which is called only when it is shown.
    """
    on_terminal, last, first = sys.stderr.isatty(), time.monotonic(), None
    pause = SECONDS_PER_UPDATE if on_terminal else SECONDS_PER_LINE

    def update(completed: float, note: Callable[[], str] = str) -> None:
        global erase
        nonlocal last, first
        now = time.monotonic()
        first = first or (now, completed)  # what a resumed run had done before does not count
        if not visible or now - last < pause:
            return
        last, line = now, f"{what}: {100 * completed / total:.0f} %"
        if completed > first[1]:
            seconds = (now - first[0]) * (total - completed) / (completed - first[1])
            line += f", {timedelta(seconds=round(seconds))} left"
        line = f"{line}  {note()}".rstrip()
        if on_terminal:
            say(line[: shutil.get_terminal_size().columns - 1], end="")
            erase = "\r\x1b[K"
        else:
            say(line)

    try:
        yield update
    finally:
        if erase:
            say(end="")


def track(items: Collection, what: str) -> Iterator:
    """Iterate over `items` under a progress display."""
    with progress(len(items), what) as update:
        update(0)
        for i, item in enumerate(items, 1):
            yield item
            update(i)
