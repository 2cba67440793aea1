"""Flags in errors, progress, streams that are closed or broken, memory, devices, atomic writes."""

import argparse
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from utils import console, devices
from utils.console import Parser, deferred_interrupt, say
from utils.devices import free_memory, pick_device
from utils.errors import ArgumentError
from utils.files import atomic_write


def test_argument_errors_become_flags_of_the_parser():
    parser = Parser()
    parser.add_argument("--n-embd", "--width", type=int)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("prompt")
    for argument, shown in (("n_embd", "--n-embd"), ("compile", "--compile"), ("prompt", "prompt"), ("eta", "eta")):
        with pytest.raises(ValueError, match=f"^{shown} is wrong$"), parser.naming_flags():
            raise ArgumentError(argument, "is wrong")
    with pytest.raises(ValueError, match=r"^n_embd is wrong$"), parser.naming_flags():
        raise ValueError("n_embd is wrong")  # words are not parsed: only an ArgumentError knows its argument


# ------------------------------------------------------------------------------------------------- progress
@pytest.fixture
def clock(monkeypatch):
    """clock(seconds, ...) sets what time.monotonic() will say: at the start, and at each update."""
    return lambda *seconds: monkeypatch.setattr(console.time, "monotonic", iter(map(float, seconds)).__next__)


def test_progress_shows_the_pace_of_this_process_and_computes_only_notes_that_are_shown(clock, capsys):
    """A resumed run begins with what another process did."""
    clock(0, 0, 5, 20, 21)
    computed = []

    def note() -> str:
        computed.append(len(computed))
        return f"loss {len(computed)}"

    with console.progress(1000, "train") as update:
        for completed in (500, 520, 600, 601):
            update(completed, note)
    assert computed == [0]
    assert capsys.readouterr().err == "train: 60 %, 0:01:20 left  loss 1\n"


def test_on_a_terminal_progress_is_one_line_that_messages_replace(clock, monkeypatch, capsys):
    clock(0, 1, 2, 3)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    with console.progress(4, "train") as update:
        update(1, lambda: "a note that is longer than the line")
        say("message")
        update(2)
        update(3)
    clear = "\r\x1b[K"
    lines = f"train: 25 %  a note{clear}message\ntrain: 50 %, 0:00:0{clear}train: 75 %, 0:00:0{clear}"
    assert capsys.readouterr().err == lines


# ------------------------------------------------------------------------------------------------- text in and out
@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_on_a_terminal_messages_break_at_spaces_and_commands_stay_whole(width, monkeypatch, capsys):
    """Issue 24, point 16: training lines broke inside numbers."""
    line = "step      1       0 s  train 6.0775 (75 % weighted for the sweep)  bound 6.0757  sampler 5.9395 nats/char"
    command = "next: python generate.py --checkpoint out/llada/best.pt --prompt 'First Citizen:' " + 150 * "x"
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    say(f"{line}\n{command}")
    *lines, last = capsys.readouterr().err.removesuffix("\n").split("\n")
    assert max(map(len, lines)) <= width
    assert " ".join(lines).split() == line.split()
    assert last == command


def test_control_characters_are_shown_on_a_terminal_and_exact_elsewhere(monkeypatch, capsys):
    text = "".join(map(chr, range(0x100))) + "\u202e\u2028é\n"
    console.print_out(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.print_out(text)
    shown = capsys.readouterr().out
    assert len(shown) == len(text)
    for before, after in zip(text, shown, strict=True):
        harmless = before in "\t\n" or (before.isprintable() and before != "\u202e") or before in "\xa0\xad\u2028"
        assert (before == after) == harmless
        assert after in "\t\n" or ord(after) >= 0x20
    assert console.printable("\x1b[31m\x7f\x9b\udce9") == "\u241b[31m\u2421\ufffd\ufffd"


PROGRAM = """
import sys, time
from utils.console import progress, run_program, say, print_out
def main():
    say("read", len(sys.stdin.read()), "characters")
    with progress(3, "work") as update:
        for i in range(3):
            update(i)
            say("x" * 70000)
            time.sleep(0.05)
    for _ in range(3):
        print_out("result\\n" * 20000)
        time.sleep(0.05)
    open("done", "w").close()
run_program(main)
"""


@pytest.mark.parametrize(
    ("streams", "is_done"),
    [
        *((streams, True) for streams in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-")),
        ("2>&1 >/dev/null | head -c 9", True),  # the reader of the messages leaves: the work goes on
        *((streams, False) for streams in ("| head -c 9", "2>&1 | head -c 9")),
    ],
)
def test_closed_and_broken_streams_make_no_traceback(tmp_path, streams, is_done):
    shell = f'"$0" -c "$1" {streams}; exit ${{PIPESTATUS[0]}}'
    process = subprocess.run(
        ["bash", "-c", shell, sys.executable, PROGRAM], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "done").exists() == is_done
    assert "Traceback" not in process.stderr
    assert "Error" not in process.stderr + process.stdout
    assert "xxx" not in process.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_loop_learns_which_signal_ends_it(number):
    before = signal.getsignal(number)
    with deferred_interrupt(signal.SIGTERM) as stopping:
        assert stopping() == 0
        os.kill(os.getpid(), number)
        assert stopping() == number
        assert signal.getsignal(number) == before  # the second one acts as usual
    assert signal.getsignal(number) == before


# ------------------------------------------------------------------------------------------------- command lines
@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="prog", examples="prog run --top-k 5\nprog run")
    run = parser.add_subparsers(dest="name").add_parser("run")
    run.add_argument("--top-k", type=int)
    run.add_argument("--length", type=int)
    run.add_argument("--compile", action=argparse.BooleanOptionalAction)
    run.add_argument("--prompt")
    return parser


def test_flags_may_have_underscores_and_values_keep_theirs(parser):
    assert parser.parse_args(["run", "--top_k", "5"]).top_k == parser.parse_args(["run", "--top_k=5"]).top_k == 5
    assert parser.parse_args(["run", "--prompt=--top_k"]).prompt == "--top_k"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--topk 5", "unrecognized arguments: --topk 5; did you mean --top-k?"),
        ("--num-steps 5", "unrecognized arguments: --num-steps 5 "),  # there is no --steps to suggest
        ("--top-k 5 --length 2 --top_k=6", "--top-k is given twice"),
        ("--compile --no-compile", "--compile is given twice"),
        ("away", "unrecognized arguments: away "),
        ("--length x", "argument --length: invalid int value: 'x'"),
    ],
)
def test_errors_are_one_line_and_name_the_nearest_flag(parser, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["run", *words.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1
    assert error.startswith(f"prog run: error: {message}")


def test_help_ends_with_the_examples(parser):
    assert parser.format_help().endswith("\nexamples:\n  prog run --top-k 5\n  prog run\n")


@pytest.mark.parametrize("program", ["train.py", "generate.py", "evaluate.py"])
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--wrong", 2)])
def test_help_and_errors_are_instant(program, flag, code):
    """They must not import torch. The best of three runs, since other processes may be running."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        process = subprocess.run([sys.executable, program, flag], cwd=ROOT, capture_output=True)
        seconds.append(time.perf_counter() - start)
        assert process.returncode == code
    assert min(seconds) < 0.4


# ------------------------------------------------------------------------------------------------- devices, files
def test_devices_are_checked(monkeypatch):
    assert pick_device("cpu") == pick_device("cpu:0")[:3] == "cpu"
    assert pick_device(None) in ("cpu", "cuda", "mps")
    for name in ("quantum", "cpu:1", "cpu:x", "", "cuda:99"):
        with pytest.raises(ArgumentError, match=f"device {name}: not available on this machine; use one of: .*cpu"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device(None) == pick_device("mps") == "mps"


@pytest.mark.parametrize(("limit", "free"), [("10000", 10000 - 7000 + 1500), ("max", None), ("6000", 500), ("1", 0)])
def test_what_a_container_uses_is_not_free(tmp_path, monkeypatch, limit, free):
    files = [tmp_path / name for name in ("memory.max", "memory.current", "memory.stat")]
    monkeypatch.setattr(devices, "CGROUPS", [files, [tmp_path / "version 1"] * 3])
    assert free_memory() > 10**6  # no container
    for file, content in zip(files, (limit, "7000", "anon 5000\ninactive_file 1500\n"), strict=True):
        file.write_text(content)
    assert free_memory() == free if free is not None else free_memory() > 10**6


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(OSError, match="No such file"), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the ne")
        (tmp_path / "missing").read_text()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
