"""Train LLaDA or GPT: `python train.py --help`. This file is the command line and the presets; see trainer.py."""

import argparse
import shlex
import signal
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils.console import (
    POSITIVE_INT,
    SEED,
    Parser,
    deferred_interrupt,
    immediate_interrupt,
    number,
    progress,
    run_program,
    say,
)
from utils.errors import ArgumentError

if TYPE_CHECKING:  # torch is imported after the arguments are parsed: --help is instant
    from checkpoint import Checkpoint
    from trainer import TrainConfig, Trainer
    from utils.processes import Processes

MODELS, ARCHITECTURES, OPTIMIZERS = ("llada", "gpt"), ("rotary", "vanilla"), ("muon", "adamw")
SEGMENTS = ("window", "speech", "paragraph", "line")
NETWORK = ("arch", "n_layer", "n_head", "n_embd", "ngram_rows")  # comes with the model that --init-from names
MOVABLE = ("data", "pairs", "steps", "minutes", "eval_every")  # what may change when a run is resumed
LAPTOP_MINUTES = 2.75
FINE_TUNING_MINUTES = 1.0
LAPTOP_STEPS_PER_MINUTE = 600  # about: how long --steps will take
SAMPLE_CHARACTERS = 120  # of --sample-every
PROMPT_CHARACTERS, PROMPT_SEARCH = 24, 4000  # of the prompt in the last line; tokens to look for it in
# Flags that are no fields of TrainConfig
NO_SETTINGS = ("preset", "device", "out", "export", "resume", "save_every", "sample_every")

EXAMPLES = """
python train.py
python train.py --model gpt --minutes 15
python train.py --data my_novel.txt --out novel
python train.py --resume
python train.py --init-from out/gpt/best.pt --model gpt --data my_letters.txt --out letters
"""


# ------------------------------------------------------------------------------------------------- presets
def laptop_preset(model: str, minutes: float) -> "TrainConfig":
    """The settings for so many minutes on a laptop. More time pays for a wider network and a longer context.

    More time also means more epochs, in which GPT memorizes the text unless it is regularized. LLaDA practically never
    sees the same masks twice, and is not regularized. It profits from more tokens instead, which short windows give it.
    Masks hide most n-grams of most windows, so the n-gram tables of LLaDA take a larger learning rate.

    Three quarters of LLaDA's rows are masked as its default sampler meets them. That lowers the loss of what it writes,
    and raises the bound.
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
        return replace(sized, ngram_lr=0.75, sweep_share=0.75, short_share=0.6 if minutes > 6 else 0.0)
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


def pretrained_preset(model: str) -> "TrainConfig":
    """The settings of the models in pretrained/: about an hour a model on a laptop, small tables for a small file.

    Sixteen epochs are many for GPT, so it is regularized.
    """
    from trainer import TrainConfig

    common = TrainConfig(
        model, val_fraction=0.1, n_layer=6, n_head=4, n_embd=128, block_size=256, ngram_rows=2699,
        batch_size=16, calibration=0.02, ngram_lr=0.3, steps=4000, eval_every=200,
    )  # fmt: skip
    if model == "llada":
        return common
    return replace(common, dropout=0.2, ngram_dropout=0.5, weight_decay=0.1, ngram_lr=0.015)


def fine_tuning_preset(model: str) -> "TrainConfig":
    """The settings for continuing from a trained model on a laptop: smaller steps than from scratch."""
    from trainer import TrainConfig

    return TrainConfig(model, batch_size=8, lr=0.002, ngram_lr=0.05, minutes=FINE_TUNING_MINUTES)


# ------------------------------------------------------------------------------------------------- command line
def make_parser() -> Parser:
    """All flags but NO_SETTINGS are fields of TrainConfig; those that are not given come from the preset."""
    parser = Parser(description="Train LLaDA (masked diffusion) or GPT (causal) on a text.", examples=EXAMPLES)
    add_run_flags(parser)
    add = parser.add_argument_group("text").add_argument
    add("--data", metavar="NAME|FILE", help="tinyshakespeare (default), pydoc, or a UTF-8 text file")
    add("--pairs", metavar="FILE", help='train on lines of {"prompt": ..., "completion": ...} instead of a text')
    segments = (
        "what an example is: running text (window, the default), or one speech, paragraph or line between [START] "
        "and [END]"
    )
    add("--segments", choices=SEGMENTS, help=segments)
    tokenizer = "characters (default: char), byte-level BPE trained on the training part, or a tokenizer.json"
    add("--tokenizer", metavar="char|bpe|FILE", help=tokenizer)
    vocab_size = number(int, low=261, high=1 << 20)
    add("--vocab-size", type=vocab_size, metavar="V", help="of --tokenizer bpe (default: 512)")
    val_fraction = number(float, above=0, below=1)
    add("--val-fraction", type=val_fraction, metavar="P", help="share of the text to validate on (default: 0.2)")
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--init-from", metavar="CHECKPOINT", help="start from this file or run's folder: its network, its tokenizer")
    add("--lora-rank", type=POSITIVE_INT, metavar="R", help="with --init-from: train low-rank adapters alone")
    add_network_flags(parser)
    add_optimization_flags(parser)
    return parser


def add_run_flags(parser: Parser) -> None:
    """What is trained, where, for how long, and what it says meanwhile."""
    add = parser.add_argument_group("run").add_argument
    add("--model", choices=MODELS, help="what to train (default: that of a named checkpoint, else llada)")
    preset = "sizes and length of the run (default: gpu on CUDA, else laptop; pretrained: of the models in pretrained/)"
    add("--preset", choices=("laptop", "gpu", "pretrained"), help=preset)
    add("--device", help="cpu, cuda, mps (default: the best one available)")
    out = "writes OUT/MODEL/last.pt, best.pt, metrics.jsonl, summary.json (default: out)"
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help=out)
    export = "also write the best weights alone there, in half precision"
    add("--export", type=Path, metavar="FILE", help=export)
    resume = "continue the run of this file or folder (default: OUT/MODEL/last.pt)"
    add("--resume", nargs="?", const="", metavar="CHECKPOINT", help=resume)
    add("--seed", type=SEED, metavar="N", help="of weights, windows and masks (default: 0)")
    group = parser.add_argument_group("length, and what is shown")
    length, add = group.add_mutually_exclusive_group(), group.add_argument
    length.add_argument("--steps", type=POSITIVE_INT, metavar="N", help="end after N steps")
    minutes = f"end after this time (default: {LAPTOP_MINUTES:g} on a laptop; on a GPU 5000 steps)"
    length.add_argument("--minutes", type=number(float, above=0), metavar="M", help=minutes)
    add("--eval-every", type=POSITIVE_INT, metavar="STEPS", help="validate this often (default: ten times a run)")
    save = "save at least this often, besides at validations (default: 10)"
    add("--save-every", type=number(float, above=0), default=10.0, metavar="MINUTES", help=save)
    sample = "show a short text of the model after each N-th validation, 0 never (default: 1 on a terminal, else 0)"
    add("--sample-every", type=number(int, low=0), metavar="N", help=sample)


def add_network_flags(parser: Parser) -> None:
    """The fields of ModelConfig. Defaults depend on the preset."""
    add = parser.add_argument_group("network (defaults: those of the preset)").add_argument
    add("--arch", choices=ARCHITECTURES, help="vanilla is PyTorch's encoder, for comparison (default: rotary)")
    add("--n-layer", type=POSITIVE_INT, metavar="L", help="layers")
    add("--n-head", type=POSITIVE_INT, metavar="H", help="attention heads in a layer")
    add("--n-embd", type=POSITIVE_INT, metavar="C", help="width: a multiple of the heads")
    add("--block-size", type=POSITIVE_INT, metavar="T", help="context length, in tokens")
    add("--dropout", type=number(float, low=0, below=1), metavar="P", help="of the layers")
    ngram_dropout = "of the n-gram tables, which overfit first"
    add("--ngram-dropout", type=number(float, low=0, below=1), metavar="P", help=ngram_dropout)
    parallel = "GPT: write a window in P streams at once, each with P-th of the network evaluations (default: 1)"
    add("--parallel", type=POSITIVE_INT, metavar="P", help=parallel)
    add("--ngram-rows", type=POSITIVE_INT, metavar="N", help="of each n-gram table, best a prime (default: 65521)")


def add_optimization_flags(parser: Parser) -> None:
    """The fields of TrainConfig that say how to train."""
    add = parser.add_argument_group("optimization (defaults: those of the preset)").add_argument
    batch_size = "rows in a step, over all processes and micro-batches"
    add("--batch-size", type=POSITIVE_INT, metavar="B", help=batch_size)
    accumulate = "micro-batches in a step: less memory, same result (default: 1)"
    add("--accumulate", type=POSITIVE_INT, metavar="N", help=accumulate)
    add("--optimizer", choices=OPTIMIZERS, help="of the blocks' matrices (default: muon)")
    lr = "peak learning rate of AdamW; Muon's and the embeddings' follow"
    add("--lr", type=number(float, above=0, high=1e6), metavar="R", help=lr)
    ngram_lr = "peak of the n-gram tables, per token"
    add("--ngram-lr", type=number(float, above=0, high=1e6), metavar="R", help=ngram_lr)
    add("--weight-decay", type=number(float, low=0, high=1e6), metavar="R", help="of the blocks' matrices")
    calibration = "share of the training text to hold out, on which a temperature is fitted at the end"
    add("--calibration", type=number(float, low=0, below=1), metavar="P", help=calibration)
    sweep_share = "LLaDA: share of the rows that are masked as the default sampler meets them, not at random"
    add("--sweep-share", type=number(float, low=0, below=1), metavar="P", help=sweep_share)
    short_share = "share of the run in which windows are cut in half"
    add("--short-share", type=number(float, low=0, high=1), metavar="P", help=short_share)
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")


def chosen_model(args: argparse.Namespace, named: "Checkpoint | None" = None) -> str:
    """What --model says, else the model of the checkpoint that --init-from names, else llada."""
    return args.model or (named.model.name if named else MODELS[0])


def given_settings(args: argparse.Namespace) -> dict:
    """The fields of TrainConfig that the flags set."""
    settings = {name: value for name, value in vars(args).items() if value is not None and name not in NO_SETTINGS}
    if args.steps or args.minutes:  # one replaces the other
        settings |= {"steps": args.steps, "minutes": args.minutes}
    return settings


def new_config(args: argparse.Namespace, on_cuda: bool, base: "Checkpoint | None" = None) -> "TrainConfig":
    """The preset with the flags that were given. Raises ArgumentError if they do not fit together."""
    settings = given_settings(args) | {"model": chosen_model(args, base)}
    for name in ("ngram_dropout", "ngram_rows", "ngram_lr"):
        if args.arch == "vanilla" and name in settings:
            raise ValueError(f"--{name.replace('_', '-')}: the vanilla network has no n-gram tables; drop it")
    if args.vocab_size and args.tokenizer != "bpe":
        raise ArgumentError("vocab_size", "needs --tokenizer bpe")
    if args.pairs and args.segments:
        raise ArgumentError("segments", "has no effect with --pairs: drop it")
    if args.pairs:
        settings["segments"] = "pairs"
    if base is not None:
        return fine_tuning_config(args, settings, base)
    model = settings["model"]
    if args.preset == "pretrained":
        preset = pretrained_preset(model)
    elif args.preset == "gpu" or (args.preset is None and on_cuda):
        preset = gpu_preset(model)
    else:
        minutes = args.minutes or (args.steps / LAPTOP_STEPS_PER_MINUTE if args.steps else LAPTOP_MINUTES)
        preset = laptop_preset(model, minutes)
        if settings.get("segments", "window") != "window":
            preset = replace(preset, sweep_share=0.0)  # its worth was measured on running text alone
    return replace(preset, **({"compile": on_cuda and settings.get("parallel", 1) == 1} | settings))


def fine_tuning_config(args: argparse.Namespace, settings: dict, base: "Checkpoint") -> "TrainConfig":
    """The settings of a run that starts from the model of --init-from. The flags of its network cannot be given."""
    network = base.model.config
    for name in (*NETWORK, "tokenizer", "preset"):
        if getattr(args, name) is not None:
            raise ArgumentError(name, f"comes with the model of {args.init_from}: drop it")
    if base.model.name != settings["model"]:
        raise ArgumentError("model", f"{args.model}: {args.init_from} holds a {base.model.name} model")
    if args.block_size and args.block_size > network.block_size:
        raise ArgumentError("block_size", f"must be at most {network.block_size}, that of {args.init_from}")
    preset = fine_tuning_preset(settings["model"])
    kept = {name: getattr(network, name) for name in (*NETWORK, "block_size", "dropout", "ngram_dropout", "parallel")}
    if network.segments != "pairs":
        kept["segments"] = network.segments
    return replace(preset, **(kept | settings))


def start_run(args: argparse.Namespace, processes: "Processes", start: float) -> "Trainer":
    """A new run, or the one to resume with its own settings; only its end may be moved."""
    from checkpoint import load_checkpoint
    from model import merge_lora
    from trainer import Trainer, load_training_corpus

    def clock() -> float:
        return time.monotonic() - start

    if args.resume is None:
        base = load_checkpoint(args.init_from) if args.init_from else None
        if base is not None:  # adapters of its own stay as they are; this run may train new ones
            base.model = merge_lora(base.model)
        config = new_config(args, processes.device.type == "cuda", base)
        trainer = Trainer(config, load_training_corpus(config, base), processes, clock, base)
        if base is not None:
            trainer.remember_base(base)
        return trainer
    checkpoint = load_checkpoint(resume_path(args))
    return Trainer.resume(checkpoint, processes, clock, **changed_settings(args, checkpoint))


def changed_settings(args: argparse.Namespace, checkpoint: "Checkpoint") -> dict:
    """The flags that change a run that is resumed. Raises ArgumentError for one that contradicts it."""
    settings, config = given_settings(args), checkpoint.training.get("config", {})
    if args.preset:
        raise ArgumentError("preset", "has no effect when resuming: drop it")
    for name, value in settings.items():
        if name not in MOVABLE and config and value != config[name]:
            problem = f"{value}: the run in {checkpoint.path} has {config[name]}, which cannot change: drop it"
            raise ArgumentError(name, f"{problem} (--steps or --minutes may move the end)")
    return {name: value for name, value in settings.items() if name in MOVABLE}


def resume_path(args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume means, by default the run's last.pt; None for a new run."""
    from checkpoint import checkpoint_file

    if args.resume is None:
        return None
    return checkpoint_file(args.resume, ("last.pt",)) if args.resume else args.out / chosen_model(args) / "last.pt"


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
    if change := summary["fine_tuning"]:
        say("fine-tuning trained {params_trainable:,} of {params:,} parameters".format(**summary))
        say("the new text: {new_before:.4f} before, {new_after:.4f} after".format(**change))
        if change["old_after"] is not None:
            say("the old text: {old_before:.4f} before, {old_after:.4f} after".format(**change))


def say_sample(trainer: "Trainer") -> None:
    """A short text of the model as it is now, on one line. The training does not notice: see test_train.py."""
    import torch

    from generation.flags import opening
    from generation.text import generate_text

    model, tokenizer = trainer.model.eval(), trainer.corpus.tokenizer
    prompt = opening("", model, tokenizer)
    # Texts have all lengths, for each of which a compiled network would be compiled anew.
    with torch.compiler.set_stance("force_eager") if trainer.config.compile else nullcontext():
        text = generate_text(model, tokenizer, prompt, max_out_tokens=SAMPLE_CHARACTERS)
    model.train()
    say(f"    {text.removeprefix(prompt)}".replace("\n", "↵"))


def beginning_of_a_line(trainer: "Trainer") -> str:
    """The first words of a line (or of a prompt) of the training text: one that a command line can hold."""
    part, tokenizer = trainer.corpus.split(trainer.config.val_fraction)[0], trainer.corpus.tokenizer
    text = part[0].prompt if trainer.config.pairs else tokenizer.decode(part[:PROMPT_SEARCH])
    for line in text.splitlines():
        words = line[:PROMPT_CHARACTERS].rpartition(" ")[0] if len(line) > PROMPT_CHARACTERS else line
        prompt = words or line[:PROMPT_CHARACTERS]
        if prompt.strip() and prompt.isprintable() and not prompt.startswith("-") and "[MASK" not in prompt:
            return prompt
    return ""


# ------------------------------------------------------------------------------------------------- main
def train(args: argparse.Namespace, start: float) -> None:
    """Train, save, score. `start`: when the program began, time.monotonic()."""
    with immediate_interrupt():
        from checkpoint import CheckpointWriter, export_weights, load_checkpoint
        from trainer import summarize
        from utils.devices import pick_device, tune_cpu
        from utils.processes import Processes

    if args.export and args.export.is_dir():
        raise ArgumentError("export", f"{args.export} is a folder: name a file")
    tune_cpu()
    processes = Processes(pick_device(args.device))
    with processes.joined(), ExitStack() as stack:
        trainer = start_run(args, processes, start)
        model, folder = trainer.config.model, args.out / trainer.config.model
        writer = CheckpointWriter(trainer, folder, resume_path(args))
        if processes.is_main:
            stack.enter_context(writer.opened())
            parameters, looked_up = trainer.model.num_parameters(), trainer.model.num_looked_up()
            share = f"{100 * looked_up / parameters:.0f} % of them rows of tables that are looked up"
            say(f"{model}: {parameters:,} parameters ({share}) on {trainer.corpus.name}, {processes}")
        sample_every = int(sys.stderr.isatty()) if args.sample_every is None else args.sample_every

        def on_validation(record: dict) -> None:
            if processes.is_main:
                writer.on_validation(record)
                say_record(record)
                if sample_every and len(trainer.history) % sample_every == 0:
                    say_sample(trainer)

        def after_step() -> None:
            if processes.is_main:
                writer.save_if_older(60 * args.save_every)

        with deferred_interrupt(signal.SIGTERM) as stopping, progress(1, "train", processes.is_main) as update:
            session = trainer.train(on_validation, update, stopping, after_step)
        if not processes.is_main:
            return
        if stopping():
            writer.save_last()
            command = ["train.py", "--resume", "--model", model, "--out", str(args.out)]
            say(f"stopped at step {trainer.step}; next: python {shlex.join(command)}")
            return
        try:
            summary = summarize(trainer, session)
        except KeyboardInterrupt:
            say(f"{folder}/best.pt is complete; its final score is missing")
            raise
        writer.save_summary(summary)
        say_summary(summary)
        adapters = "adapters.pt, " if trainer.config.lora_rank else ""
        say(f"wrote {folder}/best.pt, last.pt, {adapters}metrics.jsonl, summary.json")
        if args.export:
            export_weights(args.export, load_checkpoint(folder / "best.pt"))
            say(f"wrote {args.export}: {args.export.stat().st_size / 1e6:.1f} MB")
        command = ["generate.py", "--checkpoint", f"{folder}/best.pt", "--prompt", beginning_of_a_line(trainer)]
        say(f"next: python {shlex.join(command)}")


def main() -> None:
    """Parse the arguments and train."""
    start = time.monotonic() - time.process_time()  # the time of the imports counts
    parser = make_parser()
    args = parser.parse_args()
    with parser.naming_flags():
        train(args, start)


if __name__ == "__main__":
    run_program(main)
