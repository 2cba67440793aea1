"""The loss of any text under each model, and the words that surprise it most: `evaluate.py --text FILE`."""

import sys
from pathlib import Path

import torch

from checkpoint import Checkpoint
from data import corpus_from_text
from evaluation.metrics import WORD
from evaluation.plots import NAMES
from evaluation.suite import objective_likelihood, rows_likelihood, samplers_of
from likelihood import Likelihood
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
    corpus = corpus_from_text("--text", text, lambda texts: tokenizer)
    rows = corpus.validation_rows(corpus.ids, model.config.block_size)
    sampler = next(iter(samplers_of(model, model.config.block_size).values()))
    written, _ = rows_likelihood(model, rows, sampler, seed)
    nats = written.token_nats.flatten()[: len(corpus.ids)]  # behind them, the last window is padded
    lengths = torch.from_numpy(tokenizer.characters_per_token[corpus.ids.numpy()])
    of_characters = (nats / lengths.clamp(min=1)).repeat_interleave(lengths)
    return written, objective_likelihood(model, rows, seed), of_characters.tolist()


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
        of_words = {m.span(): sum(nats[m.start() : m.end()]) for m in WORD.finditer(text)}
        spans, shown = sorted(of_words, key=of_words.get, reverse=True), list(printable(text))
        print("  ".join(f"{text[a:b]} {of_words[a, b]:.1f}" for a, b in spans[:LISTED]), "(nats)\n")
        for a, b in spans[: max(1, round(MARKED * len(spans)))]:
            shown[a] = before + shown[a]
            shown[b - 1] += after
        print("".join(shown).rstrip("\n") + "\n")
