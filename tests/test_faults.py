"""Disks, folders and processes that fail: one clear line, and what was saved before is intact."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, TINY

import checkpoint
import train
from checkpoint import CheckpointWriter, deciding_loss, load_checkpoint
from trainer import Trainer


@pytest.fixture
def call(tmp_path, corpus_file, monkeypatch, run_main):
    """call("--steps", 3) runs train.py: (exit code, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        usual = [] if "--resume" in flags else ["--data", "corpus.txt", *TINY]
        usual += [] if {"--resume", "--eval-every"} & set(flags) else ["--eval-every", "2"]
        return run_main(train.main, *usual, *flags)[::2]

    return call


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.iterdir()}


class FileOnFullDisk(io.FileIO):
    """Writing fails after `room` bytes with the error of a full disk."""

    room = 0

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("room", [0, 1000, 40_000])
def test_a_full_disk_leaves_what_was_there(call, tmp_path, monkeypatch, room):
    assert call("--steps", 2)[0] == 0
    before = contents(tmp_path / "out/llada")

    def full_disk(path, mode="r"):
        return FileOnFullDisk(path, mode) if "w" in mode else open(path, mode)

    monkeypatch.setattr(FileOnFullDisk, "room", room)
    monkeypatch.setattr(checkpoint, "open", full_disk, raising=False)
    code, err = call("--resume", "--steps", 4)
    assert code == 2
    assert re.fullmatch(r"train.py: error: out/llada/\w+.pt: No space left on device", err.splitlines()[-1])
    assert contents(tmp_path / "out/llada") == before


def test_a_folder_that_vanishes_is_made_again(call, tmp_path, monkeypatch):
    original, calls = train.say_record, []

    def remove(record, trainer):
        original(record, trainer)
        calls.append(record["step"])
        if record["step"] == 2:
            shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(train, "say_record", remove)
    assert call("--steps", 6)[0] == 0
    assert calls == [2, 4, 6]
    assert load_checkpoint(tmp_path / "out/llada/last.pt").step == 6
    assert load_checkpoint(tmp_path / "out/llada/best.pt").step in (4, 6)
    assert len((tmp_path / "out/llada/metrics.jsonl").read_text().splitlines()) == 3


def test_the_second_training_into_a_folder_is_told_who_holds_it_however_that_ends(call, tmp_path):
    program = "import sys, pathlib, time; from utils.files import locked\n"
    program += "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    command = [sys.executable, "-c", program, str(tmp_path / "out/.llada.lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert process.stdout.readline() == "held\n"
    code, err = call("--steps", 2)
    assert code == 2
    assert f"error: out/.llada.lock is held by process {process.pid} on " in err.splitlines()[-1]
    process.kill()
    process.wait()
    assert call("--steps", 2)[0] == 0
    assert f"process {os.getpid()} " in (tmp_path / "out/.llada.lock").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_and_leave_with_their_exit_code(call, tmp_path, number):
    """So `train.py && next` does not go on, and a terminal that is closed loses nothing: issue 24, point 25."""

    def send():
        while not (tmp_path / "out/llada/last.pt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    code, err = call("--steps", 10**7)
    thread.join()
    assert code == 128 + number
    step = load_checkpoint(tmp_path / "out/llada/last.pt").step
    assert err.splitlines()[-1] == f"stopped at step {step}; next: python train.py --resume out/llada"
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_the_first_ctrl_c_during_the_final_score_ends_the_program(call, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "score", lambda trainer: signal.raise_signal(signal.SIGINT))
    assert call("--steps", 2)[0] == 130
    assert load_checkpoint(tmp_path / "out/llada/best.pt").step == 2


@pytest.mark.parametrize("place", ["nobody/model.pt", "corpus.txt/model.pt", "."])
def test_a_place_that_cannot_be_written_is_noticed_before_the_training(call, tmp_path, monkeypatch, place):
    """Issue 24, point 25."""

    def refused(dir):
        raise PermissionError(13, "Permission denied")

    if place.startswith("nobody"):
        monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refused)
    code, err = call("--steps", 2, "--export", place)
    assert code == 2
    assert "--export " in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_overwrites_nothing(call, tmp_path):
    assert call("--steps", 2)[0] == 0
    before = contents(tmp_path / "out/llada")
    for flags in (["--lr", 1e6], ["--ngram-lr", 1e6, "--optimizer", "adamw", "--lr", 1e6]):
        code, err = call("--steps", 100, "--eval-every", 100, *flags)
        assert code == 2
        assert "the loss is not finite at step" in err.splitlines()[-1]
        assert "try a smaller --lr" in err.splitlines()[-1]
        assert contents(tmp_path / "out/llada") == before


def test_what_is_killed_before_last_pt_is_written_is_done_again(call, tmp_path, monkeypatch):
    """When metrics.jsonl, and perhaps best.pt, are a validation ahead, and another file had been begun."""
    original, folder = CheckpointWriter.save_last, tmp_path / "out/llada"

    def killed(writer, pause=0.0):
        if writer.trainer.step == 4:
            raise KeyboardInterrupt
        original(writer, pause)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "save_last", killed)
        assert call("--steps", 6)[0] == 130
    ahead = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "last.pt.999.part").write_text("half")
    assert load_checkpoint(folder / "last.pt").step == len(ahead) == 2
    assert call("--resume")[0] == 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6]
    assert [record["val_loss"] for record in records[:2]] == [json.loads(line)["val_loss"] for line in ahead]
    assert load_checkpoint(folder / "best.pt").step == min(records, key=deciding_loss)["step"]
    assert not list(folder.glob("*.part"))


def test_a_training_that_is_killed_again_and_again_ends_as_one_that_is_not():
    command = [sys.executable, str(ROOT / "tests/kill_training.py"), "--kills", "4", "--steps", "500"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "4 kills" in process.stdout
