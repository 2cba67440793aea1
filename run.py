"""A training run's whole state, and the files it is kept in: what makes resuming exact."""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import Checkpoint, copy_checkpoint, save_checkpoint
from console import say
from data import Corpus, ShakespeareDataset, validation_windows
from files import replacing
from model import Transformer
from optim import build_optimizers
from parallel import Processes

VALIDATION_CHARS = 1 << 14  # scored at each validation inside the loop: evenly spaced windows, the same every time
PIECES = 2  # of a window, while windows are short
MUON_LR_RATIO = 10 / 3  # peak learning rate of Muon, and of the embeddings, over that of AdamW


@dataclass
class Settings:
    """What a run is made of besides its network and its text."""

    batch_size: int = 16  # windows a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches a step
    optimizer: str = "muon"  # or "adamw", for the blocks' matrices
    lr: float = 0.006  # AdamW's peak; Muon's and that of the embeddings follow in proportion
    ngram_lr: float = 0.15  # the n-gram tables' peak: a row moves so many times the gradient of each token that met it
    weight_decay: float = 0.0
    short_share: float = 0.0  # for so much of the run windows are read as PIECES shorter ones: attention costs less
    calibration: float = 0.0  # share of the training part kept from training, to calibrate the model on at the end
    steps: int | None = None  # the schedule counts steps,
    minutes: float | None = None  # or follows the clock
    eval_every: int | None = None  # steps; None: ten times a run
    seed: int = 0
    compile: bool = False


@dataclass
class Run:
    """A training run's whole state; `checkpoint` and `Run.resume` turn it into a file and back, bit for bit."""

    model: Transformer
    corpus: Corpus
    val_fraction: float
    settings: Settings
    processes: Processes
    step: int = 0
    seconds: float = 0.0  # spent so far, in this and earlier sessions
    flops: float = 0.0  # spent so far
    history: list[dict] = field(default_factory=list)  # one dict a validation: the lines of metrics.jsonl
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the last validation

    def __post_init__(self):
        settings, T = self.settings, self.model.config.block_size
        parts = self.processes.world * settings.accumulate
        if settings.batch_size % parts:
            raise ValueError(f"--batch-size {settings.batch_size} cannot be shared by {parts} equal micro-batches")
        self.model.to(self.processes.device)
        for module in self.model.modules():
            if isinstance(module, nn.EmbeddingBag):  # a step touches few rows; GPUs' libraries and compilers want all
                module.sparse = self.processes.device.type == "cpu" and not settings.compile
        larger = MUON_LR_RATIO * settings.lr
        use_muon = settings.optimizer == "muon"
        ngram_lr = settings.ngram_lr * self.tokens_per_step  # a step's loss is the mean over so many
        self.optimizers = build_optimizers(
            self.model, settings.lr, larger, larger, ngram_lr, settings.weight_decay, use_muon
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        train_ids, self.val_ids = self.corpus.split(self.val_fraction)
        kept = int(settings.calibration * len(train_ids))
        kept = kept if kept >= T else 0  # less than a window says too little
        if len(train_ids) - kept < T:
            raise ValueError(
                f"--calibration {settings.calibration} leaves {len(train_ids) - kept} characters to train on, too few "
                f"for one window of {T}: keep less, or use a longer text (--data)"
            )
        # Its beginning: the end is the same play as the validation part, and names not met before are what costs most.
        calibration_ids, train_ids = train_ids.split([kept, len(train_ids) - kept])
        self.train_set = ShakespeareDataset(train_ids, self.corpus.tokenizer, T)
        self.val_windows, self.calibration_windows = (
            next(iter(validation_windows(ids, T, self.corpus.tokenizer, VALIDATION_CHARS)), None)
            for ids in (self.val_ids, calibration_ids)
        )

    @property
    def tokens_per_step(self) -> int:
        """Of the global batch."""
        return self.settings.batch_size * self.model.config.block_size

    def sample_windows(self, done: float) -> Tensor:
        """(batch_size, T) windows of the training part for the next step of a run of which `done` is over, 0..1.

        For the first `short_share` of it (batch_size PIECES, T / PIECES), the same tokens cut, if T can be.
        """
        windows = self.train_set.sample(self.settings.batch_size, self.generator)
        self.corpus.forget_pages()
        short = done < self.settings.short_share and windows.shape[1] % PIECES == 0
        return windows.view(-1, windows.shape[1] // PIECES) if short else windows

    def progress(self, clock: float) -> float:
        """Share of the run that is done, 0..1, by steps or by the clock (seconds in this session)."""
        if self.settings.steps is not None:
            return self.step / self.settings.steps
        return self.processes.agree(min(1.0, (self.seconds + clock) / (60 * self.settings.minutes)))

    def checkpoint(self, clock: float) -> Checkpoint:
        """The state as it is now."""
        training = {
            "settings": asdict(self.settings),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),  # dropout on the CPU
            "cuda_rng": torch.cuda.get_rng_state_all() if self.processes.device.type == "cuda" else [],
            "seconds": self.seconds + clock,
            "flops": self.flops,
            "losses": [float(loss) for loss in self.losses],
        }
        corpus = {"name": self.corpus.name, "sha256": self.corpus.sha256, "val_fraction": self.val_fraction}
        return Checkpoint(self.model, self.corpus.tokenizer, corpus, self.step, self.history, training)

    @classmethod
    def resume(cls, checkpoint: Checkpoint, corpus: Corpus, settings: Settings, processes: Processes) -> "Run":
        """Go on where `checkpoint` stopped. Raises ValueError if the corpus is another text now."""
        known = checkpoint.corpus
        if corpus.sha256 != known["sha256"]:
            raise ValueError(f"{corpus.name} is not the text of {checkpoint.path}: restore it, or find it with --data")
        training = checkpoint.training
        self = cls(checkpoint.model.train(), corpus, known["val_fraction"], settings, processes)
        self.step, self.history, self.seconds = checkpoint.step, checkpoint.history, training["seconds"]
        self.flops = training["flops"]
        self.losses = [torch.tensor(loss, device=processes.device) for loss in training["losses"]]
        for optimizer, state in zip(self.optimizers, training["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.generator.set_state(training["generator"])
        torch.set_rng_state(training["torch_rng"])
        if training["cuda_rng"] and processes.device.type == "cuda":
            torch.cuda.set_rng_state_all(training["cuda_rng"])
        return self


class Keeper:
    """Writes a run's files: last.pt and metrics.jsonl at every validation, best.pt when it is the best one so far.

    A run that was in `folder` before is moved aside, not overwritten, once there is something to put in its place.
    """

    def __init__(self, run: Run, folder: Path, resumed_from: Path | None, clock: Callable[[], float]):
        self.run, self.folder, self.clock = run, folder, clock
        self.fresh = resumed_from is None or resumed_from.resolve().parent != folder.resolve()

    def on_validation(self, record: dict) -> None:
        """Keep the state of this validation."""
        self.save_last()
        if record["val_loss"] <= min(line["val_loss"] for line in self.run.history):
            copy_checkpoint(self.folder / "last.pt", self.folder / "best.pt")

    def save_last(self) -> None:
        """Write last.pt and metrics.jsonl."""
        if self.fresh and any(self.folder.glob("*.pt")):
            names = (self.folder.with_name(f"{self.folder.name}.{i}") for i in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            self.folder.rename(aside)
            say(f"the run that was in {self.folder} is in {aside} now")
        self.fresh = False
        save_checkpoint(self.folder / "last.pt", self.run.checkpoint(self.clock()))
        self._write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.run.history))

    def save_summary(self, summary: dict) -> None:
        """Write summary.json."""
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as temporary:
            temporary.write_text(text)
