"""Samples of both models: sample metrics against network evaluations (NFE) and time, continuations, infilling.

Everything is returned as plain values, ready for metrics.json.
"""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive import decode, equal_streams, exact_nll
from evaluation.likelihoods import mean_and_interval
from evaluation.metrics import (
    NGramModel,
    character_entropy,
    distinct_share,
    longest_copied_span,
    real_word_share,
    words,
)
from generation.infilling import fill_masks, mask_predictor, text_sampling
from generation.text import generate_texts
from likelihood import policy_likelihood
from model import Transformer
from tokenizer import MASK_ID, PAD_ID, START_ID, SimpleTokenizer
from trainer import scoring_batch_size
from unmasking import UnmaskingPolicy
from utils.counter import EvaluationCounter


# ------------------------------------------------------------------------------------------------- sample metrics
class SampleMetrics:
    """Measures texts against the models, the training text `train`, and n-grams and words of its first `read` ids."""

    def __init__(self, models: dict[str, Transformer], tokenizer: SimpleTokenizer, train: Tensor, read: int):
        self.models, self.tokenizer = models, tokenizer
        self.train = train.numpy()
        self.ngram = NGramModel(self.train[:read], tokenizer.vocab_size)
        self.vocabulary = set(words(f" {tokenizer.decode(self.train[:read])} "))

    def measure(self, texts: list[str]) -> dict:
        """All metrics of texts of equal length. Likelihoods are exact, in bits/char, see `exact_nats_per_char`."""
        if not texts:
            return {"texts": 0}
        rows = [self.tokenizer.encode(text) for text in texts]
        ids = torch.from_numpy(np.stack(rows)).long()
        bits = {name: exact_nats_per_char(model, ids) / math.log(2) for name, model in self.models.items()}
        return {
            "texts": len(texts),
            **{f"bits_under_{name}": value for name, value in bits.items()},
            "bits_under_ngram": float(np.mean([self.ngram.bits(row).mean() for row in rows])),
            "character_entropy": character_entropy(np.stack(rows)),
            "real_words": real_word_share(texts, self.vocabulary),
            "distinct_8grams": distinct_share(rows),
            "longest_copy": longest_copied_span(rows, self.train),
        }


def exact_nats_per_char(model: Transformer, texts: Tensor) -> float:
    """Exact nats/char of texts (N, T): GPT's by the chain rule, LLaDA's under its default sampler.

    LLaDA's bound would be mostly noise of its masks on so few texts.
    """
    size, policy = scoring_batch_size(model), UnmaskingPolicy(order="sweep")
    if model.causal:
        streams = equal_streams(texts.shape[1], model.config.parallel)
        return exact_nll(model, texts.to(model.device), START_ID, size, streams).mean().item()
    result, _ = policy_likelihood(mask_predictor(model), texts, policy, MASK_ID, batch_size=size)
    return result.nats_per_char


def measure_samples(
    metrics: SampleMetrics,
    validation_texts: list[str],
    T: int,
    count: int,
    temperatures: tuple[float, ...],
    kinds: list[dict],
    seed: int,
) -> list[dict]:
    """One row of sample metrics for the validation texts, then for `count` texts of T characters of each kind.

    At each temperature: GPT, and LLaDA with the settings of each kind. `nfe`: network evaluations of the batch, each of
    which reads every text; `milliseconds` a text, all of them generated together.
    """
    rows, prompts = [{"source": "validation text"} | metrics.measure(validation_texts)], [""] * count
    for temperature in temperatures:
        for name, model in metrics.models.items():
            for kind in [{}] if model.causal else kinds:
                settings = {"temperature": temperature, **kind}
                start = time.perf_counter()
                with EvaluationCounter(model) as counter:
                    texts = generate_texts(model, metrics.tokenizer, prompts, max_out_tokens=T, seed=seed, **settings)
                milliseconds = 1000 * (time.perf_counter() - start) / count
                full = [text for text in texts if len(text) == T]  # GPT can end a text early with [END]
                row = {"source": name, **settings, "nfe": counter.nfe, "milliseconds": milliseconds}
                rows.append(row | metrics.measure(full))
    return rows


# ------------------------------------------------------------------------------------------------- continuations
def validation_prompts(text: str, count: int, longest: int) -> list[str]:
    """The first lines of `count` evenly spaced paragraphs of the text, at most `longest` characters of each."""
    paragraphs = [paragraph.lstrip("\n") for paragraph in text.split("\n\n")[1:-1] if paragraph.strip()] or [text]
    chosen = np.linspace(0, len(paragraphs) - 1, count).astype(int)
    return [paragraphs[i].splitlines(keepends=True)[0][:longest] for i in chosen]


def continue_prompts(
    models: dict[str, Transformer], tokenizer: SimpleTokenizer, prompts: list[str], T: int, seed: int
) -> list[dict]:
    """Every prompt continued to at most T tokens: by LLaDA's default sampler, by LLaDA one at a time, by GPT."""
    samplers = [
        ("llada", "default sampler (sweep)", {}),
        ("llada", "confidence order, one token a step", {"order": "confidence"}),
        ("gpt", "default sampler", {}),
    ]
    length, rows = max(1, T - max(len(tokenizer.encode(prompt)) for prompt in prompts)), []
    for name, sampler, settings in samplers:
        if name in models:
            with EvaluationCounter(models[name]) as counter:
                texts = generate_texts(models[name], tokenizer, prompts, max_out_tokens=length, seed=seed, **settings)
            label = {"model": name, "sampler": sampler, "nfe": counter.nfe}
            alone = models[name].config.segments == "pairs"  # the texts are completions without their prompts
            rows += [
                label | {"prompt": p, "text": t if alone else t[len(p) :]} for p, t in zip(prompts, texts, strict=True)
            ]
    return rows


# ------------------------------------------------------------------------------------------------- infilling
def measure_infilling(models: dict[str, Transformer], windows: Tensor, spans: list[int]) -> dict[str, list[dict]]:
    """Share of the hidden characters of windows (N, T) that each model finds; the span is in the middle.

    LLaDA sees both sides and writes the most confident character first, one at each step. GPT sees the left side. Both
    are greedy. ci95 over windows.
    """
    T, results = windows.shape[1], {name: [] for name in models}
    for length in spans:
        span = slice((T - length) // 2, (T - length) // 2 + length)
        for name, model in models.items():
            right = (fill_span(model, windows.cpu(), span) == windows[:, span].cpu()).double()  # (N, length)
            accuracy, ci95 = mean_and_interval(right.mean(1))
            whole = float(right.all(1).double().mean())
            results[name].append({"span": length, "accuracy": accuracy, "ci95": ci95, "whole": whole})
    return results


def fill_span(model: Transformer, windows: Tensor, span: slice) -> Tensor:
    """The model's greedy characters for a span of windows (N, T): (N, length)."""
    length = span.stop - span.start
    if model.causal:
        prompts = F.pad(windows[:, : span.start], (1, 0), value=START_ID).to(model.device)
        columns = list(decode(model, list(prompts), max_out_tokens=length, temperature=0.0))
        return F.pad(torch.stack(columns, 1).cpu(), (0, length - len(columns)), value=PAD_ID)  # if all rows have ended
    templates = windows.clone()
    templates[:, span] = MASK_ID
    *_, state = fill_masks(model, list(templates), text_sampling(order="confidence", temperature=0.0))
    return torch.stack(state.texts)[:, span]
