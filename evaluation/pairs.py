"""Held-out pairs: what a model writes after each prompt against its completion, and the likelihood of the completion.

Of N texts and their references: the share of exact matches; chrF and BLEU of all texts together (sacrebleu's defaults);
the mean F-measure of ROUGE-L (rouge-score). All are percentages. BLEU and ROUGE-L count words: of single words, BLEU is
0. Both libraries are optional, and their metrics are None without them.
"""

import importlib.util
import math
from collections.abc import Callable

from checkpoint import Checkpoint
from data import Pair, load_pairs, validation_rows
from evaluation.likelihoods import likelihood_figures
from evaluation.settings import EvaluationSettings
from generation.text import generate_texts
from model import Transformer
from tokenizer import Tokenizer
from trainer import objective_for, scoring_batch_size
from utils.console import say, track
from utils.counter import EvaluationCounter
from utils.errors import ArgumentError

LIBRARIES = {"sacrebleu": "sacrebleu==2.6.0", "rouge_score": "rouge-score==0.1.2"}  # module -> what pip installs
METRICS = ("exact_match", "chrf", "bleu", "rouge_l")
GREEDY_LLADA = {"order": "confidence", "threshold": 0.9}  # one token at a step, or all those that are as good as sure
EXAMPLES = 5  # pairs whose texts are kept in the results
Z = 1.959964  # the 97.5 % quantile of the normal distribution


# ------------------------------------------------------------------------------------------------- metrics
def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a probability (Wilson 1927): inside [0, 1] and of some width also for 0 or all successes.

    >>> low, high = wilson_interval(0, 10)
    >>> round(low, 3), round(high, 3)
    (0.0, 0.278)
    """
    p, n = successes / trials, trials
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))


def text_metrics(texts: list[str], references: list[str]) -> dict:
    """All metrics in %, and the 95 % interval of exact match over pairs; None where a library is missing."""
    right = sum(text == reference for text, reference in zip(texts, references, strict=True))
    interval = [100 * share for share in wilson_interval(right, len(texts))]
    metrics = {"exact_match": 100 * right / len(texts), "exact_match_ci95": interval}
    metrics |= dict.fromkeys(("chrf", "bleu", "rouge_l"))
    if installed("sacrebleu"):
        import sacrebleu

        metrics["chrf"] = sacrebleu.corpus_chrf(texts, [references]).score
        metrics["bleu"] = sacrebleu.corpus_bleu(texts, [references]).score
    if installed("rouge_score"):
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        scores = [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(references, texts, strict=True)]
        metrics["rouge_l"] = 100 * sum(scores) / len(scores)
    return metrics


def installed(module: str) -> bool:
    """Whether an optional library can be imported."""
    return importlib.util.find_spec(module) is not None


# ------------------------------------------------------------------------------------------------- models
def complete_pairs(
    model: Transformer, tokenizer: Tokenizer, pairs: list[Pair], temperature: float, seed: int
) -> list[str]:
    """What a model of pairs writes after each prompt; temperature 0 takes the likeliest tokens."""
    size, texts = scoring_batch_size(model), []
    settings = {} if model.causal else GREEDY_LLADA
    for start in track(range(0, len(pairs), size), f"{model.name} writes"):
        prompts = [pair.prompt for pair in pairs[start : start + size]]
        shortest = min(len(tokenizer.encode(prompt)) for prompt in prompts)
        length = model.config.block_size - shortest - 2  # what the context holds besides [START] prompt [START]
        texts += generate_texts(
            model, tokenizer, prompts, max_out_tokens=length, seed=seed, temperature=temperature, **settings
        )
    return texts


def score_pairs(
    checkpoints: dict[str, Checkpoint], path: str, settings: EvaluationSettings, temperature: float, seed: int
) -> dict:
    """The results on all pairs of a file, plain values.

    Raises ArgumentError for a model that is not one of pairs, and ValueError for a file without text to score.
    """
    for name, checkpoint in checkpoints.items():
        if checkpoint.model.config.segments != "pairs":
            problem = f"needs models of pairs, and {checkpoint.path} ({name}) is none: train it with train.py --pairs"
            raise ArgumentError("pairs", problem)
    models = {}
    for name, checkpoint in checkpoints.items():
        corpus = load_pairs(path, lambda texts, known=checkpoint.tokenizer: known)
        try:
            rows = validation_rows(corpus.pairs, checkpoint.tokenizer, checkpoint.model.config.block_size, "pairs")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if not any(int(batch.characters.sum()) for batch in rows):
            raise ValueError(f"{path}: all completions are empty")
        if corpus.sha256 == checkpoint.corpus["sha256"]:
            say(f"warning: {name} was trained on pairs of {path}: they are not all held out")
        models[name] = score_model(checkpoint, corpus.pairs, rows, settings, temperature, seed)
    return {
        "pairs": len(corpus.pairs),
        "file": corpus.name,
        "sha256": corpus.sha256,
        "temperature": temperature,
        "models": models,
    }


def score_model(
    checkpoint: Checkpoint, pairs: list[Pair], rows: list, settings: EvaluationSettings, temperature: float, seed: int
) -> dict:
    """One model's likelihood figures, metrics and first few texts. nfe: network evaluations of a batch, the mean."""
    model = checkpoint.model
    rows = [batch.to(model.device) for batch in rows]
    size = scoring_batch_size(model)
    likelihood = objective_for(model).likelihood(model, rows, pairs=settings.pairs, batch_size=size, seed=seed)
    with EvaluationCounter(model) as counter:
        texts = complete_pairs(model, checkpoint.tokenizer, pairs, temperature, seed)
    examples = [pair._asdict() | {"text": text} for pair, text in zip(pairs, texts, strict=True)][:EXAMPLES]
    return {
        **likelihood_figures(likelihood, model, checkpoint.tokenizer),
        **text_metrics(texts, [pair.completion for pair in pairs]),
        "nfe": counter.nfe / math.ceil(len(pairs) / size),
        "examples": examples,
    }


# ------------------------------------------------------------------------------------------------- table
def print_pairs(results: dict, write: Callable[[str], None] = print) -> None:
    """One line a model on standard output; on standard error how to install what is missing."""
    how = "greedy" if results["temperature"] == 0 else f"temperature {results['temperature']:g}"
    write(f"{results['pairs']} pairs, {how}; metrics in %")
    write("model   exact match  95 % interval   chrF   BLEU  ROUGE-L  nats/char     95 % interval  kind")
    for name, m in results["models"].items():
        low, high = m["exact_match_ci95"]
        cells = ["-" if m[metric] is None else f"{m[metric]:.1f}" for metric in METRICS]
        interval = "{:.4f}..{:.4f}".format(*m["ci95"]) if m["ci95"] else "-"
        kind = "upper bound" if m["is_bound"] else "exact"
        write(
            f"{name:6} {cells[0]:>12}  {f'{low:.1f}..{high:.1f}':>13} {cells[1]:>6} {cells[2]:>6} {cells[3]:>8} "
            f"{m['nats_per_char']:10.4f} {interval:>17}  {kind}"
        )
    missing = [requirement for module, requirement in LIBRARIES.items() if not installed(module)]
    if missing:
        say(f"for the columns with -: pip install {' '.join(missing)}")
