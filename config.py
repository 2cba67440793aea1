"""Every setting of the project: frozen dataclasses whose fields carry their help text, bounds and where they count.

A field is a flag: `add_flags` makes the command line of it, `check` its bounds, `refuse_without_effect` an error where
it would change nothing. Torch is not imported here, so `--help` is instant.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import get_args

from utils.errors import ArgumentError, check_number

MODELS = ("llada", "gpt")
SEGMENTS = ("window", "speech", "paragraph", "line")
ORDERS = ("sweep", "confidence", "drawn_confidence", "left", "random")
SCHEDULES = ("uniform", "cosine")
SWEEP_STEPS = 32  # network evaluations of the default sampler for a window, or for a block; then it corrects
SEED = {"low": 0, "high": 2**63 - 1}
ARGPARSE = ("type", "metavar", "nargs", "const", "action", "choices")  # what is passed on to argparse
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "FILE"}
TEXT = ("text", "infill", "file", "chat", "race")  # the modes of generate.py in which tokens are drawn


# ------------------------------------------------------------------------------------------------- the one form
def setting(default=None, help: str | None = None, *, only: Mapping | None = None, **more):
    """A field of a settings class. Without `help` it is no flag.

    only: {another setting: the values with which this one has an effect}. more: `low`, `high`, `above`, `below` (see
    `check_number`), `choices`, and what argparse takes: `flag`, `metavar`, `type`, `nargs`, `const`, `action`.
    """
    return field(default=default, metadata={"help": help, "only": only or {}} | more)


def kind_of(annotation) -> type:
    """The type of a field, which may be None as well."""
    return get_args(annotation)[0] if isinstance(annotation, UnionType) else annotation


def bounds_of(metadata: Mapping) -> dict:
    """The bounds in a field's metadata, as `check_number` takes them."""
    return {name: metadata[name] for name in ("low", "high", "above", "below") if name in metadata}


def check(config) -> None:
    """Raise ArgumentError unless every field of a settings object is within its bounds and among its choices."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        if value is None or (isinstance(value, (str, bool)) and not choices):
            continue
        if choices and value not in choices:
            raise ArgumentError(f.name, f"must be one of {', '.join(map(str, choices))}, got {value!r}")
        if bounds := bounds_of(f.metadata):
            check_number(f.name, value, **bounds)


def add_flags(group, config_class: type, number: Callable, show_defaults: bool = True) -> None:
    """Give an argparse group a flag for every field that has a help text. One that is not given is None.

    number(kind, **bounds) makes the argparse type of a number, see `utils.console.number`.
    """
    for f in fields(config_class):
        meta, kind = f.metadata, kind_of(f.type)
        flag = f"--{meta.get('flag') or f.name.replace('_', '-')}"
        if not meta.get("help") or flag in group._option_string_actions:  # another class has made it
            continue
        options = {name: meta[name] for name in ARGPARSE if name in meta}
        if kind is bool:
            options.setdefault("action", "store_true")
        elif "type" not in options and "choices" not in options:
            options["type"] = kind if kind in (str, Path) else number(kind, **bounds_of(meta))
            options.setdefault("metavar", METAVARS[kind])
        shown = show_defaults and f.default not in (None, "") and kind is not bool and "default:" not in meta["help"]
        text = meta["help"].replace("%", "%%") + (f" (default: {f.default})" if shown else "")
        group.add_argument(flag, dest=f.name, default=None, help=text, **options)


def given(args: argparse.Namespace, config_class: type) -> dict:
    """The flags that were given among the fields of a settings class."""
    values = {f.name: getattr(args, f.name, None) for f in fields(config_class)}
    return {name: value for name, value in values.items() if value is not None}


def refuse_without_effect(args: argparse.Namespace, state: Mapping[str, object], *classes: type) -> None:
    """Raise ArgumentError for a flag that was given and has no effect.

    state: the values that decide it, by the names in `only`; a set where several count at once.
    """
    for f in (f for config_class in classes for f in fields(config_class)):
        for name, allowed in f.metadata.get("only", {}).items() if getattr(args, f.name, None) is not None else ():
            values = state[name] if isinstance(state[name], (set, frozenset)) else {state[name]}
            if not values & set(allowed):
                here, there = (" or ".join(map(str, sorted(v, key=str))) for v in (values, allowed))
                raise ArgumentError(f.name, f"has no effect with {name} {here}: it needs {name} {there}")


# ------------------------------------------------------------------------------------------------- the network
LARGEST, MOST_LAYERS = 1 << 24, 1000  # sizes beyond these are mistakes
ROTARY, BPE, LLADA_MODEL = {"arch": ("rotary",)}, {"tokenizer": ("bpe",)}, {"model": ("llada",)}


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to rebuild a network. Raises ArgumentError for sizes that cannot be built."""

    vocab_size: int = setting(5, low=1, high=LARGEST)  # V
    block_size: int = setting(256, "context length T, in tokens", low=1, high=LARGEST)
    n_embd: int = setting(128, "width: a multiple of twice the heads", low=1, high=LARGEST)
    n_head: int = setting(4, "attention heads in a layer", low=1, high=LARGEST)
    n_layer: int = setting(4, "layers", low=1, high=MOST_LAYERS)
    dropout: float = setting(0.0, "of the layers", low=0, below=1)
    arch: str = setting("rotary", "vanilla is PyTorch's encoder, for comparison", choices=("rotary", "vanilla"))
    ngram_dropout: float = setting(0.0, "of the n-gram tables, which overfit first", only=ROTARY, low=0, below=1)
    ngram_rows: int = setting(65521, "of each n-gram table, best a prime", only=ROTARY, low=1, high=LARGEST)
    ngram_width: int = setting(0, "width of these rows; 0: of the network", only=ROTARY, low=0, high=LARGEST)
    segments: str = setting(
        "window", "an example is running text (window), a speech, paragraph or line", choices=(*SEGMENTS, "pairs")
    )
    ngram_base: int | None = setting(low=1)  # of the n-gram hashes (None: V). Set when V grows: ids from it on are new
    lora_rank: int = setting(0, "with --init-from: train low-rank adapters of this rank alone", low=0)

    def __post_init__(self):
        check(self)
        if self.n_embd % (2 * self.n_head):
            raise ArgumentError("n_embd", f"must be a multiple of 2 * n_head = {2 * self.n_head}, got {self.n_embd}")
        check_number("lora_rank", self.lora_rank, high=self.n_embd)

    to_dict = asdict


# ------------------------------------------------------------------------------------------------- training
@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelConfig):
    """Everything a run is made of, the network's part included. Raises ArgumentError for values out of range."""

    model: str = setting("llada", "what to train (default: that of a named checkpoint, else llada)", choices=MODELS)
    data: tuple | None = setting(
        None, "tinyshakespeare (default), pydoc, UTF-8 text files, or a folder of them", only={"pairs": (None,)},
        nargs="+", type=str, metavar="NAME|FILE",
    )  # fmt: skip
    pairs: str | None = setting(None, 'train on lines of {"prompt": ..., "completion": ...} instead', metavar="FILE")
    val_fraction: float = setting(0.2, "share of the text to validate on", above=0, below=1)
    tokenizer: str = setting("char", "characters, subwords, or a tokenizer.json", metavar="char|bpe|FILE")
    bpe_size: int = setting(512, "of --tokenizer bpe", only=BPE, flag="vocab-size", low=261, high=1 << 20)
    init_from: str | None = setting(None, "fine-tune the model of this file or folder", metavar="CHECKPOINT")
    batch_size: int = setting(16, "rows in a step, over all processes and micro-batches", above=0)
    accumulate: int = setting(1, "micro-batches in a step: less memory, same result", above=0)
    optimizer: str = setting("muon", "of the blocks' matrices", choices=("muon", "adamw"))
    lr: float = setting(0.006, "peak of AdamW; Muon's and the embeddings' follow", above=0, high=1e6)
    ngram_lr: float = setting(0.15, "peak of the n-gram tables, per token", only=ROTARY, above=0, high=1e6)
    weight_decay: float = setting(0.0, "of the blocks' matrices", low=0, high=1e6)
    sweep_share: float = setting(0.0, "share of rows masked as in the sweep", only=LLADA_MODEL, low=0, below=1)
    short_share: float = setting(0.0, "share of the run in which windows are cut in half", low=0, high=1)
    calibration: float = setting(0.0, "share of the text held out to fit a temperature", low=0, below=1)
    steps: int | None = setting(None, "end after N steps", above=0)
    minutes: float | None = setting(None, "end after this time (default: 2.75 on a laptop)", above=0)
    epochs: float | None = setting(None, "... or earlier, after N readings of the text", above=0)
    eval_every: int | None = setting(None, "validate this often (default: ten times a run)", above=0, metavar="STEPS")
    seed: int = setting(0, "of weights, windows and masks", **SEED)
    compile: bool = setting(False, "torch.compile (default: on CUDA)", action=argparse.BooleanOptionalAction)

    def __post_init__(self):
        super().__post_init__()
        if (self.pairs is not None) != (self.segments == "pairs"):
            raise ArgumentError("segments", "are pairs if and only if a file of pairs is given")
        if self.pairs and self.data:
            raise ArgumentError("data", "is not read with a file of pairs: drop one of them")
        if self.lora_rank and self.init_from is None:
            raise ArgumentError("lora_rank", "needs a model to adapt: name its checkpoint with --init-from")
        if (self.steps is None) == (self.minutes is None):
            raise ArgumentError("steps", "or minutes must be given, and not both")
        if self.steps and self.epochs:
            raise ArgumentError("epochs", "has no effect with a number of steps: drop one of them")

    def network(self, vocab_size: int) -> ModelConfig:
        """The network's part."""
        names = [f.name for f in fields(ModelConfig)]
        return ModelConfig(**{name: getattr(self, name) for name in names} | {"vocab_size": vocab_size})


@dataclass(frozen=True)
class TrainRun:
    """The flags of train.py that change no number of the run: where it happens and what is shown."""

    preset: str | None = setting(
        None, "of sizes and length (default: gpu on CUDA, else laptop)", choices=("laptop", "gpu", "pretrained")
    )
    device: str | None = setting(None, "cpu, cuda, mps (default: the best one available)")
    out: Path = setting(Path("out"), "writes OUT/MODEL/last.pt, best.pt, metrics.jsonl, summary.json", metavar="FOLDER")
    export: Path | None = setting(None, "also write the best weights alone there, in half precision", metavar="FILE")
    resume: str | None = setting(
        None, "go on with this run (default: OUT/MODEL/last.pt)", nargs="?", const="", metavar="CHECKPOINT"
    )
    save_every: float = setting(10.0, "save at least this often, besides at validations", above=0, metavar="MINUTES")


LAPTOP_MINUTES, FINE_TUNING_MINUTES = 2.75, 1.0
LAPTOP_STEPS_PER_MINUTE = 600  # about: how long --steps will take
SWEEP_SHARE = {"llada": 0.75, "gpt": 0.0}  # of all presets: text is written by the sweep, so most rows train it


def laptop_preset(model: str, minutes: float) -> TrainConfig:
    """The settings for so many minutes on a laptop. More time pays for a wider network and a longer context.

    More time also means more epochs, in which GPT memorizes the text unless it is regularized: they are limited, which
    counts on short texts. LLaDA practically never sees the same masks twice, and is not regularized. It profits from
    more tokens instead, which short windows give it.
    Masks hide most n-grams of most windows, so the n-gram tables of LLaDA take a larger learning rate.
    """
    common = TrainConfig(model=model, n_layer=4, n_head=2, batch_size=8, calibration=0.02, minutes=minutes)
    size = (64, 256) if minutes <= 1 else (96, 256) if minutes <= 6 else (128, 512)
    sized = replace(common, n_embd=size[0], block_size=size[1])
    if model == "llada":
        return replace(sized, ngram_lr=0.75, sweep_share=SWEEP_SHARE["llada"], short_share=0.6 if minutes > 6 else 0.0)
    if minutes <= 1:
        return replace(sized, epochs=8)
    if minutes <= 6:
        return replace(sized, ngram_dropout=0.2, epochs=8)
    return replace(sized, ngram_lr=0.015, ngram_dropout=0.5, weight_decay=0.1, epochs=50)


def gpu_preset(model: str) -> TrainConfig:
    """The settings for a GPU: the layers of nanoGPT's TinyShakespeare model, and its 5000 steps."""
    return TrainConfig(
        model=model, n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2, batch_size=64, ngram_lr=0.004,
        weight_decay=0.1, calibration=0.02, steps=5000, sweep_share=SWEEP_SHARE[model],
    )  # fmt: skip


def fine_tuning_preset(model: str) -> TrainConfig:
    """The settings for continuing from a trained model on a laptop: smaller steps than from scratch."""
    common = TrainConfig(model=model, minutes=FINE_TUNING_MINUTES, sweep_share=SWEEP_SHARE[model])
    return replace(common, batch_size=8, lr=0.002, ngram_lr=0.05)


def pretrained_preset(model: str) -> TrainConfig:
    """The settings of the models in pretrained/: LLaDA was trained on a GPU, GPT on a laptop.

    LLaDA reads the text 160 times, and would memorize it without dropout. GPT memorizes it much earlier.
    """
    common = TrainConfig(
        model=model, val_fraction=0.1, n_layer=6, n_head=4, block_size=256, calibration=0.02, steps=4000
    )
    if model == "llada":
        return replace(
            common, n_embd=192, ngram_rows=32749, ngram_width=24, batch_size=64, dropout=0.1, ngram_dropout=0.3,
            ngram_lr=1.0, sweep_share=SWEEP_SHARE["llada"], steps=9800, eval_every=300,
        )  # fmt: skip
    return replace(
        common, n_embd=128, ngram_rows=2699, batch_size=16, dropout=0.2, ngram_dropout=0.5, weight_decay=0.1,
        ngram_lr=0.015, eval_every=200,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- drawing tokens
DRAWS, READS_ON, READS = ({"mode": modes} for modes in (TEXT, (*TEXT, "beams"), (*TEXT, "top", "beams")))


@dataclass(frozen=True, kw_only=True)
class LogitsConfig:
    """How a token is drawn from logits. Likelihoods are those of temperature 1 and nothing else."""

    temperature: float = setting(
        0.8, "0: the likeliest token, 1: as likelihoods are measured (pairs: 0)", only=DRAWS, low=0
    )
    top_k: int | None = setting(None, "draw from the N likeliest tokens", only=DRAWS, low=1)
    top_p: float | None = setting(None, "... from the likeliest with total probability X", only=DRAWS, above=0, high=1)
    repetition_penalty: float = setting(
        1.0, "above 1: repeat fewer tokens. With characters it destroys words", only=READS_ON, above=0
    )

    def __post_init__(self):
        check(self)


LLADA, GPT = LLADA_MODEL | DRAWS, {"model": ("gpt",)}
BEAMS = GPT | {"mode": ("beams",)}


def schedule(text: str) -> str | tuple[int, ...]:
    """An argparse type: the name of a schedule, or its counts with commas between."""
    if text in SCHEDULES:
        return text
    try:
        return tuple(int(count) for count in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {', '.join(SCHEDULES)} or counts like 8,8,16") from None


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(LogitsConfig):
    """Everything that decides how LLaDA's masks become text; `sampler.reverse_process` reads it.

    steps: network evaluations that reveal, at most, shared among the blocks of a window; None: SWEEP_STEPS a block for
    the sweep, one for each mask for other orders. schedule: a name, or the counts of each block. block_length: reveal
    in blocks of so many positions, from the first mask to the right (LLaDA's semi-autoregressive remasking). threshold:
    reveal also whatever the network is that sure of. correct: passes that write every position anew when all are
    written. cfg_scale: logits = u + (cfg_scale + 1) (c - u), u with the given tokens masked (LLaDA, appendix A).
    """

    steps: int | None = setting(
        None, f"network evaluations (default: {SWEEP_STEPS} a block, or 1 a token)", only=LLADA, low=1, high=10**6
    )
    order: str = setting("sweep", "which positions first; drawn_confidence: LLaDA's rule", only=LLADA, choices=ORDERS)
    schedule: str | tuple[int, ...] = setting("uniform", "uniform, cosine or counts: 8,8,16", only=LLADA, type=schedule)
    block_length: int | None = setting(None, "fill blocks of N tokens from left to right", only=LLADA, low=1)
    threshold: float | None = setting(None, "also reveal all with confidence >= X", only=LLADA, low=0, high=1)
    correct: int = setting(2, "passes that mask and draw written tokens anew", only=LLADA, low=0, high=1000)
    correct_temperature: float = setting(0.5, "of these passes", only=LLADA, low=0)
    cfg_scale: float = setting(0.0, "strength of guidance by the prompt", only=LLADA, low=0)
    slide: int | None = setting(None, "long texts: move the window by N (default: half of it)", only=READS_ON, low=1)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.schedule, str):
            if self.schedule not in SCHEDULES:
                raise ArgumentError("schedule", f"must be {', '.join(SCHEDULES)} or counts, got {self.schedule!r}")
        else:
            object.__setattr__(self, "schedule", tuple(self.schedule))  # a list would not be hashable
            if not self.schedule or min(self.schedule) < 1:
                raise ArgumentError("schedule", f"must be counts of at least 1, got {list(self.schedule)}")
            if self.steps is not None:
                raise ArgumentError("steps", "does not go with a list of counts, which fixes the steps of each block")
        if self.order == "sweep" and self.schedule != "uniform":
            raise ArgumentError("schedule", "does not go with --order sweep, which fixes the counts: name another")


@dataclass(frozen=True, kw_only=True)
class DecodingConfig(LogitsConfig):
    """How GPT writes.

    slide: beyond the context the window moves on by so many tokens at a time: 1 always shows the last context_len
    tokens, larger values are faster.
    """

    context_len: int | None = setting(None, "tokens that GPT sees (default: all)", only=GPT | READS, low=1)
    slide: int | None = setting(low=1)  # the flag is SamplingConfig's; None: half of the context


@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """How `beam_search` searches. The arguments are those of transformers' generate(num_beams=...).

    length_penalty: a score is the sum of log-probabilities (nats) / length ** length_penalty. early_stopping: "yes"
    stops with num_beams finished texts; "no" when the best running beam, at its present length, cannot enter them;
    "never" when it could not even at full length. repetition_penalty acts on log-probabilities: with it, scores are no
    likelihoods. num_return: texts to return, at most num_beams. context_len, slide: see DecodingConfig.
    """

    num_beams: int = setting(5, low=1)
    length_penalty: float = setting(1.0, "score: log p / length^X", only=BEAMS, low=-10, high=10)
    early_stopping: str = setting("no", "end as soon as N texts are found", only=BEAMS, choices=("no", "yes", "never"))
    repetition_penalty: float = setting(1.0, above=0)
    num_return: int = setting(1, low=1)
    context_len: int | None = setting(low=1)
    slide: int | None = setting(low=1)

    def __post_init__(self):
        check(self)
        if self.num_return > self.num_beams:
            raise ArgumentError("num_return", f"must be in 1..{self.num_beams} (num_beams), got {self.num_return}")


# ------------------------------------------------------------------------------------------------- scripts
WRITES, LONG = {"mode": ("text", "infill")}, {"mode": ("text", "chat", "race", "beams")}
PROMPTED = {"mode": ("text", "race", "top", "beams")}
COMPILED = GPT | {"mode": ("text", "chat", "beams")}
HOLES, HOLES_FILE = LLADA_MODEL | {"mode": ("infill", "top")}, LLADA_MODEL | {"mode": ("file",)}
SHOWN = {"mode": ("text", "infill", "race")}
ONE_MODEL, REPORT = {"mode": ("text", "infill", "file", "chat", "top", "beams", "page")}, {"mode": ("report",)}


@dataclass(frozen=True, kw_only=True)
class WriteRun:
    """The flags of generate.py that are no setting of a sampler: which model, which text, which view."""

    checkpoint: Path | None = setting(None, "a model, or its run's folder (default: that under --out)", only=ONE_MODEL)
    out: Path = setting(Path("out"), "folder of runs, as of train.py", only={"checkpoint": (None,)}, metavar="FOLDER")
    model: str | None = setting(None, "default: llada, or the one that the flags need", only=ONE_MODEL, choices=MODELS)
    device: str | None = setting(None, "cpu, cuda, mps (default: the best one available)")
    prompt: str | None = setting(None, "how the text begins; - reads standard input", only=PROMPTED)
    length: int = setting(200, "characters to write", only=LONG, low=1, high=10**7)
    num_samples: int = setting(1, "texts to write", only={"mode": ("text", "infill", "beams")}, low=1)
    seed: int = setting(0, "the same seed gives the same text", only=DRAWS, **SEED)
    infill: str | None = setting(None, 'fill masks: "ROMEO: [MASK*12] love [MASK*20]"', only=HOLES, metavar="TEMPLATE")
    infill_file: Path | None = setting(None, "... of a UTF-8 file, or of standard input (-)", only=HOLES_FILE)
    watch: bool = setting(False, "show the text while it is written, on standard error", only=WRITES)
    pause: float = setting(0.12, "seconds that --watch shows the first step", only={"watch": (True,)}, low=0, high=60)
    html: Path | None = setting(None, "write a page that plays how the text came about", only=SHOWN, metavar="FILE")
    gif: Path | None = setting(None, "... an animation of it", only=SHOWN, metavar="FILE")
    page: Path | None = setting(None, "write a page in which the models themselves run, in any browser", metavar="FILE")
    chat: bool = setting(False, "read prompts line by line and answer each; `exit` leaves")
    race: bool = setting(False, "LLaDA and GPT write from one prompt, side by side")
    top: int | None = setting(None, "show the N likeliest next tokens with their probabilities", low=1)
    beams: int | None = setting(None, "GPT: beam search with N beams", only=GPT, low=1)
    compile: bool = setting(False, "GPT: 2 to 4 times as fast, after half a minute", only=COMPILED)


@dataclass(frozen=True, kw_only=True)
class EvaluateRun:
    """The flags of evaluate.py."""

    out: Path = setting(Path("out"), "folder of runs", only={"models": ("under --out",)}, metavar="FOLDER")
    data: tuple | None = setting(
        None, "where the text they were trained on is now (default: where it was)", only=REPORT,
        nargs="+", type=str, metavar="NAME|FILE",
    )  # fmt: skip
    device: str | None = setting(None, "cpu, cuda, mps (default: the best one available)")
    report: Path | None = setting(None, "for tables and pictures (default: OUT/report)", only=REPORT, metavar="FOLDER")
    quick: bool = setting(False, "fewer windows and texts: wider intervals", only={"mode": ("report", "pairs")})
    seed: int = setting(0, "of masks and samples", **SEED)
    text: str | None = setting(None, "only score this text: its loss, the words that surprise", metavar="FILE")
    pairs: str | None = setting(None, "score the answers to the prompts of FILE", metavar="FILE")
