"""The evaluation: which checkpoints, and what is measured, in stages. The result is metrics.json: plain values.

Losses are in nats/char. Of subwords they are upper bounds: a text has other segmentations, which are not scored.
Letters: N windows, T positions.
"""

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import Checkpoint, load_checkpoint
from data import Corpus
from evaluation.metrics import text_metrics, words
from evaluation.samplers import sampler_likelihood, samplers_of, write_texts, writers_of
from likelihood import Likelihood, half_width95
from model import MODELS
from trainer import objective_of, scoring_batch_size
from utils.console import say, track

MOST_READ = 1 << 21  # characters of the training text that are read for its words and for copies
WINDOWS, PAIRS, FEW, TEXTS = 8192, 8, 64, 32  # pairs of masks for each window; windows that all samplers score
QUICK = 128, 2, 16, 8  # the same


def select_checkpoints(paths: list[Path], device: str) -> dict[str, Checkpoint]:
    """The checkpoints by model name, LLaDA first. Raises ValueError if two are of one model, or of different texts."""
    found: dict[str, Checkpoint] = {}
    for checkpoint in (load_checkpoint(path, device) for path in paths):
        if same := found.get(checkpoint.model.name):
            raise ValueError(f"{same.path} and {checkpoint.path} are both {same.model.name}: give one of each")
        found[checkpoint.model.name] = checkpoint
    kinds = {
        (c.corpus["sha256"], c.corpus["val_fraction"], c.model.config.segments, json.dumps(c.tokenizer.to_dict()))
        for c in found.values()
    }
    if len(kinds) > 1:
        files = " and ".join(str(checkpoint.path) for checkpoint in found.values())
        raise ValueError(f"{files} have different texts, segments or tokenizers: evaluate one at a time")
    return {name: found[name] for name in MODELS if name in found}


def figures(result: Likelihood, is_exact: bool = True) -> dict:
    """A likelihood's entry in metrics.json. is_exact: whether a text has no other tokens."""
    nats, (low, high), is_bound = result.nats_per_char, result.ci95, result.is_bound or not is_exact
    ci95 = [max(0.0, low), high] if math.isfinite(high) else None  # no loss is negative
    figures = {"nats_per_char": nats, "ci95": ci95, "bits_per_char": nats / math.log(2), "perplexity": math.exp(nats)}
    return figures | {"chars": int(result.characters.sum()), "is_bound": is_bound}


def paired_difference(a: Likelihood, b: Likelihood) -> dict:
    """nats/char of a minus b, of the same windows, with its 95 % interval; None for a single window.

    Pairing removes how hard each window is, so the interval is narrower than those of a and b.
    """
    nats = a.window_nats - b.window_nats
    mean, half = float(nats.sum() / a.characters.sum()), half_width95(nats, a.characters)
    return {"nats_per_char": mean, "ci95": [mean - half, mean + half] if math.isfinite(half) else None}


def embedding_map(weight: Tensor) -> dict:
    """Embeddings (n, C) in their two principal components, and the share of the variance of each."""
    x = weight.detach().cpu().double()
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return {"xy": (u * s)[:, :2].tolist(), "shares": (s.square() / s.square().sum())[:2].tolist()}


class Evaluation:
    """The models on their text. Each stage measures one thing and returns its entries of metrics.json."""

    def __init__(self, checkpoints: dict[str, Checkpoint], corpus: Corpus, quick: bool = False, seed: int = 0):
        first = next(iter(checkpoints.values()))
        self.checkpoints, self.corpus, self.quick, self.seed = checkpoints, corpus, quick, seed
        self.models = {name: checkpoint.model for name, checkpoint in checkpoints.items()}
        self.tokenizer, self.segments = first.tokenizer, first.model.config.segments
        windows, self.pairs, self.few, self.count = QUICK if quick else (WINDOWS, PAIRS, FEW, TEXTS)
        T = min(model.config.block_size for model in self.models.values())
        self.train, val = corpus.split(first.corpus["val_fraction"])
        self.rows = corpus.validation_rows(val, T, self.segments, windows * T)
        self.N, self.T = self.rows[0].tokens.shape
        self.results: dict[str, Likelihood] = {}  # of the objectives: exact, or an upper bound

    def some(self, limit: int) -> Tensor:
        """The indices of at most `limit` of the N windows, evenly spaced."""
        return torch.linspace(0, self.N - 1, min(limit, self.N)).long()

    def figures(self, results: dict[str, Likelihood]) -> dict[str, dict]:
        """Results by model as entries of metrics.json."""
        return {name: figures(result, self.tokenizer.is_exact) for name, result in results.items()}

    def likelihood(self) -> dict:
        """The loss of each model's objective; of windows also LLaDA's masking curve, and the loss by position."""
        for name, model in track(self.models.items(), "score"):
            settings = {"pairs": self.pairs, "seed": self.seed, "batch_size": scoring_batch_size(model)}
            rows = [part.to(model.device) for part in self.rows]
            self.results[name] = objective_of(model).likelihood(model, rows, **settings)
        entries = {"models": self.figures(self.results)}
        if self.segments == "window":
            scale = self.T / float(self.rows[0].characters.double().mean())
            windows = {name: scale * result.token_nats[: self.N, : self.T] for name, result in self.results.items()}
            entries["positions"] = {name: nats.mean(0).tolist() for name, nats in windows.items()}
            bounds = {name: result for name, result in self.results.items() if result.curve is not None}
            entries["masking_curve"] = {name: (scale * result.curve[1:]).tolist() for name, result in bounds.items()}
        return entries

    def samplers(self) -> dict:
        """The loss of each sampler against its network evaluations, and its difference to the first, a default one.

        Default samplers are scored on all windows. The loss of another is that of the first one on all windows, plus
        the paired difference on those that it has scored.
        """
        if self.segments != "window":  # rows differ in length
            return {"written": {}}
        rows, written, characters = [], {}, torch.cat([part.characters for part in self.rows])

        def add(name: str, label: str, result: Likelihood, nfe: float, reference: Likelihood) -> None:
            gap, is_bound = paired_difference(result, reference), result.is_bound or not self.tokenizer.is_exact
            level = {"nats_per_char": first.nats_per_char + gap["nats_per_char"], "is_bound": is_bound}
            rows.append({"model": name, "sampler": label, "nfe": nfe, "difference": gap} | level)

        full, chosen = self.rows[0], self.some(self.few)
        for name, model in self.models.items():
            (label, default), *others = samplers_of(model, self.T, self.quick).items()
            parts, nfe = zip(*(sampler_likelihood(model, p.tokens, default, self.seed) for p in self.rows), strict=True)
            written[name] = Likelihood.join(list(parts)).per(characters)
            first = next(iter(written.values()))
            add(name, label, written[name], nfe[0], first)
            few = Likelihood.from_token_nats([first.token_nats[chosen]]).per(full.characters[chosen])
            for label, config in track(others, f"samplers of {name}"):
                result, nfe = sampler_likelihood(model, full.tokens[chosen], config, self.seed)
                add(name, label, result.per(few.characters), nfe, few)
            if self.results[name].is_bound:
                add(name, f"random, {self.T} steps", self.results[name], self.T, first)
        return {"samplers": rows, "written": self.figures(written)}

    def texts(self) -> dict:
        """Real words, variety and copies of texts without a prompt, and of as much validation text; a text of each."""
        source, real = self.tokenizer.decode(self.train[:MOST_READ]), self.rows[0].tokens[self.some(self.count)]
        vocabulary, rows = set(words(f" {source} ")), []

        def measure(ids: Tensor, name: str | None, writer: str, **about) -> None:
            texts = list(map(self.tokenizer.decode, ids))
            metrics = text_metrics(texts, vocabulary, source)
            rows.append({"model": name, "writer": writer, "text": texts[0]} | metrics | about)

        measure(real, None, "validation text")
        for name, model in self.models.items():
            for label, config in track(writers_of(model, self.quick).items(), f"{name} writes"):
                start = time.perf_counter()
                ids, nfe = write_texts(model, *real.shape, config, self.seed)
                milliseconds = 1000 * (time.perf_counter() - start) / len(real)
                measure(ids, name, label, temperature=config.temperature, nfe=nfe, milliseconds=milliseconds)
        return {"texts": rows, "texts_of_a_kind": len(real)}

    def embeddings(self) -> dict:
        """The embeddings of the characters in two dimensions; none of subwords."""
        if not self.tokenizer.is_exact:
            return {}
        characters = self.tokenizer.characters
        weights = {name: model.encoder.embedding.weight[-len(characters) :] for name, model in self.models.items()}
        return {"embeddings": {name: embedding_map(x) for name, x in weights.items()}, "characters": characters}

    def run(self) -> dict:
        """The contents of metrics.json. Each stage ends with a line that has its time."""
        known, runs = next(iter(self.checkpoints.values())).corpus, self.checkpoints.items()
        metrics = {
            **{"corpus": known | {"characters": self.corpus.characters}, "window": self.T, "quick": self.quick},
            "training": {name: {"checkpoint": str(c.path)} | c.training.get("config", {}) for name, c in runs},
            "history": {name: c.history for name, c in runs},
        }
        for stage in (self.likelihood, self.samplers, self.texts, self.embeddings):
            start = time.monotonic()
            metrics |= stage()
            say(f"{stage.__name__}: {time.monotonic() - start:.0f} s")
        return metrics
