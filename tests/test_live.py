"""Histories and what draws them: recording, replaying, line breaks, styles, the terminal, the race, the animation."""

import os
import pty
import re
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from itertools import pairwise

import pytest
import torch
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from toy import random_model, seeded

from generation import GeneratorTransformer
from generation import terminal as views
from generation.gif import moments, write_gif
from generation.history import Frame, History, Recorder, Replay, Run, Status, layout, visible
from generation.terminal import View, plain_line, side_by_side, style_of, text_stands
from generation.write import write
from model import MODELS
from tokenizer import SimpleTokenizer

TOKENIZER = SimpleTokenizer("\x1b\n abcdefgh")


def recorded(name: str, prompt: str, length: int, view: View | None = None, first: int = 0, **settings) -> History:
    """The history of a text that a random model writes; it ends with the finished text."""
    writer = GeneratorTransformer(random_model(name, vocab_size=TOKENIZER.vocab_size), TOKENIZER)
    start, _ = writer.prompt_start(prompt, length)
    recorder = Recorder(start, TOKENIZER, name, first)
    for state in write(writer.model, [start] * 2, writer.settings(**settings), seeded(1)):
        recorder.add(state)
        if view:
            view.show(recorder.history)
    text = [visible(TOKENIZER.id_to_char[i]) for i in state.texts[0].tolist()]
    cells = Replay(recorder.history).advance().cells
    assert sorted(seconds := [frame.seconds for frame in recorder.history.frames]) == seconds
    assert [cell.text for cell in cells] == text[first:][: len(cells)]  # behind an [END] GPT writes no more
    return recorder.history


def written_history(text: str, label: str = "GPT", seconds: float = 0.1, masked: bool = False) -> History:
    """A history that writes one character a step."""
    frames = [Frame(i + 1, seconds * (i + 1), {i: (char, 0.5)}, {i: ((char, 0.5),)}) for i, char in enumerate(text)]
    return History(label, [None] * len(text) * masked, frames)


def texts_of(replay: Replay, width: int = 80) -> list[str]:
    return ["".join(run.text for run in line).rstrip() for line in replay.lines(width)]


def drawings(output: str) -> list[str]:
    """What a terminal showed, one after the other, without styles; the last stands there after a view was erased."""
    return re.sub(r"\x1b\[[0-9;]*m", "", output).split("\x1b[2K")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping moves; its value is the time slept."""
    now = [0.0]

    class Time:
        monotonic = staticmethod(lambda: now[0])
        sleep = staticmethod(lambda seconds: now.__setitem__(0, now[0] + seconds))

    monkeypatch.setattr(views, "time", Time)
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


# ------------------------------------------------------------------------------------------------- recording
def test_a_history_of_gpt_grows_and_one_of_llada_keeps_what_the_network_believed_of_every_mask():
    history = recorded("gpt", "ab", 12, first=1)
    assert history.start == ["b"]  # what is hidden is left out
    for k, frame in enumerate(history.frames, 1):
        assert (frame.nfe, list(frame.written), list(frame.beliefs)) == (k, [k], [k])
        token, p = frame.written[k]
        assert dict(frame.beliefs[k]).get(token, p) == p > 0
    history = recorded("llada", "ab", 12, steps=4, correct=0)
    assert (history.start, len(history.frames)) == (["a", "b", *[None] * 12], 4)
    masked = set(range(2, 14))
    for frame in history.frames:  # before it wrote
        assert set(frame.beliefs) == masked
        for beliefs in frame.beliefs.values():
            assert [p for _, p in beliefs] == sorted((p for _, p in beliefs), reverse=True)
            assert len(beliefs) == 5
        masked -= set(frame.written)
    assert not masked


def test_corrections_are_seen_and_windows_of_a_long_text_appear_one_after_the_other():
    history = recorded("llada", "", 24, steps=4, correct=1, correct_temperature=9.0)
    assert len(history.start) == 16  # the model's context
    replay = Replay(history)
    statuses = [{cell.status for cell in replay.advance(step + 1).cells} for step in range(len(history.frames))]
    assert len(replay.cells) == 24
    assert Status.CORRECTED in set().union(*statuses)
    assert Status.CORRECTED not in set().union(*statuses[:4])
    whole = Replay(history, whole=True).advance()
    assert {cell.status for cell in whole.cells} == {Status.SETTLED}  # nothing is new in a finished text


# ------------------------------------------------------------------------------------------------- lines
@pytest.mark.parametrize("width", [2, 5, 13, 80])
def test_lines_break_at_spaces_fit_the_width_and_keep_every_character(width):
    text = "".join("abc  \n漢é"[i] for i in torch.randint(8, (400,), generator=seeded()).tolist())
    rows = layout(text, width)
    assert "".join(rows) == text
    for row, after in pairwise(rows):
        assert cell_len(row.rstrip(" \n")) <= width
        inside_a_word = row[-1] not in " \n" and after[0] not in " \n"
        word = re.match(r"[^ \n]*", after)[0]
        if row[-1] != "\n" and word and not inside_a_word:
            assert cell_len(row + word) > width  # no line ends too early
        assert not inside_a_word or cell_len(re.search(r"[^ \n]*$", row)[0] + word) > width  # only longer words break


@pytest.mark.parametrize("masked", [True, False])
def test_lines_break_where_those_of_the_finished_text_do(masked):
    replay = Replay(written_history("the king is dead and gone", masked=masked), whole=True)
    seen = [texts_of(replay.advance(step), 10) for step in range(26)]
    assert seen[-1] == ["the king", "is dead", "and gone"]
    assert seen[5] == (["the k░░░░", "░░░░░░░░", "░░░░░░░░"] if masked else ["the k", "", ""])
    assert {len(lines) for lines in seen} == {3}


def test_control_characters_are_shown_and_line_breaks_when_they_are_written():
    assert texts_of(Replay(History("GPT", [*"a\x1b[2J\r\u202e", "[END]"]))) == ["a␛[2J␍�"]
    history = written_history("ab\n")
    assert [texts_of(Replay(history, whole).advance()) for whole in (False, True)] == [["ab↵"], ["ab"]]
    line = plain_line(Replay(written_history("a\x1b[1m\n" * 500)).advance())
    assert re.fullmatch(r"3000 ….*a␛\[1m↵", line)
    assert len(line) < 420


def test_every_status_has_a_look_with_and_without_colours_and_probability_is_a_shade():
    looks = {status: Style.parse(style_of(Run("a", status, 2))) for status in Status}
    assert len(set(looks.values())) == len({look.without_color for look in looks.values()}) == 5
    frames = [Frame(1, 0.0, {i: ("a", p) for i, p in enumerate((0.0, 0.3, 0.6, 0.9, 1.0))}, {})]
    cells = Replay(History("", [], frames)).advance().cells
    assert [cell.shade for cell in cells] == [0, 1, 2, 3, 3]
    assert len(set(map(style_of, cells))) == 4


@pytest.mark.parametrize("size", [(80, 23), (60, 19), (40, 4)])
def test_what_is_drawn_fits_the_screen_and_shows_the_last_lines(size):
    replays = [Replay(written_history("ab c\n" * 100 + end), whole=True).advance() for end in "xy"]
    for shown in ([replays[0]], replays):
        console = Console(file=StringIO(), width=size[0], highlight=False, markup=False)
        console.print(side_by_side(shown, *size))
        lines = console.file.getvalue().splitlines()
        assert len(lines) == size[1]
        assert max(map(len, lines)) <= size[0]
        assert lines[0].startswith("GPT 50.10 s, 501 ")
        assert [word.strip() for word in lines[-1].split("│")] == ["x", "y"][: len(shown)]


# ------------------------------------------------------------------------------------------------- one text
@pytest.mark.parametrize(("length", "pause", "total"), [(16, 0.12, 13.8 * 0.12), (150, 0.1, 4.76), (9, 0, 0)])
def test_the_pauses_between_steps_delay_a_text_by_a_bounded_time(terminal, clock, length, pause, total):
    history = written_history("a" * length)
    with terminal() as output, View(pause) as view:
        for _ in history.frames:
            view.show(history)
    assert "".join(drawings(output())[-1].split()) == "a" * length
    assert clock[0] == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_the_finished_text_stands_once_at_the_end_of_the_terminal(terminal, name):
    with terminal() as output, View(pause=0.01) as view:
        assert text_stands()
        history = recorded(name, "a\x1bb\n" * 9, 60, view)  # beyond the context: the first window has no masks
    text = "".join(cell.text for cell in Replay(history).advance().cells)
    assert "".join(drawings(output())[-1].split()) == "".join(text.split())
    assert re.search(name + r" 0\.\d\d s, \d+ evaluations? ", output())


def test_where_the_text_goes_and_what_a_terminal_without_colours_shows(terminal, monkeypatch):
    """A pipe gets it from the caller while the terminal keeps it too; a dumb terminal gets plain lines."""
    with terminal() as output, redirect_stdout(StringIO()), View(pause=0) as view:
        assert not text_stands()
        view.show(written_history("abc"))
    assert drawings(output())[-1].endswith("abc\n")
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal() as output, suppress(KeyboardInterrupt), View(pause=0) as view:
        view.show(written_history("abc"))
        raise KeyboardInterrupt
    assert "\x1b[1;7mc\x1b[0m" in output()  # the weights stay
    assert "38;5" not in output()
    assert output().rfind("\x1b[?25h") > output().rfind("\x1b[?25l")  # the cursor is given back
    monkeypatch.setenv("TERM", "dumb")
    with terminal() as output, View(pause=0) as view:
        view.show(written_history("ab\nc"))
        assert not text_stands()
    assert output() == "   4 ab↵c\n"


# ------------------------------------------------------------------------------------------------- race and animation
def test_a_race_keeps_the_common_clock_and_leaves_both_texts(terminal, clock, monkeypatch, capsys):
    monkeypatch.setattr(views, "REPLAY_SECONDS", 1.0)
    monkeypatch.setenv("COLUMNS", "80")
    histories = [written_history("ab", "LLaDA"), written_history("xyz " * 5, "GPT")]
    with terminal() as output:
        views.race(histories)
    assert clock[0] == pytest.approx(1.0, abs=0.03)
    *shown, left = drawings(output())
    assert any(re.match(r"LLaDA 0\.20 s, 2 evaluations +│ GPT 0\.7\d s, 7 evaluations", text) for text in shown)
    assert all(word in left for word in ("ab ", "xyz " * 5, "LLaDA 0.20 s, 2 ", "GPT 2.00 s, 20 "))
    views.race(histories)
    assert capsys.readouterr().err == ""  # elsewhere there is nothing to see


def test_an_animation_shows_one_text_in_equal_steps_and_a_race_on_its_clock(tmp_path):
    slow, fast = written_history("abcd", seconds=0.4), written_history("abcd", seconds=0.1)
    slow.frames[0] = replace(slow.frames[0], seconds=0.05)
    seconds, steps = zip(*moments([slow]), strict=True)
    assert steps == ([0], [1], [2], [3], [4])
    assert max(seconds[1:-1]) == pytest.approx(min(seconds[1:-1]), abs=0.07)
    at = [now for _, now in moments([slow, fast])]
    assert (at[0], [1, 4] in at, at[-1]) == ([0, 0], True, [4, 4])
    write_gif(tmp_path / "a.gif", [slow, fast])
    assert Image.open(tmp_path / "a.gif").n_frames == len(at)
