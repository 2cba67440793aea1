"""Benchmark of tokenizers: characters against byte-level BPE, at equal parameters and equal time, in bits/char."""

import math
import tempfile
from collections.abc import Iterator
from functools import cache

import torch

from benchmarks.timing import Row
from benchmarks.training import MODELS, run_train
from data import load_corpus
from evaluation.likelihoods import mean_and_interval
from model import MODELS as NETWORKS
from model import ModelConfig

VAL_FRACTION = 0.1
SIZES = {"n_layer": 4, "n_head": 2, "n_embd": 96, "block_size": 256}
ROWS = 65521  # of each n-gram table of the models of characters
VOCAB_SIZES = (512, 1024, 2048)  # of BPE


@cache
def parameters(vocab_size: int, rows: int) -> int:
    """Parameters of either model. They are linear in the rows of the n-gram tables."""
    with torch.device("meta"):
        return NETWORKS["gpt"](ModelConfig(vocab_size, ngram_rows=rows, **SIZES)).num_parameters()


def rows_for(vocab_size: int, characters: int) -> int:
    """Rows of each n-gram table with which a model has as many parameters as one of `characters` ids has with ROWS."""
    each = parameters(vocab_size, 2) - parameters(vocab_size, 1)
    return ROWS - round((parameters(vocab_size, ROWS) - parameters(characters, ROWS)) / each)


def tokenizer_flags(vocab_size: int | None, characters: int) -> list[str]:
    """The flags of train.py for BPE of a vocabulary, or for characters (None)."""
    if vocab_size is None:
        return ["--tokenizer=char", f"--ngram-rows={ROWS}"]
    rows = rows_for(vocab_size, characters)
    return ["--tokenizer=bpe", f"--vocab-size={vocab_size}", f"--ngram-rows={rows}"]


def compare_tokenizers(quick: bool, data: str | None, seconds: float | None) -> Iterator[Row]:
    """Table of models of characters and of BPE after `seconds` of wall time, on the whole validation part.

    bits/char: the mean over seeds, its 95 % interval by Student's t over seeds, and all seeds.
    """
    seconds, seeds = seconds or (30 if quick else 165), 1 if quick else 3
    data = data or "tinyshakespeare"
    characters = load_corpus(data).tokenizer.vocab_size
    shared = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    shared += [f"--data={data}", f"--val-fraction={VAL_FRACTION}", f"--minutes={seconds / 60:.4f}"]
    yield "model", "bits/char", "95 % interval", "kind", "all seeds", "parameters", "tokens/s", "epochs", "train.py"
    for model in MODELS:
        for vocab_size in (None, *VOCAB_SIZES[: 1 if quick else None]):
            flags = tokenizer_flags(vocab_size, characters)
            with tempfile.TemporaryDirectory() as out:
                runs = [
                    run_train(out, f"--model={model}", f"--seed={seed}", *MODELS[model], *shared, *flags)[0]
                    for seed in range(seeds)
                ]
            bits = [run["nats_per_char"] / math.log(2) for run in runs]
            mean, ci95 = mean_and_interval(torch.tensor(bits, dtype=torch.float64))
            yield (
                model,
                f"{mean:.4f}",
                "{:.4f}..{:.4f}".format(*ci95) if ci95 else "-",
                "upper bound" if runs[0]["is_bound"] else "exact",
                " ".join(f"{value:.4f}" for value in bits),
                f"{runs[0]['params']:,}",
                f"{runs[0]['tokens_per_second']:,.0f}",
                f"{runs[0]['epochs']:.1f}",
                " ".join(flags),
            )
