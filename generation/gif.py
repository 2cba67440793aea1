"""Histories as an animated GIF: characters stand where they stand in the finished text, so that nothing moves."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from generation.history import SHADES, History, Replay, Status
from utils.console import counted
from utils.files import atomic_write

WIDTH, MARGIN, GAP = 800, 20, 24  # pixels; GAP between texts that stand side by side
PLAY_SECONDS, FIRST_SECONDS, LAST_SECONDS = 7.0, 0.8, 3.0
FRAMES = 100  # at most: what happens within PLAY_SECONDS / FRAMES is shown together
BLENDS = 4  # between the colour of a letter and what is behind it: its smooth edges
WHITE, INK, FAINT = (255, 255, 255), (26, 34, 48), (91, 102, 120)
COLORS = {  # the letter, and what is behind it (SETTLED: a line below it) at probability 0 and 1
    Status.GIVEN: ((30, 58, 138), (228, 234, 248), (228, 234, 248)),
    Status.MASKED: ((152, 164, 181), WHITE, WHITE),
    Status.WRITTEN: (INK, (255, 244, 214), (245, 158, 11)),
    Status.CORRECTED: (INK, (253, 228, 233), (244, 143, 177)),
    Status.SETTLED: (INK, (191, 227, 208), (4, 120, 87)),
}
Color = tuple[int, int, int]


def write_gif(path: str | Path, histories: Sequence[History]) -> None:
    """Write the animation atomically. Several histories stand side by side on a common clock: a race.

    One history is shown step by step in equal times, a race in proportion to its seconds, both in PLAY_SECONDS.
    Raises OSError if the file cannot be written.
    """
    from PIL import Image

    pairs = [(ink, WHITE) for ink in (INK, FAINT)]
    pairs += [(ink, mix(low, high, k / (SHADES - 1))) for ink, low, high in COLORS.values() for k in range(SHADES)]
    colors = dict.fromkeys(mix(*pair, k / BLENDS) for pair in pairs for k in range(BLENDS + 1))
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for color in colors for value in color])
    seconds, steps = zip(*moments(histories), strict=True)
    first, *others = [image.quantize(palette=palette, dither=0) for image in images(histories, steps)]
    durations = [round(1000 * s) for s in seconds]
    with atomic_write(Path(path)) as temporary:  # optimize: an image holds only what differs from the one before
        first.save(temporary, "GIF", save_all=True, append_images=others, duration=durations, loop=0, optimize=True)


def moments(histories: Sequence[History]) -> list[tuple[float, list[int]]]:
    """What to show: (seconds on screen, the step of each history), from before the first step to after the last."""
    race = len(histories) > 1
    clocks = [[frame.seconds if race else i for i, frame in enumerate(h.frames, 1)] for h in histories]
    end = max(clock[-1] for clock in clocks)
    steps = ([sum(t <= k / FRAMES * end for t in clock) for clock in clocks] for k in range(FRAMES + 1))
    shown = [[PLAY_SECONDS / FRAMES * len(list(same)), now] for now, same in groupby(steps)]
    shown[0][0] += FIRST_SECONDS
    shown[-1][0] += LAST_SECONDS
    return [*map(tuple, shown)]


def images(histories: Sequence[History], moments: Sequence[list[int]]):
    """Yield an image of the texts after each of these numbers of steps, none fewer than before."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    size, font_file = 20 if len(histories) == 1 else 16, Path(get_data_path(), "fonts/ttf/DejaVuSansMono.ttf")
    font = ImageFont.truetype(font_file, size, layout_engine=ImageFont.Layout.BASIC)
    width, line_height = (WIDTH - 2 * MARGIN - GAP * (len(histories) - 1)) // len(histories), round(size * 1.4)
    advance, replays = round(font.getlength("m")), [Replay(history, whole=True) for history in histories]
    columns, top = width // advance, MARGIN + 2 * line_height
    rows = max(len(replay.lines(columns)) for replay in replays)
    for steps in moments:
        image = Image.new("RGB", (WIDTH, top + rows * line_height + MARGIN), WHITE)
        pen = ImageDraw.Draw(image)
        for k, (replay, step) in enumerate(zip(replays, steps, strict=True)):
            left, frame = MARGIN + k * (width + GAP), replay.advance(step).frame
            pen.text((left, MARGIN), replay.history.label, INK, font)
            cost = f"{counted(frame.nfe, 'evaluation')}, {frame.seconds:.2f} s"
            pen.text((left + width, MARGIN), cost, FAINT, font, anchor="ra")
            for row, line in enumerate(replay.lines(columns)):
                x, y = left, top + row * line_height
                for run in line:
                    ink, low, high = COLORS[run.status]
                    right, bottom = x + advance * len(run.text), y + line_height
                    behind_from = bottom - 3 if run.status is Status.SETTLED else y + 1
                    behind = mix(low, high, run.shade / (SHADES - 1))
                    pen.rectangle((x, behind_from, right - 1, bottom - 2), behind)
                    pen.text((x, y + 2), run.text, ink, font)
                    x = right
        yield image


def mix(low: Color, high: Color, share: float) -> Color:
    """The colour at `share` of the way."""
    return tuple(round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
