"""Evaluate LLaDA and GPT on the text they were not trained on: `python evaluate.py --help`.

One table on standard output; in --out a report in words and pictures, and metrics.json, from which both are made.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import Checkpoint, find_checkpoints, load_checkpoint
from console import Parser, number, progress, run, say
from data import Corpus, load_corpus, validation_windows
from examine import (
    Tick,
    compare_estimators,
    compare_policies,
    compare_schedules,
    difference,
    figures,
    score,
    where_it_hurts,
)
from files import replacing
from likelihood import Likelihood
from report import write_report
from samples import Yardsticks, embeddings, examine_infilling, examine_samples, gallery, held_out_prompts
from templates import STRIDE
from train import pick_device
from unmasking import UnmaskingPolicy


@dataclass(frozen=True)
class Effort:
    """How much is measured, counted in windows of T characters."""

    windows: int  # of the validation part; evenly spaced if it has more
    pairs: int  # of complementary masks for each of them
    train_windows: int  # of the training part, to see overfitting
    policy_windows: int
    budgets: tuple[int, ...]  # a policy may spend T / each of these network evaluations
    orders: tuple[str, ...]
    thresholds: tuple[float, ...]
    samples: int  # texts of each kind
    sample_orders: tuple[str, ...]
    temperatures: tuple[float, ...]
    infillings: int

    def policies(self, T: int) -> list[UnmaskingPolicy]:
        """Each order at each budget, and thresholds, which spend what they need."""
        budgets = sorted({max(1, T // part) for part in self.budgets})
        orders = [UnmaskingPolicy(steps=steps, order=order) for order in self.orders for steps in budgets]
        return orders + [UnmaskingPolicy(steps=T, threshold=threshold) for threshold in self.thresholds]

    def kinds(self, T: int) -> list[tuple[str, int]]:
        """Orders and steps in which LLaDA's samples are written."""
        budgets = sorted({max(1, T // 16), max(1, T // 4), T})
        return [(order, steps) for order in self.sample_orders for steps in budgets]


READ = 1 << 23  # characters of a large text that are read for its words, n-grams and prompts
FULL = Effort(
    windows=8192, pairs=8, train_windows=512,
    policy_windows=16, budgets=(32, 16, 8, 4, 2, 1), thresholds=(0.7, 0.9),
    orders=("confidence", "margin", "entropy", "left", "strided", "sweep"),
    samples=32, sample_orders=("sweep", "random", "confidence"), temperatures=(1.0, 0.6), infillings=256,
)  # fmt: skip
QUICK = Effort(
    windows=512, pairs=1, train_windows=128,
    policy_windows=4, budgets=(16, 4, 1), thresholds=(0.9,), orders=("confidence", "sweep"),
    samples=8, sample_orders=("sweep",), temperatures=(1.0,), infillings=32,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- what is evaluated
def choose(paths: list[str], device: str) -> dict[str, Checkpoint]:
    """The checkpoints by model name. Raises ValueError if there are none, two of a kind, or of two texts."""
    found = paths or find_checkpoints()
    if not found:
        raise ValueError("no checkpoint under out/: train one with `python train.py`, or name its file")
    checkpoints: dict[str, Checkpoint] = {}
    for checkpoint in (load_checkpoint(path, device) for path in found):
        known = checkpoints.setdefault(checkpoint.model.name, checkpoint)
        if known is not checkpoint:
            raise ValueError(f"{known.path} and {checkpoint.path} are both {known.model.name}: give one of each")
    first, *others = checkpoints.values()
    for other in others:
        if any(other.corpus[key] != first.corpus[key] for key in ("sha256", "val_fraction")):
            raise ValueError(
                f"{first.path} ({describe(first)}) and {other.path} ({describe(other)}) were trained on different "
                "texts: evaluate them one at a time"
            )
    return {name: checkpoints[name] for name in ("llada", "gpt") if name in checkpoints}


def describe(checkpoint: Checkpoint) -> str:
    corpus = checkpoint.corpus
    return f"{corpus['name']}, SHA-256 {corpus['sha256'][:8]}, val fraction {corpus['val_fraction']:g}"


def same_corpus(checkpoint: Checkpoint, name: str | None) -> Corpus:
    """The text the checkpoint was trained on. Raises ValueError if the one found is another."""
    corpus = load_corpus(name or checkpoint.corpus["name"])
    if corpus.sha256 != checkpoint.corpus["sha256"]:
        raise ValueError(
            f"{corpus.name} is not the text {checkpoint.path} was trained on (SHA-256 {corpus.sha256[:8]}, not "
            f"{checkpoint.corpus['sha256'][:8]}): restore it, or name the file that holds it with --data"
        )
    return corpus


# ------------------------------------------------------------------------------------------------- the evaluation
class Evaluation:
    """The models on their text. Each method measures one thing and returns its entries of metrics.json."""

    def __init__(self, checkpoints: dict[str, Checkpoint], corpus: Corpus, effort: Effort, seed: int):
        first = next(iter(checkpoints.values()))
        self.checkpoints, self.corpus, self.effort, self.seed = checkpoints, corpus, effort, seed
        self.models = {name: checkpoint.model for name, checkpoint in checkpoints.items()}
        self.llada, self.tokenizer = self.models.get("llada"), first.tokenizer
        self.T = min(model.config.block_size for model in self.models.values())
        self.train, self.val = corpus.split(first.corpus["val_fraction"])
        self.windows = self.some_windows(self.val, effort.windows)
        self.train_windows = self.some_windows(self.train, effort.train_windows)
        self.results: dict[str, Likelihood] = {}

    def some_windows(self, ids: Tensor, limit: int) -> list[Tensor]:
        """At most `limit` windows, evenly spaced; if the text has no more, all of them and the short last one."""
        device = next(next(iter(self.models.values())).parameters()).device
        return [part.to(device) for part in validation_windows(ids, self.T, self.tokenizer, limit * self.T)]

    def likelihood(self, tick: Tick) -> dict:
        """The table, the masking curve, and what positions and characters cost."""
        for name, model in self.models.items():
            self.results[name] = score(model, self.windows, self.effort.pairs, self.seed, tick)
        entries = {"models": {name: figures(result, self.models[name]) for name, result in self.results.items()}}
        if len(self.results) == 2:
            entries["difference"] = difference(self.results["llada"], self.results["gpt"])
        if self.llada is not None:
            entries["masking_curve"] = self.results["llada"].curve[1:].tolist()
        positions, characters = where_it_hurts(self.results, self.windows, self.tokenizer.characters)
        return entries | {"positions": positions, "characters": characters}

    def overfitting(self, tick: Tick) -> dict:
        """The same figures on some windows of the training text."""
        results = {name: score(m, self.train_windows, 2, self.seed, tick) for name, m in self.models.items()}
        return {"training_text": {name: figures(result, self.models[name]) for name, result in results.items()}}

    def steps(self, tick: Tick) -> dict:
        """nats/char against network evaluations: by schedule (bounds) and by policy (exact)."""
        if self.llada is None:
            return {}
        bound = self.results["llada"]
        reference = self.results.get("gpt", bound)
        policies, limit = self.effort.policies(self.T), self.effort.policy_windows
        return {
            "schedules": compare_schedules(bound),
            "policies": compare_policies(self.llada, self.windows[0], limit, policies, reference, tick),
        }

    def quality(self, tick: Tick) -> dict:
        """Measures of what the models write, beside those of the validation text."""
        yardsticks = Yardsticks(self.models, self.tokenizer, self.train, self.train[:READ])
        kinds, count = self.effort.kinds(self.T), self.effort.samples
        rows = examine_samples(yardsticks, self.val, self.T, count, self.effort.temperatures, kinds, self.seed, tick)
        return {"quality": rows, "words_from": min(READ, len(self.train))}

    def gallery(self, tick: Tick) -> dict:
        """Continuations of held-out prompts."""
        prompts = held_out_prompts(self.tokenizer.decode(self.val[:READ].numpy()), 3, max(1, self.T // 4))
        steps = sorted({max(1, self.T // 8), self.T})
        return {"samples": gallery(self.models, self.tokenizer, prompts, self.T, steps, self.seed, tick)}

    def infilling(self, tick: Tick) -> dict:
        """Accuracy on held-out spans."""
        spans = [length for length in (1, 4, 16) if length < self.T]
        some = torch.linspace(0, len(self.windows[0]) - 1, min(self.effort.infillings, len(self.windows[0]))).long()
        return {"infilling": examine_infilling(self.models, self.windows[0][some], spans, tick)}

    def embedding(self, tick: Tick) -> dict:
        """Where the 100 most frequent characters stand; rare ones, hardly learned, would only mark their rarity."""
        counts = torch.bincount(self.train[:READ].int(), minlength=self.tokenizer.vocab_size).tolist()
        count_of = {c: counts[i] for c, i in self.tokenizer.char_to_id.items() if c in self.tokenizer.characters}
        characters = sorted(count_of, key=lambda c: -count_of[c])[:100]
        characters = [c for c in characters if count_of[c] >= 100] or characters
        return {"embeddings": {name: embeddings(m, characters, self.tokenizer) for name, m in self.models.items()}}

    def stages(self) -> list[tuple[str, Callable[[Tick], dict], int]]:
        """Name, method and about how many windows the networks will read in it: the measure of progress."""
        effort, T, n = self.effort, self.T, len(self.models)
        budgets = sum(policy.steps if policy.threshold is None else T // 2 for policy in effort.policies(T))
        kinds = effort.kinds(T)
        written = sum(steps + STRIDE + 1 for _, steps in kinds) + STRIDE + 2  # and judged by LLaDA and by GPT
        return [
            ("likelihood", self.likelihood, len(self.windows[0]) * (2 * effort.pairs + n)),
            ("training text", self.overfitting, len(self.train_windows[0]) * (4 + n)),
            ("policies", self.steps, budgets * min(effort.policy_windows, len(self.windows[0]))),
            ("samples", self.quality, effort.samples * (written * len(effort.temperatures) + STRIDE + 1)),
            ("gallery", self.gallery, 3 * (T + T // 8)),
            ("infilling", self.infilling, effort.infillings * 24),
            ("embeddings", self.embedding, 1),
        ]

    def run(self) -> dict:
        """The contents of metrics.json, under one progress bar."""
        metrics = {
            "corpus": self.checkpoints[next(iter(self.models))].corpus | {"characters": len(self.corpus.ids)},
            "window": self.T,
            "quick": self.effort is QUICK,
            "history": {name: checkpoint.history for name, checkpoint in self.checkpoints.items()},
        }
        stages, done = self.stages(), 0
        with progress(sum(readings for *_, readings in stages), "evaluate") as update:
            for name, measure, readings in stages:
                spent = 0

                def tick(windows: int, name=name, done=done, readings=readings) -> None:
                    nonlocal spent
                    spent = min(spent + windows, readings)
                    update(done + spent, name)

                tick(0)
                metrics |= measure(tick)
                done += readings
        return metrics


# ------------------------------------------------------------------------------------------------- command line
def print_table(metrics: dict) -> None:
    """One line a model on standard output."""
    print("model   parameters nats/char     95 % interval bits/char perplexity  kind")
    for name, m in metrics["models"].items():
        interval = "{:.4f}..{:.4f}".format(*m["ci95"]) if m["ci95"] else "-"
        kind = "upper bound" if m["is_bound"] else "exact"
        print(
            f"{name:6} {m['params']:11,} {m['nats_per_char']:9.4f} {interval:>17} {m['bits_per_char']:9.4f} "
            f"{m['perplexity']:10.4f}  {kind}"
        )


def main() -> None:
    """Load, measure, tell."""
    parser = Parser(description="Evaluate LLaDA and GPT on the text they were not trained on.")
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="at most one of each model (default: those under out/)")
    add("--out", type=Path, default=Path("out/report"), help="for report.md, metrics.json, pictures (out/report)")
    add("--quick", action="store_true", help="fewer windows, policies and samples: rougher figures, wider intervals")
    add("--data", metavar="NAME|FILE", help="where the text they were trained on is now (default: where it was)")
    add("--seed", type=number(int, low=0, high=2**63 - 1), default=0)
    add("--device", help="cpu, cuda (default: the best there is)")
    add("--compare-estimators", action="store_true", help="only compare the bound's estimator with plain Monte Carlo")
    args = parser.parse_args()
    checkpoints = choose(args.checkpoints, pick_device(args.device, float64=True))
    corpus = same_corpus(next(iter(checkpoints.values())), args.data)
    evaluation = Evaluation(checkpoints, corpus, QUICK if args.quick else FULL, args.seed)
    if args.compare_estimators:
        if evaluation.llada is None:
            raise ValueError("--compare-estimators needs a LLaDA checkpoint")
        return compare_estimators(evaluation.llada, evaluation.windows[0][:64], args.seed)
    start = time.monotonic()
    metrics = evaluation.run()
    metrics["seconds"] = time.monotonic() - start
    print_table(metrics)
    args.out.mkdir(parents=True, exist_ok=True)
    with replacing(args.out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    write_report(metrics, args.out)
    say(f"wrote {args.out}/report.md, its pictures and metrics.json")


if __name__ == "__main__":
    run(main)
