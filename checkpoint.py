"""Checkpoints: one self-contained file with everything needed to generate, evaluate or resume, and the files of a run.

They hold tensors and plain values only, so that loading one never runs code. The extras/ that one needs are imported
here, so that the story need not know them.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from config import ModelConfig
from model import MODELS, NEVER_PREDICTED, Transformer
from tokenizer import SimpleTokenizer, Tokenizer
from utils.console import say
from utils.devices import pick_device
from utils.errors import ArgumentError
from utils.files import atomic_write, check_seal, locked, seal

FORMAT = 4
TABLES, SCALE = "encoder.ngrams.tables.weight", "encoder.ngrams.tables.weight.scale"  # most of the bytes of a model
RECORDS = ("corpus", "step", "history", "training")  # of a Checkpoint, which are saved as they are
RUN_FILES = ("best.pt", "last.pt")  # of a run's folder, which stands for the first of them that it holds
PRETRAINED = Path(__file__).parent / "pretrained"  # models that come with the project: NAME.pt


# ------------------------------------------------------------------------------------------------- networks
def new_model(name: str, config: ModelConfig, weights: dict[str, Tensor] | None = None) -> Transformer:
    """A network with random weights, or with those given. Adapters, if it has any, are new. Raises ArgumentError."""
    if config.arch == "vanilla":
        import extras.vanilla
    if config.segments == "pairs":
        import extras.pairs  # noqa: F401 (it adds the kind of corpus)
    model = MODELS[name](config)
    if weights is not None:
        model.load_state_dict(weights)
    if config.lora_rank:
        from extras.lora import add_adapters

        add_adapters(model)
    return model


def continued(base: Transformer, config: ModelConfig) -> Transformer:
    """A new network with the weights of `base`, its adapters merged. The vocabulary may be larger.

    The rows, n-grams and logits of old ids stay as they are, bit for bit. A new id's row of the head is the mean of
    the old ones, so its logit is the mean of theirs: the loss on old text grows by at most log(1 + new / old) (Jensen).
    Its embedding is the mean too (Hewitt 2021, "Initializing new word embeddings"), with noise of a tenth of their
    standard deviation, so that new ids differ.
    """
    state, new = merged(base).state_dict(), config.vocab_size - base.config.vocab_size
    if new:
        embedding, head = state["encoder.embedding.weight"], state["head.weight"]  # (V, C) each
        std, mean = torch.std_mean(embedding[NEVER_PREDICTED:], dim=0)
        state["encoder.embedding.weight"] = torch.cat([embedding, mean + 0.1 * std * torch.randn(new, len(mean))])
        state["head.weight"] = torch.cat([head, head[NEVER_PREDICTED:].mean(0).expand(new, -1)])
    ngram_base = base.config.ngram_base or base.config.vocab_size
    return new_model(base.name, replace(config, ngram_base=ngram_base), state)


def merged(model: Transformer) -> Transformer:
    """The model itself, its adapters added to the weights that they change: they are gone, the outputs stay."""
    if model.config.lora_rank:
        from extras.lora import merge_adapters

        merge_adapters(model)
    return model


def tokenizer_from_dict(state: dict) -> Tokenizer:
    """The inverse of a tokenizer's `to_dict`. Raises ValueError, KeyError or TypeError for anything else."""
    if "tokenizer_json" not in state:
        return SimpleTokenizer.from_dict(state)
    from extras.bpe import BPETokenizer

    return BPETokenizer.from_dict(state)


# ------------------------------------------------------------------------------------------------- writing
@dataclass
class Checkpoint:
    """A model, its tokenizer and how it was trained."""

    model: Transformer
    tokenizer: Tokenizer
    corpus: dict  # {"name", "sha256", "val_fraction"} of the text it was trained on
    step: int = 0  # steps of this run and of those that it began from
    history: list[dict] = field(default_factory=list)  # the lines of metrics.jsonl
    training: dict = field(default_factory=dict)  # what resuming needs, see `Trainer.checkpoint`
    path: Path | None = None


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, weights: dict[str, Tensor] | None = None) -> None:
    """Write `checkpoint` to `path` atomically, with its hash at the end: if this fails, the file that was there stays.

    weights: to write instead of the model's. Raises ValueError for weights that are not finite, and OSError.
    """
    path, model = Path(path), checkpoint.model
    weights = weights or model.state_dict()
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite: the training diverged, try a smaller --lr and --ngram-lr")
    state = {"format": FORMAT, "name": model.name, "config": model.config.to_dict(), "model": weights}
    state |= {"tokenizer": checkpoint.tokenizer.to_dict()} | {name: getattr(checkpoint, name) for name in RECORDS}
    with atomic_write(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # which torch makes of an OSError, such as that of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        seal(temporary)


def export_weights(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a model to use and not to train on: its weights in half precision, the rows of n-gram tables in 8 bits."""
    weights = merged(checkpoint.model).state_dict()
    half = {name: tensor.half() for name, tensor in weights.items()}
    if TABLES in weights:
        rows = weights[TABLES]
        half[SCALE] = (rows.abs().amax(1) / 127).clamp(min=1e-8).half().clamp(min=2**-24)  # (rows,), one for each
        half[TABLES] = (rows / half[SCALE].float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    save_checkpoint(path, replace(checkpoint, training={}), half)


# ------------------------------------------------------------------------------------------------- reading
def load_checkpoint(path: str | Path, device: str | torch.device = "cpu", resuming: bool = False) -> Checkpoint:
    """Read what `save_checkpoint` wrote; the model is on `device`, in eval mode. path: as of `checkpoint_file`.

    Adapters are merged, unless their run is to be resumed. Raises ValueError that names the file if it is missing,
    damaged or no checkpoint of this project, and ArgumentError for a device that this machine does not have.
    """
    device, path = pick_device(str(device)), checkpoint_file(path)
    state = read_state(path)
    try:
        config, tokenizer = ModelConfig(**state["config"]), tokenizer_from_dict(state["tokenizer"])
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.vocab_size} tokens, its network {config.vocab_size}")
        weights = state["model"]
        if SCALE in weights:
            weights[TABLES] = weights[TABLES] * weights.pop(SCALE).float()[:, None]
        with torch.random.fork_rng(devices=[]):  # the first weights are replaced: leave the generator as it was
            model = new_model(state["name"], config)
        model.load_state_dict(weights)
        records = {name: state[name] for name in RECORDS}
    except (TypeError, KeyError, ValueError, RuntimeError) as error:  # other fields, sizes, weights or tokenizer
        problem = " ".join(str(error).split())[:200]  # torch's are several lines
        raise ValueError(f"{path}: of another version of the network ({problem}): train it again") from None
    model = model if resuming else merged(model)
    return Checkpoint(model.to(device).eval(), tokenizer, **records, path=path)


def checkpoint_file(path: str | Path, names: tuple[str, ...] = RUN_FILES) -> Path:
    """A file as it is; of a run's folder the first of the files `names` that it holds. Raises ValueError for none."""
    path = Path(path)
    files = [path / name for name in names if (path / name).is_file()]
    if path.is_dir() and not files:
        raise ValueError(f"{path}: no {' or '.join(names)} in this folder: name the folder of a run, such as out/llada")
    return files[0] if files else path


def read_state(path: Path) -> dict:
    """The dictionary in a checkpoint's file, verified by its hash."""
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; train one with `python train.py`")
    check_seal(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a foreign file
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}): train it again") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this version (format {FORMAT}): train it again")
    return state


def find_checkpoints(folder: str | Path | None = None) -> list[Path]:
    """The checkpoint of each model in a folder of runs, such as out/, or of models that are one file each; LLaDA first.

    Of a run this is best.pt, or last.pt if there is no best. folder None: the models that come with the project.
    """
    folder, found = Path(folder or PRETRAINED), []
    for name in MODELS:
        places = *(folder / name / file for file in RUN_FILES), folder / f"{name}.pt"
        found += list(filter(Path.is_file, places))[:1]
    return found


def newest_checkpoint(out: str | Path | None = None, name: str | None = None) -> Path:
    """The checkpoint under `out` of model `name` (None: LLaDA if there is one, else GPT).

    out None: that under out/, or else the pretrained one. Raises ValueError if there is none.
    """
    found = find_checkpoints(out or "out") + (find_checkpoints() if out is None else [])
    for wanted in (name,) if name else MODELS:
        for path in found:
            if wanted in (path.parent.name, path.stem):
                return path
    which = f" --model {name}" if name else ""
    raise ValueError(f"no checkpoint under {out or 'out'}/: train one with `python train.py{which}`, or name its FILE")


# ------------------------------------------------------------------------------------------------- a run's folder
class CheckpointWriter:
    """Writes a run's files: best.pt (if it is the best so far), metrics.jsonl and last.pt at every validation.

    last.pt is the last of them: what a killed process had written before, the resumed run writes again. `trainer` is a
    `trainer.Trainer`. Another run in `folder` is moved aside when the first checkpoint of this one is written.
    """

    def __init__(self, trainer, folder: Path, resumed_from: Path | None = None):
        self.trainer, self.folder, self.best = trainer, folder, folder / "best.pt"
        self.is_new = resumed_from is None or resumed_from.resolve().parent != folder.resolve()
        self.saved = time.monotonic()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the folder to this process inside the block, and delete the temporary files of a killed one.

        Raises ArgumentError if nothing can be written to it, ValueError if another process trains into it.
        """
        check_writable("out", self.folder)
        with locked(self.folder.with_name(f".{self.folder.name}.lock")):
            for leftover in self.folder.glob("*.part"):
                leftover.unlink()
            yield

    def on_validation(self, record: dict) -> None:
        """Save the state of this validation."""
        losses = list(map(deciding_loss, self.trainer.history))
        if losses[-1] <= min(losses) or self.is_new or not self.best.exists():  # the best may be in another folder
            self.save("best.pt")
        self.write_text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in self.trainer.history))
        self.save_last()

    def save_last(self, pause: float = 0.0) -> None:
        """Write last.pt, unless this was done in the last `pause` seconds."""
        if time.monotonic() - self.saved >= pause:
            self.save("last.pt")
            self.saved = time.monotonic()

    def save(self, name: str) -> None:
        """Write the state to a file of the folder; before the first time, move another run aside."""
        if self.is_new and any(self.folder.glob("*.pt")):
            aside = next(p for i in count(1) if not (p := self.folder.with_name(f"{self.folder.name}.{i}")).exists())
            self.folder.rename(aside)
            say(f"the run that was in {self.folder} is now in {aside}")
        self.is_new = False
        save_checkpoint(self.folder / name, self.trainer.checkpoint())

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the run."""
        with atomic_write(self.folder / name) as temporary:
            temporary.write_text(text)


def check_writable(argument: str, folder: Path) -> None:
    """Make a folder unless it is there. Raises ArgumentError if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentError(argument, f"{folder}: cannot write there ({error.strerror})") from None


def deciding_loss(record: dict) -> float:
    """The loss of a validation by which best.pt is chosen: that of what the sampler writes, where it is trained.

    Calibrated losses, which exist at the end alone, never decide.
    """
    return record.get("sampler_loss", record["val_loss"])
