"""The loss of any text under each model, and the words that surprise it most: `evaluate.py --text FILE`."""

import re
import sys
from pathlib import Path

import torch

from checkpoint import Checkpoint
from data import corpus_from_text
from evaluation.metrics import WORD
from evaluation.plots import NAMES
from evaluation.suite import sampler_likelihood, samplers_of
from likelihood import Likelihood
from trainer import objective_of, scoring_batch_size
from utils.console import printable
from utils.files import FileText

MARKED, LISTED = 0.1, 5  # share of the words that are marked, and how many are listed


def score_text(checkpoint: Checkpoint, text: str, seed: int = 0) -> tuple[Likelihood, Likelihood, list[float]]:
    """A text under the model's default sampler (exact, at temperature 1), under its objective (LLaDA: the upper bound),
    and the sampler's nats of each character: subwords share theirs among their characters.

    Raises ValueError for models of segments, for an empty text and for unknown characters.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if model.config.segments != "window":
        raise ValueError(f"{checkpoint.path}: a model of {model.config.segments} cannot score a running text")
    corpus, parts = corpus_from_text("--text", text, lambda texts: tokenizer), []
    batches = [rows.to(model.device) for rows in corpus.validation_rows(corpus.ids, model.config.block_size)]
    for rows in batches:
        config = next(iter(samplers_of(model, rows.tokens.shape[1]).values()))
        parts.append(sampler_likelihood(model, rows.tokens, config, seed)[0].per(rows.characters))
    nats = torch.cat([part.token_nats.flatten() for part in parts])
    lengths = torch.from_numpy(tokenizer.characters_per_token[corpus.ids.numpy()])
    of_characters = (nats / lengths.clamp(min=1)).repeat_interleave(lengths)
    bound = objective_of(model).likelihood(model, batches, batch_size=scoring_batch_size(model), seed=seed)
    return Likelihood.join(parts), bound, of_characters.tolist()


def print_text(checkpoints: dict[str, Checkpoint], path: str, seed: int = 0) -> None:
    """For each model its loss in nats/char, the words that surprise it most, and the text with these marked."""
    text = "".join(FileText(Path(path)))
    if not text:
        raise ValueError(f"{path}: the text is empty")
    before, after = ("\x1b[7m", "\x1b[0m") if sys.stdout.isatty() else ("[", "]")
    for name, checkpoint in checkpoints.items():
        try:
            written, bound, nats = score_text(checkpoint, text, seed)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        kind = "exact" if checkpoint.tokenizer.is_exact else "upper bound: of one segmentation"
        beside = f"; {bound.nats_per_char:.4f} in random order (upper bound)" * bound.is_bound
        print(f"{NAMES[name]}: {written.nats_per_char:.4f} nats/char ({kind}){beside}")
        words = sorted(WORD.finditer(text), key=lambda m: -sum(nats[m.start() : m.end()]))
        marked = {m.start() for m in words[: max(1, round(MARKED * len(words)))]}
        print("  ".join(f"{m[0]} {sum(nats[m.start() : m.end()]):.1f}" for m in words[:LISTED]), "(nats)\n")

        def mark(word: re.Match, marked=marked) -> str:
            return before + word[0] + after if word.start() in marked else word[0]

        print(WORD.sub(mark, printable(text)).rstrip("\n") + "\n")
