"""Benchmarks of sampling: likelihood, network evaluations and time of LLaDA's samplers, beside GPTs with a cache.

A sampler is one SamplingConfig at temperature 1: it scores held-out text, and it writes the text that is timed.
Letters: N windows, T characters of a text, B texts at once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from autoregressive import decode, equal_streams, exact_nll
from benchmarks.timing import Row, check_picture, timed
from checkpoint import Checkpoint, load_checkpoint, newest_checkpoint
from data import load_same_corpus, validation_rows
from evaluation.plots import COLOURS, MARKERS, OTHERS, STYLE, add_legend
from generation.infilling import mask_predictor
from generation.streams import write_streams
from likelihood import Likelihood, Predict, half_width95, policy_likelihood
from model import GPT, LLaDAModel
from sampler import SamplingConfig, reverse_process
from tokenizer import END_ID, MASK_ID, NEVER_WRITTEN, PAD_ID, START_ID
from unmasking import random_positions
from utils.console import say, track

BATCH_SIZES = (1, 16)
TOKENS_A_STEP = {  # order -> how many tokens are revealed at each step, by one sampler each
    "left": (1,),
    "random": (1, 8, 16),
    "confidence": (1, 4, 16),
    "drawn_confidence": (1, 4, 16),
    "sweep": (4, 8, 16, 32),
    "strided": (8, 16, 32),
}
ADAPTIVE = {
    "confidence, threshold 0.9": SamplingConfig(order="confidence", threshold=0.9, temperature=1.0),
    "confidence, threshold 0.6": SamplingConfig(order="confidence", threshold=0.6, temperature=1.0),
    "confidence, factor 0.5": SamplingConfig(order="confidence", factor=0.5, temperature=1.0),
    "entropy, entropy bound 0.2": SamplingConfig(order="entropy", entropy_bound=0.2, temperature=1.0),
}
STREAMS = (1, 2, 4, 8, 16)  # in which the first GPT with streams writes, besides as it was trained
BOUND_REFERENCE = "random, 1 a step"


# ------------------------------------------------------------------------------------------------- samplers
def samplers(T: int) -> dict[str, SamplingConfig]:
    """Orders, steps and adaptive rules for texts of T characters. The first is the exact reference for the others."""
    configs = {
        f"{order}, {n} a step": SamplingConfig(steps=math.ceil(T / n), order=order, temperature=1.0)
        for order, counts in TOKENS_A_STEP.items()
        for n in counts
    }
    return configs | ADAPTIVE


# ------------------------------------------------------------------------------------------------- likelihood
def held_out_windows(checkpoint: Checkpoint, T: int, n_windows: int) -> Tensor:
    """(N, T): evenly spaced windows of the text that the model was not trained on; n_windows, or all there are."""
    corpus = load_same_corpus(checkpoint.corpus, "window", checkpoint.tokenizer)
    windows = validation_rows(corpus.split(checkpoint.corpus["val_fraction"])[1], checkpoint.tokenizer, T)[0].tokens
    return windows[torch.linspace(0, len(windows) - 1, min(n_windows, len(windows))).long()]


def score(predict: Predict, windows: Tensor, config: SamplingConfig, mask_token_id: int = MASK_ID) -> Likelihood | None:
    """Likelihood of windows (N, T) under a sampler; None if it has neither a likelihood nor a bound.

    Exact if the positions follow from what is visible. In random order -log p(window | order), with one order drawn for
    each window: an upper bound in expectation over orders (Jensen).
    """
    if config.has_exact_likelihood:
        return policy_likelihood(predict, windows, config, mask_token_id)[0]
    if config.order == "random":
        policy = random_positions(config, torch.Generator().manual_seed(0))
        return policy_likelihood(predict, windows, policy, mask_token_id, is_bound=True)[0]
    return None


def kind(likelihood: Likelihood | None) -> str:
    """The cell that says what a figure is."""
    if likelihood is None:
        return "-"
    return "upper bound" if likelihood.is_bound else "exact"


def nats(likelihood: Likelihood | None) -> str:
    """nats/char, with the 95 % interval over windows."""
    if likelihood is None:
        return "-"
    low, high = likelihood.ci95
    return f"{likelihood.nats_per_char:.3f} +- {(high - low) / 2:.3f}"


def difference(a: Likelihood | None, b: Likelihood | None) -> str:
    """nats/char by which a is above b, with the paired 95 % interval: both are of the same windows."""
    if a is None or b is None or a is b:
        return "-"
    half = half_width95(a.window_nats - b.window_nats, a.characters)
    return f"{a.nats_per_char - b.nats_per_char:+.3f} +- {half:.3f}"


# ------------------------------------------------------------------------------------------------- writing
def write_with_llada(model: LLaDAModel, config: SamplingConfig, T: int, B: int) -> float:
    """Write B texts of T characters from nothing; their mean number of network evaluations."""
    predict, masked = mask_predictor(model), torch.full((B, T), MASK_ID)
    *_, step = reverse_process(predict, masked, MASK_ID, config, never=NEVER_WRITTEN, pad_token_id=PAD_ID)
    return float(step.evaluations.double().mean())


def write_with_gpt(model: GPT, streams: int, T: int, B: int) -> float:
    """Write B texts of T characters from nothing with the cache; the number of network evaluations."""
    if streams != model.config.parallel:
        model.set_streams(streams)
    if model.fills_masks:
        return float(sum(1 for _ in write_streams(model, [torch.full((T,), MASK_ID)] * B)))
    return float(sum(1 for _ in decode(model, [torch.tensor([START_ID])] * B, max_out_tokens=T)))


def time_writers(writers: dict[str, Callable[[], float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Call each writer once: its wall time in seconds, and its NFE."""
    seconds, nfe = {}, {}
    for name, writer in track(writers.items(), "time"):
        seconds[name], nfe[name] = timed(writer)
    return seconds, nfe


# ------------------------------------------------------------------------------------------------- samplers and GPTs
@dataclass(frozen=True)
class Measured:
    """A sampler's figures for texts of T characters."""

    T: int
    name: str
    likelihood: Likelihood | None
    nfe: float
    seconds: list[float]  # for each of BATCH_SIZES


def compare_samplers(
    out: str, n_windows: int, lengths: tuple[int, ...], also: Sequence[str] = (), picture: Path | None = None
) -> Iterator[Row]:
    """Table of `samplers` and GPTs, on n_windows held-out windows of each length T; and a picture of the longest.

    The GPTs are the newest ones under `out` and under the folders of `also`. A length beyond LLaDA's context is cut to
    it; GPTs have a row where the text fits in their context. Raises ValueError if there is no LLaDA under `out`.
    """
    check_picture(picture)
    llada = load_checkpoint(newest_checkpoint(out, "llada"))
    gpts = comparable_gpts([out, *also], llada)
    first = next(iter(samplers(max(lengths))))
    yield (
        "T", "sampler", "NFE", "nats/char", "kind", f"minus {first} (exact)", f"minus {BOUND_REFERENCE} (upper bound)",
        *(f"ms, batch {B}" for B in BATCH_SIZES), f"times faster than {first}",
    )  # fmt: skip
    for T in sorted({min(T, llada.model.config.block_size) for T in lengths}):
        rows = {row.name: row for row in measure(llada, gpts, T, n_windows)}
        reference, bound = rows[first], rows[BOUND_REFERENCE].likelihood
        for row in rows.values():
            yield (
                str(T), row.name, f"{row.nfe:.1f}", nats(row.likelihood), kind(row.likelihood),
                difference(row.likelihood, reference.likelihood), difference(row.likelihood, bound),
                *(f"{1000 * seconds:.0f}" for seconds in row.seconds),
                " ".join(f"{a / b:.1f}x" for a, b in zip(reference.seconds, row.seconds, strict=True)),
            )  # fmt: skip
    if picture is not None:
        draw_frontier(list(rows.values()), picture)


def measure(llada: Checkpoint, gpts: dict[str, tuple[GPT, int]], T: int, n_windows: int) -> list[Measured]:
    """The figures of all samplers and GPTs for texts of T characters."""
    model, predict = llada.model, mask_predictor(llada.model)
    windows, configs = held_out_windows(llada, T, n_windows), samplers(T)
    scores = {name: score(predict, windows, configs[name]) for name in track(configs, f"likelihood, T = {T}")}
    gpts = {name: (gpt, n) for name, (gpt, n) in gpts.items() if 2 * n <= T <= gpt.config.block_size}
    for name, (gpt, n) in gpts.items():
        nll = exact_nll(gpt, windows, START_ID, streams=equal_streams(T, n))
        scores[name] = Likelihood.from_token_nats([nll])
    seconds = []  # for each batch size
    for B in BATCH_SIZES:
        writers = {name: partial(write_with_llada, model, config, T, B) for name, config in configs.items()}
        writers |= {name: partial(write_with_gpt, gpt, n, T, B) for name, (gpt, n) in gpts.items()}
        write_with_llada(model, SamplingConfig(steps=1), T, B)  # the first calls are slower: not counted
        for gpt, n in gpts.values():
            write_with_gpt(gpt, n, min(T, 32), B)
        times, nfe = time_writers(writers)
        seconds.append(times)
    return [Measured(T, name, scores[name], nfe[name], [times[name] for times in seconds]) for name in scores]


def comparable_gpts(folders: Sequence[str], llada: Checkpoint) -> dict[str, tuple[GPT, int]]:
    """The newest GPT under each folder and its number of streams, by the names in the table.

    One that saw LLaDA's held-out text is left out. The first one with streams also writes in other numbers of streams.
    As LLaDA here, they never write [END].
    """
    gpts = {}
    for folder in folders:
        try:
            gpt = load_checkpoint(newest_checkpoint(folder, "gpt"))
        except ValueError as error:
            say(f"no row for GPT: {error}")
            continue
        if gpt.corpus["sha256"] != llada.corpus["sha256"] or gpt.corpus["val_fraction"] < llada.corpus["val_fraction"]:
            say(f"no row for GPT: {gpt.path} may have been trained on the windows that are scored")
            continue
        gpt.model.never[END_ID] = True
        P = gpt.model.config.parallel
        if P > 1 and all(n == 1 for _, n in gpts.values()):
            gpts |= {f"GPT trained in {P}, {n} streams": (gpt.model, n) for n in STREAMS if n != P}
        gpts["GPT, 1 stream" if P == 1 else f"GPT, {P} streams"] = gpt.model, P
    return gpts


# ------------------------------------------------------------------------------------------------- the picture
def family(name: str) -> str:
    """The samplers that one line of the picture joins.

    >>> family("sweep, 8 a step"), family("confidence, threshold 0.9"), family("GPT trained in 8, 4 streams")
    ('sweep order', 'confidence order, adaptive', 'GPT trained in 8 streams, written in n')
    """
    order, _, rest = name.partition(", ")
    if order.startswith("GPT"):
        return "GPT trained and written in n streams" if order == "GPT" else f"{order} streams, written in n"
    return f"{order} order" + ("" if rest.endswith("a step") else ", adaptive")


def draw_frontier(rows: list[Measured], path: Path) -> None:
    """nats/char against characters/s at each batch size and against network evaluations. Bounds are hollow."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    families: dict[str, list[Measured]] = {}
    for row in rows:
        if row.likelihood is not None:
            families.setdefault(family(row.name), []).append(row)
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6))
        panels = figure.subplots(1, len(BATCH_SIZES) + 1, sharey=True)
        for i, (axes, B) in enumerate(zip(panels, BATCH_SIZES, strict=False)):
            draw_families(axes, families, [[row.T * B / row.seconds[i] for row in mine] for mine in families.values()])
            axes.set_xlabel(f"characters/s, {B} at once" if B > 1 else "characters/s, one text")
        draw_families(panels[-1], families, [[row.nfe for row in mine] for mine in families.values()])
        panels[-1].set_xlabel(f"network evaluations for {rows[0].T} characters")
        panels[0].set_ylabel("loss (nats/char)")
        add_legend(figure, panels[0], columns=3)
        figure.savefig(path, dpi=90)


def draw_families(axes, families: dict[str, list[Measured]], xs: list[list[float]]) -> None:
    """A line for each family through its points; GPT's carry their numbers of streams."""
    for i, ((name, rows), x) in enumerate(zip(families.items(), xs, strict=True)):
        y, is_gpt, is_bound = [r.likelihood.nats_per_char for r in rows], "GPT" in name, rows[0].likelihood.is_bound
        colours = [COLOURS["llada"], *OTHERS]
        colour = COLOURS["gpt"] if is_gpt else colours[i % len(colours)]
        axes.plot(
            *zip(*sorted(zip(x, y, strict=True)), strict=True), marker=MARKERS[i % len(MARKERS)], color=colour,
            markersize=5, markerfacecolor="white" if is_bound else colour, linewidth=2 if is_gpt else 1,
            linestyle=":" if name.startswith("GPT trained in") else "-",
            label=f"{name} ({kind(rows[0].likelihood)})",
        )  # fmt: skip
        for row, *point in zip(rows, x, y, strict=True):
            if is_gpt:
                streams = row.name.split()[-2]
                axes.annotate(streams, point, (0, -12), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
