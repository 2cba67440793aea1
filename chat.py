"""A conversation at the terminal, with any writer: `python generate.py --chat`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from console import deferred_interrupt, say


def chat(answer: Callable[[str, int], Iterator[str]]) -> None:
    """Print what answer(prompt, turn) yields, as it comes, for every line read, until `quit` or the input's end.

    A prompt that cannot be read gets its error line and the next turn. Ctrl-C and Ctrl-D end the conversation.
    """
    if sys.stdin.isatty():
        say("Enter a beginning; the model goes on. `quit` leaves.")
    try:
        for turn, prompt in enumerate(read_prompts()):
            try:
                pieces = answer(prompt, turn)
            except ValueError as error:
                say(f"error: {error}")
                continue
            print(prompt, end="", flush=True)
            with deferred_interrupt() as stopping:  # between two pieces: raised anywhere, an interrupt can get lost
                for piece in pieces:
                    print(piece, end="", flush=True)
                    if stopping():
                        raise KeyboardInterrupt
            print("\n", flush=True)
    except KeyboardInterrupt:
        say()


def read_prompts() -> Iterator[str]:
    """Lines of standard input up to `quit`, empty ones left out; at a terminal with editing and history."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        with suppress(ImportError):  # not on every system
            import readline  # noqa: F401 (its import gives input() the arrow keys)
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
