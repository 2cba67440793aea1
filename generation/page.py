"""One self-contained HTML page that plays the histories of texts: no network, no scripts from text (see page.html)."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from generation.history import Cell, History
from utils.files import atomic_write

TEMPLATE = Path(__file__).with_name("page.html")
DIGITS = 4  # of probabilities


def write_page(path: str | Path, histories: Sequence[History], title: str) -> None:
    """Write the page atomically. Several histories stand side by side under a common clock: a race.

    Raises OSError if the file cannot be written.
    """
    before, after = TEMPLATE.read_text("utf-8").split("{{data}}")
    script = after.rpartition("<script>")[2].partition("</script>")[0]  # as the browser hashes it
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = {"title": title, "histories": [packed(history) for history in histories]}
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(before.replace("{{script hash}}", digest) + json_in_html(data) + after, "utf-8")


def json_in_html(data) -> str:
    """JSON in ASCII that no HTML parser can take for markup: <, > and & are escaped as well.

    >>> json_in_html("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 and lone surrogates are escaped
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def packed(history: History) -> dict:
    """A history as compact plain values. Tokens are indices into a table; -1 or nothing at all is a mask.

    A frame is [nfe, seconds, changes], a change [position] or [position, token, confidence, candidates], where the
    candidates are token, probability, token, probability, ...
    """
    ids: dict[str, int] = {}

    def index(token: str | None) -> int:
        return -1 if token is None else ids.setdefault(token, len(ids))

    def change(position: int, cell: Cell) -> list:
        if cell.token is None:
            return [position]
        pairs = [value for token, p in cell.candidates for value in (index(token), round(p, DIGITS))]
        return [position, index(cell.token), round(cell.confidence, DIGITS), pairs]

    start = [index(token) for token in history.start]
    frames = [
        [frame.nfe, round(frame.seconds, DIGITS), [change(*item) for item in frame.changes.items()]]
        for frame in history.frames
    ]
    return {"label": history.label, "tokens": list(ids), "start": start, "frames": frames}
