"""Train LLaDA or GPT: `python train.py --help`. This file is the command line and the presets; see trainer.py."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils.console import POSITIVE_INT, SEED, Parser, deferred_interrupt, number, progress, run_program, say

if TYPE_CHECKING:  # torch is imported after the arguments are parsed: --help is instant
    from trainer import TrainConfig, Trainer
    from utils.processes import Processes

MODELS, ARCHITECTURES, OPTIMIZERS = ("llada", "gpt"), ("rotary", "vanilla"), ("muon", "adamw")
LAPTOP_MINUTES = 2.75
LAPTOP_STEPS_PER_MINUTE = 600  # about: how long --steps will take


# ------------------------------------------------------------------------------------------------- presets
def laptop_preset(model: str, minutes: float) -> "TrainConfig":
    """The settings for so many minutes on a laptop. More time pays for a wider network and a longer context.

    More time also means more epochs, in which GPT memorizes the text unless it is regularized. LLaDA practically never
    sees the same masks twice, and is not regularized. It profits from more tokens instead, which short windows give it.
    Masks hide most n-grams of most windows, so the n-gram tables of LLaDA take a larger learning rate.
    """
    from trainer import TrainConfig

    common = TrainConfig(model, n_layer=4, n_head=2, batch_size=8, calibration=0.02, minutes=minutes)
    if minutes <= 1:
        sized = replace(common, n_embd=64, block_size=256)
    elif minutes <= 6:
        sized = replace(common, n_embd=96, block_size=256)
    else:
        sized = replace(common, n_embd=128, block_size=512)
    if model == "llada":
        return replace(sized, ngram_lr=0.75, short_share=0.6 if minutes > 6 else 0.0)
    if minutes <= 1:
        return sized
    if minutes <= 6:
        return replace(sized, ngram_dropout=0.2)
    return replace(sized, ngram_lr=0.015, ngram_dropout=0.5, weight_decay=0.1)


def gpu_preset(model: str) -> "TrainConfig":
    """The settings for a GPU: the layers of nanoGPT's TinyShakespeare model, and its 5000 steps."""
    from trainer import TrainConfig

    return TrainConfig(
        model, n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2,
        batch_size=64, ngram_lr=0.004, weight_decay=0.1, calibration=0.02, steps=5000,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- command line
def make_parser() -> Parser:
    """All flags but the first four are fields of TrainConfig; those that are not given come from the preset."""
    parser = Parser(description="Train LLaDA (masked diffusion) or GPT (causal) on a text.")
    add = parser.add_argument
    add("--preset", choices=("laptop", "gpu"), help="sizes and length of the run (default: gpu on CUDA, else laptop)")
    add("--device", help="cpu, cuda, mps (default: the best one available)")
    add("--out", type=Path, default=Path("out"), help="writes OUT/MODEL/last.pt, best.pt, metrics.jsonl (default: out)")
    add("--resume", nargs="?", const="", metavar="CHECKPOINT", help="continue a run (default: OUT/MODEL/last.pt)")
    add("--model", choices=MODELS, default="llada")
    add("--data", metavar="NAME|FILE", help="tinyshakespeare (default), pydoc, or a UTF-8 text file")
    add("--val-fraction", type=number(float, above=0, below=1), help="share of the text to validate on (default: 0.2)")
    add("--arch", choices=ARCHITECTURES, help="network (default: rotary)")
    add("--n-layer", type=POSITIVE_INT)
    add("--n-head", type=POSITIVE_INT)
    add("--n-embd", type=POSITIVE_INT)
    add("--block-size", type=POSITIVE_INT, help="context length, in characters")
    add("--dropout", type=number(float, low=0, below=1))
    add("--ngram-dropout", type=number(float, low=0, below=1), help="dropout of the n-gram tables, which overfit first")
    add("--ngram-rows", type=POSITIVE_INT, help="rows of each n-gram table, best a prime (default: 65521)")
    add("--batch-size", type=POSITIVE_INT, help="windows in a step, over all processes and micro-batches")
    add("--accumulate", type=POSITIVE_INT, help="micro-batches in a step: less memory, same result")
    add("--optimizer", choices=OPTIMIZERS, help="of the blocks' matrices (default: muon)")
    add("--lr", type=number(float, above=0), help="peak learning rate of AdamW; Muon's and the embeddings' follow")
    add("--ngram-lr", type=number(float, above=0), help="peak learning rate of the n-gram tables, per token")
    add("--weight-decay", type=number(float, low=0), help="of the blocks' matrices")
    add("--calibration", type=number(float, low=0, below=1),
        help="share of the training text to hold out, on which a temperature is fitted at the end")  # fmt: skip
    add("--short-share", type=number(float, low=0, high=1), help="share of the run in which windows are cut in half")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=POSITIVE_INT, help="length of the run in steps")
    length.add_argument("--minutes", type=number(float, above=0), help="length of the run in time")
    add("--eval-every", type=POSITIVE_INT, metavar="STEPS", help="validate this often (default: ten times a run)")
    add("--seed", type=SEED)
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    return parser


def given_settings(args: argparse.Namespace) -> dict:
    """The fields of TrainConfig that the flags set."""
    others = ("preset", "device", "out", "resume")
    settings = {name: value for name, value in vars(args).items() if value is not None and name not in others}
    if args.steps or args.minutes:  # one replaces the other
        settings |= {"steps": args.steps, "minutes": args.minutes}
    return settings


def new_config(args: argparse.Namespace, on_cuda: bool) -> "TrainConfig":
    """The preset with the flags that were given. Raises ArgumentError if they do not fit together."""
    settings = given_settings(args)
    for name in ("ngram_dropout", "ngram_rows", "ngram_lr"):
        if args.arch == "vanilla" and name in settings:
            raise ValueError(f"--{name.replace('_', '-')}: the vanilla network has no n-gram tables; drop it")
    if args.preset == "gpu" or (args.preset is None and on_cuda):
        preset = gpu_preset(args.model)
    else:
        minutes = args.minutes or (args.steps / LAPTOP_STEPS_PER_MINUTE if args.steps else LAPTOP_MINUTES)
        preset = laptop_preset(args.model, minutes)
    return replace(preset, **({"compile": on_cuda} | settings))


def start_run(args: argparse.Namespace, processes: "Processes", start: float) -> "Trainer":
    """A new run, or the one to resume with its own settings; only its end may be moved."""
    from checkpoint import load_checkpoint
    from data import load_corpus
    from trainer import Trainer

    def clock() -> float:
        return time.monotonic() - start

    if args.resume is None:
        config = new_config(args, on_cuda=processes.device.type == "cuda")
        return Trainer(config, load_corpus(config.data), processes, clock)
    changes = {name: value for name, value in given_settings(args).items() if name != "model"}
    for name in (*changes, *(["preset"] if args.preset else [])):
        if name not in ("data", "steps", "minutes", "eval_every"):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} cannot change when resuming: drop it (--steps or --minutes may move the end)")
    return Trainer.resume(load_checkpoint(resume_path(args)), processes, clock, **changes)


def resume_path(args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume means, by default the run's last.pt; None for a new run."""
    return None if args.resume is None else Path(args.resume or args.out / args.model / "last.pt")


# ------------------------------------------------------------------------------------------------- messages
def say_record(record: dict) -> None:
    """One line for each validation."""
    line = "step {step:>6}  {seconds:>6.0f} s  train {train_loss:.4f}  val {val_loss:.4f} nats/char".format(**record)
    if "temperature" in record:
        line += ", {calibrated_val_loss:.4f} calibrated at temperature {temperature:.3f}".format(**record)
    say(line)


def say_summary(summary: dict) -> None:
    """What the run cost and its final score."""
    kind = "upper bound" if summary["is_bound"] else "exact"
    say("{params:,} parameters trained on {tokens:,} tokens: {epochs:.1f} epochs, {tokens_per_param:.2g} tokens per "
        "parameter".format(**summary))  # fmt: skip
    say("{flops:.3g} FLOPs = {pfs_days:.2g} petaFLOP/s-days, at {tokens_per_second:,.0f} tokens/s = ".format(**summary)
        + f"{summary['flops_per_second'] / 1e9:.1f} GFLOP/s")  # fmt: skip
    line = "validation: {nats_per_char:.4f} nats/char, {kind}, on {chars:,} characters".format(kind=kind, **summary)
    if summary["ci95"]:
        line += " (95 % interval {:.4f}..{:.4f} over windows)".format(*summary["ci95"])
    say(line)


# ------------------------------------------------------------------------------------------------- main
def train(args: argparse.Namespace, start: float) -> None:
    """Train, save, score. `start`: when the program began, time.monotonic()."""
    from checkpoint import CheckpointWriter
    from trainer import summarize
    from utils.devices import pick_device, tune_cpu
    from utils.processes import Processes

    tune_cpu()
    processes = Processes(pick_device(args.device))
    with processes.joined(), deferred_interrupt() as stopping:
        trainer = start_run(args, processes, start)
        model, folder = trainer.config.model, args.out / trainer.config.model
        writer = CheckpointWriter(trainer, folder, resume_path(args))
        if processes.is_main:
            parameters, looked_up = trainer.model.num_parameters(), trainer.model.num_looked_up()
            share = f"{100 * looked_up / parameters:.0f} % of them rows of tables that are looked up"
            say(f"{model}: {parameters:,} parameters ({share}) on {trainer.corpus.name}, {processes}")

        def on_validation(record: dict) -> None:
            if processes.is_main:
                writer.on_validation(record)
                say_record(record)

        with progress(1, "train", processes.is_main and sys.stderr.isatty()) as update:
            session = trainer.train(on_validation, update, stopping)
        if not processes.is_main:
            return
        if stopping():
            writer.save_last()
            say(f"stopped at step {trainer.step}; next: python train.py --resume --model {model} --out {args.out}")
            return
        summary = summarize(trainer, session)
        writer.save_summary(summary)
        say_summary(summary)
        say(f"wrote {folder}/best.pt, last.pt, metrics.jsonl, summary.json")
        say(f"next: python generate.py --checkpoint {folder}/best.pt")


def main() -> None:
    """Parse the arguments and train."""
    start = time.monotonic() - time.process_time()  # the time of the imports counts
    parser = make_parser()
    args = parser.parse_args()
    with parser.naming_flags():
        train(args, start)


if __name__ == "__main__":
    run_program(main)
