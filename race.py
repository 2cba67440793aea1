"""Trainings against each other: pairs that differ in one thing, and the loss a budget of seconds buys.

Every run is the real `train.py` in a process of its own, so start-up, compilation and memory count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from console import say
from optim import Muon

PAIRS = {  # what is compared -> the flags of A, the flags of B
    "rotary / vanilla": (["--arch", "rotary"], ["--arch", "vanilla"]),
    "Muon / AdamW": (["--optimizer", "muon"], ["--optimizer", "adamw"]),
    "compiled / eager": (["--compile"], ["--no-compile"]),
}
BUDGETS = (40, 165, 900)  # seconds on a machine of 100 GFLOP/s


@dataclass
class Finish:
    """How one training ended."""

    nats_per_char: float
    tokens_per_second: float
    peak_megabytes: float


def train(flags: list) -> Finish:
    """Run train.py with these flags to its end, silently. Raises OSError with its last words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, Path(__file__).parent / "train.py", *flags, "--out", folder]
        with open(Path(folder) / "log", "w+") as log:
            process = subprocess.Popen(list(map(str, arguments)), stderr=log, stdout=log)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                raise OSError(f"train.py {' '.join(map(str, flags))}: {log.read().strip().splitlines()[-1]}")
        summary = json.loads(next(Path(folder).glob("*/summary.json")).read_text())
    peak = usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    return Finish(summary["nats_per_char"], summary["tokens_per_second"], peak)


def compare(args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Pairs of trainings, A B A B: tokens/s, loss at equal time, peak memory."""
    rounds, minutes = (1, 0.2) if args.quick else (3, 0.7)
    common = ["--val-fraction", 0.1, "--minutes", minutes, *(["--data", args.data] if args.data else [])]
    yield "A / B", "model", "tokens/s A", "B", "ratio (spread)", "nats/char A", "B", "peak MB A", "B"
    for name, (a, b) in PAIRS.items():
        for model in ("gpt",) if args.quick else ("gpt", "llada"):
            flags = ["--model", model, *common]
            runs = [(train([*flags, *a, "--seed", i]), train([*flags, *b, "--seed", i])) for i in range(rounds)]
            ratios = [x.tokens_per_second / y.tokens_per_second for x, y in runs]
            yield name, model, *columns(runs, "tokens_per_second", ",.0f"), spread(ratios), \
                *columns(runs, "nats_per_char", ".3f"), *columns(runs, "peak_megabytes", ",.0f")  # fmt: skip


def columns(runs: list[tuple[Finish, Finish]], field: str, form: str) -> tuple[str, str]:
    """The medians of A and of B."""
    sides = zip(*runs, strict=True)
    return tuple(format(statistics.median(getattr(run, field) for run in side), form) for side in sides)


def spread(ratios: list[float]) -> str:
    """Median (smallest..largest)."""
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}..{max(ratios):.2f})"


def muon_steps() -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of torch.optim.Muon and one of ours, each over matrices like those of the laptop model."""
    shapes = [(288, 96), (96, 96), (384, 96), (96, 384)] * 4

    def optimizer(make: Callable) -> torch.optim.Optimizer:
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        return make(weights)

    return optimizer(torch.optim.Muon).step, optimizer(Muon).step


def budgets(args: argparse.Namespace, gigaflops: Callable[[], float]) -> Iterator[tuple[str, ...]]:
    """Loss on the whole validation set after 40 s, 165 s and 15 minutes of a 100 GFLOP/s machine; median over seeds.

    The machine is timed before and after each run; its seconds count by its speed. A run during which the speed changed
    by more than a fifth is discarded and repeated, three times at most; a seed without a valid run is left out.
    """
    yield "seconds", "model", "nats/char (median)", "all seeds", "wall s", "tokens/s", "peak MB"
    chosen = args.seconds or (BUDGETS[:1] if args.quick else BUDGETS)
    for seconds in chosen:
        for model in args.model or ("gpt", "llada"):
            seeds = 1 if args.quick or seconds > 300 else 3
            tries = (calibrated(seconds, model, seed, args.data, gigaflops) for seed in range(seeds))
            runs = [run for run in tries if run is not None]
            if not runs:
                yield f"{seconds:g}", model, "the machine was never quiet", "", "", "", ""
                continue
            losses = sorted(finish.nats_per_char for finish, _ in runs)
            yield f"{seconds:g}", model, f"{statistics.median(losses):.4f}", " ".join(f"{x:.4f}" for x in losses), \
                " ".join(f"{wall:.0f}" for _, wall in runs), \
                f"{statistics.median(f.tokens_per_second for f, _ in runs):,.0f}", \
                f"{max(f.peak_megabytes for f, _ in runs):,.0f}"  # fmt: skip


def calibrated(
    seconds: float, model: str, seed: int, data: str | None, gigaflops: Callable
) -> tuple[Finish, float] | None:
    """One run of `seconds` at 100 GFLOP/s, and the wall seconds that was; None if the machine never was quiet."""
    for _ in range(3):
        before = gigaflops()
        wall = seconds * 100 / before
        flags = ["--model", model, "--val-fraction", 0.1, "--minutes", wall / 60, "--seed", seed]
        finish = train([*flags, *(["--data", data] if data else [])])
        after = gigaflops()
        say(f"{seconds:g} s, {model}, seed {seed}: {finish.nats_per_char:.4f} nats/char; "
            f"{before:.0f} GFLOP/s before, {after:.0f} after")  # fmt: skip
        if max(before, after) <= 1.2 * min(before, after):
            return finish, wall
        say("discarded: the machine's speed changed by more than 20 % meanwhile")
    return None
