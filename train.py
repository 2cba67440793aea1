"""Train LLaDA or GPT: `python train.py --help`. This file is the command line; the run itself is in trainer.py."""

import argparse
import json
import math
import shlex
import signal
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from config import (
    LAPTOP_MINUTES,
    LAPTOP_STEPS_PER_MINUTE,
    MODELS,
    ModelConfig,
    TrainConfig,
    TrainRun,
    add_flags,
    fine_tuning_preset,
    given,
    gpu_preset,
    laptop_preset,
    pretrained_preset,
    refuse_without_effect,
)
from utils.console import Parser, deferred_interrupt, immediate_interrupt, number, progress, run_program, say
from utils.errors import ArgumentError, check_number

if TYPE_CHECKING:  # torch is imported after the arguments are parsed: --help is instant
    from checkpoint import Checkpoint
    from data import Corpus
    from tokenizer import Tokenizer
    from trainer import Trainer
    from utils.processes import Processes

NETWORK = ("arch", "n_layer", "n_head", "n_embd", "ngram_rows", "ngram_width")  # comes with the model of --init-from
ENDS = ("steps", "minutes", "epochs")
MOVABLE = ("data", "pairs", "eval_every", "compile", "accumulate", *ENDS)  # what may change when a run is resumed
EXAMPLES = """
python train.py
python train.py --model gpt --minutes 15
python train.py --data my_novel.txt --out novel
python train.py --resume
python train.py --init-from out/gpt/best.pt --data my_letters.txt --out letters
"""


# ------------------------------------------------------------------------------------------------- settings
def make_parser() -> Parser:
    """One flag for each setting that has a help text."""
    parser = Parser(description="Train LLaDA (masked diffusion) or GPT (causal) on a text.", examples=EXAMPLES)
    add_flags(parser.add_argument_group("run"), TrainRun, number)
    for title, config_class in (("network", ModelConfig), ("text and training", TrainConfig)):
        add_flags(parser.add_argument_group(f"{title} (defaults: those of the preset)"), config_class, number, False)
    return parser


def given_settings(args: argparse.Namespace, on_cuda: bool, source: "Checkpoint | None" = None) -> dict:
    """The fields of TrainConfig that the flags and the device set.

    source: the checkpoint that the run resumes or begins from. Raises ArgumentError for a flag that contradicts it.
    """
    settings = {"compile": on_cuda} | given(args, TrainConfig)
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    if args.steps or args.minutes:  # one replaces the other
        settings = dict.fromkeys(ENDS if args.steps else ENDS[:2]) | settings
    if args.pairs:
        settings.setdefault("segments", "pairs")
    if source is None:
        return settings
    fixed = {"preset": "its own", "tokenizer": "its own", "model": source.model.name}
    if args.resume is not None:
        fixed |= {name: value for name, value in source.training.get("config", {}).items() if name not in MOVABLE}
    else:
        fixed |= {name: getattr(source.model.config, name) for name in NETWORK}
        check_number("block_size", args.block_size or 1, high=source.model.config.block_size)
    for name, value in (settings | {"preset": args.preset}).items():
        if name in fixed and value not in (None, fixed[name]):
            problem = f"{value}: the run in {source.path} has {fixed[name]}, which cannot change: drop it"
            raise ArgumentError(name, problem)
    return settings


def new_config(args: argparse.Namespace, on_cuda: bool, base: "Checkpoint | None" = None) -> TrainConfig:
    """A preset, or that of fine-tuning with the network of `base`, and the flags that were given.

    Raises ArgumentError if they do not fit together.
    """
    settings = given_settings(args, on_cuda, base)
    model = settings.setdefault("model", base.model.name if base else MODELS[0])
    if base is not None:
        network = base.model.config.to_dict()
        if network["segments"] == "pairs":  # of this model and not of the new text
            del network["segments"]
        preset, settings = fine_tuning_preset(model), network | settings
    else:
        minutes = args.minutes or (args.steps / LAPTOP_STEPS_PER_MINUTE if args.steps else LAPTOP_MINUTES)
        laptop = partial(laptop_preset, minutes=minutes)
        presets = {"laptop": laptop, "gpu": gpu_preset, "pretrained": pretrained_preset}
        preset = presets[args.preset or ("gpu" if on_cuda else "laptop")](model)
    state = {name: settings.get(name, getattr(preset, name)) for name in ("model", "arch", "tokenizer")}
    refuse_without_effect(args, state | {"pairs": None if args.pairs is None else "FILE"}, TrainConfig)
    return replace(preset, **settings)


# ------------------------------------------------------------------------------------------------- the run
def make_tokenizer(config: TrainConfig, base: "Checkpoint | None", texts: Iterable[str]) -> "Tokenizer":
    """That of a base, which learns the characters that it does not know, or subwords of the training part alone."""
    from data import training_length, training_texts

    if base is not None:
        known = base.tokenizer
        return known.extended("".join(set(chain.from_iterable(texts)))) if known.is_exact else known
    from extras.bpe import read_tokenizer, train_bpe

    if config.tokenizer != "bpe":
        return read_tokenizer(config.tokenizer)
    if not config.pairs:
        return train_bpe(training_texts(texts, config.val_fraction), config.bpe_size)
    texts = list(texts)  # prompts and completions in turn
    return train_bpe(texts[: 2 * training_length(len(texts) // 2, config.val_fraction)], config.bpe_size)


def load_training_corpus(config: TrainConfig, base: "Checkpoint | None" = None) -> "Corpus":
    """The text or the pairs of a new run. base: the checkpoint that it begins from, if any."""
    from data import load_corpus

    if config.pairs:
        import extras.pairs  # noqa: F401 (it adds the kind of corpus)
    own_characters = base is None and config.tokenizer == "char"
    tokenizer = None if own_characters else partial(make_tokenizer, config, base)
    return load_corpus(config.pairs or config.data, tokenizer, config.segments)


def start_run(args: argparse.Namespace, resumed: Path | None, processes: "Processes") -> "Trainer":
    """A new run, or the one to resume with its own settings: only its end may be moved, and how a step is computed."""
    from checkpoint import load_checkpoint
    from trainer import Trainer
    from utils.devices import compile_problem

    on_cuda = processes.device.type == "cuda"
    if (on_cuda if args.compile is None else args.compile) and (problem := compile_problem(processes.device)):
        say(f"not compiled: {problem}")
        args.compile = False
    if resumed is not None:
        checkpoint = load_checkpoint(resumed, resuming=True)
        return Trainer.resume(checkpoint, processes, **given_settings(args, on_cuda, checkpoint))
    base = load_checkpoint(args.init_from) if args.init_from else None
    config = new_config(args, on_cuda, base)
    return Trainer(config, load_training_corpus(config, base), processes, base=base)


def train(args: argparse.Namespace) -> None:
    """Train, save, score."""
    with immediate_interrupt():
        from checkpoint import RUN_FILES, CheckpointWriter, check_writable, checkpoint_file, export_weights
        from trainer import summarize
        from utils.devices import pick_device, tune_cpu
        from utils.processes import Processes

    if args.export:
        if args.export.is_dir():
            raise ArgumentError("export", f"{args.export} is a folder: name a file")
        check_writable("export", args.export.parent)
    tune_cpu()
    processes, runs, resumed = Processes(pick_device(args.device)), args.out or TrainRun.out, None
    if args.resume is not None:
        resumed = checkpoint_file(args.resume or runs / (args.model or MODELS[0]), ("last.pt",))
    with processes.joined(), ExitStack() as stack:
        trainer = start_run(args, resumed, processes)
        folder = runs / trainer.config.model
        if resumed and args.out is None and resumed.name in RUN_FILES:  # a run that is named goes on where it is
            folder = resumed.parent
        writer = CheckpointWriter(trainer, folder, resumed)
        if processes.is_main:
            stack.enter_context(writer.opened())
            parameters = f"{trainer.model.num_parameters():,} parameters"
            say(f"{trainer.config.model}: {parameters} on {trainer.corpus.name}, {processes}")

        def on_validation(record: dict) -> None:
            if processes.is_main:
                writer.on_validation(record)
                say_record(record, trainer)

        def after_step() -> None:
            if processes.is_main:
                writer.save_last(60 * (args.save_every or TrainRun.save_every))

        signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        with deferred_interrupt(*signals) as stopping, progress(1, "train", processes.is_main) as update:
            trainer.train(on_validation, update, stopping, after_step)
        if stopping():
            if processes.is_main:
                writer.save_last()
                command = shlex.join(["train.py", "--resume", str(folder)])
                say(f"stopped at step {trainer.step}; next: python {command}")
            sys.exit(128 + stopping())
        if not processes.is_main:
            return
        if not writer.best.is_file():  # resumed in another folder, where nothing was left to do
            writer.on_validation(trainer.history[-1])
        best = trainer.keep(writer.best)
        summary = summarize(trainer)
        writer.write_text("summary.json", json.dumps(summary, indent=2) + "\n")
        say_summary(summary, best.history[-1], trainer.config)
        say(f"wrote best.pt, last.pt, metrics.jsonl and summary.json to {folder}")
        if args.export:
            export_weights(args.export, best)
            say(f"wrote {args.export}: {args.export.stat().st_size / 1e6:.1f} MB")
        answer = ["--chat"] if trainer.config.segments == "pairs" else []  # to prompts, which such a model needs
        say(f"next: python {shlex.join(['generate.py', '--checkpoint', f'{folder}/best.pt', *answer])}")


# ------------------------------------------------------------------------------------------------- messages
def say_record(record: dict, trainer: "Trainer") -> None:
    """One line for each validation: every loss by its name."""
    share = trainer.config.sweep_share
    line = "step {step:>6}  {seconds:>6.0f} s  train {train_loss:.4f}".format(**record)
    line += f" ({100 * share:.0f} % weighted for the sweep)" if share else ""
    line += "  {} {:.4f}".format("bound" if trainer.objective.is_bound else "val", record["val_loss"])
    line += "  sampler {sampler_loss:.4f}".format(**record) if "sampler_loss" in record else ""
    say(f"{line} nats/char")


def say_summary(summary: dict, best: dict, config: TrainConfig) -> None:
    """What the run cost, the score of best.pt, and what was missing. best: the last record of its history."""
    cost = "{steps:,} steps in {seconds:,.0f} s, {characters:,} characters read: {epochs:.1f} times the text"
    say(cost.format(**summary))
    if "temperature" in best:
        say("best.pt: step {step}, calibrated at temperature {temperature:.3f}".format(**best))
    kind = "upper bound" if summary["is_bound"] else "exact"
    line = "validation of best.pt: {nats_per_char:.4f} nats/char, {kind}, on {chars:,} characters"
    line += " (95 % interval {:.4f}..{:.4f} over windows)".format(*summary["ci95"]) if summary["ci95"] else ""
    line += f": as unsure as among {math.exp(summary['nats_per_char']):.1f} characters"
    say(line.format(kind=kind, **summary))
    if tuned := summary["fine_tuning"]:
        trained = "fine-tuning trained {params_trainable:,} of {params:,} parameters".format(**summary)
        say(f"{trained}; the new text was {tuned['new_before']:.4f} nats/char before")
    if summary["overfitting_since"]:
        advice = "end there (--steps), or use a longer text"
        say(f"overfitting since step {summary['overfitting_since']}, which is what best.pt holds: {advice}")
    usual = LAPTOP_STEPS_PER_MINUTE * (config.minutes or 0)
    if not tuned and summary["epochs"] < (config.epochs or math.inf) and summary["steps"] < usual / 2:
        minutes = math.ceil(config.minutes * usual / summary["steps"])
        say(f"the run lacked steps: a usual laptop makes {usual:,.0f} in this time; here --minutes {minutes} would do")


def main() -> None:
    """Parse the arguments and train."""
    parser = make_parser()
    args = parser.parse_args()
    with parser.naming_flags():
        train(args)


if __name__ == "__main__":
    run_program(main)
