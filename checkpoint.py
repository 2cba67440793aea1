"""Checkpoints: one self-contained file with everything needed to generate, evaluate or resume, and the files of a run.

They hold tensors and plain values only, so that loading one never runs code.
"""

import itertools
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model import MODELS, ModelConfig, Transformer, adapt, lora_state, merge_lora
from tokenizer import Tokenizer, tokenizer_from_dict
from utils.console import say
from utils.devices import pick_device
from utils.files import atomic_write, sha256_of

FORMAT = 2
PRETRAINED = Path(__file__).parent / "pretrained"  # models that come with the project: NAME.pt


@dataclass
class Checkpoint:
    """A model, its tokenizer and how it was trained."""

    model: Transformer
    tokenizer: Tokenizer
    corpus: dict  # {"name", "sha256", "val_fraction"} of the text it was trained on
    step: int = 0
    history: list[dict] = field(default_factory=list)  # the lines of metrics.jsonl
    training: dict = field(default_factory=dict)  # what resuming needs, see `Trainer.checkpoint`
    path: Path | None = None


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path` atomically: if this fails, the file that was there stays."""
    write_state(path, checkpoint, checkpoint.model.state_dict(), checkpoint.training)


def export_weights(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a model to use and not to train on: its weights in half precision, adapters merged.

    It is an ordinary checkpoint of an eighth of the size. Rounding to float16 changes its loss in the fifth digit.
    """
    state = merge_lora(checkpoint.model) if checkpoint.model.config.lora_rank else checkpoint.model
    half = {name: tensor.half() for name, tensor in state.state_dict().items()}
    write_state(path, checkpoint, half, {}, config=state.config)


def save_adapters(path: str | Path, checkpoint: Checkpoint, base: dict) -> None:
    """Write the adapters of a model alone. base: {"path", "sha256"} of the checkpoint that they change."""
    write_state(path, checkpoint, lora_state(checkpoint.model), {}, base=base)


def write_state(
    path: str | Path,
    checkpoint: Checkpoint,
    weights: dict[str, torch.Tensor],
    training: dict,
    config: ModelConfig | None = None,
    base: dict | None = None,
) -> None:
    """Write a checkpoint's file with these weights and this training state."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "format": FORMAT,
        "name": checkpoint.model.name,
        "config": (config or checkpoint.model.config).to_dict(),
        "base": base,
        "model": weights,
        "tokenizer": checkpoint.tokenizer.to_dict(),
        "corpus": checkpoint.corpus,
        "step": checkpoint.step,
        "history": checkpoint.history,
        "training": training,
    }
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Make `target` the same checkpoint as `source`: a hard link where the file system allows it, else a copy.

    A link is safe, because checkpoints are only ever replaced and never modified in place.
    """
    with atomic_write(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read what `save_checkpoint` wrote; the model is on `device`, in eval mode.

    Raises ValueError that names the file if it is missing, broken or no checkpoint of this project, and ArgumentError
    for a device that this machine does not have.
    """
    device, path = pick_device(str(device)), Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; train one with `python train.py`")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a truncated or foreign file
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}): train it again") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("name") not in MODELS:
        raise ValueError(f"{path}: not a checkpoint of this version (format {FORMAT}): train it again")
    model = adapted_base(path, state) if state["base"] else None
    try:
        model = model or MODELS[state["name"]](ModelConfig(**state["config"]))
        model.load_state_dict(model.state_dict() | state["model"] if state["base"] else state["model"])
    except (TypeError, RuntimeError):  # other fields or weights
        raise ValueError(f"{path}: made by another version of the network: train it again") from None
    return Checkpoint(
        model=model.to(device).eval(),
        tokenizer=tokenizer_from_dict(state["tokenizer"]),
        corpus=state["corpus"],
        step=state["step"],
        history=state["history"],
        training=state["training"],
        path=path,
    )


def adapted_base(path: Path, state: dict) -> Transformer:
    """The model that the adapters in `state` were trained on, with fresh ones. Raises ValueError if it is not there."""
    base = state["base"]
    try:
        if sha256_of(Path(base["path"])) == base["sha256"]:
            return adapt(merge_lora(load_checkpoint(base["path"]).model), ModelConfig(**state["config"]))
    except FileNotFoundError:
        pass
    raise ValueError(f"{path}: holds adapters of {base['path']}, which is missing or has changed: restore that file")


def find_checkpoints(out: str | Path = "out") -> list[Path]:
    """The checkpoints of the runs under `out`, newest run first: best.pt of each, or last.pt if there is no best."""
    found = []
    for name in MODELS:
        candidates = [Path(out) / name / file for file in ("best.pt", "last.pt")]
        existing = [path for path in candidates if path.is_file()]
        if existing:
            found.append((max(path.stat().st_mtime_ns for path in existing), existing[0]))
    return [path for _, path in sorted(found, reverse=True)]


def pretrained_checkpoints() -> list[Path]:
    """The models that come with the project, LLaDA first."""
    return [path for name in MODELS if (path := PRETRAINED / f"{name}.pt").is_file()]


def newest_checkpoint(out: str | Path = "out", name: str | None = None) -> Path:
    """The newest checkpoint under `out`, of model `name` if given, else the pretrained one.

    Raises ValueError if there is none.
    """
    for path in [*find_checkpoints(out), *pretrained_checkpoints()]:
        if name is None or name in (path.parent.name, path.stem):
            return path
    which = f" --model {name}" if name else ""
    raise ValueError(f"no checkpoint under {out}/: train one with `python train.py{which}`, or pass --checkpoint FILE")


# ------------------------------------------------------------------------------------------------- a run's folder
class CheckpointWriter:
    """Writes a run's files: last.pt and metrics.jsonl at every validation, best.pt when it is the best so far.

    `trainer` is a `trainer.Trainer`, of which only history and checkpoint() are used. If `folder` holds another run,
    that is moved aside when the first checkpoint of this one is written.
    """

    def __init__(self, trainer, folder: Path, resumed_from: Path | None = None):
        self.trainer, self.folder = trainer, folder
        self.is_new = resumed_from is None or resumed_from.resolve().parent != folder.resolve()

    def on_validation(self, record: dict) -> None:
        """Save the state of this validation."""
        self.save_last()
        best = self.folder / "best.pt"  # missing at first, also if the history of another folder has a better record
        if loss_of_weights(record) <= min(map(loss_of_weights, self.trainer.history)) or not best.exists():
            copy_checkpoint(self.folder / "last.pt", best)

    def save_last(self) -> None:
        """Write last.pt and metrics.jsonl."""
        if self.is_new and any(self.folder.glob("*.pt")):
            names = (self.folder.with_name(f"{self.folder.name}.{i}") for i in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            self.folder.rename(aside)
            say(f"the run that was in {self.folder} is now in {aside}")
        self.is_new = False
        save_checkpoint(self.folder / "last.pt", self.trainer.checkpoint())
        self._write_text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in self.trainer.history))

    def save_summary(self, summary: dict) -> None:
        """Write summary.json; of a run that trained adapters also adapters.pt, the best ones alone."""
        if summary["fine_tuning"] and self.trainer.config.lora_rank:
            best = load_checkpoint(self.folder / "best.pt")
            save_adapters(self.folder / "adapters.pt", best, summary["fine_tuning"]["base"])
        self._write_text("summary.json", json.dumps(summary, indent=2) + "\n")

    def _write_text(self, name: str, text: str) -> None:
        with atomic_write(self.folder / name) as temporary:
            temporary.write_text(text)


def loss_of_weights(record: dict) -> float:
    """Validation loss of the weights that were saved with this record, nats/char: calibrated if they are.

    >>> loss_of_weights({"val_loss": 1.62}), loss_of_weights({"val_loss": 1.6, "calibrated_val_loss": 1.58})
    (1.62, 1.58)
    """
    return record.get("calibrated_val_loss", record["val_loss"])
