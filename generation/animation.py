"""The histories of texts as an animated GIF, drawn cell by cell in a monospaced font.

Cells stand where they stand in the finished text, so that nothing moves while the text is written.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from generation.history import History, Status
from utils.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, MARGIN, GAP = 800, 20, 24  # pixels; GAP between texts that stand side by side
FONT_SIZE, RACE_FONT_SIZE, LINE_HEIGHT = 20, 16, 1.35
PLAY_SECONDS, FIRST_SECONDS, LAST_SECONDS = 7.0, 0.8, 3.0
FRAME_SECONDS = 0.06  # the least time between two images: what happens within it is shown together
SHADES, EDGE_STEPS = 5, 4  # of confidence; between text and background
MAX_TOKEN = 24  # characters shown of one token

Color = tuple[int, int, int]
BACKGROUND, INK, FAINT, LINE, ACCENT = (255, 255, 255), (26, 34, 48), (91, 102, 120), (208, 213, 221), (29, 78, 216)
MASK, REMASK, REMASK_BACK = (152, 164, 181), (190, 18, 60), (253, 228, 233)
GIVEN, GIVEN_BACK = (30, 58, 138), (228, 234, 248)
WRITTEN = (255, 244, 214), (245, 158, 11)  # background at confidence 0 and 1
WRITTEN_EDGE = (146, 64, 14)
SETTLED = (191, 227, 208), (4, 120, 87)  # underline at confidence 0 and 1


def write_gif(path: str | Path, histories: Sequence[History]) -> None:
    """Write the animation atomically. Several histories stand side by side on a common clock: a race.

    One history is shown step by step in equal times, a race in proportion to its seconds, both in PLAY_SECONDS.
    Raises OSError if the file cannot be written.
    """
    painter, palette = Painter(histories), make_palette()
    seconds, steps = zip(*moments(histories), strict=True)
    first, *others = [painter.paint(now).quantize(palette=palette, dither=0) for now in steps]
    durations = [round(1000 * s) for s in seconds]
    with atomic_write(Path(path)) as temporary:  # optimize: an image holds only what differs from the one before
        first.save(temporary, "GIF", save_all=True, append_images=others, duration=durations, loop=0, optimize=True)


def moments(histories: Sequence[History]) -> list[tuple[float, list[int]]]:
    """What to show: (seconds on screen, the step of each history), from before the first step to after the last."""

    def clocks(history: History) -> list[float]:
        return [frame.seconds if len(histories) > 1 else float(i + 1) for i, frame in enumerate(history.frames)]

    times = [clocks(history) for history in histories]
    end = max((clock[-1] for clock in times if clock), default=0.0) or 1.0
    starts: dict[int, list[int]] = {}  # by slot of FRAME_SECONDS: the state at the end of the slot
    for now in sorted({0.0, *(t for clock in times for t in clock)}):
        slot = round(now / end * PLAY_SECONDS / FRAME_SECONDS)
        starts[slot] = [sum(t <= now for t in clock) for clock in times]
    slots = list(starts)
    seconds = [(b - a) * FRAME_SECONDS for a, b in pairwise(slots)]
    if seconds:
        seconds[0] += FIRST_SECONDS
    return list(zip([*seconds, LAST_SECONDS], starts.values(), strict=True))


def make_palette() -> "Image":
    """An image whose palette holds the colours that are drawn, and steps between text and background for its edges."""
    from PIL import Image

    pairs = [(INK, BACKGROUND), (FAINT, BACKGROUND), (GIVEN, GIVEN_BACK), (MASK, LINE), (REMASK, REMASK_BACK)]
    pairs += [(INK, mix(*WRITTEN, k / SHADES)) for k in range(SHADES + 1)]
    colors = [mix(*pair, k / EDGE_STEPS) for pair in pairs for k in range(EDGE_STEPS + 1)]
    colors += [mix(*SETTLED, k / SHADES) for k in range(SHADES + 1)] + [ACCENT, WRITTEN_EDGE]
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for color in dict.fromkeys(colors) for value in color])
    return palette


# ------------------------------------------------------------------------------------------------- layout
def visible(token: str) -> str:
    """A token as it is drawn: a line feed as ⏎, other control characters by name.

    >>> visible("a\\n"), visible("\\t"), visible("\\u2028")
    ('a⏎', '^I', '<2028>')
    """
    shown = ""
    for char in token:
        if char == "\n":
            shown += "⏎"
        elif ord(char) < 32:
            shown += f"^{chr(64 + ord(char))}"
        elif unicodedata.category(char)[0] == "C" or unicodedata.category(char) in ("Zl", "Zp"):
            shown += f"<{ord(char):04X}>"
        else:
            shown += char
    return shown[:MAX_TOKEN]


def last_tokens(history: History) -> list[str]:
    """The last token that stood at each position, " " where there never was one."""
    tokens = [token or " " for token in history.start]
    for frame in history.frames:
        for position, cell in sorted(frame.changes.items()):
            tokens[position : position + 1] = [cell.token or tokens[position]]
    return tokens


def layout(tokens: Sequence[str], columns: int) -> list[tuple[int, int]]:
    """(row, column) of each token: lines end at line feeds, and between words where they would be too long.

    >>> layout("to be\\nor", 6)
    [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1)]
    >>> layout("to be", 4)
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    """
    words: list[list[str]] = []
    for i, token in enumerate(tokens):
        new = i == 0 or tokens[i - 1][-1:].isspace() or (token[:1].isspace() and not token.isspace())
        if new:
            words.append([])
        words[-1].append(token)
    places, row, column = [], 0, 0
    for word in words:
        if column + sum(len(visible(token)) for token in word) > columns and column:
            row, column = row + 1, 0
        for token in word:
            if column + len(visible(token)) > columns and column:  # a word longer than a line
                row, column = row + 1, 0
            places.append((row, column))
            column += len(visible(token))
        if word[-1].endswith("\n"):
            row, column = row + 1, 0
    return places


# ------------------------------------------------------------------------------------------------- drawing
@dataclass
class Panel:
    """Where one text is drawn."""

    history: History
    left: int
    widths: list[int]  # characters in each cell
    places: list[tuple[int, int]]  # (row, column) of each cell
    drawn: dict[int, tuple]  # position -> what was drawn there last


class Painter:
    """Draws the states of the histories into one image; only cells that have changed are drawn again."""

    def __init__(self, histories: Sequence[History]):
        from matplotlib import get_data_path
        from PIL import Image, ImageDraw, ImageFont

        size = FONT_SIZE if len(histories) == 1 else RACE_FONT_SIZE
        fonts = Path(get_data_path()) / "fonts" / "ttf"
        self.font = ImageFont.truetype(fonts / "DejaVuSansMono.ttf", size)
        self.bold = ImageFont.truetype(fonts / "DejaVuSansMono-Bold.ttf", size)
        self.advance, self.line = self.font.getlength("m"), round(size * LINE_HEIGHT)
        panel_width = (WIDTH - 2 * MARGIN - GAP * (len(histories) - 1)) // len(histories)
        self.panels, self.panel_width = [], panel_width
        for i, history in enumerate(histories):
            tokens = last_tokens(history)
            places = layout(tokens, int(panel_width / self.advance))
            widths = [len(visible(token)) for token in tokens]
            self.panels.append(Panel(history, MARGIN + i * (panel_width + GAP), widths, places, {}))
        rows = 1 + max((row for panel in self.panels for row, _ in panel.places), default=0)
        self.top = MARGIN + 2 * self.line + 12  # below the status
        self.image = Image.new("RGB", (WIDTH, self.top + rows * self.line + MARGIN), BACKGROUND)
        self.pen = ImageDraw.Draw(self.image)

    def paint(self, steps: Sequence[int]) -> "Image":
        """A copy of the image with each history after so many steps."""
        for panel, step in zip(self.panels, steps, strict=True):
            cells = panel.history.cells_at(step)
            for position, cell in enumerate(cells):
                state = cell.token, cell.status(step), round(cell.confidence * SHADES) / SHADES
                if panel.drawn.get(position) != state:
                    panel.drawn[position] = state
                    self.draw_cell(panel, position, *state)
            asked = len(panel.places) - sum(token is not None for token in panel.history.start)
            written = sum(cell.token is not None and cell.step > 0 for cell in cells)
            self.draw_status(panel, step, written / asked if asked else 1.0)
        return self.image.copy()

    def draw_status(self, panel: Panel, step: int, share: float) -> None:
        """The label, the step, network evaluations and time, and a bar of the share that is written."""
        left, right, line, history = panel.left, panel.left + self.panel_width, self.line, panel.history
        nfe, seconds = (history.frames[step - 1].nfe, history.frames[step - 1].seconds) if step else (0, 0.0)
        self.pen.rectangle((left, MARGIN, right, self.top - 1), BACKGROUND)
        self.pen.text((left, MARGIN), history.label, INK, self.bold)
        self.pen.text((right, MARGIN), f"{seconds:.2f} s", INK, self.font, anchor="ra")
        words = f"step {step}/{history.step}, {nfe} network evaluation{'' if nfe == 1 else 's'}"
        self.pen.text((left, MARGIN + line), words, FAINT, self.font)
        y = MARGIN + 2 * line
        self.pen.rectangle((left, y, right, y + 3), LINE)
        self.pen.rectangle((left, y, left + round(share * self.panel_width), y + 3), ACCENT)

    def draw_cell(self, panel: Panel, position: int, token: str | None, status: Status, confidence: float) -> None:
        """One cell. States differ in colour and in shape or weight, as on the page."""
        row, column = panel.places[position]
        left, right = (panel.left + round(self.advance * x) for x in (column, column + panel.widths[position]))
        top = self.top + row * self.line
        right, bottom = right - 1, top + self.line - 1
        pen, text = self.pen, visible(token or "")[: panel.widths[position]]
        pen.rectangle((left, top, right, bottom), GIVEN_BACK if status == Status.GIVEN else BACKGROUND)
        if status == Status.MASKED:
            pen.rectangle((left + 1, top + self.line // 4, right - 1, bottom - self.line // 4), MASK)
        elif status == Status.REMASKED:
            pen.rectangle((left, top + 3, right, bottom - 3), REMASK_BACK, REMASK)
            pen.line((left, bottom - 3, right, top + 3), REMASK)
        elif status == Status.WRITTEN:
            pen.rectangle((left, top + 1, right, bottom - 1), mix(*WRITTEN, confidence), WRITTEN_EDGE)
        elif status == Status.SETTLED:
            pen.rectangle((left, bottom - 2, right, bottom - 1), mix(*SETTLED, confidence))
        bold = status in (Status.GIVEN, Status.WRITTEN)
        color = FAINT if text.endswith("⏎") else GIVEN if status == Status.GIVEN else INK
        pen.text((left, top + 1), text, color, self.bold if bold else self.font)


def mix(low: Color, high: Color, share: float) -> Color:
    """The colour at `share` of the way."""
    return tuple(round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
