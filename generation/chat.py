"""Read prompts line by line and answer each: `python generate.py --chat`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from utils.console import deferred_interrupt, encoding_problem, say, write

LEAVE = ("exit", "quit")


def chat(answer: Callable[[str, int], Iterator[str]], answers: bool = False) -> None:
    """For every line of standard input, print what answer(line, turn) yields, until `exit` or the end of input.

    Unless the model answers prompts, it continues them, and each is printed before what was written. A ValueError that
    `answer` raises is shown as one line, and the next line is read. Ctrl-C ends an answer; a second one, or one at the
    prompt, ends the chat, and so does Ctrl-D.
    """
    if sys.stdin.isatty():
        task = "a prompt; the model answers it" if answers else "the beginning of a text; the model continues it"
        say(f"Enter {task}. Ctrl-C ends an answer, `exit` the chat.")
    try:
        for turn, prompt in enumerate(read_prompts()):
            try:
                pieces = answer(prompt, turn)
            except ValueError as error:
                say(f"error: {error}")
                continue
            write("" if answers else prompt)
            with deferred_interrupt() as stopping:  # stop between two pieces: torch can lose an exception raised in it
                for piece in pieces:
                    write(piece)
                    if stopping():
                        break
            write("\n\n")
    except KeyboardInterrupt:
        say()


def read_prompts() -> Iterator[str]:
    """Lines of standard input up to `exit`, without empty ones; on a terminal with line editing and history."""
    with suppress(AttributeError):  # not a real stream
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes of another encoding are no end of the chat
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
        if line in LEAVE:
            return
        if problem := encoding_problem(line):
            say(f"error: {problem}")
        elif line:
            yield line
