"""A training run: configuration, state, loop, exact resume, calibration and the final score.

Everything random in a step is drawn on the CPU for the whole global batch and then shared out. So one process, several
processes and accumulated micro-batches see the same numbers (but for dropout), and a resumed run continues exactly.

Letters: B windows in a global batch, T positions.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoregressive import CausalObjective
from checkpoint import Checkpoint
from data import (
    PAIRS,
    SEPARATORS,
    Corpus,
    Rows,
    load_corpus,
    load_pairs,
    load_same_corpus,
    make_dataset,
    training_length,
    training_texts,
    validation_rows,
    window_rows,
)
from diffusion import DiffusionObjective
from likelihood import Likelihood, pairs_needed
from model import MODELS, ModelConfig, Transformer, adapt, least_bytes
from optim import build_optimizers, learning_rate_factor, set_learning_rate
from tokenizer import SPECIAL_TOKENS, SimpleTokenizer, Tokenizer, read_tokenizer, train_bpe
from utils.console import progress, say
from utils.counter import EvaluationCounter
from utils.devices import memory_problem
from utils.errors import ArgumentError, check_number
from utils.files import sha256_of
from utils.processes import Processes

OPTIMIZERS = ("muon", "adamw")
SHORT_PARTS = 2  # into how many a window is cut while windows are short
VALIDATIONS = 10  # in a run, unless eval_every says otherwise
VALIDATION_CHARS = 1 << 14  # scored at each validation: evenly spaced windows, the same every time
FINAL_CHARS = 1 << 18  # scored at the end: the whole validation part of TinyShakespeare
FINAL_PAIRS = 2  # pairs of masks for each of these windows (LLaDA)
NEWTON_STEPS = 6  # of the fit of a temperature


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run is made of. Raises ArgumentError for values out of range."""

    model: str = "llada"  # or "gpt"
    data: str | None = None  # corpus, see `data.load_corpus`
    val_fraction: float = 0.2  # of the text
    segments: str = "window"  # what a row of training text is, see data.py: window, speech, paragraph, line or pairs
    pairs: str | None = None  # file of prompts and completions, instead of `data`
    tokenizer: str = "char"  # or "bpe", trained on the training part, or the path of a tokenizer.json
    vocab_size: int = 512  # of "bpe"
    # Fine-tuning.
    init_from: str | None = None  # checkpoint to start from
    lora_rank: int = 0  # train adapters of this rank alone
    # The network, see `ModelConfig`.
    arch: str = "rotary"
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 256
    dropout: float = 0.0
    ngram_dropout: float = 0.0
    ngram_rows: int = 65521
    parallel: int = 1
    # Optimization.
    batch_size: int = 16  # windows in a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches in a step
    optimizer: str = "muon"  # of the blocks' matrices
    lr: float = 0.006  # AdamW's peak; those of Muon and of the embeddings are proportional to it
    ngram_lr: float = 0.15  # the n-gram tables' peak, per token: a row moves by this times each token's gradient
    weight_decay: float = 0.0  # of the blocks' matrices
    sweep_share: float = 0.0  # LLaDA: share of a batch that is masked as the default sampler meets it
    short_share: float = 0.0  # for this share of the run windows are cut into SHORT_PARTS: attention costs less
    calibration: float = 0.0  # share of the training text that is held out to fit a temperature on at the end
    # Length: either a number of steps or minutes of time.
    steps: int | None = None
    minutes: float | None = None
    eval_every: int | None = None  # steps between validations; None: VALIDATIONS in a run
    seed: int = 0
    compile: bool = False  # torch.compile the encoder

    def __post_init__(self):
        if self.model not in MODELS:
            raise ArgumentError("model", f"must be one of {', '.join(MODELS)}, got {self.model!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ArgumentError("optimizer", f"must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        check_number("val_fraction", self.val_fraction, above=0, below=1)
        check_number("calibration", self.calibration, low=0, below=1)
        check_number("short_share", self.short_share, low=0, high=1)
        check_number("sweep_share", self.sweep_share, low=0, below=1)
        if self.sweep_share and self.model == "gpt":
            raise ArgumentError("sweep_share", "is for --model llada: GPT masks nothing")
        for name in ("weight_decay", "seed"):
            check_number(name, getattr(self, name), low=0)
        for name in ("batch_size", "accumulate", "lr", "ngram_lr", "steps", "minutes", "eval_every"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)
        if self.segments not in ("window", *SEPARATORS, PAIRS):
            raise ArgumentError("segments", f"must be window, {', '.join(SEPARATORS)}, got {self.segments!r}")
        if (self.pairs is not None) != (self.segments == PAIRS):
            raise ArgumentError("segments", "are pairs if and only if a file of pairs is given")
        if self.pairs is not None and self.data is not None:
            raise ArgumentError("data", "is not read with a file of pairs: drop one of them")
        check_number("lora_rank", self.lora_rank, low=0)
        if self.lora_rank and self.init_from is None:
            raise ArgumentError("lora_rank", "needs a model to adapt: name its checkpoint with --init-from")
        if self.parallel > 1 and self.model == "llada":
            raise ArgumentError("parallel", "is for --model gpt: LLaDA writes in several places anyway")
        if self.parallel > 1 and self.compile:
            raise ArgumentError("compile", "does not go with streams, whose prefixes have many lengths: drop it")
        if (self.steps is None) == (self.minutes is None):
            raise ArgumentError("steps", "or minutes must be given, and not both")
        self.model_config(vocab_size=len(SPECIAL_TOKENS) + 1)  # raises for impossible sizes

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The network's part."""
        return ModelConfig(
            vocab_size, self.block_size, self.n_embd, self.n_head, self.n_layer, self.dropout, self.arch,
            ngram_dropout=self.ngram_dropout, ngram_rows=self.ngram_rows, segments=self.segments,
            parallel=self.parallel, lora_rank=self.lora_rank,
        )  # fmt: skip

    to_dict = asdict


@dataclass(frozen=True)
class FineTuning:
    """What a run that starts from another model remembers of it. Losses are nats/char on the whole validation parts."""

    base: dict  # {"path", "sha256"} of its checkpoint
    old_corpus: dict  # as in that checkpoint
    old_segments: str
    new_before: float  # loss on the new text before the run
    old_before: float | None  # on the old one; None: that text is not here any more


def load_training_corpus(config: TrainConfig, base: Checkpoint | None = None) -> Corpus:
    """The text or the pairs of a new run, with the tokenizer that it asks for; with a base, that of the base.

    A base's tokenizer of characters learns the characters that it does not know.
    """

    def make_tokenizer(texts: Iterable[str]) -> Tokenizer:
        if base is not None:
            known = base.tokenizer
            return known.extended("".join(set().union(*texts))) if isinstance(known, SimpleTokenizer) else known
        if config.tokenizer == "char":
            return SimpleTokenizer("".join(set().union(*texts)))
        if config.tokenizer != "bpe":
            return read_tokenizer(config.tokenizer)
        if config.pairs:  # texts are prompts and completions in turn
            texts = list(texts)
            return train_bpe(texts[: 2 * training_length(len(texts) // 2, config.val_fraction)], config.vocab_size)
        return train_bpe(training_texts(texts, config.val_fraction), config.vocab_size)

    known_by_characters = base is None and config.tokenizer == "char"
    if config.pairs:
        return load_pairs(config.pairs, make_tokenizer)
    return load_corpus(config.data, None if known_by_characters else make_tokenizer)


def objective_for(model: Transformer, sweep_share: float = 0.0) -> DiffusionObjective | CausalObjective:
    """What a model is trained for and scored by."""
    return CausalObjective(model.config.parallel) if model.causal else DiffusionObjective(sweep_share)


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
        clock: Callable[[], float] | None = None,
        base: Checkpoint | None = None,
    ):
        """A new run. clock() gives the seconds of this session, by default from now on. base: the model to start from.

        Raises ArgumentError for a batch that cannot be shared out or a text that is too short.
        """
        start = time.monotonic()
        self.clock = clock or (lambda: time.monotonic() - start)
        self.config, self.corpus, self.processes = config, corpus, processes
        self.step, self.flops, self.seconds_before = 0, 0.0, 0.0
        self.history: list[dict] = []
        self.losses: list[Tensor] = []
        self.fine_tuning: FineTuning | None = None
        micro_batches = processes.world * config.accumulate
        if config.batch_size % micro_batches:
            raise ArgumentError("batch_size", f"{config.batch_size} is not a multiple of {micro_batches} micro-batches")
        self._split_corpus()
        torch.manual_seed(config.seed)  # initial weights and dropout
        network = config.model_config(corpus.tokenizer.vocab_size)
        self.generator = torch.Generator().manual_seed(config.seed)  # windows and masks
        self._check_memory(network)
        model = MODELS[config.model](network) if base is None else adapt(base.model, network, self.generator)
        self.model = model.to(processes.device)
        self.objective = objective_for(model, config.sweep_share)
        for module in self.model.modules():
            if isinstance(module, nn.EmbeddingBag):  # a step touches few rows, but GPUs and compilers need dense rows
                module.sparse = processes.device.type == "cpu" and not config.compile
        characters = config.batch_size * self.train_set.characters_per_row  # of a step: losses are means over them
        self.optimizers = build_optimizers(
            self.model, characters, config.lr, config.ngram_lr, config.weight_decay, config.optimizer
        )
        if config.compile:
            self.model.encoder.compile()
        self.replica = processes.replicate(self.model)  # its gradients are averaged over the processes

    def _check_memory(self, network: ModelConfig) -> None:
        """Raise ArgumentError, before anything is allocated, for sizes that this machine has no memory for.

        Counted is what is needed at least: the weights, and what the layers and the head keep for the backward pass.
        """
        config, C, V = self.config, network.n_embd, network.vocab_size
        rows = config.batch_size // (config.accumulate * self.processes.world)
        activations = 4 * rows * config.block_size * (12 * C * config.n_layer + V)
        weights = least_bytes(config.model, network)
        if problem := memory_problem(weights + activations, self.processes.device):
            largest = "batch_size" if activations > weights else "ngram_rows" if network.ngram_rows > C else "n_embd"
            raise ArgumentError(largest, f"{getattr(config, largest)} {problem}: use smaller sizes, or --accumulate")

    def _split_corpus(self) -> None:
        """Set the rows to train on, to calibrate and to validate on."""
        config, T, tokenizer = self.config, self.config.block_size, self.corpus.tokenizer
        train_part, self.val_part = self.corpus.split(config.val_fraction)
        self.corpus.check_part(train_part, "train", T, config.segments)
        self.corpus.check_part(self.val_part, "validate", T, config.segments)
        held_out = int(config.calibration * len(train_part))
        held_out = held_out if held_out >= T else 0  # less than one window is too little
        if config.segments == "window" and len(train_part) - held_out < T:
            problem = f"{config.calibration} leaves {len(train_part) - held_out} characters to train on, too few for "
            raise ArgumentError("calibration", f"{problem}one window of {T}: hold out less, or use a longer text")
        # Hold out the beginning of the text. Its end is from the same play as the validation part and shares its names,
        # so it is worth most for training.
        calibration_part, train_part = train_part[:held_out], train_part[held_out:]
        self.train_set = make_dataset(train_part, tokenizer, T, config.segments)
        self.val_rows = validation_rows(self.val_part, tokenizer, T, config.segments, VALIDATION_CHARS)[0]
        self.calibration_rows = None
        if held_out:
            rows = validation_rows(calibration_part, tokenizer, T, config.segments, VALIDATION_CHARS)
            self.calibration_rows = rows[0]

    def remember_base(self, base: Checkpoint) -> None:
        """Score the model that this run starts from on the new text and, if it is still here, on the old one."""
        file = {"path": str(base.path.resolve()), "sha256": sha256_of(base.path)}
        segments = base.model.config.segments
        old, new = self.old_loss(base.corpus, segments), score_validation(self).nats_per_char
        self.fine_tuning = FineTuning(file, base.corpus, segments, new, old)

    def old_loss(self, old_corpus: dict, segments: str) -> float | None:
        """Loss on the validation part of the text that the base was trained on, nats/char; None if it is not here."""
        tokenizer = self.corpus.tokenizer
        try:
            corpus = load_same_corpus(old_corpus, segments, tokenizer)
        except (OSError, ValueError) as error:
            say(f"forgetting is not measured: {error}")
            return None
        part = corpus.split(old_corpus["val_fraction"])[1]
        rows = validation_rows(part, tokenizer, self.config.block_size, segments, FINAL_CHARS)
        return score_rows(self.model, rows).nats_per_char

    # --------------------------------------------------------------------------------------------- quantities
    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.config.batch_size * self.config.block_size

    @property
    def seconds(self) -> float:
        """Seconds spent on this run, in this session and in earlier ones."""
        return self.seconds_before + self.clock()

    def done(self) -> float:
        """Share of the run that is over, 0..1, by steps or by time; the same in all processes."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        return self.processes.agree(min(1.0, self.seconds / (60 * self.config.minutes)))

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
    ) -> dict[str, float]:
        """Train to the end of the run, or until stopping() after a step.

        Returns tokens_per_second and flops_per_second of this call. on_validation(record) is called for each new
        record of the history, update(done, status) after each step, and after_step() after its validation, if any: only
        there can the state be saved.
        """
        step, flops, began = self.step, self.flops, self.clock()
        eval_every = self.config.eval_every or (self.config.steps and max(1, self.config.steps // VALIDATIONS))
        done = self.done()
        next_validation = done + 1 / VALIDATIONS
        self.model.train()
        if done >= 1 and self.step == 0:
            raise ArgumentError("minutes", f"{self.config.minutes:g} are over before the first step: give more")
        while done < 1 and not self.processes.agree(stopping()):
            set_learning_rate(self.optimizers, learning_rate_factor(done))
            self.losses.append(self.train_step(done))
            self.step += 1
            done = self.done()
            update(done, self.status)
            if done >= 1 or (self.step % eval_every == 0 if eval_every else done >= next_validation):
                next_validation += 1 / VALIDATIONS
                self.history.append(self.validation_record(is_last=done >= 1))
                on_validation(self.history[-1])
            after_step()
        seconds = self.clock() - began
        return {
            "tokens_per_second": (self.step - step) * self.tokens_per_step / seconds,
            "flops_per_second": (self.flops - flops) / seconds,
        }

    def sample_rows(self, done: float) -> Rows:
        """A global batch of random rows of the training text for the next step, `done` of the run being over.

        For the first `short_share` of the run windows are cut into SHORT_PARTS, if T allows it.
        """
        rows = self.train_set.sample(self.config.batch_size, self.generator)
        self.corpus.forget_pages()
        T = rows.tokens.shape[1]
        if rows.given is None and done < self.config.short_share and T % SHORT_PARTS == 0:
            return window_rows(rows.tokens.view(-1, T // SHORT_PARTS), self.corpus.tokenizer)
        return rows

    def train_step(self, done: float) -> Tensor:
        """One optimizer step on one global batch, `done` of the run being over.

        Returns its loss, nats/character, on the device: the same in all processes, so that process 0 can save it.
        """
        batch = self.objective.make_batch(self.sample_rows(done), self.generator, is_training=True)
        self.flops += self.model.flops_per_token(batch.inputs.shape[1]) * batch.inputs.numel()
        total, parts = torch.zeros((), device=self.processes.device), self.config.accumulate
        for part in range(parts):
            with self.processes.local(self.replica, last=part == parts - 1), autocast(self.processes.device):
                micro_batch = self.processes.share(batch, part, parts)
                loss = self.objective.loss(self.objective.predict(self.replica, micro_batch), micro_batch)
                (loss / parts).backward()
            total += loss.detach() / parts
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return self.processes.mean(total)

    # --------------------------------------------------------------------------------------------- validation
    def validation_record(self, is_last: bool) -> dict:
        """A new record of the history. `val_loss` is that of the weights as they were trained.

        At the end of the run the model is calibrated. Then the record also has the `temperature` and the
        `calibrated_val_loss`, which is that of the final weights.
        """
        record = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "seconds": self.seconds,
            "train_loss": torch.stack(self.losses).mean().item(),
            "val_loss": self.validate(),
            "lr": self.optimizers[-1].param_groups[0]["lr"],
        }
        if not math.isfinite(record["train_loss"] + record["val_loss"]):
            losses = f"{record['train_loss']} in training, {record['val_loss']} in validation"
            advice = "try a smaller --lr and --ngram-lr; what was saved before is intact"
            raise ValueError(f"the loss is not finite at step {self.step} ({losses}): {advice}")
        self.losses.clear()
        if is_last and self.calibration_rows is not None:
            record["temperature"] = self.calibrate()
            record["calibrated_val_loss"] = self.validate()
        return record

    @torch.no_grad()
    def predict_rows(self, rows: Rows) -> tuple[Tensor, NamedTuple]:
        """The model's logits on rows, and the batch they belong to. The masks are the same every time."""
        self.model.eval()
        batch = self.objective.make_batch(rows, torch.Generator().manual_seed(0))
        batch = type(batch)(*(x.to(self.processes.device) for x in batch))
        with autocast(self.processes.device):
            logits = self.objective.predict(self.model, batch)
        self.model.train()
        return logits, batch

    def validate(self) -> float:
        """Loss on the validation windows, nats/char: exact for GPT, one draw of the upper bound for LLaDA."""
        return self.objective.loss(*self.predict_rows(self.val_rows)).item()

    def calibrate(self) -> float:
        """Divide the model's logits by the temperature that minimizes the loss on held-out text; returns it.

        Many epochs make the model overconfident. Temperature scaling (arXiv 1706.04599) corrects most of that with one
        number. The loss is convex in 1 / temperature, so Newton's method finds it.
        """
        logits, batch = self.predict_rows(self.calibration_rows)
        logits = logits.clamp(min=-1e4)  # -inf has no gradient
        scale = torch.ones((), device=logits.device, requires_grad=True)
        for _ in range(NEWTON_STEPS):
            loss = self.objective.loss(logits * scale, batch)
            (slope,) = torch.autograd.grad(loss, scale, create_graph=True)
            (curvature,) = torch.autograd.grad(slope, scale)
            step = slope / (curvature + 1e-9)  # an untrained model has no curvature
            scale = (scale - step).detach().clamp(0.25, 4).requires_grad_()
        with torch.no_grad():
            self.model.head.weight.mul_(scale)  # the head has no bias: this divides the logits
        return 1 / scale.item()

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
            "fine_tuning": asdict(self.fine_tuning) if self.fine_tuning else None,
        }
        corpus = {"name": self.corpus.name, "sha256": self.corpus.sha256, "val_fraction": self.config.val_fraction}
        return Checkpoint(self.model, self.corpus.tokenizer, corpus, self.step, self.history, training)

    @classmethod
    def resume(
        cls, checkpoint: Checkpoint, processes: Processes, clock: Callable[[], float] | None = None, **changes
    ) -> "Trainer":
        """Continue the run of `checkpoint`. `changes`: new values of the fields data, steps, minutes or eval_every.

        Raises ValueError if it holds no state of a training run or its corpus is now another text.
        """
        training = checkpoint.training
        if "config" not in training:
            raise ValueError(f"{checkpoint.path}: holds no training state of this version: cannot resume")
        config = replace(TrainConfig(**training["config"]), **changes)
        moved_to = changes.get("pairs" if config.pairs else "data")
        corpus = load_same_corpus(checkpoint.corpus, config.segments, checkpoint.tokenizer, moved_to)
        self = cls(config, corpus, processes, clock, base=checkpoint)
        if training["fine_tuning"]:
            self.fine_tuning = FineTuning(**training["fine_tuning"])
        self.step, self.history = checkpoint.step, checkpoint.history
        self.seconds_before, self.flops = training["seconds"], training["flops"]
        self.losses = [torch.tensor(loss, device=processes.device) for loss in training["losses"]]
        for optimizer, state in zip(self.optimizers, training["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.generator.set_state(training["generator"])
        torch.set_rng_state(training["torch_rng"])
        if training["cuda_rng"] and processes.device.type == "cuda":
            torch.cuda.set_rng_state_all(training["cuda_rng"])
        return self


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA. Many CPUs compute it much more slowly than float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def scoring_batch_size(model: Transformer) -> int:
    """Windows to evaluate at once: few on a CPU, so that their activations fit its caches."""
    return 32 if model.device.type == "cpu" else 256


def score_validation(trainer: Trainer) -> Likelihood:
    """Exact (GPT) or upper bound (LLaDA) on the whole validation part, or on about FINAL_CHARS tokens of it."""
    config = trainer.config
    return score_rows(
        trainer.model,
        validation_rows(trainer.val_part, trainer.corpus.tokenizer, config.block_size, config.segments, FINAL_CHARS),
    )


def score_rows(model: Transformer, batches: list[Rows]) -> Likelihood:
    """Exact (GPT) or upper bound (LLaDA) on rows, with a progress display."""
    objective, shapes = objective_for(model), [rows.tokens.shape for rows in batches if rows.tokens.numel()]
    # A short last window gets as many masks as it has positions, see `pairs_needed`.
    evaluations = [2 * pairs_needed(N, T, FINAL_PAIRS) if objective.is_bound else 1 for N, T in shapes]  # of a row
    with (
        progress(sum(n * N * T for n, (N, T) in zip(evaluations, shapes, strict=True)), "validate") as update,
        EvaluationCounter(model.eval(), update=update),
    ):
        return objective.likelihood(
            model,
            [rows.to(model.device) for rows in batches],
            pairs=FINAL_PAIRS,
            batch_size=scoring_batch_size(model),
        )


def summarize(trainer: Trainer, session: dict[str, float]) -> dict:
    """What the run cost and its final score, as plain values. `session`: what `Trainer.train` returned."""
    params, tokens = trainer.model.num_parameters(), trainer.step * trainer.tokens_per_step
    result, fine_tuning = score_validation(trainer), None
    if trainer.fine_tuning:
        old = trainer.fine_tuning
        fine_tuning = asdict(old) | {
            "new_after": result.nats_per_char,
            "old_after": None if old.old_before is None else trainer.old_loss(old.old_corpus, old.old_segments),
        }
    return {
        "params": params,
        "params_trainable": trainer.model.num_trainable(),
        "tokens": tokens,
        "epochs": trainer.step * trainer.config.batch_size / trainer.train_set.rows_per_epoch,
        "tokens_per_param": tokens / params,
        "flops": trainer.flops,
        "pfs_days": trainer.flops / (1e15 * 86400),
        **session,
        "nats_per_char": result.nats_per_char,
        "ci95": list(result.ci95) if math.isfinite(result.ci95[0]) else None,  # None: one window has no interval
        # Other tokens could spell the text too, so that of its encoding is a bound for the text.
        "is_bound": result.is_bound or not isinstance(trainer.corpus.tokenizer, SimpleTokenizer),
        "chars": int(result.characters.sum()),
        "fine_tuning": fine_tuning,
    }
