"""Benchmark of repeated data: both models on a text that is so small that they pass over it many times.

Every run is annealed over its own length. So a model that is stopped early is a shorter run.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import Row, check_picture
from benchmarks.training import MODELS, run_train
from data import load_corpus
from evaluation.likelihoods import mean_and_interval
from evaluation.plots import COLOURS, NAMES, STYLE, add_legend
from utils.console import say
from utils.errors import ArgumentError
from utils.files import atomic_write, sha256_of

VAL_FRACTION = 0.1  # of the corpus
CALIBRATION = 0.02  # of the text to train on
CURVE_POINTS = 25  # validations in a long run, about; a short one is validated after each epoch
REGULARIZATION = {  # the best that was found
    "gpt": ("--dropout=0.5", "--ngram-dropout=0.5", "--weight-decay=1", "--ngram-lr=0.015"),
    "llada": ("--dropout=0", "--ngram-dropout=0", "--weight-decay=0", "--ngram-lr=0.75"),
}


@dataclass(frozen=True)
class Sizes:
    """The text to train on, the network, and the lengths of the runs."""

    characters: int = 100_000
    network: tuple[str, ...] = ("--n-layer=4", "--n-head=2", "--n-embd=64", "--ngram-rows=65521")
    block_size: int = 256
    batch_size: int = 8
    epochs: tuple[tuple[int, ...], tuple[int, ...]] = ((4, 8, 16), (25, 100))  # of GPT, of LLaDA
    seeds: int = 3


FULL = Sizes()
QUICK = Sizes(4000, ("--n-layer=1", "--n-head=2", "--n-embd=16", "--ngram-rows=101"), 64, 8, ((1, 4), (4,)), 1)


@dataclass(frozen=True)
class Training:
    """What a training left."""

    history: list[dict]  # the lines of metrics.jsonl: losses of a sample of the validation part
    summary: dict  # with the loss of the whole


Runs = dict[tuple[str, int], list[Training]]  # (model, epochs) -> its trainings, one for each seed


def write_text(path: Path, data: str | None, characters: int) -> float:
    """Write the first `characters` of the corpus, then its validation part; the share of the latter in the file."""
    corpus = load_corpus(data)
    train, val = (corpus.tokenizer.decode(part.numpy()) for part in corpus.split(VAL_FRACTION))
    if len(train) < characters:
        raise ArgumentError("data", f"{corpus.name} has {len(train)} characters to train on, {characters} are needed")
    path.write_bytes((train[:characters] + val).encode())
    return len(val) / (characters + len(val))


def flags_of(sizes: Sizes, model: str, epochs: int, seed: int) -> tuple[str, ...]:
    """The flags of train.py for one training, but for those of the text."""
    trained = sizes.characters - int(CALIBRATION * sizes.characters)
    steps_per_epoch = trained / (sizes.batch_size * sizes.block_size)
    eval_every = max(1, round(max(1, epochs // CURVE_POINTS) * steps_per_epoch))
    return (
        f"--model={model}", f"--seed={seed}", f"--steps={round(epochs * steps_per_epoch)}",
        f"--eval-every={eval_every}", "--preset=laptop", *MODELS[model], *sizes.network,
        f"--block-size={sizes.block_size}", f"--batch-size={sizes.batch_size}",
        f"--calibration={CALIBRATION}", "--short-share=0", *REGULARIZATION[model],
    )  # fmt: skip


def train_once(file: Path, text: Path, val_fraction: float, flags: tuple[str, ...]) -> Training:
    """Train, and write the result to `file`; or read what was written there when these flags ended before."""
    settings = {"flags": list(flags), "text": sha256_of(text)}
    if file.exists():
        known = json.loads(file.read_text())
        if known["settings"] != settings:
            raise ArgumentError("out", f"{file} was trained on another text or with other flags: choose another folder")
        return Training(known["history"], known["summary"])
    with tempfile.TemporaryDirectory() as folder:
        summary, _ = run_train(folder, *flags, f"--data={text}", f"--val-fraction={val_fraction!r}")
        [metrics] = Path(folder).glob("*/metrics.jsonl")
        history = [json.loads(line) for line in metrics.read_text().splitlines()]
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps({"settings": settings, "history": history, "summary": summary}))
    return Training(history, summary)


def train_all(folder: Path, data: str | None, sizes: Sizes) -> Runs:
    """All trainings, seed after seed. Those that `folder` has the results of are not repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    text, runs = folder / "text.txt", {}
    val_fraction = write_text(text, data, sizes.characters)
    for seed in range(sizes.seeds):
        for model, lengths in zip(MODELS, sizes.epochs, strict=True):
            for epochs in lengths:
                file, flags = folder / f"{model}-{epochs}-{seed}.json", flags_of(sizes, model, epochs, seed)
                training = train_once(file, text, val_fraction, flags)
                say(f"{model}, {epochs} epochs, seed {seed}: {training.summary['nats_per_char']:.4f} nats/char")
                runs.setdefault((model, epochs), []).append(training)
    return runs


def mean_and_range(losses: Sequence[float]) -> tuple[float, float, float]:
    """The mean, the smallest and the largest of several seeds."""
    return statistics.mean(losses), min(losses), max(losses)


def mean_curve(trainings: list[Training]) -> list[tuple[float, float, float, float]]:
    """(epochs, mean loss, smallest, largest) of each validation, over seeds, before calibration."""
    epochs_per_token = trainings[0].summary["epochs"] / trainings[0].summary["tokens"]
    validations = zip(*(training.history for training in trainings), strict=True)
    losses = [(records[0]["tokens"], [record["val_loss"] for record in records]) for records in validations]
    return [(tokens * epochs_per_token, *mean_and_range(values)) for tokens, values in losses]


def final_losses(trainings: list[Training]) -> list[float]:
    """Of each seed, the loss of the calibrated model on the whole validation part."""
    return [training.summary["nats_per_char"] for training in trainings]


def kind(trainings: list[Training]) -> str:
    """What the losses are."""
    return "upper bound" if trainings[0].summary["is_bound"] else "exact"


def with_interval(values: list[float], sign: str = "") -> str:
    """The mean over seeds and its 95 % interval by Student's t."""
    mean, ci95 = mean_and_interval(torch.tensor(values, dtype=torch.float64))
    return f"{mean:{sign}.4f}" + (" ({:{s}.4f}..{:{s}.4f})".format(*ci95, s=sign) if ci95 else "")


def compare_epochs(quick: bool, data: str | None, out: Path | None, picture: Path | None) -> Iterator[Row]:
    """Table of runs of several lengths, and their picture. `out`: a folder of results, which can be continued."""
    check_picture(picture)
    with tempfile.TemporaryDirectory() as temporary:
        runs = train_all(out or Path(temporary), data, QUICK if quick else FULL)
    of_gpt = [final_losses(trainings) for (model, _), trainings in runs.items() if model == "gpt"]
    best = min(of_gpt, key=statistics.mean)
    sample = ("sample: best (epochs)", "sample: end", "sample: calibrated")
    yield "model", "epochs", "seeds", *sample, "whole: calibrated", "all seeds", "kind", "minus the best GPT"
    for (model, _), trainings in sorted(runs.items()):
        curve, losses = mean_curve(trainings), final_losses(trainings)
        yield (
            model,
            f"{trainings[0].summary['epochs']:.1f}",
            str(len(trainings)),
            "{1:.4f} ({0:.1f})".format(*min(curve, key=lambda point: point[1])),
            f"{curve[-1][1]:.4f}",
            f"{statistics.mean(training.history[-1]['calibrated_val_loss'] for training in trainings):.4f}",
            with_interval(losses),
            " ".join(f"{loss:.4f}" for loss in losses),
            kind(trainings),
            "-" if losses == best else with_interval([a - b for a, b in zip(losses, best, strict=True)], "+"),
        )
    if picture:
        draw(runs, picture)


def draw(runs: Runs, picture: Path) -> None:
    """Left: losses in the course of the longest runs. Right: final losses of runs of all lengths. Bands: over seeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stars = {"marker": "*", "linestyle": "none", "markersize": 12, "markeredgecolor": "black", "color": COLOURS["gpt"]}
    with rc_context(STYLE | {"figure.dpi": 96}):
        figure = Figure(figsize=(8, 4.4))
        left, right = figure.subplots(1, 2, sharey=True)
        for model in MODELS:
            lengths = sorted(epochs for name, epochs in runs if name == model)
            style, label = "--" if model == "gpt" else "-", f"{NAMES[model]}, {kind(runs[model, lengths[0]])}"
            during = mean_curve(runs[model, lengths[-1]])
            ends = [(x, *mean_and_range(final_losses(runs[model, x]))) for x in lengths]
            for axes, points, marker in ((left, during, ""), (right, ends, "o")):
                x, mean, low, high = zip(*points, strict=True)
                axes.plot(x, mean, style + marker, color=COLOURS[model], markersize=4, label=label)
                axes.fill_between(x, low, high, color=COLOURS[model], alpha=0.25, linewidth=0)
                if model == "gpt":
                    axes.plot(*min(points, key=lambda point: point[1])[:2], **stars, label="GPT stopped early")
        left.set_title("during the longest runs, not calibrated;\na sample of the validation part", fontsize=10)
        right.set_title("end of runs of several lengths, calibrated;\nthe whole validation part", fontsize=10)
        left.set_ylabel("loss (nats/char): mean and range over seeds")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set(xlabel="epochs over the training text")
            axes.xaxis.set_major_formatter("{x:g}")
        add_legend(figure, right, columns=3)
        figure.savefig(picture)
