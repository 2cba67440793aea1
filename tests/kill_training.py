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
        except BaseException as error:
            print(f"FAILED {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid: int, deadline: float, writing: Path | None) -> bool:
    """Wait for a process until the deadline, or until it writes a file into the folder; whether it has ended."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, "the training failed"
            return True
        if writing is not None and any(writing.glob("*.part")):
            return False
        time.sleep(0.0005)
    return False


def wait_until_it_trains(pid: int, lock: Path) -> None:
    """Wait until the process holds the lock of its folder."""
    while not (lock.exists() and f"process {pid} " in lock.read_text()):
        assert not ended(pid, time.monotonic() + 0.01, None)


def check_files(folder: Path, before: dict) -> dict:
    """Check what a killed process left; returns the step of last.pt and the loss of best.pt."""
    state = {"step": 0, "best": float("inf")}
    if (folder / "last.pt").exists():
        state["step"] = load_checkpoint(folder / "last.pt").step
    if (folder / "best.pt").exists():
        best = load_checkpoint(folder / "best.pt")
        assert best.step == best.history[-1]["step"]
        state["best"] = deciding_loss(best.history[-1])
        assert state["best"] == min(map(deciding_loss, best.history))
    if (folder / "metrics.jsonl").exists():
        text = (folder / "metrics.jsonl").read_text()
        steps = [json.loads(line)["step"] for line in text.splitlines()]
        assert text == "" or text.endswith("\n")  # empty before the first validation
        assert steps == sorted(set(steps)), "a doubled line"
    assert state["step"] >= before["step"], "work that was saved is lost"
    assert state["best"] <= before["best"], "best.pt got worse"
    return state


def differences(one, two, where: str = "") -> list[str]:
    """Where two states differ, apart from seconds: every tensor, number and string is compared."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, two) else [where]
    if isinstance(one, dict):
        keys = (one.keys() | two.keys()) - {"seconds"}
        return [d for key in keys for d in differences(one.get(key), two.get(key), f"{where}/{key}")]
    if isinstance(one, list) and isinstance(two, list):
        if len(one) != len(two):
            return [f"{where}: {len(one)} and {len(two)} entries"]
        pairs = zip(one, two, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in differences(a, b, f"{where}/{i}")]
    return [] if one == two else [where]


def kill_again_and_again(work: Path, kills: int, steps: int, model: str, seed: int) -> None:
    """Train once in peace and once with `kills` kills, and compare the ends. Every second kill hits a write."""
    draw = random.Random(seed)
    lines = [f"{i}: the king is {draw.choice(['dead', 'alive', 'gone'])}.\n" for i in range(350)]
    (work / "corpus.txt").write_text("".join(lines))
    assert ended(start(work / "whole", steps, model), time.monotonic() + 600, None)
    folder, state, done, hit, leftovers = work / "killed", {"step": 0, "best": float("inf")}, 0, 0, 0
    while done < kills:
        pid = start(folder, steps, model)
        if done % 5:  # else it is killed while it starts, perhaps
            wait_until_it_trains(pid, folder / f".{model}.lock")
        life = time.monotonic() + draw.uniform(0, 0.6)
        writing = folder / model if done % 2 else None
        too_short = "the run ended before it was killed often enough: more --steps"
        if writing:  # let it train a while first
            assert not ended(pid, life, None), too_short
            life = time.monotonic() + 2.0
        assert not ended(pid, life, writing), too_short
        time.sleep(draw.uniform(0, 0.003) if writing else 0)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += 1
        parts = len(list((folder / model).glob("*.part")))
        hit, leftovers = hit + bool(parts), leftovers + parts
        state = check_files(folder / model, state)
        print(f"kill {done}: step {state['step']}, best {state['best']:.4f}, {parts} unfinished files", flush=True)
    assert ended(start(folder, steps, model), time.monotonic() + 600, None)
    check_files(folder / model, state)
    assert not list((folder / model).glob("*.part"))
    for name in ("last.pt", "best.pt"):
        one, two = (torch.load(work / run / model / name) for run in ("whole", "killed"))
        for state in (one, two):
            state["training"]["config"].pop("data")
        assert differences(one, two) == []
    lines = [(work / run / model / "metrics.jsonl").read_text().splitlines() for run in ("whole", "killed")]
    assert [json.loads(line)["step"] for line in lines[0]] == [json.loads(line)["step"] for line in lines[1]]
    print(f"{model}: {done} kills, {hit} of them during a write; the end is bit for bit that of the run in peace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--model", choices=("llada", "gpt"), default="llada")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        kill_again_and_again(Path(work), args.kills, args.steps, args.model, args.seed)


if __name__ == "__main__":
    main()
