"""Watching a masked text fill in: a live view on a terminal, a line a step anywhere else. All of it on stderr."""

import sys
from collections.abc import Iterator

from console import say
from templates import Draft
from tokenizer import MASK_ID, PAD_ID, SimpleTokenizer

HOLE = "·"  # how a character that is not written yet is shown
COLORS = ("red", "yellow", "green")  # of a character just written: how sure the network was, in thirds


def watch(drafts: Iterator[Draft], tokenizer: SimpleTokenizer, pause: float = 0.0) -> Iterator[Draft]:
    """Pass the drafts on, showing the canvas of the first text that is being written.

    What the latest step wrote is coloured by confidence. `pause`: seconds to look at each step.
    """
    if not sys.stderr.isatty():
        for draft in drafts:
            line = "".join(text for text, _ in canvas(draft, tokenizer))
            say(f"{draft.nfe:4} {line}".replace("\n", "⏎"))
            yield draft
        return
    import time

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        for draft in drafts:
            view = Text.assemble(*canvas(draft, tokenizer), (f"\n\n{draft.nfe} network evaluations", "dim"))
            live.update(view, refresh=True)
            time.sleep(pause)
            yield draft


def canvas(draft: Draft, tokenizer: SimpleTokenizer) -> list[tuple[str, str]]:
    """The characters of the first canvas, each with its style."""
    step = draft.step
    cells = zip(step.tokens[0].tolist(), step.committed[0].tolist(), step.confidence[0].tolist(), strict=True)
    return [
        (HOLE, "dim")
        if token == MASK_ID
        else (tokenizer.id_to_char[token], COLORS[min(2, int(3 * confidence))] if committed else "")
        for token, committed, confidence in cells
        if token != PAD_ID
    ]
