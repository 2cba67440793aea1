"""Benchmarks of sampling: likelihood, network evaluations and time of LLaDA's samplers, beside GPT with a cache.

A sampler is one SamplingConfig at temperature 1: it scores held-out text, and it writes the text that is timed.
Letters: N windows, T characters of a text, B texts at once.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from autoregressive import decode, exact_nll
from benchmarks.timing import Row, timed
from checkpoint import Checkpoint, load_checkpoint, newest_checkpoint
from data import load_same_corpus, validation_rows
from generation.infilling import mask_predictor
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
BOUND_REFERENCE = "random, 1 a step"
GPT_LABEL = "GPT, cached"


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


def bits(likelihood: Likelihood | None) -> str:
    """Bits/char, with the 95 % interval over windows."""
    if likelihood is None:
        return "-"
    low, high = likelihood.ci95
    return f"{likelihood.nats_per_char / math.log(2):.3f} +- {(high - low) / 2 / math.log(2):.3f}"


def difference(a: Likelihood | None, b: Likelihood | None) -> str:
    """Bits/char by which a is above b, with the paired 95 % interval: both are of the same windows."""
    if a is None or b is None or a is b:
        return "-"
    half = half_width95(a.window_nats - b.window_nats, a.characters)
    return f"{(a.nats_per_char - b.nats_per_char) / math.log(2):+.3f} +- {half / math.log(2):.3f}"


# ------------------------------------------------------------------------------------------------- writing
def write_with_llada(model: LLaDAModel, config: SamplingConfig, T: int, B: int) -> float:
    """Write B texts of T characters from nothing; their mean number of network evaluations."""
    predict, masked = mask_predictor(model), torch.full((B, T), MASK_ID)
    *_, step = reverse_process(predict, masked, MASK_ID, config, never=NEVER_WRITTEN, pad_token_id=PAD_ID)
    return float(step.evaluations.double().mean())


def write_with_gpt(model: GPT, T: int, B: int) -> float:
    """Write B texts of T characters from nothing with the cache; the number of network evaluations."""
    return float(sum(1 for _ in decode(model, [torch.tensor([START_ID])] * B, max_out_tokens=T)))


def time_writers(writers: dict[str, Callable[[], float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Call each writer once: its wall time in seconds, and its NFE."""
    seconds, nfe = {}, {}
    for name, writer in track(writers.items(), "time"):
        seconds[name], nfe[name] = timed(writer)
    return seconds, nfe


# ------------------------------------------------------------------------------------------------- samplers and GPT
def compare_samplers(out: str, n_windows: int, lengths: tuple[int, ...]) -> Iterator[Row]:
    """Table of `samplers` and GPT, on n_windows held-out windows of each length T.

    A length beyond LLaDA's context is cut to it; GPT has a row where the text fits in its context.
    Raises ValueError if there is no LLaDA under `out`.
    """
    llada = load_checkpoint(newest_checkpoint(out, "llada"))
    gpt, model, predict = comparable_gpt(out, llada), llada.model, mask_predictor(llada.model)
    first = next(iter(samplers(max(lengths))))
    yield (
        "T", "sampler", "NFE", "bits/char", "kind", f"minus {first} (exact)", f"minus {BOUND_REFERENCE} (upper bound)",
        *(f"ms, batch {B}" for B in BATCH_SIZES), f"times faster than {first}",
    )  # fmt: skip
    for T in sorted({min(T, model.config.block_size) for T in lengths}):
        windows, configs = held_out_windows(llada, T, n_windows), samplers(T)
        scores = {name: score(predict, windows, configs[name]) for name in track(configs, f"likelihood, T = {T}")}
        if gpt is not None and T <= gpt.model.config.block_size:
            scores[GPT_LABEL] = Likelihood.from_token_nats([exact_nll(gpt.model, windows, START_ID)])
        seconds = []  # for each batch size
        for B in BATCH_SIZES:
            writers = {name: partial(write_with_llada, model, config, T, B) for name, config in configs.items()}
            if GPT_LABEL in scores:
                writers[GPT_LABEL] = partial(write_with_gpt, gpt.model, T, B)
            write_with_llada(model, SamplingConfig(steps=1), T, B)  # the first call is slower: not counted
            times, nfe = time_writers(writers)
            seconds.append(times)
        for name, likelihood in scores.items():
            yield (
                str(T), name, f"{nfe[name]:.1f}", bits(likelihood), kind(likelihood),
                difference(likelihood, scores[first]), difference(likelihood, scores.get(BOUND_REFERENCE)),
                *(f"{1000 * times[name]:.0f}" for times in seconds),
                " ".join(f"{times[first] / times[name]:.1f}x" for times in seconds),
            )  # fmt: skip


def comparable_gpt(out: str, llada: Checkpoint) -> Checkpoint | None:
    """The newest GPT under `out`; None if it saw LLaDA's held-out text. As LLaDA here, it never writes [END]."""
    try:
        gpt = load_checkpoint(newest_checkpoint(out, "gpt"))
    except ValueError as error:
        say(f"no row for GPT: {error}")
        return None
    if gpt.corpus["sha256"] != llada.corpus["sha256"] or gpt.corpus["val_fraction"] < llada.corpus["val_fraction"]:
        say(f"no row for GPT: {gpt.path} may have been trained on the windows that are scored")
        return None
    gpt.model.never[END_ID] = True
    return gpt
