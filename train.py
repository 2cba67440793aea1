"""Train LLaDA or GPT: `python train.py --help`.

The loop is `train_loop`. Everything random is drawn on the CPU for the whole global batch and then shared out: one
process, several processes and accumulated micro-batches see the same numbers, and a resumed run repeats one that was
never interrupted.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

import console
from autoregressive import causal_inputs, compute_gpt_loss
from checkpoint import load_checkpoint
from console import POSITIVE_INT, Parser, deferred_interrupt, number, progress, say
from data import load_corpus, validation_windows
from diffusion import compute_llada_loss, density_of_t, forward_process, sample_t
from examine import finite, score
from likelihood import Likelihood
from model import CONFIGS, ENCODERS, MODELS
from optim import learning_rate_factor, set_learning_rate
from parallel import Processes
from run import Keeper, Run, Settings
from tokenizer import MASK_ID, START_ID

FINAL_CHARS = 1 << 18  # scored at the end: all of TinyShakespeare's validation part,
NEWTON_STEPS = 6  # from temperature 1 to the best one
FINAL_PAIRS = 2  # each window of LLaDA's under so many pairs of masks
T_POWER = 2.0  # t = u^2: lightly masked windows are the noisy ones (a token weighs 1/t), so draw them more often
PRESETS = {
    "laptop": {"n_layer": 4, "n_head": 2, "block_size": 256, "batch_size": 8, "minutes": 2.75,
               "calibration": 0.02},
    "gpu": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "steps": 5000,
            "dropout": 0.2, "weight_decay": 0.1, "ngram_lr": 0.004, "calibration": 0.02},
}  # fmt: skip

# The laptop preset up to so many minutes, for both models, and what GPT needs not to learn a text by heart: the longer,
# the more epochs. More time pays for more width and a longer context. LLaDA never sees the same masks twice: for as
# long as this was tried, dropout only cost it. It is short of tokens instead, and short windows give it more of them.
LAPTOP_SIZES = (  # minutes, of both, of GPT, of LLaDA
    (1.0, {"n_embd": 64}, {}, {}),
    (6.0, {"n_embd": 96}, {"ngram_dropout": 0.2}, {}),
    (
        float("inf"),
        {"n_embd": 128, "block_size": 512},
        {"ngram_lr": 0.015, "ngram_dropout": 0.5, "weight_decay": 0.1},
        {"short_share": 0.6},
    ),
)
LAPTOP_STEPS_A_MINUTE = 600  # about: tells how long --steps will take
LLADA_NGRAM_LR = 0.75  # on a laptop; masks hide most n-grams of most windows, the others may move farther


# ------------------------------------------------------------------------------------------------- what is minimized
def make_batch(name: str, sequences: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(B, T) windows -> tensors, B rows each, for prediction and loss. All the randomness of a step is here."""
    if name == "gpt":
        return causal_inputs(sequences, START_ID), sequences
    t = sample_t(len(sequences), generator, power=T_POWER)
    masked, mask = forward_process(sequences, t, MASK_ID, generator)
    return masked, sequences, mask, t


def predict(name: str, model: torch.nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Logits where the loss wants them: (B, T, V), or LLaDA's (N, V) of the masked positions; its last MLP and head see
    no others."""
    return model(batch[0]) if name == "gpt" else model(batch[0], at=batch[2])


def compute_loss(name: str, logits: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """nats/token: exact for GPT, an upper bound for LLaDA."""
    if name == "gpt":
        return compute_gpt_loss(logits, batch[1])
    _, targets, mask, t = batch
    return compute_llada_loss(logits, targets, mask, t, density_of_t(t, T_POWER))


# ------------------------------------------------------------------------------------------------- the loop
def train_step(run: Run, model: torch.nn.Module, done: float) -> Tensor:
    """One optimizer step on one global batch, `done` of the run being over; returns its loss (nats/token), averaged
    over the processes."""
    settings, processes = run.settings, run.processes
    windows = run.sample_windows(done)
    batch = make_batch(run.model.name, windows, run.generator)
    run.flops += run.model.flops_per_token(windows.shape[1]) * windows.numel()
    total = torch.zeros((), device=processes.device)
    for part in range(settings.accumulate):
        with processes.local(model, last=part == settings.accumulate - 1), autocast(processes.device):
            shared = processes.share(batch, part, settings.accumulate)
            loss = compute_loss(run.model.name, predict(run.model.name, model, shared), shared)
            (loss / settings.accumulate).backward()
        total += loss.detach() / settings.accumulate
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total


@torch.no_grad()
def read(run: Run, windows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The model's logits on windows, under the same masks every time, and the batch they belong to."""
    run.model.eval()
    batch = make_batch(run.model.name, windows, torch.Generator().manual_seed(0))
    batch = tuple(x.to(run.processes.device) for x in batch)
    with autocast(run.processes.device):
        logits = predict(run.model.name, run.model, batch)
    run.model.train()
    return logits, batch


def validate(run: Run) -> float:
    """Loss (nats/char: exact, or one draw of the bound) on the run's windows, the same ones and masks every time."""
    return compute_loss(run.model.name, *read(run, run.val_windows)).item()


def calibrate(run: Run) -> float:
    """Divide the model's logits by the temperature at which it predicts text it has not read best; returns it.

    Who reads a text many times grows too sure on all others; one number, fitted on windows kept from training, mends
    most of that (temperature scaling, arXiv 1706.04599). The loss is convex in 1 / temperature: Newton's method.
    """
    logits, batch = read(run, run.calibration_windows)
    logits = logits.clamp(min=-1e4)  # -inf has no gradient
    scale = torch.ones((), device=logits.device, requires_grad=True)
    for _ in range(NEWTON_STEPS):
        loss = compute_loss(run.model.name, logits * scale, batch)
        (slope,) = torch.autograd.grad(loss, scale, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, scale)
        scale = (scale - slope / (curvature + 1e-9)).detach().clamp(0.25, 4).requires_grad_()  # untrained: no curvature
    with torch.no_grad():
        run.model.head.weight.mul_(scale)  # no bias: the same as dividing the logits
    return 1 / scale.item()


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where it is fast: CUDA. CPUs without it would crawl."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def train_loop(
    run: Run,
    on_validation: Callable[[dict], None] = lambda record: None,
    update: Callable[[float, str], None] = lambda progress, note: None,
    stopping: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] | None = None,
) -> None:
    """Train `run` to its end, or until stopping() after a step; both leave it where it can go on exactly.

    on_validation(record) is called for each new line of the history, update(progress, note) after each step. clock()
    gives the seconds of this session, by default from now on.
    """
    start = time.monotonic()
    clock = clock or (lambda: time.monotonic() - start)
    settings = run.settings
    model = run.processes.replicate(run.model.train())
    done = run.progress(clock())
    next_validation = done + 0.1
    while done < 1 and not run.processes.agree(stopping()):
        set_learning_rate(run.optimizers, learning_rate_factor(done))
        run.losses.append(train_step(run, model, done))
        run.step += 1
        done = run.progress(clock())
        speed = run.step * run.tokens_per_step / (run.seconds + clock())
        update(done, f"step {run.step}  loss {run.losses[-1]:.3f}  {speed:,.0f} tokens/s")
        due = run.step % settings.eval_every == 0 if settings.eval_every else done >= next_validation
        if due or done >= 1:
            next_validation += 0.1
            calibrated = {"temperature": calibrate(run)} if done >= 1 and run.calibration_windows is not None else {}
            record = {
                "step": run.step,
                "tokens": run.step * run.tokens_per_step,
                "seconds": run.seconds + clock(),
                "train_loss": run.processes.mean(torch.stack(run.losses).mean()).item(),
                "val_loss": validate(run),
                "lr": run.optimizers[-1].param_groups[0]["lr"],
                **calibrated,
            }
            run.losses.clear()
            run.history.append(record)
            on_validation(record)


# ------------------------------------------------------------------------------------------------- what came of it
def score_validation(run: Run) -> Likelihood:
    """Exact (GPT) or bound (LLaDA) on the whole validation part, or on FINAL_CHARS evenly spaced characters of it."""
    windows = validation_windows(run.val_ids, run.model.config.block_size, run.corpus.tokenizer, FINAL_CHARS)
    windows, read = [part.to(run.processes.device) for part in windows], 0
    with progress(len(windows[0]) * (1 if run.model.causal else 2 * FINAL_PAIRS), "validate") as update:

        def tick(count: int) -> None:
            nonlocal read
            read += count
            update(read, "")

        return score(run.model.eval(), windows, FINAL_PAIRS, 0, tick)


def summarize(run: Run, steps: int, flops: float, seconds: float) -> dict:
    """What the run cost and came to. Speed is that of the last `steps` steps of `flops`, which took `seconds`."""
    params, tokens = run.model.num_parameters(), run.step * run.tokens_per_step
    result = score_validation(run)
    return {
        "params": params,
        "tokens": tokens,
        "epochs": tokens / len(run.train_set.ids),
        "tokens_per_param": tokens / params,
        "flops": run.flops,
        "pfs_days": run.flops / (1e15 * 86400),
        "tokens_per_second": steps * run.tokens_per_step / seconds,
        "flops_per_second": flops / seconds,
        "nats_per_char": result.nats_per_char,
        "ci95": finite(result.ci95),
        "is_bound": result.is_bound,
        "chars": int(result.lengths.sum()),
    }


def report(summary: dict) -> None:
    """Say it in words."""
    kind = "upper bound" if summary["is_bound"] else "exact"
    say("{params:,} parameters saw {tokens:,} tokens: {epochs:.1f} epochs, {tokens_per_param:.1f} tokens a parameter "
        "(Chinchilla's optimum is about 20)".format(**summary))  # fmt: skip
    say("{flops:.3g} FLOPs = {pfs_days:.2g} petaFLOP/s-days, at {tokens_per_second:,.0f} tokens/s = ".format(**summary)
        + f"{summary['flops_per_second'] / 1e9:.1f} GFLOP/s")  # fmt: skip
    interval = summary["ci95"] and " (95 % interval {:.4f}..{:.4f} over windows)".format(*summary["ci95"])
    say("validation: {nats_per_char:.4f} nats/char, {kind}, on {chars:,} characters".format(kind=kind, **summary)
        + (interval or ""))  # fmt: skip


# ------------------------------------------------------------------------------------------------- command line
def parse_arguments() -> argparse.Namespace:
    """The flags; whatever is not given comes from the preset."""
    parser = Parser(description="Train LLaDA (masked diffusion) or GPT (causal) on a text.")
    add = parser.add_argument
    add("--model", choices=MODELS, default="llada")
    add("--data", metavar="NAME|FILE", help="tinyshakespeare (default), pydoc, or a UTF-8 text file")
    add("--val-fraction", type=number(float, above=0, below=1), help="share of the text to validate on (default 0.2)")
    add("--preset", choices=PRESETS, help="sizes and schedule (default: gpu if there is one, else laptop)")
    add("--arch", choices=ENCODERS)
    add("--n-layer", type=POSITIVE_INT)
    add("--n-head", type=POSITIVE_INT)
    add("--n-embd", type=POSITIVE_INT)
    add("--block-size", type=POSITIVE_INT, help="context, in characters")
    add("--dropout", type=number(float, low=0, below=1))
    add("--ngram-dropout", type=number(float, low=0, below=1), help="of the n-gram tables, which overfit first")
    add("--ngram-rows", type=POSITIVE_INT, help="of each n-gram table; best a prime")
    add("--batch-size", type=POSITIVE_INT, help="windows a step, over all processes and micro-batches")
    add("--accumulate", type=POSITIVE_INT, help="micro-batches a step: less memory, same result")
    add("--optimizer", choices=("muon", "adamw"), help="of the blocks' matrices (default: muon)")
    add("--lr", type=number(float, above=0), help="peak learning rate of AdamW; Muon's and the embeddings' follow")
    add("--ngram-lr", type=number(float, above=0), help="of the n-gram tables, on a token's loss: less for more epochs")
    add("--weight-decay", type=number(float, low=0), help="of the blocks' matrices")
    add("--calibration", type=number(float, low=0, below=1),
        help="share of the training text to keep from training: a temperature is fitted on it at the end")  # fmt: skip
    add("--short-share", type=number(float, low=0, high=1), help="of the run, at first, with windows cut in half")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=POSITIVE_INT)
    length.add_argument("--minutes", type=number(float, above=0), help="the schedule follows the clock instead")
    add("--eval-every", type=POSITIVE_INT, metavar="STEPS", help="validate this often (default: ten times a run)")
    add("--seed", type=number(int, low=0, high=2**63 - 1))
    add("--device", help="cpu, cuda, mps (default: the best there is)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--out", type=Path, default=Path("out"), help="writes OUT/MODEL/last.pt, best.pt, metrics.jsonl (default: out)")
    add("--resume", nargs="?", const="", metavar="CHECKPOINT", help="go on (default: with OUT/MODEL/last.pt)")
    return parser.parse_args()


def pick_device(name: str | None, float64: bool = False) -> str:
    """The named device, or the best there is; with `float64`, of those that can: text is drawn in it, and MPS cannot.

    Raises ValueError for one this machine does not have.
    """
    mps = torch.backends.mps.is_available() and not float64
    counts = {"cuda": torch.cuda.device_count(), "mps": int(mps), "cpu": 1}
    if name is None:
        return next(device for device, count in counts.items() if count)
    kind, _, index = name.partition(":")
    if (index and not index.isdecimal()) or int(index or 0) >= counts.get(kind, 0):
        here = ", ".join(device for device, count in counts.items() if count)
        raise ValueError(f"--device {name}: not on this machine, or not able to do this; there is {here}")
    return name


def new_run(args: argparse.Namespace, processes: Processes) -> Run:
    """A fresh run: preset, then flags."""
    name = args.preset or ("gpu" if processes.device.type == "cuda" else "laptop")
    preset, given = dict(PRESETS[name]), {k: v for k, v in vars(args).items() if v is not None}
    if name == "laptop":
        minutes = given["steps"] / LAPTOP_STEPS_A_MINUTE if "steps" in given else (preset | given)["minutes"]
        sizes, of_gpt, of_llada = next(row for limit, *row in LAPTOP_SIZES if minutes <= limit)
        preset |= sizes | (of_gpt if args.model == "gpt" else {"ngram_lr": LLADA_NGRAM_LR} | of_llada)
    if "steps" in given or "minutes" in given:
        del preset["steps" if "steps" in preset else "minutes"]
    chosen = {"compile": processes.device.type == "cuda"} | preset | given
    corpus = load_corpus(args.data)
    config_class, settings = CONFIGS[args.model], Settings(**{k: chosen[k] for k in names(Settings) if k in chosen})
    if settings.steps and not settings.eval_every:
        settings.eval_every = max(1, settings.steps // 10)
    config = {k: chosen[k] for k in names(config_class) if k in chosen}
    if chosen.get("arch") == "vanilla" and (for_tables := [k for k in given if k.startswith("ngram")]):
        raise ValueError(f"--{for_tables[0].replace('_', '-')}: the vanilla network has no n-gram tables; drop it")
    corpus.check_windows(chosen.get("val_fraction", 0.2), config["block_size"])
    torch.manual_seed(settings.seed)  # initial weights and dropout
    model = MODELS[args.model](config_class(vocab_size=corpus.tokenizer.vocab_size, **config))
    return Run(model, corpus, chosen.get("val_fraction", 0.2), settings, processes)


def names(dataclass: type) -> list[str]:
    """The names of its fields."""
    return [f.name for f in fields(dataclass)]


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """The file --resume means, by default the run's last.pt; None for a fresh run."""
    return None if args.resume is None else Path(args.resume or args.out / args.model / "last.pt")


def resumed_run(args: argparse.Namespace, processes: Processes) -> Run:
    """The run of a checkpoint, with its own settings; only its end may be moved."""
    movable = {"model", "data", "steps", "minutes", "eval_every", "device", "out", "resume"}
    extra = [k for k, v in vars(args).items() if v is not None and k not in movable]
    if extra:
        flag = extra[0].replace("_", "-")
        raise ValueError(f"--{flag} cannot change when resuming: drop it (--steps or --minutes may move the end)")
    checkpoint = load_checkpoint(checkpoint_to_resume(args))
    if not checkpoint.training:
        raise ValueError(f"{checkpoint.path}: holds no training state: cannot resume")
    settings = Settings(**checkpoint.training["settings"])
    if args.steps or args.minutes:
        settings.steps, settings.minutes = args.steps, args.minutes
    settings.eval_every = args.eval_every or settings.eval_every
    return Run.resume(checkpoint, load_corpus(args.data or checkpoint.corpus["name"]), settings, processes)


def tune_cpu() -> None:
    """Two settings that cost nothing: no denormals, and on glibc freed memory is kept for the next step.

    Without the second, every large activation is returned to the system and faulted in again: a sixth of a step.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    """Parse, train, keep, report."""
    start = time.monotonic() - time.process_time()  # imports count: their CPU time is their wall time, near enough
    args = parse_arguments()
    tune_cpu()
    processes = Processes(pick_device(args.device))
    with processes.joined(), deferred_interrupt() as stopping:
        run = new_run(args, processes) if args.resume is None else resumed_run(args, processes)
        if run.settings.compile:
            run.model.encoder.compile()
        folder, clock = args.out / run.model.name, lambda: time.monotonic() - start
        keeper = Keeper(run, folder, checkpoint_to_resume(args), clock)
        say(f"{run.model.name}: {run.model.num_parameters():,} parameters on {run.corpus.name}, {processes}")
        with progress(1, "train", processes.is_main and sys.stderr.isatty()) as update:

            def on_validation(record: dict) -> None:
                if processes.is_main:
                    keeper.on_validation(record)
                    log(record)

            steps, flops, began = run.step, run.flops, clock()
            train_loop(run, on_validation, update, stopping, clock)
            trained_for = clock() - began
        if not processes.is_main:
            return
        if stopping():
            keeper.save_last()
            say(f"stopped at step {run.step}; to go on, add --resume --model {run.model.name} --out {args.out}")
            return
        summary = summarize(run, run.step - steps, run.flops - flops, trained_for)
        keeper.save_summary(summary)
        report(summary)
        say(f"wrote {folder}/best.pt, last.pt, metrics.jsonl, summary.json; next: python generate.py --prompt ROMEO:")


def log(record: dict) -> None:
    """One line a validation."""
    say("step {step:>6}  {seconds:>6.0f} s  train {train_loss:.4f}  val {val_loss:.4f} nats/char".format(**record)
        + (", at temperature {:.3f}".format(record["temperature"]) if "temperature" in record else ""))  # fmt: skip


if __name__ == "__main__":
    console.run(main)
