"""Holes of unknown length in a template: "O [MASK*3-12] love!" has 3 to 12 characters between its words."""

import re

import torch
from torch import Tensor

from config import SamplingConfig
from generation.text import GeneratorTransformer
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
    are filled in one batch. The three likeliest are said on standard error. Raises ArgumentError for a range that is
    empty or has more than MOST lengths.
    """
    while match := HOLE.search(template):
        low, high = int(match[1]), int(match[2])
        if not low <= high < low + MOST:
            raise ArgumentError("infill", f"{match[0]}: the second number must be 0 to {MOST - 1} more than the first")
        before, behind = template[: match.start()], template[match.end() :]
        trials = [f"{before}[MASK*{n}]" + HOLE.sub(r"[MASK*\1]", behind) for n in range(low, high + 1)]
        starts = [writer.template_start(trial) for trial in trials]
        *_, state = write(writer.model, starts, config, torch.Generator().manual_seed(seed))
        texts = dict(zip(range(low, high + 1), state.texts, strict=True))
        scores = {n: pseudo_likelihood(writer, text) for n, text in texts.items()}
        lengths = sorted(scores, key=scores.get, reverse=True)
        for n in lengths[:3]:
            say(f"{match[0]}: {n} tokens, {scores[n]:.3f} nats/character: {writer.tokenizer.decode(texts[n])!r:.60}")
        template = f"{before}[MASK*{lengths[0]}]{behind}"
    return template


@torch.inference_mode()
def pseudo_likelihood(writer: GeneratorTransformer, text: Tensor) -> float:
    """The mean log-probability of the tokens of a text (T,), each given all but those LEFT_OUT tokens apart.

    In nats/character of the whole text, higher is likelier. It is not the likelihood (Besag 1975): it compares lengths
    of one hole, and knows both sides of every token.
    """
    size, total = writer.model.config.block_size - (writer.model.config.segments != "window"), 0.0
    predict = mask_predictor(writer.model, may_end=True)
    for window in text.split(size):
        hidden = torch.arange(len(window)) % LEFT_OUT == torch.arange(LEFT_OUT)[:, None]  # (LEFT_OUT, T)
        logits = predict(window.masked_fill(hidden, MASK_ID))
        log_p = in_float64(logits).log_softmax(-1).gather(-1, window.expand(LEFT_OUT, -1)[..., None])[..., 0]
        total += float(log_p[hidden].sum())
    return total / max(1, len(writer.tokenizer.decode(text)))
