"""Benchmarks: `python -m extras.bench budget|sampling|decoding|gaps`, from the root of the repository.

Times are compared in turns, A B A B ..., after one call of each that is not counted, so that a busy moment of the
machine meets both. The machine's speed is printed before and after.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from timeit import timeit

import torch
from torch import Tensor

from autoregressive import exact_nll
from checkpoint import Checkpoint, find_checkpoints, new_model
from config import DecodingConfig, ModelConfig, SamplingConfig
from data import Rows, load_same_corpus
from evaluation.plots import kind
from evaluation.report import SAMPLER_COLUMNS, sampler_cells, table
from evaluation.suite import compare_samplers, samplers_of, select_checkpoints, write_texts
from generation.write import write
from model import GPT, MODELS, Transformer
from tokenizer import END_ID, MASK_ID, START_ID
from utils.console import Parser, run_program, say

TRAIN, BUDGETS = Path(__file__).resolve().parent.parent / "train.py", (40, 165, 900)  # in seconds
CONTEXT, VOCABULARY = 256, 69  # the vocabulary is that of TinyShakespeare
NETWORKS = ((4, 4, 128), (6, 6, 384))  # layers, heads, width
HOLES, CANDIDATES = (1, 4, 16), 16
Row = tuple[str, ...]  # one line of a table; the first row that a benchmark yields is the heading


# ------------------------------------------------------------------------------------------------- measuring
def in_turns(a: Callable[[], object], b: Callable[[], object], turns: int) -> tuple[float, str]:
    """The median seconds of b(), and how many times as long a() takes: the ratio of the medians, in brackets the
    smallest and the largest ratio of a turn."""
    a(), b()
    seconds = [(timeit(a, number=1), timeit(b, number=1)) for _ in range(turns)]
    of_a, of_b = map(median, zip(*seconds, strict=True))
    ratios = [first / second for first, second in seconds]
    return of_b, f"{of_a / of_b:.2f}x ({min(ratios):.2f}..{max(ratios):.2f})"


def gigaflops() -> float:
    """GFLOP/s of the linear layer that dominates a training step: float32, (4096, 128) by (512, 128); median of 400."""
    layer = partial(torch.nn.functional.linear, torch.randn(4096, 128), torch.randn(512, 128))
    return 2e-9 * 4096 * 128 * 512 / median(timeit(layer, number=1) for _ in range(400))


def percent(share: float, count: int) -> str:
    """A share of `count` in %, and its 95 % interval (Wilson 1927).

    >>> percent(0.5, 100), percent(0.0, 100)
    ('50.0 (40.4..59.6)', '0.0 (0.0..3.7)')
    """
    z2 = 1.959964**2 / count
    middle, half = share + z2 / 2, (z2 * (share * (1 - share) + z2 / 4)) ** 0.5
    low, high = (100 * edge / (1 + z2) for edge in (middle - half, middle + half))
    return f"{100 * share:.1f} ({low:.1f}..{high:.1f})"


def held_out(args: argparse.Namespace, count: int) -> tuple[dict[str, Checkpoint], Rows]:
    """A LLaDA and a GPT, and `count` windows of text that neither was trained on; quick: a tenth of them."""
    runs = select_checkpoints(args.checkpoints or find_checkpoints(), "cpu")
    if len(runs) < len(MODELS):
        raise ValueError("two models are compared: name the checkpoints of a LLaDA and a GPT")
    runs["gpt"].model.never[END_ID] = True  # as LLaDA here
    T, known = min(CONTEXT, *(run.model.config.block_size for run in runs.values())), runs["llada"].corpus
    corpus = load_same_corpus(known, "window", runs["llada"].tokenizer, args.data)
    part, count = corpus.split(known["val_fraction"])[1], count // 10 if args.quick else count
    return runs, corpus.validation_rows(part, T, max_tokens=T * count)[0]


# ------------------------------------------------------------------------------------------------- the benchmarks
def run_train(*flags: str) -> dict:
    """Run train.py to its end in a process of its own; its summary. Raises OSError with the last line of a failure."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run([sys.executable, TRAIN, *flags, "--out", folder], capture_output=True, text=True)
        if process.returncode:
            raise OSError(f"train.py {' '.join(flags)}: {(process.stderr.strip().splitlines() or ['stopped'])[-1]}")
        return json.loads(next(Path(folder).glob("*/summary.json")).read_text())


def budget(args: argparse.Namespace) -> Iterator[Row]:
    """Validation loss after 40 s, 165 s and 15 minutes of a machine that makes 100 GFLOP/s on a float32 linear layer,
    on the last tenth of the text: median over seeds. The time is scaled by the speed of this machine. LLaDA trains its
    bound."""
    yield "seconds", "model", "nats/char", "kind", "all seeds", "tokens/s"
    for seconds, model in itertools.product(BUDGETS[: 1 if args.quick else None], MODELS):
        flags = [f"--model={model}", "--val-fraction=0.1", f"--minutes={seconds * 100 / gigaflops() / 60:.4f}"]
        flags += ["--sweep-share=0"] * (model == "llada") + (["--data", *args.data] if args.data else [])
        runs = [run_train(*flags, f"--seed={seed}") for seed in range(1 if args.quick or seconds > 300 else 3)]
        losses, speeds = ([run[key] for run in runs] for key in ("nats_per_char", "tokens_per_second"))
        every = " ".join(f"{loss:.4f}" for loss in losses)
        yield f"{seconds:g}", model, f"{median(losses):.4f}", kind(runs[0]), every, f"{median(speeds):,.0f}"


def sampling(args: argparse.Namespace) -> Iterator[Row]:
    """Samplers at temperature 1 of a LLaDA and a GPT. nats/char of held-out windows, differences to the first row are
    paired over the same windows. Exact: the likelihood of the sampler that is timed; random order has an upper bound
    only. NFE: network evaluations for a text. Speed: the time of the first row over that of this one, in turns."""
    runs, rows = held_out(args, 64)
    N, T = rows.tokens.shape
    yield *SAMPLER_COLUMNS, "ms, batch 1", "speed, batch 1", "ms, batch 16", "speed, batch 16"
    entries, _ = compare_samplers(runs, [rows], {}, few=N, seed=0)
    writers = [(run.model, config) for run in runs.values() for config in samplers_of(run.model, T).values()]
    for entry, writer in zip(entries, writers, strict=True):
        cells = sampler_cells(entry)
        for B in (1, 16):
            first, this = (partial(write_texts, model, B, T, config) for model, config in (writers[0], writer))
            seconds, ratio = in_turns(first, this, 1 if args.quick else 5)
            cells += [f"{1000 * seconds:.0f}", ratio]
        yield tuple(cells)


def filled(model: Transformer, windows: Tensor, hole: slice, **settings) -> Tensor:
    """What a model writes into the hole of windows (N, T): (N, n). GPT sees nothing behind it."""
    end, settings_class = (hole.stop, DecodingConfig) if isinstance(model, GPT) else (None, SamplingConfig)
    starts = windows[:, :end].clone()
    starts[:, hole] = MASK_ID
    *_, state = write(model, list(starts), settings_class(**settings), torch.Generator().manual_seed(0))
    return torch.stack(state.texts)[:, hole]


def decoding(args: argparse.Namespace) -> Iterator[Row]:
    """GPT with random weights writes the last 200 characters of a window of 256. Speed: the time of writing that
    computes the whole text for every character over the time of the row, median, in brackets the smallest and the
    largest ratio of one turn."""
    yield "network", "decoder", "speed", "characters/s"
    text, end = torch.randint(END_ID + 1, VOCABULARY, (1, CONTEXT)), slice(56, CONTEXT)
    for n_layer, n_head, n_embd in NETWORKS:
        config = ModelConfig(VOCABULARY, CONTEXT, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        model, compiled, uncached = (new_model("gpt", config).eval() for _ in range(3))
        uncached.new_cache = lambda *sizes: None
        for gpt in (model, compiled, uncached):
            gpt.never[END_ID] = True
        torch.compiler.reset()  # what was compiled for another network would be made general, and slower
        compiled.compile()
        recomputed = partial(filled, uncached, text, end)
        for label, gpt in (("cached", model), ("cached, compiled", compiled)):
            seconds, ratio = in_turns(recomputed, partial(filled, gpt, text, end), 3 if args.quick else 9)
            yield f"{n_layer} layers x {n_embd}", label, ratio, f"{(CONTEXT - end.start) / seconds:.0f}"


def best_of_drawn(gpt: GPT, windows: Tensor, hole: slice) -> Tensor:
    """Of CANDIDATES that GPT draws for each hole, the one that is likeliest together with what follows: (N, n)."""
    kept = []
    for rows in (window.repeat(CANDIDATES, 1) for window in windows):
        rows[:, hole] = filled(gpt, rows, hole, temperature=0.8)
        rows = rows.unique(dim=0)
        kept.append(rows[exact_nll(gpt, rows, START_ID)[:, hole.start :].sum(1).argmin(), hole])
    return torch.stack(kept)


def gaps(args: argparse.Namespace) -> Iterator[Row]:
    """Holes in the middle of unseen windows of 256 characters. LLaDA: the likeliest characters, one at each network
    evaluation, from left to right. GPT, left side: the likeliest characters; it sees nothing that follows. GPT, best of
    16: drawn at temperature 0.8, kept is the one for which the exact likelihood of it and the right side is largest. In
    %, with 95 % intervals over windows (Wilson; of characters, conservative). Time of a hole: in batches of 16 texts,
    not in turns."""
    runs, (windows, *_) = held_out(args, 200)
    (N, T), gpt = windows.shape, runs["gpt"].model
    writers = {
        "LLaDA": partial(filled, runs["llada"].model, temperature=0.0, order="left", correct=0),
        "GPT, left side": partial(filled, gpt, temperature=0.0),
        f"GPT, best of {CANDIDATES}": partial(best_of_drawn, gpt),
    }
    yield "hole", "writer", "all right", "characters right", "ms a hole"
    for n in HOLES:
        hole = slice((T - n) // 2, (T + n) // 2)
        for name, writer in writers.items():
            start = time.perf_counter()
            found = torch.cat([writer(some, hole) for some in windows.split(CANDIDATES)])
            milliseconds = 1000 * (time.perf_counter() - start) / N
            right = (found == windows[:, hole]).double()  # (N, n)
            shares = percent(float(right.prod(1).mean()), N), percent(float(right.mean()), N)
            yield str(n), name, *shares, f"{milliseconds:.0f}"


# ------------------------------------------------------------------------------------------------- command line
BENCHMARKS = {"budget": budget, "sampling": sampling, "decoding": decoding, "gaps": gaps}


def parse_args() -> argparse.Namespace:
    """NAME and its flags; its docstring says what it measures."""
    parser = Parser(prog="python -m extras.bench", description="Measure training, sampling, decoding, infilling.")
    subparsers = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, benchmark in BENCHMARKS.items():
        caption = " ".join(benchmark.__doc__.split())
        subparser = subparsers.add_parser(name, help=caption.split(". ")[0], description=caption)
        subparser.set_defaults(rows_of=benchmark, caption=caption)
        subparser.add_argument("--quick", action="store_true", help="fewer repetitions")
        if name != "decoding":
            subparser.add_argument("--data", nargs="+", metavar="NAME|FILE", help="as for train.py")
        if name in ("sampling", "gaps"):
            named = {"metavar": "CHECKPOINT", "help": "default: the pretrained LLaDA and GPT"}
            subparser.add_argument("checkpoints", nargs="*", type=Path, **named)
    return parser.parse_args()


def main() -> None:
    """Measure; print the table (after Ctrl-C, of the rows measured so far), its caption and the machine."""
    args, before, measured = parse_args(), gigaflops(), []
    rows = args.rows_of(args)
    heading = next(rows)
    try:
        for row in rows:
            say("  ".join(row))
            measured.append(row)
    finally:
        print(table(heading, measured))
    print(textwrap.fill(args.caption, 120))
    print(f"machine: {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{before:.0f} GFLOP/s before and {gigaflops():.0f} after (float32 linear layer)")  # fmt: skip


if __name__ == "__main__":
    run_program(main)
