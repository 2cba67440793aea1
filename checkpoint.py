"""Checkpoints: one self-contained file with everything needed to generate, evaluate or resume, and the files of a run.

They hold tensors and plain values only, so that loading one never runs code.
"""

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from model import MODELS, ModelConfig, Transformer, adapt, least_bytes, lora_state, merge_lora
from tokenizer import Tokenizer, tokenizer_from_dict
from utils.console import say
from utils.devices import memory_problem, pick_device
from utils.errors import ArgumentError
from utils.files import LockedError, atomic_write, check_seal, locked, seal, sha256_of

FORMAT = 2
ENTRIES = {  # of the dictionary in a file, and their types
    **{"format": int, "name": str, "config": dict, "base": dict | None, "model": dict, "tokenizer": dict},
    **{"corpus": dict, "step": int, "history": list, "training": dict},
}
RUN_FILES = ("best.pt", "last.pt")  # of a run's folder, which stands for the first of them that it holds
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
    """Write a checkpoint's file with these weights and this training state, and its hash at the end.

    Raises ValueError for weights that are not finite, and OSError.
    """
    path = Path(path)
    check_finite(path, weights)
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
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # which torch makes of an OSError, such as that of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        seal(temporary)


def check_finite(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError, naming the file and the weight, for a weight that is NaN or infinite."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite: the training diverged, try a smaller --lr and --ngram-lr")


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
    """Read what `save_checkpoint` wrote; the model is on `device`, in eval mode. path: as of `checkpoint_file`.

    Raises ValueError that names the file if it is missing, damaged or no checkpoint of this project, and ArgumentError
    for a device that this machine does not have.
    """
    device, path = pick_device(str(device)), checkpoint_file(path)
    state = read_state(path)
    base = merged_base(path, state["base"]) if state["base"] else None
    try:
        config, tokenizer = ModelConfig(**state["config"]), tokenizer_from_dict(state["tokenizer"])
        check_sizes(state, config, tokenizer)
        model = MODELS[state["name"]](config) if base is None else adapt(base, config)
        kept = {} if base is None else model.state_dict().keys() - lora_state(model).keys()
        model.load_state_dict({name: model.state_dict()[name] for name in kept} | state["model"])
    except (TypeError, KeyError, ValueError, RuntimeError) as error:  # other fields, sizes, weights or tokenizer
        problem = " ".join(str(error).split())[:200]  # torch's are several lines
        raise ValueError(f"{path}: of another version of the network ({problem}): train it again") from None
    return Checkpoint(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        corpus=state["corpus"],
        step=state["step"],
        history=state["history"],
        training=state["training"],
        path=path,
    )


def checkpoint_file(path: str | Path, names: tuple[str, ...] = RUN_FILES) -> Path:
    """A file as it is; of a run's folder the first of the files `names` that it holds.

    Raises ValueError for a folder that holds none of them.
    """
    path = Path(path)
    files = [path / name for name in names if (path / name).is_file()]
    if path.is_dir() and not files:
        raise ValueError(f"{path}: no {' or '.join(names)} in this folder: name the folder of a run, such as out/llada")
    return files[0] if files else path


def read_state(path: Path) -> dict:
    """The dictionary in a checkpoint's file, verified: its hash, its entries and their types, finite weights."""
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; train one with `python train.py`")
    check_seal(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a foreign file
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}): train it again") from None
    known = isinstance(state, dict) and state.keys() == ENTRIES.keys()
    if not known or not all(isinstance(state[name], kind) for name, kind in ENTRIES.items()):
        raise ValueError(f"{path}: not a checkpoint of this version (other entries): train it again")
    if state["format"] != FORMAT or state["name"] not in MODELS:
        raise ValueError(f"{path}: not a checkpoint of this version (format {FORMAT}): train it again")
    for name, tensor in state["model"].items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.float32, torch.float16):
            raise ValueError(f"{path}: {name} is no tensor of float32 or float16: train it again")
    check_finite(path, state["model"])
    return state


def check_sizes(state: dict, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError, before it is built, for a network that does not fit its tokenizer, weights or this machine."""
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"its tokenizer has {tokenizer.vocab_size} tokens, its network {config.vocab_size}")
    if problem := memory_problem(least_bytes(state["name"], config)):
        raise ValueError(f"it {problem}")
    needed = least_bytes(state["name"], replace(config, block_size=2 * config.parallel))
    held = sum(4 * tensor.numel() for tensor in state["model"].values())
    if not state["base"] and needed > 1.1 * held:
        raise ValueError(f"its network would have {needed:,} bytes of weights, and the file holds {held:,}")


def merged_base(path: Path, base: dict) -> Transformer:
    """The model that the adapters in `path` were trained on. Raises ValueError if it is not there."""
    try:
        if sha256_of(Path(base["path"])) == base["sha256"]:
            return merge_lora(load_checkpoint(base["path"]).model)
    except (FileNotFoundError, KeyError, TypeError):
        pass
    missing = f"{base.get('path')}, which is missing or has changed"
    raise ValueError(f"{path}: holds adapters of {missing}: restore that file")


def find_checkpoints(out: str | Path = "out") -> list[Path]:
    """The checkpoints of the runs under `out`, newest run first: best.pt of each, or last.pt if there is no best."""
    found = []
    for name in MODELS:
        candidates = [Path(out) / name / file for file in RUN_FILES]
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

    `trainer` is a `trainer.Trainer`, of which only step, history and checkpoint() are used. If `folder` holds another
    run, that is moved aside when the first checkpoint of this one is written.
    """

    def __init__(self, trainer, folder: Path, resumed_from: Path | None = None):
        self.trainer, self.folder, self.resumed_from = trainer, folder, resumed_from
        self.is_new = resumed_from is None or resumed_from.resolve().parent != folder.resolve()
        self.saved = time.monotonic()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the folder to this process inside the block, and complete what a killed process left there.

        Raises ArgumentError if another process trains into it or nothing can be written to it.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder.with_name(f".{self.folder.name}.lock")))
                self.folder.mkdir(exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder):
                    pass
            except LockedError as error:
                problem = f"{self.folder}: {error} trains into it: wait for it, or choose another folder"
                raise ArgumentError("out", problem) from None
            except OSError as error:
                raise ArgumentError("out", f"{self.folder}: cannot write there ({error.strerror})") from None
            self.complete()
            yield

    def complete(self) -> None:
        """Delete the temporary files of a killed process, and write what it had yet to write after last.pt."""
        for leftover in self.folder.glob("*.part"):
            leftover.unlink()
        history = self.trainer.history
        if not self.is_new and self.resumed_from.name == "last.pt" and history:
            self.write_history()
            if history[-1]["step"] == self.trainer.step:
                self.save_best()

    def on_validation(self, record: dict) -> None:
        """Save the state of this validation."""
        self.save_last()
        self.save_best()

    def save_best(self) -> None:
        """Make best.pt the state in last.pt, if its record is the best so far."""
        losses = list(map(loss_of_weights, self.trainer.history))
        best = self.folder / "best.pt"  # missing at first, also if the history of another folder has a better record
        if losses[-1] <= min(losses) or not best.exists():
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
        self.write_history()
        self.saved = time.monotonic()

    def write_history(self) -> None:
        """Write metrics.jsonl."""
        self._write_text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in self.trainer.history))

    def save_if_older(self, seconds: float) -> None:
        """`save_last`, if the last time is so long ago."""
        if time.monotonic() - self.saved >= seconds:
            self.save_last()

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
