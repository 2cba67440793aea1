"""Prompts and completions: `train.py --pairs FILE` learns the completions, `evaluate.py --pairs FILE` scores them.

A line of the file is {"prompt": ..., "completion": ...}, a row of tokens `prompt [START] completion [END] [PAD] ...`.

Metrics, in %, of N texts and their completions: exact matches; chrF and BLEU of all texts together (sacrebleu's
defaults); the mean F-measure of ROUGE-L (rouge-score). Both libraries are optional.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import Checkpoint
from data import LOADERS, Corpus, MakeTokenizer, RowDataset, lasting_path, training_length
from evaluation.report import fixed, interval, kind, table
from evaluation.suite import figures, objective_likelihood
from generation.text import GeneratorTransformer
from tokenizer import END_ID, START_ID, SimpleTokenizer
from trainer import scoring_batch_size
from utils.console import say, track
from utils.errors import ArgumentError
from utils.files import FileText

GREEDY = {"order": "confidence", "threshold": 0.9}  # LLaDA: a token at a step, or all that are as good as sure
METRICS = "exact", "chrF", "BLEU", "ROUGE-L"


# ------------------------------------------------------------------------------------------------- the corpus
class Pair(NamedTuple):
    """A prompt and what is to be written after it."""

    prompt: str
    completion: str


@dataclass
class PairCorpus(Corpus):
    """Pairs. Parts of it are lists of them; the last `val_fraction` are for validation."""

    pairs: list[Pair] = field(default_factory=list)

    @property
    def characters(self) -> int:
        return sum(len(text) for pair in self.pairs for text in pair)

    def split(self, val_fraction: float) -> tuple[list[Pair], list[Pair]]:
        cut = training_length(len(self.pairs), val_fraction)
        return self.pairs[:cut], self.pairs[cut:]

    def check_part(self, part: list[Pair], purpose: str, block_size: int, segments: str) -> None:
        if not part:
            raise ValueError(f"there is no pair to {purpose} on: use more pairs or another --val-fraction")

    def dataset(self, part: list[Pair], block_size: int, segments: str = "pairs", stride: int = 1) -> RowDataset:
        """Rows of which prompt and [START] are given. Raises ValueError for a pair that is longer than the context."""
        rows, given, encode = [], [], lambda text: self.tokenizer.encode(text).tolist()
        for prompt, completion in part:
            start = [*encode(prompt), START_ID]
            rows.append([*start, *encode(completion), END_ID])
            given.append(len(start))
            if len(rows[-1]) >= block_size:
                needed = f"takes {len(rows[-1]) + 1} tokens, more than the context of {block_size}"
                raise ValueError(f"the pair {prompt[:40]!r} {needed}: shorten it or use a larger --block-size")
        return RowDataset(rows, [len(pair.completion) for pair in part], given, block_size - 1)


def load_pairs(path: str, make_tokenizer: MakeTokenizer | None = None) -> PairCorpus:
    """Pairs from a file of JSON lines. Raises ValueError naming the first bad line, ArgumentError for no file."""
    if not Path(path).exists():
        raise ArgumentError("pairs", f'{path}: no such file; give lines of {{"prompt": ..., "completion": ...}}')
    file, pairs = lasting_path(path), []
    text = "".join(FileText(file))
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            pair = Pair(entry["prompt"], entry["completion"])
            if not all(isinstance(part, str) for part in pair):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}, line {number}: not {{"prompt": "...", "completion": "..."}}') from None
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: holds no pairs")
    texts = [part for pair in pairs for part in pair]
    tokenizer = make_tokenizer(texts) if make_tokenizer else SimpleTokenizer("".join(set().union(*texts)))
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    empty = torch.from_numpy(tokenizer.encode(""))
    return PairCorpus(str(file), sha256, tokenizer, empty, pairs=pairs)


LOADERS["pairs"] = load_pairs


# ------------------------------------------------------------------------------------------------- scores
def text_metrics(texts: list[str], references: list[str]) -> dict[str, float | None]:
    """METRICS in %; None where a library is missing."""
    right = sum(text == reference for text, reference in zip(texts, references, strict=True))
    metrics = dict.fromkeys(METRICS) | {"exact": 100 * right / len(texts)}
    with suppress(ImportError):
        import sacrebleu

        metrics["chrF"] = sacrebleu.corpus_chrf(texts, [references]).score
        metrics["BLEU"] = sacrebleu.corpus_bleu(texts, [references]).score
    with suppress(ImportError):
        from rouge_score.rouge_scorer import RougeScorer

        score = RougeScorer(["rougeL"]).score
        found = [score(a, b)["rougeL"].fmeasure for a, b in zip(references, texts, strict=True)]
        metrics["ROUGE-L"] = 100 * sum(found) / len(found)
    return metrics


def score_pairs(checkpoints: dict[str, Checkpoint], path: str, quick: bool = False, seed: int = 0) -> dict[str, dict]:
    """For each model of pairs: metrics of its likeliest answers, their texts, the loss of the completions.

    Raises ArgumentError for another model, and ValueError for a file without text to score.
    """
    results = {}
    for name, checkpoint in checkpoints.items():
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        if model.config.segments != "pairs":
            raise ArgumentError("pairs", f"needs models of pairs, and {checkpoint.path} is none: train with --pairs")
        corpus = load_pairs(path, lambda texts, known=tokenizer: known)
        rows = corpus.dataset(corpus.pairs, model.config.block_size).rows(torch.arange(len(corpus.pairs)))
        if not rows.characters.any():
            raise ValueError(f"{path}: all completions are empty")
        if corpus.sha256 == checkpoint.corpus["sha256"]:
            say(f"warning: {name} was trained on pairs of {path}: they are not all held out")
        size, writer, texts = scoring_batch_size(model), GeneratorTransformer(model, tokenizer), []
        settings = writer.settings(temperature=0.0, **({} if model.causal else GREEDY))
        for start in track(range(0, len(corpus.pairs), size), f"{name} writes"):
            prompts = [pair.prompt for pair in corpus.pairs[start : start + size]]
            pieces = writer.stream(prompts, settings, max_out_tokens=model.config.block_size, seed=seed)
            texts += map("".join, zip(*pieces, strict=True))
        result = objective_likelihood(model, [rows], seed, pairs=2 if quick else 8)
        metrics = text_metrics(texts, [pair.completion for pair in corpus.pairs])
        results[name] = metrics | figures(result, tokenizer.is_exact) | {"texts": texts}
    return results


def print_scores(results: dict[str, dict]) -> None:
    """A table on standard output; on standard error what its columns miss."""
    rows = []
    for name, m in results.items():
        losses = fixed(m["nats_per_char"], 4), interval(m["ci95"]), kind(m)
        rows.append([name, str(len(m["texts"])), *(fixed(m[metric], 1) for metric in METRICS), *losses])
    print(table(["model", "pairs", *METRICS, "nats/char", "95 % interval", "kind"], rows))
    say("metrics in %, of the likeliest answers; BLEU and ROUGE-L count words: BLEU is 0 where no four agree in a row")
    if any(m[metric] is None for m in results.values() for metric in METRICS):
        say("for the columns with -: pip install sacrebleu==2.6.0 rouge-score==0.1.2")
