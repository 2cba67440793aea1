"""The views in the terminal: styles, line breaks, scrolling, pace, windows, plain lines, the race."""

import os
import pty
import re
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from itertools import combinations

import pytest
import torch
from rich.cells import cell_len
from rich.style import Style

from autoregressive import decode
from generation import live, race, screen
from generation.history import Cell, Frame, History, Status, record_filling
from generation.infilling import fill_masks, prompt_template, window_starts
from generation.live import PAUSE, PAUSES, View
from generation.screen import NEWLINE, Scroller, glyph, glyphs, text_stands, wrapped
from generation.text import prompt_ids
from model import MODELS, ModelConfig
from tokenizer import END_ID, MASK_ID, PAD_ID, SimpleTokenizer

TOKENIZER = SimpleTokenizer("\x1b\n abcdefgh")
BLOCK_SIZE = 16
CELLS = {  # a cell of each status after step 2
    Status.GIVEN: Cell("a", 0, 1.0),
    Status.MASKED: Cell(None),
    Status.WRITTEN: Cell("a", 2, 0.5),
    Status.REMASKED: Cell(None, 2),
    Status.SETTLED: Cell("a", 1, 0.5),
}


def random_model(name: str):
    """An untrained model that rarely writes [END]."""
    torch.manual_seed(0)
    config = ModelConfig(TOKENIZER.vocab_size, BLOCK_SIZE, n_embd=16, n_head=2, n_layer=1, ngram_rows=101)
    return MODELS[name](config).eval()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def written_history(text: str, label: str = "GPT", seconds: float = 0.1) -> History:
    """A history that writes one character a step."""
    history = History(label, [])
    for i, char in enumerate(text):
        history.add(Frame({i: Cell(char, i + 1, 0.5)}, nfe=i + 1, seconds=seconds * (i + 1)))
    return history


def without_styles(output: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", output)


def plain(lines) -> list[str]:
    return [line.plain for line in lines]


class FakeScreen:
    """Keeps what is drawn."""

    size = 80, 23

    def __init__(self):
        self.drawn, self.left = [], None

    def is_due(self) -> bool:
        return True

    def draw(self, make_lines) -> None:
        self.drawn.append(plain(make_lines(*self.size)))

    def leave(self, *texts) -> None:
        self.left = plain(texts)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping moves; its value is the time slept."""
    now = [0.0]
    for module in (live, race):
        monkeypatch.setattr(
            module,
            "time",
            type(
                "time",
                (),
                {
                    "monotonic": staticmethod(lambda: now[0]),
                    "sleep": staticmethod(lambda seconds: now.__setitem__(0, now[0] + seconds)),
                },
            ),
        )
    return now


@pytest.fixture
def terminal(monkeypatch):
    """`with terminal() as output:` standard output and error are a pseudo-terminal; output() is what it received."""
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "40", "LINES": "12"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return pseudo_terminal


@contextmanager
def pseudo_terminal():
    master, slave = pty.openpty()
    received = []

    def read() -> None:
        with suppress(OSError):  # the other end was closed
            while data := os.read(master, 4096):
                received.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        yield lambda: b"".join(received).decode().replace("\r\n", "\n")
    reader.join()
    os.close(master)


# ------------------------------------------------------------------------------------------------- characters
@pytest.mark.parametrize("pair", list(combinations(Status, 2)))
def test_every_status_has_a_colour_of_its_own_and_a_symbol_or_weight_of_its_own(pair):
    (a, a_style), (b, b_style) = ((text, Style.parse(style)) for text, style in (glyph(CELLS[s], 2) for s in pair))
    colors = [(style.color, style.reverse) for style in (a_style, b_style)]
    assert colors[0] != colors[1]
    assert (a, a_style.without_color) != (b, b_style.without_color)


def test_confidence_is_a_shade():
    styles = [glyph(Cell("a", 1, confidence), 2)[1] for confidence in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert len(set(styles)) == 4
    assert styles[3] == styles[4]


def test_control_characters_are_shown_and_special_tokens_are_not():
    history = History("GPT", ["a", "\x1b", "[", "2", "J", "\r", "\u202e", "[END]"])
    assert "".join(text for text, _ in glyphs(history)) == "a␛[2J␍�"


def test_a_line_break_is_marked_when_it_is_written_and_adds_no_line_at_the_edge():
    history = written_history("ab\n")
    assert glyphs(history)[-1][0] == NEWLINE + "\n"
    assert glyphs(history, settled=True)[-1][0] == "\n"
    assert [len(wrapped(glyphs(history), width)[0]) for width in (2, 3)] == [2, 2]


def test_lines_fit_the_width_and_keep_every_character():
    draw = torch.Generator().manual_seed(0)
    for width in (2, 5, 13):
        text = "".join("ab \n漢é"[i] for i in torch.randint(6, (200,), generator=draw).tolist())
        lines, line_of = wrapped([(char, "") for char in text], width)
        lines = ["".join(char for char, _ in line) for line in lines]
        assert max(map(cell_len, lines)) <= width
        assert "".join(lines) == text.replace("\n", "")
        assert line_of == sorted(line_of)
        assert line_of[-1] == len(lines) - 1


def test_the_latest_change_is_on_the_screen_and_the_text_moves_as_little_as_needed():
    history = History("LLaDA", [None] * 100)
    scroller, tops = Scroller(), []
    for step, position in enumerate((99, 55, 49, 0), 1):
        history.add(Frame({position: Cell("x", step, 0.5)}, step, 0.0))
        lines = plain(scroller.lines(history, width=10, height=5))
        assert len(lines) == 5
        assert lines[position // 10 - scroller.top][position % 10] == "x"
        tops.append(scroller.top)
    assert tops == [5, 5, 4, 0]
    assert scroller.part == "lines 1-5 of 10"


# ------------------------------------------------------------------------------------------------- one text
@pytest.mark.parametrize(
    ("length", "pause", "total"), [(16, PAUSE, 16 * PAUSE), (300, PAUSE, PAUSES * PAUSE), (9, 0, 0)]
)
@pytest.mark.parametrize("known", [True, False])
def test_steps_stand_for_a_pause_and_all_together_for_a_bounded_time(clock, length, pause, total, known):
    text = "a" * length
    with View(pause, steps=length if known else None) as view:
        view.screen = FakeScreen()
        whole = written_history(text)
        if not known:
            whole.start = [None] * length
        history, times = History("LLaDA", whole.start), []
        for frame in whole.frames:
            history.add(frame)
            view.show(history)
            times.append(clock[0])
        view.finish(text)
    assert view.screen.left == [text]
    assert clock[0] == pytest.approx(total, rel=0.02)
    assert times[length // 2] == pytest.approx(total / 2, abs=pause + 0.02 * total)  # evenly


def test_a_view_changes_nothing_and_shows_the_windows_of_a_long_text():
    model = random_model("llada")
    template = prompt_template("abc", 40, model, TOKENIZER)[0]
    expected = [state.texts[1].clone() for state in fill_masks(model, [template] * 2, generator=generator())]
    seen, windows = [], []
    with View(pause=0) as view:
        view.show = lambda history, window: (setattr(view, "history", history), windows.append(window))
        for state in view.filling(fill_masks(model, [template] * 2, generator=generator()), template, TOKENIZER):
            seen.append(state.texts[1].clone())
    assert all(map(torch.equal, seen, expected))
    starts = window_starts(len(template), BLOCK_SIZE, BLOCK_SIZE // 2)
    assert windows[0] is None
    assert list(dict.fromkeys(window.start for window in windows[1:])) == starts
    assert {len(window) for window in windows[1:]} == {BLOCK_SIZE}
    assert [cell.token for cell in view.history.cells] == list(TOKENIZER.decode(state.texts[0]))


def test_decoding_passes_all_columns_on_even_if_the_first_text_ends(capsys):
    model = random_model("gpt")
    prompts = [prompt_ids(model, TOKENIZER, prompt) for prompt in ("ab", "c")]

    def columns():
        for n, column in enumerate(decode(model, prompts, max_out_tokens=9, generator=generator())):
            column = column.clone()
            column[0] = (4 + n, END_ID, PAD_ID)[min(n, 2)]
            yield column

    with View(pause=0) as view:
        seen = list(view.decoding(columns(), model, prompts[0], TOKENIZER))
    assert all(map(torch.equal, seen, columns()))
    assert [cell.token for cell in view.history.cells] == ["a", "b", "\n", "[END]"]
    assert capsys.readouterr().err == "   1 ab⏎\n   2 ab⏎\n"


def test_lines_that_are_not_on_a_terminal_are_plain_and_bounded(capsys):
    history = written_history("a\x1b[1m\n" * 500)
    with View() as view:
        view.show(history)
        view.finish("never printed")
    line, rest = capsys.readouterr().err.split("\n")
    assert not rest
    assert line.startswith("2999 …") or line.startswith("3000 …")
    assert line.endswith("a␛[1m⏎")
    assert len(line) < 420
    assert not text_stands()


@pytest.mark.parametrize("size", [(80, 23), (40, 19), (12, 4)])
def test_the_view_fits_the_screen(size):
    view = View()
    view.history = written_history("ab c\n" * 100)
    for _ in range(2):  # the second drawing says which lines are shown
        lines = view.lines(*size, window=None)
        assert len(lines) <= size[1]
        assert max(len(line.plain) for line in lines) <= size[0] or size[0] < 20
    assert any(line.plain.startswith("step 500") for line in lines)


# ------------------------------------------------------------------------------------------------- the terminal
def test_the_finished_text_stands_once_at_the_end_of_the_terminal(terminal):
    model = random_model("llada")
    template = prompt_template("a\x1bb\n", 60, model, TOKENIZER)[0]
    with terminal() as output:
        assert text_stands()
        with View(pause=0.01) as view:
            *_, state = view.filling(fill_masks(model, [template], generator=generator()), template, TOKENIZER)
    shown = output().rpartition("\x1b[2K")[2]  # after the view was erased
    assert without_styles(shown) == TOKENIZER.decode(state.texts[0]).replace("\x1b", "␛") + "\n"
    assert re.search(r"step \d+ · \d+ evaluations · ", output())


def test_a_pipe_gets_the_text_from_the_caller_while_the_terminal_keeps_it_too(terminal, capsys):
    with terminal() as output, redirect_stdout(StringIO()), View(pause=0) as view:
        assert not text_stands()
        view.show(written_history("abc"))
        view.finish("abc")
    assert without_styles(output()).endswith("abc\n")


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with terminal() as output, View() as view:
        view.show(written_history("ab\nc"))
        view.finish("ab\nc")
        assert not text_stands()
    assert output() == "   4 ab⏎c\n"


def test_without_colour_the_weights_stay(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal() as output, View(pause=0) as view:
        view.show(written_history("abc"))
    assert "\x1b[1;7mc\x1b[0m" in output()
    assert "38;5" not in output()


def test_an_interrupted_view_gives_the_cursor_back(terminal):
    with terminal() as output, suppress(KeyboardInterrupt), View(pause=0) as view:
        view.show(written_history("abc"))
        raise KeyboardInterrupt
    assert output().rfind("\x1b[?25h") > output().rfind("\x1b[?25l")


# ------------------------------------------------------------------------------------------------- the race
def test_each_model_runs_alone_after_a_warm_up(capsys):
    events = []

    def run(label):
        for step in range(6):
            events.append((label, step))
            yield written_history("a" * step, label)

    histories = race.race([lambda: run("LLaDA"), lambda: run("GPT")])
    for label, start in (("LLaDA", 0), ("GPT", 10)):
        assert events[start : start + 10] == [(label, step) for step in (0, 1, 2, 3, 0, 1, 2, 3, 4, 5)]
    assert [history.label for history in histories] == ["LLaDA", "GPT"]
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "GPT: 5 characters in 0.50 s, 10 characters/s, 5 network evaluations"


@pytest.mark.parametrize("size", [(80, 23), (60, 20), (40, 12)])
def test_a_replay_keeps_the_common_clock_and_ends_with_both_texts(clock, size):
    histories = [written_history("ab", "LLaDA", seconds=0.1), written_history("xyz" * 5, "GPT", seconds=0.1)]
    fake = FakeScreen()
    fake.size = size
    race.replay(fake, histories, [0, 0])
    assert clock[0] == pytest.approx(1.5 * race.slowdown(1.5), abs=0.1)
    assert clock[0] <= race.REPLAY_SECONDS + 0.1
    for lines in fake.drawn:
        assert len(lines) <= size[1]
        assert max(map(len, lines)) <= size[0]
    middle = "\n".join(fake.drawn[len(fake.drawn) // 2])
    assert "LLaDA ✓ · 0.20 s · 2 " in middle
    assert re.search(r"GPT · 0.7\d s · 7 ", middle)
    assert "times slower" in middle
    assert "each measured alone" in middle
    end = "\n".join(plain(race.finished(histories, [0, 0], size[0])))
    assert all(word in end for word in ("ab", "xyz" * 5, "GPT ✓ · 1.50 s · 15 "))


def test_a_race_on_a_terminal_leaves_both_texts(terminal, monkeypatch):
    monkeypatch.setattr(race, "REPLAY_SECONDS", 0.3)
    model = random_model("llada")
    template = prompt_template("ab", 20, model, TOKENIZER)[0]

    def run(label):
        return record_filling(fill_masks(model, [template], generator=generator()), template, TOKENIZER, label)

    with terminal() as output:
        histories = race.race([lambda: run("A"), lambda: run("B")])
    shown = without_styles(output().rpartition("\x1b[2K")[2])
    assert histories[0].cells == histories[1].cells
    assert shown.count("".join(cell.token for cell in histories[0].cells).replace("\x1b", "␛")) == 2
    assert shown.replace("\n", " ").count("20 characters in") == 2


def test_masks_left_over_are_shown_as_such():
    history = History("LLaDA", ["a", None, None])
    history.add(Frame({1: Cell(None, 1)}, 1, 0.0))
    assert [text for text, _ in glyphs(history, window=range(2))] == ["a", screen.REMASKED, screen.OTHER_MASK]
    assert MASK_ID not in TOKENIZER.encode("a")
