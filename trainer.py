"""A training run: state, loop, exact resume, calibration and the final score.

Everything random in a step is drawn on the CPU for the whole global batch and then shared out. So one process, several
processes and accumulated micro-batches see the same numbers (but for dropout), and a resumed run continues exactly.

Letters: B rows in a global batch, T positions, N predicted positions, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoregressive import CausalObjective
from checkpoint import Checkpoint, continued, deciding_loss, load_checkpoint, new_model, save_checkpoint
from config import ModelConfig, TrainConfig
from data import Corpus, Rows, load_same_corpus, window_rows
from diffusion import DiffusionObjective
from likelihood import Likelihood
from model import GPT, Transformer, least_bytes
from optim import build_optimizers, learning_rate_factor, set_learning_rate
from utils.console import say
from utils.devices import memory_problem
from utils.errors import ArgumentError
from utils.processes import Processes

SHORT_PARTS = 2  # into how many a window is cut while windows are short
VALIDATIONS = 10  # in a run, unless eval_every says otherwise
VALIDATION_CHARS = 1 << 14  # scored at each validation: evenly spaced windows, the same every time
FINAL_CHARS = 1 << 18  # scored at the end: the whole validation part of TinyShakespeare
FINAL_PAIRS = 2  # pairs of masks for each of these windows (LLaDA)
NEWTON_STEPS = 6  # of the fit of a temperature
LOGITS_AT_ONCE = 1 << 24  # numbers, at most, where rows are scored: what bounds the memory of large vocabularies
OVERFITTING = 1.01  # of the best loss: more than this share above it is no noise


def objective_of(model: Transformer, sweep_share: float = 0.0) -> DiffusionObjective | CausalObjective:
    """What a model is trained for and scored by."""
    return CausalObjective() if isinstance(model, GPT) else DiffusionObjective(sweep_share)


# ------------------------------------------------------------------------------------------------- the run
class Trainer:
    """A run's whole state and its loop. `checkpoint` and `resume` turn it into a file and back, bit for bit.

    `step` steps and `flops` FLOPs are done; `history` holds one dict for each validation (the lines of metrics.jsonl);
    `losses` are those of the steps since the last validation, nats/character, on the device.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        processes: Processes,
        clock: Callable[[], float] = time.monotonic,
        base: Checkpoint | None = None,
        model: Transformer | None = None,
    ):
        """A new run. clock(): seconds. base: the model to begin from. model: that of a run that goes on.

        Raises ArgumentError for a batch that cannot be shared out or a text that is too short.
        """
        self.config, self.corpus, self.processes, self.clock = config, corpus, processes, clock
        self.step, self.flops, self.seconds_before, self.began = 0, 0.0, 0.0, None
        self.history: list[dict] = []
        self.losses: list[Tensor] = []
        self.base_steps = base.step if base else 0
        micro_batches = processes.world * config.accumulate
        if config.batch_size % micro_batches:
            raise ArgumentError("batch_size", f"{config.batch_size} is not a multiple of {micro_batches} micro-batches")
        self.split_corpus()
        torch.manual_seed(config.seed)  # initial weights and dropout
        self.generator = torch.Generator().manual_seed(config.seed)  # windows and masks
        network = config.network(corpus.tokenizer.vocab_size)
        check_memory(config, network, processes)
        if model is None:
            model = continued(base.model, network) if base else new_model(config.model, network)
        self.model = model.to(processes.device)
        self.objective = objective_of(model, config.sweep_share)
        for module in self.model.modules():
            if isinstance(module, nn.EmbeddingBag):  # a step touches few rows, but GPUs and compilers need dense rows
                module.sparse = processes.device.type == "cpu" and not config.compile
        characters = config.batch_size * self.train_set.characters_per_row  # of a step: losses are means over them
        rates = config.lr, config.ngram_lr, config.weight_decay
        self.optimizers = build_optimizers(self.model, characters, *rates, config.optimizer)
        if config.compile:
            self.model.encoder.compile()
        self.replica = processes.replicate(self.model)  # its gradients are averaged over the processes
        self.fine_tuning: dict | None = None  # the checkpoint that this run began from, and its score on the new text
        if base:
            self.fine_tuning = {"base": str(base.path.resolve()), "new_before": self.score().nats_per_char}

    def split_corpus(self) -> None:
        """Set the rows to train on, to calibrate and to validate on."""
        config, T = self.config, self.config.block_size
        train_part, self.val_part = self.corpus.split(config.val_fraction)
        held_out = int(config.calibration * len(train_part))
        held_out = held_out if held_out >= T else 0  # less than one window is too little
        # Hold out the beginning of the text. Its end is from the same play as the validation part and shares its names,
        # so it is worth most for training.
        calibration_part, train_part = train_part[:held_out], train_part[held_out:]
        self.corpus.check_part(train_part, "train", T, config.segments)
        self.corpus.check_part(self.val_part, "validate", T, config.segments)
        self.train_set = self.corpus.dataset(train_part, T, config.segments)
        self.val_rows = self.corpus.validation_rows(self.val_part, T, config.segments, VALIDATION_CHARS)[0]
        rows = self.corpus.validation_rows(calibration_part, T, config.segments, VALIDATION_CHARS) if held_out else []
        self.calibration_rows = rows[0] if rows else None

    # --------------------------------------------------------------------------------------------- quantities
    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.config.batch_size * self.config.block_size

    @property
    def epochs(self) -> float:
        """How often the training text has been read."""
        return self.step * self.config.batch_size / self.train_set.rows_per_epoch

    @property
    def seconds(self) -> float:
        """Seconds spent on this run since its first step, in this session and in earlier ones."""
        return self.seconds_before + (0.0 if self.began is None else self.clock() - self.began)

    def done(self) -> float:
        """Share of the run that is over, 0..1, by steps or by time and epochs; the same in all processes."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        by_epochs = self.epochs / self.config.epochs if self.config.epochs else 0.0
        return min(1.0, max(by_epochs, self.processes.agree(self.seconds / (60 * self.config.minutes))))

    def status(self) -> str:
        """One line for a progress display. It waits for the device to finish the step."""
        speed = self.step * self.tokens_per_step / self.seconds
        return f"step {self.step}  loss {self.losses[-1]:.3f}  {speed:,.0f} tokens/s"

    # --------------------------------------------------------------------------------------------- the loop
    def train(
        self,
        on_validation: Callable[[dict], None] = lambda record: None,
        update: Callable[[float, Callable[[], str]], None] = lambda done, status: None,
        stopping: Callable[[], bool] = lambda: False,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Train to the end of the run, or until stopping() after a step. Time is counted from here.

        on_validation(record) is called for each new record of the history, update(done, status) after each step, and
        after_step() after its validation, if any: only there can the state be saved.
        """
        self.began = self.clock()
        eval_every = self.config.eval_every or (self.config.steps and max(1, self.config.steps // VALIDATIONS))
        done = self.done()
        next_validation = done + 1 / VALIDATIONS
        self.model.train()
        while (done < 1 or not self.history) and not self.processes.agree(stopping()):  # at least one validation
            set_learning_rate(self.optimizers, learning_rate_factor(done))
            self.losses.append(self.train_step(done))
            self.step += 1
            done = self.done()
            update(done, self.status)
            if done >= 1 or (self.step % eval_every == 0 if eval_every else done >= next_validation):
                next_validation += 1 / VALIDATIONS
                self.history.append(self.validation_record())
                on_validation(self.history[-1])
            after_step()

    def sample_rows(self, done: float) -> Rows:
        """A global batch of random rows of the training text for the next step, `done` of the run being over.

        For the first `short_share` of the run windows are cut into SHORT_PARTS, if T allows it.
        """
        rows = self.train_set.sample(self.config.batch_size, self.generator)
        T = rows.tokens.shape[1]
        if rows.given is None and done < self.config.short_share and T % SHORT_PARTS == 0:
            return window_rows(rows.tokens.view(-1, T // SHORT_PARTS), self.corpus.tokenizer)
        return rows

    def train_step(self, done: float) -> Tensor:
        """One optimizer step on one global batch, `done` of the run being over.

        Returns its loss, nats/character, on the device: the same in all processes, so that process 0 can save it.
        """
        batch = self.objective.make_batch(self.sample_rows(done), self.generator, "train_loss")
        self.flops += self.model.flops_per_token(batch.inputs.shape[1]) * batch.inputs.numel()
        total, parts = torch.zeros((), device=self.processes.device), self.config.accumulate
        for part in range(parts):
            with self.processes.local(self.replica, last=part == parts - 1), autocast(self.processes.device):
                micro_batch = self.processes.share(batch, part, parts).on(self.processes.device)
                loss = self.objective.loss(self.objective.predict(self.replica, micro_batch), micro_batch)
                (loss / parts).backward()
            total += loss.detach() / parts
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return self.processes.mean(total)

    # --------------------------------------------------------------------------------------------- validation
    def validation_record(self) -> dict:
        """A new record of the history: the mean training loss since the last one, and the losses in objective.scores.

        All are nats/char of the weights as they were trained: calibration comes after the end of the run.
        """
        record = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "seconds": self.seconds,
            "train_loss": torch.stack(self.losses).mean().item(),
            **{name: self.validate(name) for name in self.objective.scores},
            "lr": self.optimizers[-1].param_groups[0]["lr"],
        }
        if not math.isfinite(record["train_loss"] + record["val_loss"]):
            losses = f"{record['train_loss']} in training, {record['val_loss']} in validation"
            advice = "try a smaller --lr and --ngram-lr; what was saved before is intact"
            raise ValueError(f"the loss is not finite at step {self.step} ({losses}): {advice}")
        self.losses.clear()
        return record

    @torch.no_grad()
    def predictions(self, rows: Rows, purpose: str) -> Iterator[tuple[Tensor, NamedTuple, float]]:
        """The model's logits on rows, a few at a time: logits, their batch and its share of the rows.

        The masks are the same every time.
        """
        batch, size = self.objective.make_batch(rows, torch.Generator().manual_seed(0), purpose), len(rows.tokens)
        self.model.eval()
        for part in torch.arange(size).split(scoring_batch_size(self.model)):
            some = type(batch)(*(x[part] for x in batch)).on(self.processes.device)
            with autocast(self.processes.device):
                logits = self.objective.predict(self.model, some)
            yield logits, some, len(part) / size
        self.model.train()

    def validate(self, score: str = "val_loss") -> float:
        """A loss on the validation windows, nats/char: exact for GPT, one draw of the masks for LLaDA."""
        parts = [share * self.objective.loss(*p) for *p, share in self.predictions(self.val_rows, score)]
        return torch.stack(parts).sum().item()

    @torch.no_grad()
    def calibrate(self) -> float:
        """Divide the model's logits by the temperature that minimizes the loss on held-out text; returns it.

        Many epochs make the model overconfident. Temperature scaling (arXiv 1706.04599) corrects most of that with one
        number. The loss, sum w CE(s z) for logits z, is convex in s = 1 / temperature, so Newton's method finds it:
        its derivatives are sum w (E[z] - z_target) and sum w Var[z], under softmax(s z).
        """
        scale = torch.ones((), device=self.processes.device)
        for _ in range(NEWTON_STEPS):
            slope, curvature = torch.zeros_like(scale), torch.zeros_like(scale)
            for logits, batch, share in self.predictions(self.calibration_rows, self.objective.scores[-1]):
                targets, weights = self.objective.weighted_targets(batch)  # (N,) each
                z = logits.flatten(0, -2).float().clamp(min=-1e4)  # (N, V); -inf times a probability of 0 is no number
                p = (scale * z).softmax(-1)
                mean = (p * z).sum(-1, keepdim=True)
                slope += share * (weights * (mean - z.gather(1, targets[:, None]))[:, 0]).sum()
                curvature += share * (weights * (p * (z - mean).square()).sum(-1)).sum()
            scale = (scale - slope / (curvature + 1e-9)).clamp(0.25, 4)  # an untrained model has no curvature
        for p in self.model.head.parameters():  # the head has no bias: this divides the logits
            p.mul_(scale)
        return 1 / scale.item()

    def keep(self, path: Path) -> Checkpoint:
        """At the end, continue with what is kept, best.pt; unless it is calibrated, calibrate it and write it again."""
        best = load_checkpoint(path, resuming=True)
        self.model = best.model.to(self.processes.device)
        if self.calibration_rows is not None and "temperature" not in best.history[-1]:
            best.history[-1]["temperature"] = self.calibrate()
            best.history[-1] |= {f"calibrated_{name}": self.validate(name) for name in self.objective.scores}
            save_checkpoint(path, best)
        return best

    def score(self) -> Likelihood:
        """Exact (GPT) or upper bound (LLaDA) on the whole validation part, or on about FINAL_CHARS tokens of it."""
        rows = self.corpus.validation_rows(self.val_part, self.config.block_size, self.config.segments, FINAL_CHARS)
        say(f"scoring {sum(int(part.characters.sum()) for part in rows):,} characters")
        rows, size = [part.to(self.model.device) for part in rows], scoring_batch_size(self.model)
        return self.objective.likelihood(self.model.eval(), rows, pairs=FINAL_PAIRS, batch_size=size)

    # --------------------------------------------------------------------------------------------- checkpoints
    def checkpoint(self) -> Checkpoint:
        """The state as it is now."""
        training = {
            "config": self.config.to_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),  # dropout on the CPU
            "cuda_rng": torch.cuda.get_rng_state_all() if self.processes.device.type == "cuda" else [],
            "seconds": self.seconds,
            "flops": self.flops,
            "losses": [float(loss) for loss in self.losses],
            "base_steps": self.base_steps,
            "fine_tuning": self.fine_tuning,
        }
        corpus = {"name": self.corpus.name, "sha256": self.corpus.sha256, "val_fraction": self.config.val_fraction}
        steps = self.base_steps + self.step
        return Checkpoint(self.model, self.corpus.tokenizer, corpus, steps, self.history, training)

    @classmethod
    def resume(
        cls, checkpoint: Checkpoint, processes: Processes, clock: Callable[[], float] = time.monotonic, **changes
    ) -> "Trainer":
        """Continue the run of a checkpoint that was loaded for it. `changes`: new values of fields of the config.

        Raises ValueError if it holds no state of a training run or its corpus is now another text.
        """
        training = checkpoint.training
        if "config" not in training:
            raise ValueError(f"{checkpoint.path}: holds no training state of this version: cannot resume")
        config = replace(TrainConfig(**training["config"]), **changes)
        moved_to = changes.get("pairs" if config.pairs else "data")
        corpus = load_same_corpus(checkpoint.corpus, config.segments, checkpoint.tokenizer, moved_to)
        self = cls(config, corpus, processes, clock, model=checkpoint.model)
        self.base_steps, self.fine_tuning = training["base_steps"], training["fine_tuning"]
        self.step, self.history = checkpoint.step - self.base_steps, checkpoint.history
        self.seconds_before, self.flops = training["seconds"], training["flops"]
        self.losses = [torch.tensor(loss, device=processes.device) for loss in training["losses"]]
        for optimizer, state in zip(self.optimizers, training["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.generator.set_state(training["generator"])
        torch.set_rng_state(training["torch_rng"])
        if processes.device.type == "cuda" and len(training["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(training["cuda_rng"])
        return self


# ------------------------------------------------------------------------------------------------- memory and score
def check_memory(config: TrainConfig, network: ModelConfig, processes: Processes) -> None:
    """Raise ArgumentError, before anything is allocated, for sizes that this machine has no memory for.

    Counted is what is needed at least: the weights and their gradients; what the layers keep for the backward pass; the
    logits, their log-probabilities and the gradient, in a step; and what fitting a temperature makes of logits.
    """
    C, V, T = network.n_embd, network.vocab_size, network.block_size
    rows = config.batch_size // (config.accumulate * processes.world)
    weights = least_bytes(config.model, network)
    step, scoring = 4 * rows * T * (12 * C * config.n_layer + 2 * V), 4 * max(LOGITS_AT_ONCE, T * V) * 6
    if problem := memory_problem(weights + max(step, scoring if V > 4096 else 0), processes.device):
        largest = "batch_size" if step > weights else "ngram_rows" if network.ngram_rows > C else "n_embd"
        raise ArgumentError(largest, f"{getattr(config, largest)} {problem}: use smaller sizes, or --accumulate")


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA. Many CPUs compute it much more slowly than float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def scoring_batch_size(model: Transformer) -> int:
    """Rows to evaluate at once: few on a CPU, so that their activations fit its caches; fewer if V is large."""
    rows = LOGITS_AT_ONCE // (model.config.block_size * model.config.vocab_size)
    return max(1, min(32 if model.device.type == "cpu" else 256, rows))


def summarize(trainer: Trainer) -> dict:
    """What the run cost and the score of what is kept, as plain values."""
    model, history, result = trainer.model, trainer.history, trainer.score()
    best, seconds = min(history, key=deciding_loss), history[-1]["seconds"]
    overfitting = deciding_loss(history[-1]) > OVERFITTING * deciding_loss(best)
    return {
        "params": model.num_parameters(),
        "params_trainable": model.num_parameters(trainable=True),
        "steps": trainer.step,
        "seconds": seconds,
        "tokens_per_second": trainer.step * trainer.tokens_per_step / max(seconds, 1e-9),
        "characters": round(trainer.step * trainer.config.batch_size * trainer.train_set.characters_per_row),
        "epochs": trainer.epochs,
        "flops": trainer.flops,
        "nats_per_char": result.nats_per_char,
        "ci95": list(result.ci95) if math.isfinite(result.ci95[0]) else None,  # None: one window has no interval
        # Other tokens could spell the text too, so that of its encoding is a bound for the text.
        "is_bound": result.is_bound or not trainer.corpus.tokenizer.is_exact,
        "chars": int(result.characters.sum()),
        "overfitting_since": best["step"] if overfitting else None,
        "fine_tuning": trainer.fine_tuning,
    }
