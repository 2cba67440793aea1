"""Benchmarks of training: pairs that differ in one flag, and the loss that a budget of seconds reaches.

Every training runs train.py in a process of its own, so start-up, compilation and memory count.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Pairs, Row, gigaflops, is_steady
from utils.console import say

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
COMPARISONS = (  # the flag of A, the flag of B
    ("--arch=rotary", "--arch=vanilla"),
    ("--optimizer=muon", "--optimizer=adamw"),
    ("--compile", "--no-compile"),
)
BUDGETS = (40.0, 165.0, 900.0)  # seconds on a machine of 100 GFLOP/s
MODELS = {"gpt": (), "llada": ("--sweep-share=0",)}  # LLaDA is trained for the loss that is compared, its bound
RESULT_COLUMNS = ("nats/char", "kind", "all seeds", "tokens/s", "wall s", "peak MB")


@dataclass(frozen=True)
class TrainingResult:
    """How a training of `seconds` of wall time ended."""

    seconds: float
    nats_per_char: float  # on the validation part
    is_bound: bool
    tokens_per_second: float
    peak_megabytes: float  # resident memory


def run_train(out: str | Path, *flags: str) -> tuple[dict, float]:
    """Run train.py to its end in a process of its own, silently. Its runs are under `out`.

    Returns the run's summary, see `trainer.summarize`, and the process's peak resident memory in MB. Raises OSError
    with the last line of its output if it fails.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, TRAIN, *flags, "--out", out], stderr=log, stdout=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise OSError(f"train.py {' '.join(flags)}: {log.read().strip().splitlines()[-1]}")
    finished = list(Path(out).glob("*/summary.json"))
    if not finished:
        raise OSError(f"train.py {' '.join(flags)}: was stopped before its end")
    newest = max(finished, key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text()), usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def run_training(model: str, seconds: float, seed: int, data: str | None, *flags: str) -> TrainingResult:
    """Train for `seconds` and validate on the last tenth of the text. Raises OSError as `run_train` does."""
    length = f"--minutes={seconds / 60}"
    flags = (f"--model={model}", *MODELS[model], length, f"--seed={seed}", "--val-fraction=0.1", *flags)
    flags = flags if data is None else (*flags, f"--data={data}")
    with tempfile.TemporaryDirectory() as folder:
        summary, peak = run_train(folder, *flags)
    return TrainingResult(seconds, summary["nats_per_char"], summary["is_bound"], summary["tokens_per_second"], peak)


def result_cells(results: list[TrainingResult]) -> Row:
    """The cells of RESULT_COLUMNS: medians over seeds; the kind of the loss is exact (GPT) or upper bound (LLaDA)."""
    losses = sorted(result.nats_per_char for result in results)
    return (
        f"{statistics.median(losses):.4f}",
        "upper bound" if results[0].is_bound else "exact",
        " ".join(f"{loss:.4f}" for loss in losses),
        f"{statistics.median(result.tokens_per_second for result in results):,.0f}",
        f"{statistics.median(result.seconds for result in results):.0f}",
        f"{max(result.peak_megabytes for result in results):,.0f}",
    )


def compare_trainings(quick: bool, data: str | None) -> Iterator[Row]:
    """Table of COMPARISONS, for GPT and (not if quick) for LLaDA: A, and B in the row below."""
    rounds, seconds = (1, 12) if quick else (3, 42)
    yield "flag", "model", *RESULT_COLUMNS, "ratio"
    for flag_a, flag_b in COMPARISONS:
        for model in ("gpt",) if quick else MODELS:
            a, b = [], []
            for seed in range(rounds):
                a.append(run_training(model, seconds, seed, data, flag_a))
                b.append(run_training(model, seconds, seed, data, flag_b))
            speeds = Pairs([result.tokens_per_second for result in a], [result.tokens_per_second for result in b])
            yield flag_a, model, *result_cells(a), str(speeds)
            yield flag_b, model, *result_cells(b), ""


def loss_by_budget(
    quick: bool, data: str | None, budgets: list[float] | None = None, models: list[str] | None = None
) -> Iterator[Row]:
    """Table of the validation loss after each budget (seconds at 100 GFLOP/s), median over seeds."""
    yield "seconds", "model", *RESULT_COLUMNS
    for budget in budgets or (BUDGETS[:1] if quick else BUDGETS):
        for model in models or MODELS:
            seeds = 1 if quick or budget > 300 else 3
            attempts = [train_for_budget(budget, model, seed, data) for seed in range(seeds)]
            results = [result for result in attempts if result is not None]
            cells = result_cells(results) if results else ("the machine was never quiet", *[""] * 5)
            yield f"{budget:g}", model, *cells


def train_for_budget(budget: float, model: str, seed: int, data: str | None) -> TrainingResult | None:
    """One training of `budget` seconds at 100 GFLOP/s.

    Repeated if the machine's speed changed meanwhile; None after three such attempts.
    """
    for _ in range(3):
        before = gigaflops()
        result = run_training(model, budget * 100 / before, seed, data)
        after = gigaflops()
        say(f"{budget:g} s, {model}, seed {seed}: {result.nats_per_char:.4f} nats/char at {before:.0f} GFLOP/s")
        if is_steady(before, after):
            return result
        say(f"discarded: the machine made {after:.0f} GFLOP/s at the end")
    return None
