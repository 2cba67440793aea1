"""The evaluation: which checkpoints and text, and what is measured, in stages. The result is metrics.json."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import data
from checkpoint import Checkpoint, load_checkpoint
from data import Corpus, Rows, validation_rows
from evaluation.likelihoods import (
    curve_half_widths,
    likelihood_figures,
    loss_by_character,
    loss_by_position,
    paired_difference,
    position_half_widths,
)
from evaluation.policies import compare_policies, compare_schedules
from evaluation.samples import SampleMetrics, continue_prompts, measure_infilling, measure_samples, validation_prompts
from evaluation.settings import QUICK, EvaluationSettings
from likelihood import Likelihood, monotone
from model import MODELS
from tokenizer import SimpleTokenizer
from trainer import objective_for, scoring_batch_size
from unmasking import STRIDE
from utils.console import progress, say
from utils.counter import EvaluationCounter

MOST_READ = 1 << 23  # characters of a large text that are read for its words, n-grams and prompts
TRAIN_PAIRS = 2  # of masks for each window of the training text
SPANS = (1, 4, 16)  # characters to infill
PROMPTS = 3


# ------------------------------------------------------------------------------------------------- what is evaluated
def select_checkpoints(paths: list[str], device: str) -> dict[str, Checkpoint]:
    """The checkpoints by model name, LLaDA first. Raises ValueError if two are of one model, or of different texts."""
    checkpoints: dict[str, Checkpoint] = {}
    for checkpoint in (load_checkpoint(path, device) for path in paths):
        first = checkpoints.setdefault(checkpoint.model.name, checkpoint)
        if first is not checkpoint:
            raise ValueError(f"{first.path} and {checkpoint.path} are both {first.model.name}: give one of each")
    first, *others = checkpoints.values()
    for other in others:
        for what, a, b in (
            ("segments", first.model.config.segments, other.model.config.segments),
            ("tokenizers", first.tokenizer.to_dict(), other.tokenizer.to_dict()),
        ):
            if a != b:
                raise ValueError(f"{first.path} and {other.path} have different {what}: evaluate them one at a time")
    for other in others:
        if any(other.corpus[key] != first.corpus[key] for key in ("sha256", "val_fraction")):
            texts = (
                "{path} ({name}, SHA-256 {sha256:.8}, val fraction {val_fraction:g})".format(path=c.path, **c.corpus)
                for c in (first, other)
            )
            raise ValueError(f"{' and '.join(texts)} were trained on different texts: evaluate them one at a time")
    return {name: checkpoints[name] for name in MODELS if name in checkpoints}


def load_same_corpus(checkpoint: Checkpoint, name: str | None) -> Corpus:
    """The text the checkpoint was trained on. Raises ValueError if the text found is a different one."""
    return data.load_same_corpus(checkpoint.corpus, checkpoint.model.config.segments, checkpoint.tokenizer, name)


def describe_training(checkpoint: Checkpoint) -> dict:
    """How a model was trained up to this checkpoint."""
    last = checkpoint.history[-1] if checkpoint.history else {}
    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "tokens": last.get("tokens"),
        "seconds": last.get("seconds"),
        "temperature": last.get("temperature"),
        "settings": checkpoint.training.get("config", {}),
    }


def characters_per_window(rows: Rows) -> float:
    """The mean number of characters in a row."""
    return float(rows.characters.cpu().double().mean())


# ------------------------------------------------------------------------------------------------- the evaluation
class Stage(NamedTuple):
    """A part of the evaluation. `windows`: about how many windows the networks read in it, to show progress."""

    name: str
    measure: Callable[[], dict]
    windows: int


class Evaluation:
    """The models on their text. Each method measures one thing and returns its entries of metrics.json."""

    def __init__(self, checkpoints: dict[str, Checkpoint], corpus: Corpus, settings: EvaluationSettings, seed: int):
        first = next(iter(checkpoints.values()))
        self.checkpoints, self.corpus, self.settings, self.seed = checkpoints, corpus, settings, seed
        self.models = {name: checkpoint.model for name, checkpoint in checkpoints.items()}
        self.llada, self.tokenizer, self.device = self.models.get("llada"), first.tokenizer, first.model.device
        self.T = min(model.config.block_size for model in self.models.values())
        self.segments = first.model.config.segments
        self.train, self.val = corpus.split(first.corpus["val_fraction"])
        self.rows = self.spaced_rows(self.val, settings.windows)
        self.train_rows = self.spaced_rows(self.train, settings.train_windows)
        self.results: dict[str, Likelihood] = {}

    def spaced_rows(self, part: Tensor | list, limit: int) -> list[Rows]:
        """At most `limit` rows, evenly spaced; if the text has no more, all of them and the short last window."""
        batches = validation_rows(part, self.tokenizer, self.T, self.segments, limit * self.T)
        return [rows.to(self.device) for rows in batches]

    def left_out(self) -> dict[str, str]:
        """The stages that say nothing right about these models, and why."""
        if self.segments != "window":
            why = f"rows of {self.segments} differ in length"
            return dict.fromkeys(("masking curve", "positions", "policies", "sample metrics", "infilling"), why)
        if not isinstance(self.tokenizer, SimpleTokenizer):
            why = "a subword stands for several characters"
            return dict.fromkeys(("positions", "characters", "sample metrics", "infilling"), why)
        return {}

    def some_windows(self, limit: int) -> Tensor:
        """At most `limit` of the full validation windows, evenly spaced: (N, T)."""
        windows = self.rows[0].tokens
        return windows[torch.linspace(0, len(windows) - 1, min(limit, len(windows))).long()]

    def score(self, batches: list[Rows], pairs: int) -> dict[str, Likelihood]:
        """The likelihood of the same rows under each model."""
        settings = {"pairs": pairs, "seed": self.seed}
        return {
            name: objective_for(model).likelihood(model, batches, batch_size=scoring_batch_size(model), **settings)
            for name, model in self.models.items()
        }

    def figures(self, results: dict[str, Likelihood]) -> dict[str, dict]:
        """Each model's entry in metrics.json."""
        return {name: likelihood_figures(r, self.models[name], self.tokenizer) for name, r in results.items()}

    def likelihood(self) -> dict:
        """Figures of the validation text, the masking curve, loss by position and by character."""
        self.results = self.score(self.rows, self.settings.pairs)
        entries = {"models": self.figures(self.results)}
        if len(self.results) == 2:
            entries["difference"] = paired_difference(self.results["llada"], self.results["gpt"])
        left_out = self.left_out()
        if self.llada is not None and "masking curve" not in left_out:
            scale = self.T / characters_per_window(self.rows[0])  # from tokens to characters
            curve = scale * self.results["llada"].curve
            entries["masking_curve"], entries["masking_curve_fit"] = curve[1:].tolist(), monotone(curve)[1:].tolist()
            entries["masking_curve_half_widths"] = curve_half_widths(self.results["llada"], scale)
        if "positions" not in left_out:
            entries["positions"] = loss_by_position(self.results, self.rows[0])
            entries["position_half_widths"] = position_half_widths(self.results, self.rows[0])
        if "characters" not in left_out:
            entries["characters"] = loss_by_character(self.results, self.rows, self.tokenizer)
        return entries

    def training_text(self) -> dict:
        """The same figures on windows of the training text, to see overfitting."""
        results = self.score(self.train_rows, TRAIN_PAIRS)
        return {"training_text": self.figures(results)}

    def policies(self) -> dict:
        """LLaDA's loss against network evaluations, by schedule and by policy."""
        if self.llada is None:
            return {}
        bound, policies, limit = self.results["llada"], self.settings.policies(self.T), self.settings.policy_windows
        rows = compare_policies(self.llada, self.rows[0], limit, policies, bound, self.seed)
        if not isinstance(self.tokenizer, SimpleTokenizer):  # the text has other segmentations, which are not scored
            rows = [row | {"is_bound": True} for row in rows]
        schedules = compare_schedules(bound, characters_per_window(self.rows[0]))
        return {"schedules": schedules, "policies": rows}

    def sample_metrics(self) -> dict:
        """Metrics of samples, and of as much validation text."""
        settings = self.settings
        texts = [self.tokenizer.decode(row.cpu()) for row in self.some_windows(settings.samples)]
        metrics = SampleMetrics(self.models, self.tokenizer, self.train, MOST_READ)
        kinds = settings.sample_kinds(self.T)
        rows = measure_samples(metrics, texts, self.T, settings.samples, settings.temperatures, kinds, self.seed)
        return {"sample_metrics": rows, "words_from": min(MOST_READ, len(self.train))}

    def samples(self) -> dict:
        """Continuations of lines of the validation text; of pairs, completions of their prompts."""
        if self.segments == "pairs":
            chosen = torch.linspace(0, len(self.val) - 1, min(PROMPTS, len(self.val))).long().tolist()
            prompts = [self.val[i].prompt for i in chosen]
        else:
            text = self.tokenizer.decode(self.val[:MOST_READ].numpy())
            prompts = validation_prompts(text, PROMPTS, max(1, self.T // 4))
        return {"samples": continue_prompts(self.models, self.tokenizer, prompts, self.T, self.seed)}

    def infilling(self) -> dict:
        """Accuracy on spans of the validation text."""
        windows = self.some_windows(self.settings.infillings)
        return {"infilling": measure_infilling(self.models, windows, [span for span in SPANS if span < self.T])}

    def stages(self) -> list[Stage]:
        """All stages, in order."""
        settings, T, n = self.settings, self.T, len(self.models)
        full, train = len(self.rows[0].tokens), len(self.train_rows[0].tokens)
        policy_steps = sum(policy.steps for policy in settings.policies(T))
        sample_steps = sum(kind["steps"] + STRIDE + n for kind in settings.sample_kinds(T)) + 2 * n
        stages = [
            Stage("likelihood", self.likelihood, full * (2 * settings.pairs + n)),
            Stage("training text", self.training_text, train * (2 * TRAIN_PAIRS + n)),
            Stage("policies", self.policies, policy_steps * min(settings.policy_windows, full)),
            Stage("sample metrics", self.sample_metrics, settings.samples * sample_steps * len(settings.temperatures)),
            Stage("samples", self.samples, PROMPTS * (T + STRIDE)),
            Stage("infilling", self.infilling, settings.infillings * (sum(SPANS) + n)),
        ]
        return [stage for stage in stages if stage.name not in self.left_out()]

    def run(self) -> dict:
        """The contents of metrics.json. Each stage shows its progress, and afterwards a line with its time."""
        metrics = {
            "corpus": self.checkpoints[next(iter(self.models))].corpus | {"characters": self.corpus.characters},
            "window": self.T,
            "segments": self.segments,
            "left_out": self.left_out(),
            "quick": self.settings is QUICK,
            "history": {name: checkpoint.history for name, checkpoint in self.checkpoints.items()},
            "training": {name: describe_training(checkpoint) for name, checkpoint in self.checkpoints.items()},
        }
        for name, why in self.left_out().items():
            say(f"{name}: left out, {why}")
        began = time.monotonic()
        for stage in self.stages():
            start = time.monotonic()
            with (
                progress(stage.windows * self.T, stage.name) as update,
                EvaluationCounter(*self.models.values(), update=update),
            ):
                metrics |= stage.measure()
            say(f"{stage.name}: {time.monotonic() - start:.0f} s")
        return metrics | {"seconds": time.monotonic() - began}
