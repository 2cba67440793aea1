"""Holes of unknown length in a template: "O [MASK*3-12] love!" has 3 to 12 characters between its words."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from config import SamplingConfig
from generation.text import GeneratorTransformer, template_start
from generation.write import mask_predictor, write
from logits import in_float64
from tokenizer import MASK_ID
from utils.console import say
from utils.errors import ArgumentError

HOLE = re.compile(r"\[MASK\*(\d{1,7})-(\d{1,7})\]")
MOST = 64  # lengths that are tried
LEFT_OUT = 8  # forward passes of a score: each hides every eighth token


def choose_lengths(template: str, writer: GeneratorTransformer, config: SamplingConfig, seed: int = 0) -> str:
    """The template with each [MASK*a-b] replaced by the [MASK*n] whose filled text is the likeliest per character.

    One hole after the other, from the left; those behind it take part with their shortest length. All lengths of a hole
    are filled in one batch, and scored by `scores`. The three best are said on standard error. Raises ArgumentError for
    a range that is empty or has more than MOST lengths.
    """
    while match := HOLE.search(template):
        low, high = int(match[1]), int(match[2])
        if not low <= high < low + MOST:
            raise ArgumentError("infill", f"{match[0]}: the second number must be 0 to {MOST - 1} more than the first")
        behind = HOLE.sub(r"[MASK*\1]", template[match.end() :])
        trials = [f"{template[: match.start()]}[MASK*{n}]{behind}" for n in range(low, high + 1)]
        starts = [template_start(trial, writer.model, writer.tokenizer) for trial in trials]
        *_, state = write(writer.model, starts, config, torch.Generator().manual_seed(seed))
        scored = zip(scores(writer, state.texts), range(low, high + 1), state.texts, strict=True)
        found = sorted(scored, key=lambda trial: -trial[0])
        for score, n, text in found[:3]:
            say(f"{match[0]}: {n} tokens, {score:.3f} nats/character: {writer.tokenizer.decode(text)!r:.60}")
        template = f"{template[: match.start()]}[MASK*{found[0][1]}]{template[match.end() :]}"
    return template


@torch.inference_mode()
def scores(writer: GeneratorTransformer, texts: list[Tensor]) -> Iterator[float]:
    """For each text (T,): the mean log-probability of its tokens, each given all but those LEFT_OUT tokens apart.

    In nats/character of the whole text, higher is likelier. It is a pseudo-likelihood (Besag 1975), not the likelihood:
    it compares lengths of one hole, and knows both sides of every token.
    """
    for text in texts:
        size, total = writer.model.config.block_size - (writer.model.config.segments != "window"), 0.0
        predict = mask_predictor(writer.model, may_end=True)
        for start in range(0, len(text), size):
            window = text[start : start + size]
            hidden = torch.arange(len(window)) % LEFT_OUT == torch.arange(LEFT_OUT)[:, None]  # (LEFT_OUT, T)
            logits = predict(window.masked_fill(hidden, MASK_ID))
            log_p = in_float64(logits).log_softmax(-1).gather(-1, window.expand(LEFT_OUT, -1)[..., None])[..., 0]
            total += float(log_p[hidden].sum())
        yield total / max(1, len(writer.tokenizer.decode(text)))
