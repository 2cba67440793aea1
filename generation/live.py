"""Show a text filling in, on standard error: a live view on a terminal, one line a step elsewhere."""

import sys
import time
from collections.abc import Iterator

from generation.infilling import GenerationState
from tokenizer import MASK_ID, PAD_ID, SimpleTokenizer
from utils.console import say

MASK_SYMBOL = "·"  # shown for a masked character
COLORS = ("red", "yellow", "green")  # of a character just revealed: its confidence in thirds


def watch(
    states: Iterator[GenerationState], tokenizer: SimpleTokenizer, pause: float = 0.0
) -> Iterator[GenerationState]:
    """Pass the states on and show the current window of the first text that is not finished.

    What the latest step revealed is coloured by confidence. pause: seconds to show each step for on a terminal.
    """
    if not sys.stderr.isatty():
        for state in states:
            line = "".join(text for text, _ in styled_characters(state, tokenizer))
            say(f"{state.nfe:4} {line}".replace("\n", "⏎"))
            yield state
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        for state in states:
            count = (f"\n\nnetwork evaluations: {state.nfe}", "dim")
            live.update(Text.assemble(*styled_characters(state, tokenizer), count), refresh=True)
            time.sleep(pause)
            yield state


def styled_characters(state: GenerationState, tokenizer: SimpleTokenizer) -> list[tuple[str, str]]:
    """The characters of the first window, each with its rich style."""
    step = state.step
    cells = zip(step.tokens[0].tolist(), step.revealed[0].tolist(), step.confidence[0].tolist(), strict=True)
    characters = []
    for token, revealed, confidence in cells:
        if token == MASK_ID:
            characters.append((MASK_SYMBOL, "dim"))
        elif token != PAD_ID:
            color = COLORS[min(2, int(3 * confidence))] if revealed else ""
            characters.append((tokenizer.id_to_char[token], color))
    return characters
