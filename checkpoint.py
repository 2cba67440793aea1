"""One self-contained file: everything needed to generate, evaluate or resume. Tensors and plain values only."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from files import replacing
from model import CONFIGS, MODELS, Transformer
from tokenizer import SimpleTokenizer

FORMAT = 1


@dataclass
class Checkpoint:
    """A model with its tokenizer and its past."""

    model: Transformer
    tokenizer: SimpleTokenizer
    corpus: dict  # {"name", "sha256", "val_fraction"} of the text it was trained on
    step: int = 0
    history: list[dict] = field(default_factory=list)  # the lines of metrics.jsonl
    training: dict = field(default_factory=dict)  # settings, optimizer and generator states: what resuming needs
    path: Path | None = None


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """`path` holds a whole checkpoint at every moment: this one or the one before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "format": FORMAT,
        "name": checkpoint.model.name,
        "config": checkpoint.model.config.to_dict(),
        "model": checkpoint.model.state_dict(),
        "tokenizer": checkpoint.tokenizer.to_dict(),
        "corpus": checkpoint.corpus,
        "step": checkpoint.step,
        "history": checkpoint.history,
        "training": checkpoint.training,
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Make `target` the same checkpoint as `source`, at once: one file under two names where the disk allows it.

    Neither name can change what the other holds, since checkpoints are replaced and never written into.
    """
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read what `save_checkpoint` wrote; the model is on `device`, in eval mode.

    Raises ValueError that names the file if it is missing, broken or no checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; train one with `python train.py`")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a file that is cut off or something else altogether
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}): train it again") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("name") not in MODELS:
        raise ValueError(f"{path}: not a checkpoint of this version (format {FORMAT}): train it again")
    try:
        model = MODELS[state["name"]](CONFIGS[state["name"]](**state["config"]))
        model.load_state_dict(state["model"])
    except (TypeError, RuntimeError):  # fields or weights of another version
        raise ValueError(f"{path}: made by another version of the network: train it again") from None
    return Checkpoint(
        model=model.to(device).eval(),
        tokenizer=SimpleTokenizer.from_dict(state["tokenizer"]),
        corpus=state["corpus"],
        step=state["step"],
        history=state["history"],
        training=state["training"],
        path=path,
    )


def find_checkpoints(out: str | Path = "out") -> list[Path]:
    """The checkpoints of the runs under `out`, newest run first; of each run best.pt, or else last.pt."""
    found = []
    for name in MODELS:
        candidates = [Path(out) / name / file for file in ("best.pt", "last.pt")]
        existing = [path for path in candidates if path.is_file()]
        if existing:
            found.append((max(path.stat().st_mtime_ns for path in existing), existing[0]))
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(out: str | Path = "out", name: str | None = None) -> Path:
    """The newest run's checkpoint, of model `name` if given. Raises ValueError if there is none."""
    for path in find_checkpoints(out):
        if name is None or path.parent.name == name:
            return path
    which = f" --model {name}" if name else ""
    raise ValueError(f"no checkpoint under {out}/: train one with `python train.py{which}`, or pass --checkpoint FILE")
