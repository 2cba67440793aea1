"""Kill one training again and again, at random moments and while it writes: python tests/kill_training.py --kills 50

After every kill the run must go on from its last checkpoint, with whole files, and the end must be bit for bit that of
a run that was never killed. Each life is a fork of this process, so that torch is imported once.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch._dynamo  # imported by optimizers when they are made: once, here
from conftest import TINY

import train
import trainer  # noqa: F401 (imported before the forks)
from checkpoint import deciding_loss, load_checkpoint


def start(folder: Path, steps: int, model: str) -> int:
    """Fork a process that begins or resumes the run in `folder`; returns its id."""
    flags = ["--model", model, "--data", str(folder.parent / "corpus.txt"), "--steps", str(steps), "--eval-every", "5"]
    flags += [*TINY, "--dropout", "0.1", "--short-share", "0.5", "--calibration", "0.1"]
    flags += ["--out", str(folder), "--save-every", "0.002"]  # minutes
    if (folder / model / "last.pt").exists():
        flags.append("--resume")
    pid = os.fork()
    if pid == 0:
        log = os.open(folder.parent / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 2)
        sys.argv = ["train.py", *flags]
        try:
            train.main()
            os._exit(0)
        except BaseException:
            traceback.print_exc()  # into the log
            os._exit(1)
    return pid


def ended(pid: int, seconds: float, writing: Path | None = None) -> bool:
    """Wait for a process so long, or until it writes a file into the folder; whether it has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (writing and any(writing.glob("*.part"))):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, "the training failed"
            return True
        time.sleep(0.0005)
    return False


def check_files(folder: Path, before: tuple[int, float]) -> tuple[int, float]:
    """Check what a killed process left; returns the step of last.pt and the loss of best.pt."""
    step, loss = 0, float("inf")
    if (folder / "last.pt").exists():
        step = load_checkpoint(folder / "last.pt").step
    if (folder / "best.pt").exists():
        best = load_checkpoint(folder / "best.pt")
        assert best.step == best.history[-1]["step"]
        loss = deciding_loss(best.history[-1])
        assert loss == min(map(deciding_loss, best.history))
    if (folder / "metrics.jsonl").exists():
        text = (folder / "metrics.jsonl").read_text()
        steps = [json.loads(line)["step"] for line in text.splitlines()]
        assert text == "" or text.endswith("\n")  # empty before the first validation
        assert steps == sorted(set(steps)), "a doubled line"
    assert step >= before[0], "work that was saved is lost"
    assert loss <= before[1], "best.pt got worse"
    return step, loss


def differences(one, two, where: str = "") -> list[str]:
    """Where two states differ, apart from seconds: every tensor, number and string is compared."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, two) else [where]
    if isinstance(one, list) and isinstance(two, list):
        one, two = dict(enumerate(one)), dict(enumerate(two))
    if isinstance(one, dict):
        keys = (one.keys() | two.keys()) - {"seconds"}
        return [d for key in keys for d in differences(one.get(key, "-"), two.get(key, "-"), f"{where}/{key}")]
    return [] if one == two else [where]


def kill_again_and_again(work: Path, kills: int, steps: int, model: str) -> None:
    """Train once in peace and once with `kills` kills, and compare the ends. Every second kill hits a write."""
    draw, folder, state, hits = random.Random(0), work / "killed", (0, float("inf")), 0
    lines = [f"{i}: the king is {draw.choice(['dead', 'alive', 'gone'])}.\n" for i in range(350)]
    (work / "corpus.txt").write_text("".join(lines))
    assert ended(start(work / "whole", steps, model), 600)
    for kill in range(kills):
        pid, lock, too_short = start(folder, steps, model), folder / f".{model}.lock", "too few --steps for these kills"
        while kill % 5 and not (lock.exists() and f"process {pid} " in lock.read_text()):  # until it trains
            assert not ended(pid, 0.01)
        assert not ended(pid, draw.uniform(0, 0.6)), too_short
        if kill % 2:
            assert not ended(pid, 2.0, writing=folder / model), too_short
            time.sleep(draw.uniform(0, 0.003))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        hits += any((folder / model).glob("*.part"))
        state = check_files(folder / model, state)
        print(f"kill {kill + 1}: step {state[0]}, best {state[1]:.4f}", flush=True)
    assert ended(start(folder, steps, model), 600)
    check_files(folder / model, state)
    assert not list((folder / model).glob("*.part"))
    for name in ("last.pt", "best.pt"):
        one, two = (torch.load(work / run / model / name) for run in ("whole", "killed"))
        assert differences(one, two) == []
    lines = [(work / run / model / "metrics.jsonl").read_text().splitlines() for run in ("whole", "killed")]
    assert [json.loads(line)["step"] for line in lines[0]] == [json.loads(line)["step"] for line in lines[1]]
    print(f"{model}: {kills} kills, {hits} of them during a write; the end is bit for bit that of the run in peace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--model", choices=("llada", "gpt"), default="llada")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        kill_again_and_again(Path(work), args.kills, args.steps, args.model)


if __name__ == "__main__":
    main()
