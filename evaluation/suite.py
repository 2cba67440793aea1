"""The evaluation: which checkpoints, how each model writes, and what is measured. The result is metrics.json.

Losses are in nats/char. Of subwords they are upper bounds: a text has other segmentations, which are not scored.
Letters: N windows, T positions.
"""

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from autoregressive import exact_nll
from checkpoint import Checkpoint, load_checkpoint
from config import SWEEP_STEPS, DecodingConfig, SamplingConfig
from data import Corpus
from evaluation.metrics import text_metrics, words
from generation.write import mask_predictor, write
from likelihood import Likelihood, half_width95, policy_likelihood
from model import GPT, MODELS, Transformer
from sampler import has_exact_likelihood, policy_of
from tokenizer import MASK_ID, START_ID
from trainer import objective_of, scoring_batch_size
from utils.console import say, track

Config = SamplingConfig | DecodingConfig
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


# ------------------------------------------------------------------------------------------------- samplers
def samplers_of(model: Transformer, T: int, quick: bool = False) -> dict[str, Config]:
    """The samplers to compare on windows of T tokens, at temperature 1 and uncorrected; first the default one.

    LLaDA: the sweep and the random order in several numbers of steps, others one token a step.
    """
    if isinstance(model, GPT):
        return {"as trained": DecodingConfig(temperature=1.0)}
    steps, single = ((16, 32), ("confidence",)) if quick else ((8, 16, 32), ("left", "confidence"))
    found = {f"sweep, {min(SWEEP_STEPS, T)} steps": {}}
    several = [(order, K) for order in ("sweep", "random") for K in steps if K < T]
    found |= {f"{order}, {K} steps": {"order": order, "steps": K} for order, K in several}
    found |= {f"{order}, {T} steps": {"order": order} for order in single}
    found["confidence, threshold 0.9"] = {"order": "confidence", "threshold": 0.9}
    return {name: SamplingConfig(temperature=1.0, correct=0, **settings) for name, settings in found.items()}


def sampler_likelihood(model: Transformer, windows: Tensor, config: Config, seed: int = 0) -> tuple[Likelihood, float]:
    """Negative log-likelihood of windows (N, T) under a sampler, in nats/token, and its evaluations for a window.

    LLaDA's is teacher-forced, in the sampler's own order. Exact where the positions follow from what is visible; of
    random order an upper bound in expectation over the drawn orders (Jensen). Raises ValueError for other samplers.
    """
    size = scoring_batch_size(model)
    if isinstance(model, GPT):
        nats = exact_nll(model, windows.to(model.device), START_ID, size).cpu()
        return Likelihood.from_token_nats([nats]), windows.shape[1]
    exact = has_exact_likelihood(config)
    if not exact and config.order != "random":
        raise ValueError(f"this sampler of order {config.order} has no likelihood")
    policy = policy_of(config, None if exact else torch.Generator().manual_seed(seed))
    settings = {"batch_size": size, "is_bound": not exact}
    result, nfe = policy_likelihood(mask_predictor(model), windows.cpu(), policy, MASK_ID, **settings)
    return result, float(nfe.double().mean())


def writers_of(model: Transformer, quick: bool = False) -> dict[str, Config]:
    """The settings to write texts with, by name; first those of generate.py."""
    found = {"default": {}, "temperature 1": {"temperature": 1.0}}
    if isinstance(model, GPT):
        return {name: DecodingConfig(**settings) for name, settings in found.items()}
    found |= {"64 steps": {"steps": 64}, "without correction": {"correct": 0}}
    found |= {} if quick else {"drawn_confidence, 1 a step": {"order": "drawn_confidence", "correct": 0}}
    return {name: SamplingConfig(**settings) for name, settings in found.items()}


def write_texts(model: Transformer, N: int, T: int, config: Config, seed: int = 0) -> tuple[Tensor, int]:
    """N texts of T tokens from nothing, (N, T), and the network evaluations that took."""
    *_, state = write(model, [torch.full((T,), MASK_ID)] * N, config, torch.Generator().manual_seed(seed))
    return torch.stack(state.texts), state.nfe


# ------------------------------------------------------------------------------------------------- entries
def figures(result: Likelihood, is_exact: bool = True) -> dict:
    """A likelihood's entry in metrics.json. is_exact: whether a text has no other tokens."""
    nats, (low, high) = result.nats_per_char, result.ci95
    return {
        "nats_per_char": nats,
        "ci95": [max(0.0, low), high] if math.isfinite(high) else None,  # no loss is negative
        "bits_per_char": nats / math.log(2),
        "perplexity": math.exp(nats),
        "chars": int(result.characters.sum()),
        "is_bound": result.is_bound or not is_exact,
    }


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
            found = self.results.items()
            entries["positions"] = {x: (scale * r.token_nats[: self.N, : self.T]).mean(0).tolist() for x, r in found}
            entries["masking_curve"] = {x: (scale * r.curve[1:]).tolist() for x, r in found if r.curve is not None}
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
            "corpus": known | {"characters": self.corpus.characters},
            "window": self.T,
            "quick": self.quick,
            "training": {name: {"checkpoint": str(c.path)} | c.training.get("config", {}) for name, c in runs},
            "history": {name: c.history for name, c in runs},
        }
        for stage in (self.likelihood, self.samplers, self.texts, self.embeddings):
            start = time.monotonic()
            metrics |= stage()
            say(f"{stage.__name__}: {time.monotonic() - start:.0f} s")
        return metrics
