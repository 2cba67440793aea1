"""Flags in errors, argument types, progress, devices, atomic writes."""

import argparse
import io
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
import torch
from conftest import ROOT

from utils import console
from utils.console import Parser, number
from utils.devices import pick_device
from utils.errors import ArgumentError
from utils.files import atomic_write
from utils.standard_input import input_waits


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


@pytest.mark.parametrize(
    ("kind", "bounds", "text", "problem"),
    [
        (int, {"low": 1}, "0", "must be at least 1, got 0"),
        (int, {"high": 2**63 - 1}, str(2**63), "must be at most"),
        (int, {}, "1.5", "'1.5' is not a whole number"),
        (float, {"above": 0}, "0", "must be greater than 0, got 0.0"),
        (float, {"below": 1}, "1", "must be less than 1, got 1.0"),
        (float, {"low": 0}, "nan", "must be finite, got nan"),
        (float, {}, "-inf", "must be finite"),
        (float, {}, "x", "'x' is not a number"),
    ],
)
def test_numbers_out_of_range_are_refused(kind, bounds, text, problem):
    with pytest.raises(argparse.ArgumentTypeError, match=problem):
        number(kind, **bounds)(text)


def test_notes_of_a_progress_display_are_computed_only_when_they_are_shown(monkeypatch, capsys):
    time = iter([0.0, 1.0, 5.0, 11.0, 12.0])  # the start, and each update
    monkeypatch.setattr(console.time, "monotonic", lambda: next(time))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    computed = []

    def note() -> str:
        computed.append(len(computed))
        return f"loss {len(computed)}"

    with console.progress(4, "train") as update:
        for completed in range(1, 5):
            update(completed, note)
    assert computed == [0]
    assert capsys.readouterr().err == "train: 75 %  0:00:05 left, loss 1\n"


def test_the_pace_is_that_of_this_process(monkeypatch, capsys):
    """A resumed run begins with what another process did."""
    time = iter([0.0, 0.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(time))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with console.progress(1000, "train", unit="tokens") as update:
        update(500)
        update(600)
    assert capsys.readouterr().err == "train: 60 %  5.0 tokens/s, 0:01:20 left\n"


# ------------------------------------------------------------------------------------------------- text in and out
def test_control_characters_are_shown_on_a_terminal_and_exact_elsewhere(monkeypatch, capsys):
    text = "".join(map(chr, range(0x100))) + "\u202e\u2028é\n"
    console.write(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.write(text)
    shown = capsys.readouterr().out
    assert len(shown) == len(text)
    for before, after in zip(text, shown, strict=True):
        harmless = before in "\t\n" or (before.isprintable() and before != "\u202e") or before in "\xa0\xad\u2028"
        assert (before == after) == harmless
        assert after in "\t\n" or ord(after) >= 0x20
    assert console.printable("\x1b[31m\x7f\x9b\udce9") == "\u241b[31m\u2421\ufffd\ufffd"


def test_waiting_input_is_noticed_without_reading_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    reading, writing = os.pipe()
    with open(tmp_path / "file") as file, open(os.devnull) as nothing, open(reading) as pipe, open(writing, "w") as end:
        for stream in (file, nothing, pipe, io.StringIO("text"), None):
            monkeypatch.setattr(sys, "stdin", stream)
            assert input_waits() is (stream is file)
        end.write("text")
        end.flush()
        monkeypatch.setattr(sys, "stdin", pipe)
        assert input_waits()
        end.close()
        assert pipe.read() == "text"
        assert not input_waits()
        monkeypatch.setattr(sys, "stdin", file)
        assert file.read() == "text"
        assert not input_waits()


# ------------------------------------------------------------------------------------------------- command lines
@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="prog", examples="prog --top-k 5\nprog run")
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--length", type=int)
    parser.add_argument("--order", choices=("left", "confidence"))
    return parser


@pytest.fixture
def nested() -> Parser:
    parser = Parser(prog="prog")
    parser.add_subparsers(dest="name", metavar="NAME").add_parser("run").add_argument("--num-runs", type=int)
    return parser


def test_flags_may_have_underscores_and_values_keep_theirs(parser, nested):
    assert parser.parse_args(["--top_k", "5"]).top_k == parser.parse_args(["--top_k=5"]).top_k == 5
    assert nested.parse_args(["run", "--num_runs", "2"]).num_runs == 2
    parser.add_argument("--prompt")
    assert parser.parse_args(["--prompt=--top_k"]).prompt == "--top_k"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--topk 5", "unrecognized arguments: --topk 5; did you mean --top-k?"),
        ("--max_new_tokens 5", "unrecognized arguments: --max_new_tokens 5; did you mean --length?"),
        ("--gen-length=5", "unrecognized arguments: --gen-length=5; did you mean --length?"),
        ("--num-steps 5", "unrecognized arguments: --num-steps 5 "),  # there is no --steps to suggest
        ("run --num-rums", "prog run: error: unrecognized arguments: --num-rums; did you mean --num-runs?"),
        ("rum", "argument NAME: 'rum' is not one of run; did you mean run?"),
        ("--order lfet", "argument --order: 'lfet' is not one of left, confidence; did you mean left?"),
        ("--order conf", "did you mean confidence?"),
        ("--order random", "'random' is not one of left, confidence "),
        ("run away", "unrecognized arguments: away; put quotes around a text with spaces"),
    ],
)
def test_errors_name_what_is_nearest(parser, nested, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        (nested if words.startswith("r") else parser).parse_args(words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1
    assert message in error


def test_help_ends_with_the_examples_and_the_version_is_shown(parser, capsys):
    assert parser.format_help().endswith("\nexamples:\n  prog --top-k 5\n  prog run\n")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--version"])
    assert stop.value.code == 0
    versions = f"Python {platform.python_version()}, torch {version('torch')}"
    assert capsys.readouterr().out == f"prog {console.VERSION} ({versions})\n"
    assert not hasattr(parser.parse_args([]), "version")


@pytest.mark.parametrize("program", [["train.py"], ["generate.py"], ["evaluate.py"], ["-m", "benchmarks"]], ids=str)
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--wrong", 2)])
def test_help_and_errors_are_instant(program, flag, code):
    """They must not import torch. The best of three runs, since other processes may be running."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        process = subprocess.run([sys.executable, *program, flag], cwd=ROOT, capture_output=True)
        seconds.append(time.perf_counter() - start)
        assert process.returncode == code
    assert min(seconds) < 0.4


def test_devices_are_checked():
    assert pick_device("cpu") == pick_device("cpu:0")[:3] == "cpu"
    assert pick_device(None) in ("cpu", "cuda", "mps")
    for name in ("quantum", "cpu:1", "cpu:x", "", "cuda:99"):
        with pytest.raises(ArgumentError, match=f"device {name}: not available on this machine; use one of: .*cpu"):
            pick_device(name)


def test_mps_is_chosen_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device(None) == pick_device("mps") == "mps"


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(OSError, match="No such file"), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the ne")
        (tmp_path / "missing").read_text()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
