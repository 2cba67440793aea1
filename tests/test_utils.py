"""Flags in errors, argument types, progress, devices, atomic writes."""

import argparse
import sys

import pytest
import torch

from utils import console
from utils.console import Parser, number
from utils.devices import pick_device
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
    time = iter([0.0, 1.0, 5.0, 11.0, 11.0, 12.0])  # the start, and each update; one that is shown reads it twice
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
    assert capsys.readouterr().err == "train: 75 %  loss 1\n"


def test_devices_are_checked():
    assert pick_device("cpu") == pick_device("cpu:0", float64=True)[:3] == "cpu"
    assert pick_device(None) in ("cpu", "cuda", "mps")
    for name in ("quantum", "cpu:1", "cpu:x", "", "cuda:99"):
        with pytest.raises(ArgumentError, match=f"device {name}: not available on this machine; use one of: .*cpu"):
            pick_device(name)


def test_float64_is_refused_on_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device(None) == pick_device("mps") == "mps"
    assert pick_device(None, float64=True) == "cpu"
    with pytest.raises(ArgumentError, match="mps: cannot compute in float64; use one of: cpu"):
        pick_device("mps", float64=True)


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(OSError, match="No such file"), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the ne")
        (tmp_path / "missing").read_text()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
