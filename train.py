"""Train LLaDA or GPT: `python train.py --help`. This file is the command line; the run itself is in trainer.py."""

import argparse
import math
import shlex
import signal
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
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
from utils.errors import ArgumentError

if TYPE_CHECKING:  # torch is imported after the arguments are parsed: --help is instant
    from checkpoint import Checkpoint
    from data import Corpus
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


# ------------------------------------------------------------------------------------------------- command line
def make_parser() -> Parser:
    """One flag for each setting that has a help text."""
    parser = Parser(description="Train LLaDA (masked diffusion) or GPT (causal) on a text.", examples=EXAMPLES)
    add_flags(parser.add_argument_group("run"), TrainRun, number)
    for title, config_class in (("network", ModelConfig), ("text and training", TrainConfig)):
        add_flags(parser.add_argument_group(f"{title} (defaults: those of the preset)"), config_class, number, False)
    return parser


def given_settings(args: argparse.Namespace) -> dict:
    """The fields of TrainConfig that the flags set."""
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in given(args, TrainConfig).items()}
    if any(name in settings for name in ENDS[:2]):  # one replaces the other
        settings = dict.fromkeys(ENDS if "steps" in settings else ENDS[:2]) | settings
    return settings | ({"segments": "pairs"} if args.pairs else {})


def new_config(args: argparse.Namespace, on_cuda: bool, base: "Checkpoint | None" = None) -> TrainConfig:
    """The preset with the flags that were given. Raises ArgumentError if they do not fit together."""
    settings = given_settings(args) | {"model": args.model or (base.model.name if base else MODELS[0])}
    state = {"model": settings["model"], "arch": args.arch or "rotary", "tokenizer": args.tokenizer or "char"}
    refuse_without_effect(args, state | {"pairs": None if args.pairs is None else "FILE"}, TrainConfig)
    if args.pairs and args.segments:
        raise ArgumentError("segments", "has no effect with --pairs: drop it")
    if args.old_data and base is None:
        raise ArgumentError("old_data", "needs --init-from")
    kept = {"compile": on_cuda}
    if base is not None:
        preset, kept = fine_tuning_preset(settings["model"]), kept | network_of(base, args)
    elif args.preset == "pretrained":
        preset = pretrained_preset(settings["model"])
    elif args.preset == "gpu" or (args.preset is None and on_cuda):
        preset = gpu_preset(settings["model"])
    else:
        minutes = args.minutes or (args.steps / LAPTOP_STEPS_PER_MINUTE if args.steps else LAPTOP_MINUTES)
        preset = laptop_preset(settings["model"], minutes)
    return replace(preset, **(kept | settings))


def network_of(base: "Checkpoint", args: argparse.Namespace) -> dict:
    """The settings of the network of --init-from. Raises ArgumentError for a flag that contradicts them."""
    network = base.model.config
    for name in (*NETWORK, "tokenizer", "preset"):
        if getattr(args, name) is not None:
            raise ArgumentError(name, f"comes with the model of {args.init_from}: drop it")
    if args.model not in (None, base.model.name):
        raise ArgumentError("model", f"{args.model}: {args.init_from} holds a {base.model.name} model")
    if args.block_size and args.block_size > network.block_size:
        raise ArgumentError("block_size", f"must be at most {network.block_size}, that of {args.init_from}")
    names = (*NETWORK, "block_size", "dropout", "ngram_dropout", "segments")
    return {name: getattr(network, name) for name in names if getattr(network, name) != "pairs"}


def changed_settings(args: argparse.Namespace, checkpoint: "Checkpoint", on_cuda: bool = False) -> dict:
    """The flags that change a run that is resumed. Raises ArgumentError for one that contradicts it."""
    settings, config = given_settings(args), checkpoint.training.get("config", {})
    if args.preset:
        raise ArgumentError("preset", "has no effect when resuming: drop it")
    for name, value in settings.items():
        if name not in MOVABLE and config and value != config[name]:
            problem = f"{value}: the run in {checkpoint.path} has {config[name]}, which cannot change: drop it"
            raise ArgumentError(name, f"{problem} (--steps or --minutes may move the end)")
    return {"compile": on_cuda} | {name: value for name, value in settings.items() if name in MOVABLE}


def run_files(args: argparse.Namespace, model: str | None) -> tuple[Path, Path | None]:
    """The run's folder, OUT/MODEL, and the checkpoint that --resume means, None for a new run.

    Without --out, a run that is resumed by its name goes on where it is. model: None if only the file tells it.
    """
    from checkpoint import RUN_FILES, checkpoint_file

    folder = (args.out or TrainRun.out) / (model or args.model or MODELS[0])
    if not args.resume:
        return folder, None if args.resume is None else folder / "last.pt"
    named = checkpoint_file(args.resume, ("last.pt",))
    return (named.parent if args.out is None and named.name in RUN_FILES else folder), named


# ------------------------------------------------------------------------------------------------- the run
def load_training_corpus(config: TrainConfig, base: "Checkpoint | None" = None) -> "Corpus":
    """The text or the pairs of a new run, with the tokenizer that it asks for; with a base, that of the base.

    A base's tokenizer of characters learns the characters that it does not know.
    """
    from data import load_corpus, training_length, training_texts
    from tokenizer import SimpleTokenizer

    def make_tokenizer(texts: Iterable[str]):
        if base is not None:
            known = base.tokenizer
            return known.extended("".join(set().union(*texts))) if isinstance(known, SimpleTokenizer) else known
        from extras.bpe import read_tokenizer, train_bpe

        if config.tokenizer != "bpe":
            return read_tokenizer(config.tokenizer)
        if config.pairs:  # texts are prompts and completions in turn
            texts = list(texts)
            return train_bpe(texts[: 2 * training_length(len(texts) // 2, config.val_fraction)], config.bpe_size)
        return train_bpe(training_texts(texts, config.val_fraction), config.bpe_size)

    if config.pairs:
        import extras.pairs  # noqa: F401 (it adds the kind of corpus)
    known_by_characters = base is None and config.tokenizer == "char"
    return load_corpus(config.pairs or config.data, None if known_by_characters else make_tokenizer, config.segments)


def start_run(args: argparse.Namespace, processes: "Processes") -> "Trainer":
    """A new run, or the one to resume with its own settings: only its end may be moved, and how a step is computed."""
    from checkpoint import load_checkpoint
    from trainer import Trainer
    from utils.devices import compile_problem

    on_cuda = processes.device.type == "cuda"
    if (on_cuda if args.compile is None else args.compile) and (problem := compile_problem(processes.device)):
        say(f"not compiled: {problem}")
        args.compile = False
    if args.resume is not None:
        checkpoint = load_checkpoint(run_files(args, None)[1], resuming=True)
        return Trainer.resume(checkpoint, processes, **changed_settings(args, checkpoint, on_cuda))
    base = load_checkpoint(args.init_from) if args.init_from else None
    config = new_config(args, on_cuda, base)
    trainer = Trainer(config, load_training_corpus(config, base), processes, base=base)
    if base is not None:
        trainer.remember_base(base, args.old_data)
    return trainer


def train(args: argparse.Namespace) -> None:
    """Train, save, score."""
    with immediate_interrupt():
        from checkpoint import CheckpointWriter, check_writable, export_weights, load_checkpoint, save_checkpoint
        from trainer import summarize
        from utils.devices import pick_device, tune_cpu
        from utils.processes import Processes

    if args.export:
        if args.export.is_dir():
            raise ArgumentError("export", f"{args.export} is a folder: name a file")
        check_writable("export", args.export.parent)
    tune_cpu()
    processes = Processes(pick_device(args.device))
    with processes.joined(), ExitStack() as stack:
        trainer = start_run(args, processes)
        model = trainer.config.model
        folder, resumed_from = run_files(args, model)
        writer = CheckpointWriter(trainer, folder, resumed_from)
        if processes.is_main:
            stack.enter_context(writer.opened())
            parameters, looked_up = trainer.model.num_parameters(), trainer.model.num_looked_up()
            share = f"{100 * looked_up / parameters:.0f} % of them rows of tables that are looked up"
            say(f"{model}: {parameters:,} parameters ({share}) on {trainer.corpus.name}, {processes}")

        def on_validation(record: dict) -> None:
            if processes.is_main:
                writer.on_validation(record)
                say_record(record, trainer)

        def after_step() -> None:
            if processes.is_main:
                writer.save_last(60 * (args.save_every or TrainRun.save_every))

        signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        with deferred_interrupt(*signals) as stopping, progress(1, "train", processes.is_main) as update:
            session = trainer.train(on_validation, update, stopping, after_step)
        if stopping() and processes.is_main:
            writer.save_last()
            say(f"stopped at step {trainer.step}; next: python {shlex.join(['train.py', '--resume', str(folder)])}")
        if stopping():
            sys.exit(128 + stopping())
        if not processes.is_main:
            return
        if not writer.best.is_file():  # resumed in another folder, where nothing was left to do
            writer.on_validation(trainer.history[-1])
        try:
            best = load_checkpoint(writer.best, resuming=True)
            if trainer.keep(best):
                save_checkpoint(writer.best, best)
            summary = summarize(trainer, session)
        except KeyboardInterrupt:
            say(f"{folder}/best.pt is complete; its final score is missing")
            raise
        writer.save_summary(summary)
        say_summary(summary, best.history[-1], trainer)
        adapters = "adapters.pt, " if trainer.config.lora_rank else ""
        say(f"wrote {folder}/best.pt, last.pt, {adapters}metrics.jsonl, summary.json")
        if args.export:
            export_weights(args.export, load_checkpoint(writer.best))
            say(f"wrote {args.export}: {args.export.stat().st_size / 1e6:.1f} MB")
        say(f"next: python {shlex.join(['generate.py', '--checkpoint', f'{folder}/best.pt'])}")


# ------------------------------------------------------------------------------------------------- messages
def say_record(record: dict, trainer: "Trainer") -> None:
    """One line for each validation: every loss by its name."""
    share = trainer.config.sweep_share
    line = "step {step:>6}  {seconds:>6.0f} s  train {train_loss:.4f}".format(**record)
    line += f" ({100 * share:.0f} % weighted for the sweep)" if share else ""
    line += "  {} {:.4f}".format("bound" if trainer.objective.is_bound else "val", record["val_loss"])
    line += "  sampler {sampler_loss:.4f}".format(**record) if "sampler_loss" in record else ""
    say(f"{line} nats/char")


def say_summary(summary: dict, best: dict, trainer: "Trainer") -> None:
    """What the run cost, the score of best.pt, and what was missing. best: the last record of its history."""
    config = trainer.config
    say("{steps:,} steps in {seconds:,.0f} s, {tokens_per_second:,.0f} tokens/s: {characters:,} characters were read, "
        "{epochs:.1f} times the text".format(**summary))  # fmt: skip
    if "temperature" in best:
        name = trainer.objective.scores[-1]
        change = f"{name} {best[name]:.4f} -> {best[f'calibrated_{name}']:.4f}"
        say(f"best.pt: step {best['step']}, calibrated at temperature {best['temperature']:.3f} ({change})")
    kind = "upper bound" if summary["is_bound"] else "exact"
    line = "validation of best.pt: {nats_per_char:.4f} nats/char, {kind}, on {chars:,} characters"
    line += " (95 % interval {:.4f}..{:.4f} over windows)".format(*summary["ci95"]) if summary["ci95"] else ""
    line += f": as unsure as among {math.exp(summary['nats_per_char']):.1f} characters"
    say(line.format(kind=kind, **summary))
    if change := summary["fine_tuning"]:
        say("fine-tuning trained {params_trainable:,} of {params:,} parameters".format(**summary))
        say("the new text: {new_before:.4f} before, {new_after:.4f} after".format(**change))
        if change["old_after"] is not None:
            say("the old text: {old_before:.4f} before, {old_after:.4f} after".format(**change))
    if summary["overfitting_since"]:
        say("overfitting since step {overfitting_since}, which is what best.pt holds: end there (--steps), or use a "
            "longer text".format(**summary))  # fmt: skip
    usual = LAPTOP_STEPS_PER_MINUTE * (config.minutes or 0)
    if not change and summary["epochs"] < (config.epochs or math.inf) and summary["steps"] < usual / 2:
        more = math.ceil(config.minutes * usual / summary["steps"])
        say(f"this run lacked steps: {summary['steps']:,}, where a usual laptop makes about {usual:,.0f} in "
            f"{config.minutes:g} minutes; here --minutes {more} would make as many")  # fmt: skip


def main() -> None:
    """Parse the arguments and train."""
    parser = make_parser()
    args = parser.parse_args()
    with parser.naming_flags():
        train(args)


if __name__ == "__main__":
    run_program(main)
