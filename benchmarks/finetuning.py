"""Benchmark of fine-tuning: all weights against low-rank adapters, on another text than the base was trained on."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Row
from benchmarks.training import MODELS, run_train

NEW_TEXT = "pydoc"  # the documentation that ships with Python: other words, and characters the base never saw
RANKS = (None, 4, 16, 64)  # of the adapters; None: all weights are trained


@dataclass(frozen=True)
class Sizes:
    """The network and the lengths of both trainings."""

    network: tuple[str, ...] = ("--n-layer=4", "--n-head=2", "--n-embd=96", "--block-size=256")
    base_steps: int = 1500
    steps: int = 500
    ranks: tuple[int | None, ...] = RANKS


FULL = Sizes()
QUICK = Sizes(("--n-layer=2", "--n-head=2", "--n-embd=32", "--block-size=64", "--ngram-rows=1009"), 100, 30, (None, 4))


def train_base(folder: Path, model: str, sizes: Sizes, data: str | None) -> Path:
    """Train a model from scratch; its checkpoint."""
    flags = (f"--model={model}", *MODELS[model], f"--steps={sizes.base_steps}", f"--data={data or 'tinyshakespeare'}")
    run_train(folder / "base", *flags, *sizes.network)
    return folder / "base" / model / "best.pt"


def fine_tune(folder: Path, model: str, base: Path, sizes: Sizes, rank: int | None) -> dict:
    """Continue from the base on NEW_TEXT; the run's summary."""
    flags = [f"--model={model}", f"--init-from={base}", f"--data={NEW_TEXT}", f"--steps={sizes.steps}"]
    return run_train(folder / "tuned", *flags, *([f"--lora-rank={rank}"] if rank else []))[0]


def compare_fine_tuning(quick: bool, data: str | None) -> Iterator[Row]:
    """Table of full fine-tuning and adapters of several ranks, at equal steps, for both models.

    Losses are in nats/char on the whole validation parts. Seconds are those of the steps alone.
    """
    sizes = QUICK if quick else FULL
    losses = ("new before", "new after", "old before", "old after")
    yield "model", "trained", "parameters trained", "share, %", *losses, "kind", "seconds"
    for model in MODELS:
        with tempfile.TemporaryDirectory() as name:
            base = train_base(Path(name), model, sizes, data)
            for rank in sizes.ranks:
                run = fine_tune(Path(name), model, base, sizes, rank)
                change = run["fine_tuning"]
                yield (
                    model,
                    f"rank {rank}" if rank else "all weights",
                    f"{run['params_trainable']:,}",
                    f"{100 * run['params_trainable'] / run['params']:.2f}",
                    *(f"{change[key.replace(' ', '_')]:.4f}" for key in losses),
                    "upper bound" if run["is_bound"] else "exact",
                    f"{run['tokens'] / run['tokens_per_second']:.0f}",
                )
