"""Read prompts line by line and answer each: `python generate.py --chat`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from utils.console import deferred_interrupt, say


def chat(answer: Callable[[str, int], Iterator[str]]) -> None:
    """For every line of standard input, print it and what answer(line, turn) yields, until `quit` or the end of input.

    A ValueError that `answer` raises is shown as one line, and the next line is read. Ctrl-C and Ctrl-D end the chat.
    """
    if sys.stdin.isatty():
        say("Enter the beginning of a text; the model continues it. `quit` ends.")
    try:
        for turn, prompt in enumerate(read_prompts()):
            try:
                pieces = answer(prompt, turn)
            except ValueError as error:
                say(f"error: {error}")
                continue
            print(prompt, end="", flush=True)
            with deferred_interrupt() as stopping:  # stop between two pieces: torch can lose an exception raised in it
                for piece in pieces:
                    print(piece, end="", flush=True)
                    if stopping():
                        raise KeyboardInterrupt
            print("\n", flush=True)
    except KeyboardInterrupt:
        say()


def read_prompts() -> Iterator[str]:
    """Lines of standard input up to `quit`, without empty ones; on a terminal with line editing and history."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        with suppress(ImportError):  # not available on every system
            import readline  # noqa: F401 (importing it gives input() editing and history)
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                say()
            return
        if line == "quit":
            return
        if line:
            yield line
