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
from data import Corpus, Rows
from evaluation.metrics import text_metrics, words
from generation.write import mask_predictor, write
from likelihood import Likelihood, half_width95, policy_likelihood
from model import GPT, MODELS, Transformer
from sampler import has_exact_likelihood, policy_of
from tokenizer import MASK_ID, START_ID
from trainer import objective_of, scoring_batch_size
from utils.console import track

Config = SamplingConfig | DecodingConfig
MOST_READ = 1 << 21  # characters of the training text that are read for its words and for copies
FULL = 8192, 8, 64, 32  # windows, pairs of masks for each of them, windows that all samplers score, texts
QUICK = 128, 2, 16, 8  # the same with --quick


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
def samplers_of(model: Transformer, T: int) -> dict[str, Config]:
    """The samplers to compare on windows of T tokens, at temperature 1 and uncorrected; first the default one.

    LLaDA: the sweep and the random order in several numbers of steps, others one token a step.
    """
    if isinstance(model, GPT):
        return {"as trained": DecodingConfig(temperature=1.0)}
    found = {f"sweep, {min(SWEEP_STEPS, T)} steps": {}}
    several = [(order, K) for order in ("sweep", "random") for K in (8, 16, 32) if K < T]
    found |= {f"{order}, {K} steps": {"order": order, "steps": K} for order, K in several}
    found |= {f"{order}, {T} steps": {"order": order} for order in ("left", "confidence")}
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


def rows_likelihood(model: Transformer, rows: list[Rows], config: Config, seed: int = 0) -> tuple[Likelihood, float]:
    """`sampler_likelihood` of windows of running text of several lengths, per character; NFE of the first length."""
    parts, nfe = zip(*(sampler_likelihood(model, part.tokens, config, seed) for part in rows), strict=True)
    return Likelihood.join(list(parts)).per(torch.cat([part.characters for part in rows])), nfe[0]


def objective_likelihood(model: Transformer, rows: list[Rows], seed: int = 0, pairs: int = 8) -> Likelihood:
    """Of any rows, under what the model learns: GPT exact, LLaDA an upper bound from `pairs` pairs of masks a row."""
    settings = {"pairs": pairs, "seed": seed, "batch_size": scoring_batch_size(model)}
    return objective_of(model).likelihood(model, [part.to(model.device) for part in rows], **settings)


def writers_of(model: Transformer) -> dict[str, Config]:
    """The settings to write texts with, by name; first those of generate.py."""
    found = {"default": {}, "temperature 1": {"temperature": 1.0}}
    if isinstance(model, GPT):
        return {name: DecodingConfig(**settings) for name, settings in found.items()}
    found |= {f"{2 * SWEEP_STEPS} steps": {"steps": 2 * SWEEP_STEPS}, "4 correction passes": {"correct": 4}}
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


# ------------------------------------------------------------------------------------------------- stages
def evenly_spaced(N: int, limit: int) -> Tensor:
    """The indices of at most `limit` of N windows."""
    return torch.linspace(0, N - 1, min(limit, N)).long()


def compare_samplers(
    runs: dict[str, Checkpoint], rows: list[Rows], objectives: dict[str, Likelihood], few: int, seed: int
) -> tuple[list[dict], dict[str, Likelihood]]:
    """The loss of each sampler and its network evaluations, as entries of metrics.json; those of the default samplers.

    Default samplers are scored on all windows. The loss of another is that of the first one on all windows, plus the
    paired difference on `few` of them, which both have scored. objectives: the likelihoods of `objective_likelihood`.
    """
    entries, written, chosen = [], {}, evenly_spaced(len(rows[0].tokens), few)
    some, T = Rows(rows[0].tokens[chosen], rows[0].characters[chosen]), rows[0].tokens.shape[1]
    for name, run in runs.items():
        (label, config), *others = samplers_of(run.model, T).items()
        written[name], nfe = rows_likelihood(run.model, rows, config, seed)
        first = next(iter(written.values()))
        compared = [(label, written[name], nfe, first)]
        reference = Likelihood.from_token_nats([first.token_nats[chosen]]).per(some.characters)
        for label, config in track(others, f"samplers of {name}"):
            compared.append((label, *rows_likelihood(run.model, [some], config, seed), reference))
        if name in objectives and objectives[name].is_bound:
            compared.append((f"random, {T} steps", objectives[name], T, first))
        for label, result, nfe, against in compared:
            gap, is_bound = paired_difference(result, against), result.is_bound or not run.tokenizer.is_exact
            level = {"nats_per_char": first.nats_per_char + gap["nats_per_char"], "is_bound": is_bound}
            entries.append({"model": name, "sampler": label, "nfe": nfe, "difference": gap} | level)
    return entries, written


def compare_texts(runs: dict[str, Checkpoint], source: str, real: Tensor, seed: int) -> list[dict]:
    """Real words, variety and copies of texts without a prompt, and of as much validation text, `real` (N, T); with a
    text of each. source: the training text."""
    vocabulary, decode = set(words(f" {source} ")), next(iter(runs.values())).tokenizer.decode

    def entry(ids: Tensor, **about) -> dict:
        texts = list(map(decode, ids))
        return about | {"text": texts[0]} | text_metrics(texts, vocabulary, source)

    entries = [entry(real, model=None, writer="validation text")]
    for name, run in runs.items():
        for label, config in track(writers_of(run.model).items(), f"{name} writes"):
            start = time.perf_counter()
            ids, nfe = write_texts(run.model, *real.shape, config, seed)
            cost = {"nfe": nfe, "milliseconds": 1000 * (time.perf_counter() - start) / len(real)}
            entries.append(entry(ids, model=name, writer=label, temperature=config.temperature, **cost))
    return entries


def evaluate(runs: dict[str, Checkpoint], corpus: Corpus, quick: bool = False, seed: int = 0) -> dict:
    """The models on their text: the contents of metrics.json."""
    first = next(iter(runs.values()))
    tokenizer, segments = first.tokenizer, first.model.config.segments
    windows, pairs, few, count = QUICK if quick else FULL
    T = min(run.model.config.block_size for run in runs.values())
    train, val = corpus.split(first.corpus["val_fraction"])
    rows = corpus.validation_rows(val, T, segments, windows * T)
    N, T = rows[0].tokens.shape
    results = {x: objective_likelihood(run.model, rows, seed, pairs) for x, run in track(runs.items(), "score")}
    entries, written = {}, {}
    if segments == "window":  # other rows differ in length
        entries["samplers"], written = compare_samplers(runs, rows, results, few, seed)
        scale = T / float(rows[0].characters.double().mean())
        entries["positions"] = {x: (scale * r.token_nats[:N, :T]).mean(0).tolist() for x, r in results.items()}
        entries["masking_curve"] = {x: (scale * r.curve[1:]).tolist() for x, r in results.items() if r.is_bound}
    if tokenizer.is_exact:  # subwords have no such map
        entries["characters"] = tokenizer.characters
        weights = {x: run.model.encoder.embedding.weight[-len(tokenizer.characters) :] for x, run in runs.items()}
        entries["embeddings"] = {name: embedding_map(weight) for name, weight in weights.items()}
    source, real = tokenizer.decode(train[:MOST_READ]), rows[0].tokens[evenly_spaced(N, count)]
    return entries | {
        "corpus": first.corpus | {"characters": corpus.characters},
        "window": T,
        "quick": quick,
        "training": {x: {"checkpoint": str(run.path)} | run.training.get("config", {}) for x, run in runs.items()},
        "history": {name: run.history for name, run in runs.items()},
        "models": {name: figures(result, tokenizer.is_exact) for name, result in results.items()},
        "written": {name: figures(result, tokenizer.is_exact) for name, result in written.items()},
        "texts": compare_texts(runs, source, real, seed),
        "texts_of_a_kind": len(real),
    }
