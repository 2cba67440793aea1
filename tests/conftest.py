"""Fixtures of several tests: a small text, and a function that runs the programs as a user does."""

import io
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
from utils.console import run_program

ROOT = Path(__file__).parent.parent
TINY = [
    *("--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "16"),
    *("--ngram-rows", "101", "--batch-size", "4"),
]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in background jobs, and so would programs


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are tiny: a second thread makes them slower. Denormal numbers, which train.py turns off, are on."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _no_pretrained_models(monkeypatch):
    """A test without a checkpoint must not find one that comes with the project; test_pretrained.py opens them."""
    monkeypatch.setattr(checkpoint, "PRETRAINED", Path("no pretrained models"))


@pytest.fixture
def corpus_file(tmp_path) -> Path:
    """A file of eight thousand characters of text with some structure."""
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"{i}: the king is {['dead', 'alive'][i % 2]}.\n" for i in range(350)))
    return path


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main(train.main, "--steps", 3) runs a program's main in this process: (exit code, stdout, stderr)."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", [main.__module__.replace(".", "/") + ".py", *map(str, arguments)])
        code = 0
        try:
            run_program(main)
        except SystemExit as stop:
            code = stop.code
        torch.set_flush_denormal(False)  # train.py turns them off; other tests in this process keep them
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script("train.py", "--steps", "3") runs a program, run_script("-m", "extras.bench", "budget") a module, in
    this process, which needs no second import of torch. Returns its standard output and its messages.
    """

    def call(program: str, *arguments: str, stdin: str = "", check: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr(time, "process_time", lambda: 0.0)  # --minutes counts the time since the process began
        status = 0
        try:
            if program == "-m":
                sys.argv[:] = arguments
                runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            torch.set_flush_denormal(False)
        output, messages = capsys.readouterr()
        assert status == check, messages
        return output, messages

    return call


@pytest.fixture
def command(tmp_path):
    """command("train.py", "--steps", 3) runs a program in a temporary folder without network; returns the process."""

    def call(program: str, *arguments, check: int | None = 0, stdin: str | None = None, env: dict | None = None):
        blocked = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            [sys.executable, str(ROOT / program), *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | blocked | (env or {}),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check is not None:
            assert process.returncode == check, process.stderr
        assert "Traceback" not in process.stderr
        return process

    return call
