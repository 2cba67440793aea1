"""What a page costs: network evaluations, wall time and exact likelihood of LLaDA's policies, beside GPT with a cache.

`python bench.py sample`, `blocks` and `crossing` print what is measured here.

Letters: T characters, B texts at once.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from autoregressive import decode, exact_nll
from checkpoint import Checkpoint, find_checkpoints, load_checkpoint, newest_checkpoint
from console import track
from data import load_corpus, validation_windows
from likelihood import Likelihood, Policy, Predict, policy_likelihood, standard_error
from model import GPT, GPTConfig, LLaDAConfig, LLaDAModel
from sampler import reverse_process
from templates import STRIDE, mask_predictor
from throughput import compiled_copy
from tokenizer import END_ID, MASK_ID, START_ID
from unmasking import UnmaskingPolicy

Seconds = Callable[[Callable[[], object]], float]  # wall time of a call
BATCHES = (1, 16)


# ------------------------------------------------------------------------------------------------- quality and cost
def policies(T: int) -> dict[str, UnmaskingPolicy]:
    """The policies compared, by what the table calls them; the first is what the others are measured against."""
    return {
        "random, one at a time": UnmaskingPolicy(T, "random"),
        "left to right, one at a time": UnmaskingPolicy(T, "left"),
        "most confident, one at a time": UnmaskingPolicy(T, "confidence"),
        **{f"sweep, {T // K} at a time": UnmaskingPolicy(K, "sweep") for K in (T // 4, T // 8, T // 16, T // 32)},
        **{f"strided, {T // K} at a time": UnmaskingPolicy(K, "strided") for K in (T // 8, T // 16, T // 32)},
        **{f"random, {T // K} at a time": UnmaskingPolicy(K, "random") for K in (T // 8, T // 16)},
        **{f"most confident, {T // K} at a time": UnmaskingPolicy(K, "confidence") for K in (T // 4, T // 16)},
        **{f"threshold {p}": UnmaskingPolicy(threshold=p) for p in (0.9, 0.6)},
        "factor 0.5": UnmaskingPolicy(factor=0.5),
        "entropy bound 0.2": UnmaskingPolicy(order="entropy", entropy_bound=0.2),
    }


def forced(policy: UnmaskingPolicy, generator: torch.Generator) -> Policy:
    """The policy as `policy_likelihood` wants it; a random order is drawn, its likelihood the mean over orders."""
    if policy.order != "random":
        return policy

    def choose(logits: Tensor, masked: Tensor, step: int) -> Tensor:
        n = masked.shape[1] // policy.steps
        scores = torch.rand(masked.shape, generator=generator).masked_fill(~masked, -1.0)
        return torch.zeros_like(masked).scatter(1, scores.topk(n).indices, True)

    return choose


def frontier(seconds: Seconds, windows: int, rounds: int, lengths: tuple[int, ...]) -> Iterator[tuple]:
    """Rows of the table: policy, evaluations, bits/char and its distance from the first policy, wall time.

    Quality on `windows` windows of 128 characters of the validation text, or a quarter as many at each doubling: one at
    a time costs the square of the length. Teacher-forced (LLaDA and GPT: the same windows). Times are
    medians of `rounds` rounds, in each of which every policy writes once; the ratio is of medians.
    """
    checkpoint = load_checkpoint(newest_checkpoint("out", "llada"))
    rival = next((load_checkpoint(path) for path in find_checkpoints("out") if path.parent.name == "gpt"), None)
    times_by_batch = [f"ms, batch {B}" for B in BATCHES]
    yield ("T", "policy", "evaluations", "bits/char", "difference", *times_by_batch, "times faster")
    for T in (T for T in lengths if T <= checkpoint.model.config.block_size):
        texts = held_out(checkpoint, T, max(1, windows * 128**2 // T**2))
        table = policies(T)
        exact = {name: price(checkpoint.model, texts, policy) for name, policy in track(table.items(), f"quality, {T}")}
        times = {B: time_policies(seconds, checkpoint.model, table, T, B, rounds) for B in BATCHES}
        reference = next(iter(table))
        for name in table:
            likelihood, nfe = exact[name]
            ms = [1000 * statistics.median(times[B][name]) for B in BATCHES]
            faster = [statistics.median(times[B][reference]) * 1000 / t for B, t in zip(BATCHES, ms, strict=True)]
            yield (
                str(T), name, f"{nfe:.1f}", f"{bits(likelihood):.3f}", difference(likelihood, exact[reference][0]),
                *(f"{t:.0f}" for t in ms), " ".join(f"{x:.1f}x" for x in faster),
            )  # fmt: skip
        if rival is not None and T <= rival.model.config.block_size:
            yield from gpt_row(seconds, rival, texts, exact[reference][0], rounds)


def held_out(checkpoint: Checkpoint, T: int, windows: int) -> Tensor:
    """(N, T): evenly spaced windows of the text the model was not trained on."""
    _, ids = load_corpus(checkpoint.corpus["name"]).split(checkpoint.corpus["val_fraction"])
    texts = validation_windows(ids, T, checkpoint.tokenizer)[0]
    return texts[torch.linspace(0, len(texts) - 1, min(windows, len(texts))).long()]


def price(model: Predict, texts: Tensor, policy: UnmaskingPolicy) -> tuple[Likelihood, float]:
    """Exact likelihood of texts (N, T) under the policy, and its mean number of evaluations."""
    likelihood, nfe = policy_likelihood(model, texts, forced(policy, torch.Generator().manual_seed(0)), MASK_ID)
    return likelihood, float(nfe.double().mean())


def bits(likelihood: Likelihood) -> float:
    """Bits/char."""
    return likelihood.nats_per_char / math.log(2)


def difference(a: Likelihood, b: Likelihood) -> str:
    """Bits/char by which a is above b, with its 95 % interval: window by window, they are the same texts."""
    half = 1.96 * standard_error(a.window_nats - b.window_nats, a.lengths)
    return f"{bits(a) - bits(b):+.3f} +- {half / math.log(2):.3f}"


def time_policies(
    seconds: Seconds, model: LLaDAModel, table: dict[str, UnmaskingPolicy], T: int, B: int, rounds: int
) -> dict[str, list[float]]:
    """Wall times of writing B texts of T characters, each policy once a round, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in table}
    write_texts(model, UnmaskingPolicy(8, "strided"), T, B)
    for _ in range(rounds):
        for name, policy in track(table.items(), f"time, {T} characters, batch {B}"):
            times[name].append(seconds(partial(write_texts, model, policy, T, B)))
    return times


def write_texts(model: LLaDAModel, policy: UnmaskingPolicy, T: int, B: int) -> Tensor:
    """(B, T) drawn from nothing."""
    flags = {name: value for name, value in asdict(policy).items() if value is not None}
    masked = torch.full((B, T), MASK_ID)
    *_, step = reverse_process(mask_predictor(model), masked, MASK_ID, temperature=1.0, **flags)
    return step.tokens


def gpt_row(seconds: Seconds, rival: Checkpoint, texts: Tensor, reference: Likelihood, rounds: int) -> Iterator[tuple]:
    """GPT on the same windows: exact likelihood, and the wall time of cached decoding."""
    T = texts.shape[1]
    likelihood = Likelihood.exact([exact_nll(rival.model, texts, START_ID)])
    times = [[seconds(partial(gpt_texts, rival.model, T, B)) for _ in range(rounds)] for B in BATCHES]
    ms = [f"{1000 * statistics.median(column):.0f}" for column in times]
    yield (str(T), "GPT, cached", f"{T}", f"{bits(likelihood):.3f}", difference(likelihood, reference), *ms, "")


def gpt_texts(model: GPT, T: int, B: int) -> list[Tensor]:
    """B texts of T characters, drawn by GPT with its cache."""
    slide = max(1, model.config.block_size // 2)
    return list(decode(model, [torch.tensor([START_ID])] * B, max_out_tokens=T, slide=slide))


# ------------------------------------------------------------------------------------------------- blocks
def blocks(seconds: Seconds, windows: int) -> Iterator[tuple]:
    """Rows of the table: sweeps in blocks from left to right, with the masks after the block computed or cut off.

    `ahead`: how many of those masks the network still reads. Quality as in `frontier`, against the same blocks with all
    masks read; the time is that of pricing the windows, where every policy does the same work besides the network's.
    """
    checkpoint = load_checkpoint(newest_checkpoint("out", "llada"))
    model, T = checkpoint.model, checkpoint.model.config.block_size
    texts = held_out(checkpoint, T, windows)
    yield ("block", "ahead", "evaluations", "bits/char", "difference", "s")
    for length in (T, T // 2, T // 4, T // 8):
        policy, reference = UnmaskingPolicy(STRIDE * T // length, "sweep", block_length=length), None
        for ahead in (T, 64, 16, 0) if length < T else (T,):
            result: list[tuple[Likelihood, float]] = []
            time = seconds(lambda a=ahead, n=length, p=policy, r=result: r.append(price(cut(model, n, a), texts, p)))
            [(likelihood, nfe)] = result
            reference = reference or likelihood
            yield (str(length), "all" if ahead == T else str(ahead), f"{nfe:.0f}", f"{bits(likelihood):.3f}",
                   difference(likelihood, reference), f"{time:.1f}")  # fmt: skip


def cut(model: LLaDAModel, block_length: int, ahead: int) -> Predict:
    """A predictor that reads only `ahead` columns beyond the block that holds the first mask; -inf beyond those."""

    def predict(tokens: Tensor) -> Tensor:
        T, first = tokens.shape[1], int((tokens == MASK_ID).long().argmax(1).min())
        end = min(T, (first // block_length + 1) * block_length + ahead)
        return torch.nn.functional.pad(model(tokens[:, :end]), (0, 0, 0, T - end), value=-torch.inf)

    return predict


# ------------------------------------------------------------------------------------------------- crossing
SIZES = {"0.8 M": {"n_layer": 4, "n_embd": 128, "n_head": 4}, "10.7 M": {"n_layer": 6, "n_embd": 384, "n_head": 6}}


def crossing(seconds: Seconds, rounds: int, lengths: tuple[int, ...] = (32, 64, 128, 256)) -> Iterator[tuple]:
    """Rows of the table: characters/s of LLaDA (sweep, 16 and 8 evaluations) and GPT (cached), in alternation.

    Untrained networks: what is drawn does not change what it costs. Ratios are to the compiled GPT.
    """
    columns = "GPT, cached", "GPT, compiled", "LLaDA, 16 evaluations", "LLaDA, 8", "16 to GPT", "8 to GPT"
    yield ("parameters", "batch", "T", *columns)
    for size, shape in SIZES.items():
        llada = LLaDAModel(LLaDAConfig(69, max(lengths), **shape)).eval()
        gpt = GPT(GPTConfig(69, max(lengths) + 1, **shape)).eval()
        gpt.never[END_ID] = True  # an untrained network would soon stop
        compiled = compiled_copy(gpt)
        for B in BATCHES:
            for T in lengths:
                writers = [partial(gpt_texts, model, T, B) for model in (gpt, compiled)]
                writers += [partial(write_texts, llada, UnmaskingPolicy(K, "sweep"), T, B) for K in (16, 8)]
                times = [[seconds(writer) for writer in writers] for _ in range(rounds + 1)][1:]  # the first warms up
                rates = [B * T / statistics.median(column) for column in zip(*times, strict=True)]
                ratios = [f"{rate / rates[1]:.2f}x" for rate in rates[2:]]
                yield (size, str(B), str(T), *(f"{rate:.0f}" for rate in rates), *ratios)
