"""Read prompts line by line and answer each: `python generate.py --chat`."""

import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import suppress

from utils.console import deferred_interrupt, print_out, say, valid_text


def chat(answer: Callable[[str], Iterator[str]], task: str) -> None:
    """For every line of standard input, print what answer(line) yields, until `exit` or the end of input.

    A ValueError that `answer` raises is shown as one line, and the next line is read. Ctrl-C ends an answer; a second
    one, or one at the prompt, ends the chat, and so does Ctrl-D. task: what to enter.
    """
    at_terminal = sys.stdin.isatty()
    with suppress(AttributeError):  # not a real stream
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes of another encoding are no end of the chat
    if at_terminal:
        say(f"Enter {task}. Ctrl-C ends an answer, `exit` the chat.")
        with suppress(ImportError):  # not available on every system
            import readline  # noqa: F401 (importing it gives input() editing and history)
    try:
        while (line := input("> " if at_terminal and sys.stdout.isatty() else "").strip()) not in ("exit", "quit"):
            try:
                with deferred_interrupt() as stopping:  # between two pieces: torch can lose an exception raised in it
                    for piece in answer(valid_text(line)) if line else ():
                        print_out(piece)
                        if stopping():
                            break
                print_out("\n\n" if line else "")
            except (ValueError, ArgumentTypeError) as error:
                say(f"error: {error}")
    except (EOFError, KeyboardInterrupt):
        say(end="\n" if at_terminal else "")
