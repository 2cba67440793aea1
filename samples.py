"""What the models write, measured: quality against network evaluations and time, a gallery, infilling.

Both models write texts of the same length by the plain draw from their distribution (no truncation), LLaDA in the given
numbers of steps. Everything comes back as plain values, ready for metrics.json.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from autoregressive import decode
from examine import Tick, batch_size, score
from likelihood import policy_likelihood
from model import Transformer
from quality import NGramModel, character_entropy, distinct_share, longest_copied_span, real_word_share, words
from sampler import reverse_process
from templates import STRIDE
from tokenizer import MASK_ID, PAD_ID, SPECIAL_TOKENS, START_ID, SimpleTokenizer
from unmasking import UnmaskingPolicy

ORDER = "sweep"  # in the gallery: positions written together stand far apart, the order that loses least in few steps


# ------------------------------------------------------------------------------------------------- writing
def write_llada(
    model: Transformer, templates: Tensor, steps: int, order: str, seed: int, tick: Tick, temperature: float = 1.0
) -> tuple[Tensor, int]:
    """Fill the masks of templates (N, T); returns the texts (N, T) and the network evaluations each one took."""
    generator, nfe = torch.Generator().manual_seed(seed), 0
    for step in reverse_process(
        model, templates, MASK_ID, steps=steps, order=order, temperature=temperature, generator=generator
    ):
        tick(len(templates) * (step.nfe - nfe))
        nfe = step.nfe
    return step.tokens.cpu(), nfe


def write_gpt(
    model: Transformer, prompts: list[Tensor], T: int, seed: int, tick: Tick, temperature: float = 1.0
) -> tuple[Tensor, int]:
    """Continue prompts of ids to T characters each: the texts (N, T) and the network evaluations each one took."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    room = T - min(map(len, prompts))
    opened = [torch.cat([torch.tensor([START_ID]), prompt.cpu()]).to(device) for prompt in prompts]
    columns = decode(model, opened, max_out_tokens=room, temperature=temperature, generator=generator)
    written = [tokens.cpu() for tokens in columns]
    tick(len(prompts))  # with the cache, T columns one by one are about one reading of a window
    columns = torch.stack(written, 1) if written else torch.zeros(len(prompts), 0, dtype=torch.long)
    texts = [torch.cat([prompt.cpu(), row])[:T] for prompt, row in zip(prompts, columns, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), len(written)


# ------------------------------------------------------------------------------------------------- quality
class Yardsticks:
    """What texts are held against: the models, the training text, and the n-grams and words of some or all of it."""

    def __init__(
        self, models: dict[str, Transformer], tokenizer: SimpleTokenizer, train: Tensor, part: Tensor
    ):
        self.models, self.tokenizer = models, tokenizer
        self.train = train.numpy()
        self.ngram = NGramModel(part.numpy(), tokenizer.vocab_size)
        self.vocabulary = set(words(f" {tokenizer.decode(part.numpy())} "))

    def measure(self, texts: Tensor, tick: Tick) -> dict:
        """All measures of texts (N, T). bits/char are exact, see `nats_per_char` for LLaDA's.

        A text in which a model wrote [END] is no text of T characters: it is left out, and not counted in `texts`.
        """
        texts = texts[(texts >= len(SPECIAL_TOKENS)).all(1)]
        if not len(texts):
            return {"texts": 0}
        rows = list(texts.numpy())
        bits = {
            f"bits_under_{name}": nats_per_char(model, texts, tick) / np.log(2) for name, model in self.models.items()
        }
        return {
            "texts": len(rows),
            **bits,
            "bits_under_ngram": float(np.mean([self.ngram.bits(row).mean() for row in rows])),
            "character_entropy": character_entropy(texts.numpy()),
            "real_words": real_word_share([self.tokenizer.decode(row) for row in rows], self.vocabulary),
            "distinct_8grams": distinct_share(rows),
            "longest_copy": longest_copied_span(rows, self.train),
        }


def nats_per_char(model: Transformer, texts: Tensor, tick: Tick) -> float:
    """Exact, of texts (N, T): GPT's by the chain rule, LLaDA's as the sampler it is by default.

    A few texts are too few for LLaDA's bound: its masks would be most of the noise.
    """
    texts = texts.to(next(model.parameters()).device)
    if model.causal:
        return score(model, [texts], 0, 0, tick).nats_per_char
    policy = UnmaskingPolicy(steps=min(STRIDE, texts.shape[1]), order=ORDER)
    return policy_likelihood(model, texts, policy, MASK_ID, batch_size(texts), tick)[0].nats_per_char


def examine_samples(
    yardsticks: Yardsticks,
    val: Tensor,
    T: int,
    count: int,
    temperatures: tuple[float, ...],
    kinds: list[tuple[str, int]],
    seed: int,
    tick: Tick,
) -> list[dict]:
    """One row of measures for `count` texts of T characters from: the validation text; at each temperature GPT, and
    LLaDA in each kind of (order, steps). `nfe` a text; `milliseconds` a text, all `count` written together."""
    models = yardsticks.models
    stretches = val[: len(val) // T * T].view(-1, T)
    some = torch.linspace(0, len(stretches) - 1, min(count, len(stretches))).long()
    rows = [{"source": "validation text"} | yardsticks.measure(stretches[some].long(), tick)]
    writers: list[tuple[dict, Callable[[], tuple[Tensor, int]]]] = []
    for temperature in temperatures:
        at = {"temperature": temperature}
        if "gpt" in models:
            prompts = [torch.zeros(0, dtype=torch.long)] * count
            writers.append(({"source": "gpt"} | at, partial(write_gpt, models["gpt"], prompts, T, seed, tick, **at)))
        if "llada" in models:
            blank = torch.full((count, T), MASK_ID, device=next(models["llada"].parameters()).device)
            for order, steps in kinds:
                write = partial(write_llada, models["llada"], blank, steps, order, seed, tick, **at)
                writers.append(({"source": "llada", "order": order, "steps": steps} | at, write))
    for label, write in writers:
        start = time.perf_counter()
        texts, nfe = write()
        seconds = time.perf_counter() - start
        rows.append({**label, "nfe": nfe, "milliseconds": 1000 * seconds / count, **yardsticks.measure(texts, tick)})
    return rows


# ------------------------------------------------------------------------------------------------- gallery
def held_out_prompts(text: str, count: int, longest: int) -> list[str]:
    """The first lines of `count` paragraphs of the text, evenly spaced, at most `longest` characters of each."""
    paragraphs = [paragraph.lstrip("\n") for paragraph in text.split("\n\n")[1:-1] if paragraph.strip()] or [text]
    some = np.linspace(0, len(paragraphs) - 1, count).astype(int)
    first_lines = [paragraphs[i].splitlines(keepends=True)[0] for i in some]
    return [line[:longest] for line in first_lines]


def gallery(
    models: dict[str, Transformer],
    tokenizer: SimpleTokenizer,
    prompts: list[str],
    T: int,
    steps: list[int],
    seed: int,
    tick: Tick,
) -> list[dict]:
    """Every prompt continued to T characters: by LLaDA in each number of steps, by GPT."""
    ids = [torch.from_numpy(tokenizer.encode(prompt)).long() for prompt in prompts]
    written = []
    if "llada" in models:
        templates = torch.full((len(ids), T), MASK_ID)
        for row, prompt in zip(templates, ids, strict=True):
            row[: len(prompt)] = prompt
        templates = templates.to(next(models["llada"].parameters()).device)
        for count in steps:
            written.append(("llada", count, write_llada(models["llada"], templates, count, ORDER, seed, tick)[0]))
    if "gpt" in models:
        written.append(("gpt", None, write_gpt(models["gpt"], ids, T, seed, tick)[0]))
    return [
        {
            "model": name,
            "order": ORDER if count else None,
            "steps": count,
            "prompt": prompt,
            "text": tokenizer.decode(row[len(known) :].numpy()),
        }
        for i, (prompt, known) in enumerate(zip(prompts, ids, strict=True))
        for name, count, texts in written
        for row in [texts[i]]
    ]


# ------------------------------------------------------------------------------------------------- infilling
def examine_infilling(
    models: dict[str, Transformer], windows: Tensor, lengths: list[int], tick: Tick
) -> dict[str, list[dict]]:
    """Share of the hidden characters of held-out windows (N, T) that each model finds; the span is in the middle.

    LLaDA sees both sides and writes the surest character first, one a step; GPT sees the left side and writes the
    likeliest character each time. ci95 over windows.
    """
    T, results = windows.shape[1], {name: [] for name in models}
    for length in lengths:
        start = (T - length) // 2
        span = slice(start, start + length)
        for name, model in models.items():
            if name == "llada":
                templates = windows.clone()
                templates[:, span] = MASK_ID
                steps = reverse_process(model, templates, MASK_ID, order="confidence", temperature=0.0)
                *_, last = steps
                found = last.tokens[:, span]
                tick(length * len(windows))
            else:
                opened = torch.nn.functional.pad(windows[:, :start], (1, 0), value=START_ID)
                written = decode(model, list(opened), max_out_tokens=length, temperature=0.0)
                found = torch.full_like(windows[:, span], PAD_ID)  # where all rows have ended
                for i, column in enumerate(written):
                    found[:, i] = column
                tick(len(windows))
            right = (found == windows[:, span]).double().cpu()  # (N, length)
            share, whole = right.mean(1), right.all(1).double()
            half = 1.96 * float(share.std()) / len(share) ** 0.5 if len(share) > 1 else None
            mean = float(share.mean())
            interval = None if half is None else [mean - half, mean + half]
            results[name].append({"span": length, "accuracy": mean, "ci95": interval, "whole": float(whole.mean())})
    return results


# ------------------------------------------------------------------------------------------------- embeddings
def embeddings(model: Transformer, characters: list[str], tokenizer: SimpleTokenizer, nearest: int = 3) -> dict:
    """The characters' output embeddings, the head's rows, on their first two principal components; nearest by cosine.

    Rows are alike for characters that can stand in the same places. `explained`: the components' shares of variance.
    """
    ids = torch.tensor([tokenizer.char_to_id[c] for c in characters])
    vectors = model.head.weight.detach().cpu().double()[ids]  # (n, C)
    U, S, _ = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    cosine = torch.nn.functional.normalize(vectors, dim=1)
    cosine = (cosine @ cosine.T).fill_diagonal_(-torch.inf)
    closest = cosine.topk(min(nearest, len(ids) - 1)).indices.tolist()
    return {
        "characters": characters,
        "xy": (U * S)[:, :2].tolist(),
        "explained": (S.square() / S.square().sum().clamp(min=1e-12))[:2].tolist(),
        "nearest": {c: [characters[i] for i in row] for c, row in zip(characters, closest, strict=True)},
    }
