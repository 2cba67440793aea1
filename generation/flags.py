"""From the flags of `python generate.py` to settings: which have an effect in which mode, and what they set.

A flag that was not given is None, so that one without effect can be refused.
"""

import errno
import os
import tempfile
from argparse import Namespace
from dataclasses import fields

from autoregressive import BeamConfig, DecodingConfig
from generation.infilling import MASK_PATTERN, knows, text_sampling
from generation.text import MAX_OUT_TOKENS, Config
from model import Transformer
from sampler import SamplingConfig
from tokenizer import Tokenizer
from utils.errors import ArgumentError
from utils.standard_input import input_waits, read_input

MODES = {"chat": "--chat", "top": "--top", "num_beams": "--beams", "race": "--race"}  # besides writing text
TEMPLATES = {"infill": "--infill", "infill_file": "--infill-file"}  # a whole text, instead of a prompt and a length
VIEWS = ("watch", "html", "gif")  # of a text that is being written
RACERS = ("llada", "gpt")
TEMPERATURE = 0.7  # small models are easier to read below 1, the temperature of all likelihoods; answers take 0
DEFAULTS = {"max_out_tokens": MAX_OUT_TOKENS, "num_samples": 1, "seed": 0}
EARLY_STOPPING = {"no": False, "yes": True, "never": "never"}


# ------------------------------------------------------------------------------------------------- which have an effect
def mode_of(args: Namespace) -> str:
    """The mode that the flags ask for: a key of MODES, or "text"."""
    return next((name for name in MODES if getattr(args, name) is not None), "text")


def used_flags(mode: str, model: Transformer) -> set[str]:
    """The flags that have an effect in this mode with this model, by their destinations."""
    if mode == "race":
        shared = {"out", "device", "prompt", "race", "max_out_tokens", "seed", "html", "gif"}
        return shared | {*names(DecodingConfig), *names(SamplingConfig)}
    used = {"checkpoint", "out", "model", "device", "prompt", mode} | ({"streams"} if model.causal else set())
    if mode == "top":
        return used | {"context_len" if model.causal else "infill"}
    used |= {"max_out_tokens"} | ({"compile"} if model.causal else set())
    if mode == "num_beams":
        return used | {"num_samples", *names(BeamConfig)} if model.causal else set()
    used |= {"seed", "stop", *names(DecodingConfig)} if model.causal else {"seed", *names(SamplingConfig)}
    if model.causal and model.fills_masks:  # streams do not write from left to right
        used -= {"stop", "context_len", "slide", "compile"}
    if mode == "chat":
        return used - {"prompt"}
    return used | {"num_samples", "pause", *VIEWS} | (set() if model.causal else {*TEMPLATES})


def names(config_class: type) -> list[str]:
    """The fields of a class of settings."""
    return [field.name for field in fields(config_class)]


def refuse_unused(args: Namespace, mode: str, model: Transformer) -> None:
    """Raise ArgumentError if a flag was given that has no effect. model: any of those that race."""
    used, others = used_flags(mode, model), [m for m in ("text", *MODES) if m != "race"]
    used_by_model = set().union(*(used_flags(m, model) for m in others))
    given_flags = [name for name, value in vars(args).items() if value is not None]
    for name in given_flags:
        if mode != "race" and name not in used_by_model:
            raise ArgumentError(name, f"has no effect on a {model.name} model; choose another with --model")
    for name in given_flags:
        if name not in used:
            raise ArgumentError(name, f"has no effect with {MODES[mode]}" if mode in MODES else "needs --beams")
    for template, flag in TEMPLATES.items():
        for name in ("prompt", "max_out_tokens"):
            if template in given_flags and name in given_flags:
                raise ArgumentError(name, f"has no effect with {flag}: its template is the whole text")
    for name in ("num_samples", *VIEWS):
        if args.infill_file is not None and name in given_flags:
            raise ArgumentError(name, "has no effect with --infill-file, which writes one file")
    if args.pause is not None and not args.watch:
        raise ArgumentError("pause", "needs --watch")
    if args.checkpoint is not None and args.out is not None:
        raise ArgumentError("out", "has no effect with --checkpoint, which names the model")
    if args.eta is not None and args.remask not in ("cap", "rescale", "loop"):
        raise ArgumentError("eta", "needs --remask cap, rescale or loop")


def models_of(args: Namespace, mode: str) -> tuple[str | None, ...]:
    """The kinds of model to load; None: either. Raises ArgumentError for a race of a certain model."""
    if mode == "race":
        for name in ("checkpoint", "model"):
            if getattr(args, name) is not None:
                raise ArgumentError(name, "has no effect with --race, which takes the newest of each kind under --out")
        return RACERS
    return ("llada",) if args.model is None and is_template(args) else (args.model,)


def is_template(args: Namespace) -> bool:
    """Whether a template is given, instead of a prompt."""
    return any(getattr(args, name) is not None for name in TEMPLATES)


def check_writable(args: Namespace) -> None:
    """Raise ArgumentError if the file of --html or --gif could not be written when the text is complete."""
    for name in ("html", "gif"):
        path = getattr(args, name)
        if path is None:
            continue
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise ArgumentError(name, f"{path}: cannot be written ({error.strerror})") from None


# ------------------------------------------------------------------------------------------------- settings
def given(args: Namespace, config_class: type) -> dict:
    """The flags that were given among the fields of a class of settings."""
    values = {name: getattr(args, name, None) for name in names(config_class)}
    return {name: value for name, value in values.items() if value is not None}


def make_config(args: Namespace, model: Transformer) -> Config:
    """The settings with which this model writes. Raises ArgumentError for settings that do not go together."""
    defaults = {"temperature": 0.0 if model.config.segments == "pairs" else TEMPERATURE}
    if model.causal:
        slide = {} if model.fills_masks else {"slide": half_context(args, model)}
        return DecodingConfig(**(defaults | slide | given(args, DecodingConfig)))
    return text_sampling(**(defaults | given(args, SamplingConfig)))


def make_beam_config(args: Namespace, model: Transformer) -> BeamConfig:
    """The settings of --beams. Raises ArgumentError."""
    if args.num_samples > args.num_beams:
        raise ArgumentError("num_samples", f"must be at most {args.num_beams}, the number of --beams")
    settings = {"slide": half_context(args, model)} | given(args, BeamConfig)
    early_stopping = EARLY_STOPPING[args.early_stopping or "no"]
    return BeamConfig(**(settings | {"num_return": args.num_samples, "early_stopping": early_stopping}))


def half_context(args: Namespace, model: Transformer) -> int:
    """GPT's default --slide here: beyond the context, one token in so many computes the whole window again."""
    return max(1, (args.context_len or model.config.block_size) // 2)


# ------------------------------------------------------------------------------------------------- the prompt
def read_prompt(args: Namespace) -> str:
    """--prompt, or standard input for `--prompt -`. Raises ArgumentError if input that nobody asked for is waiting.

    So the command never waits for input unless it was told to, and never ignores what was piped into it.
    """
    if args.prompt is None:
        if input_waits():
            problem = 'is not given, but standard input holds text: --prompt - reads it, --prompt "" does without'
            raise ArgumentError("prompt", problem)
        return ""
    if args.prompt != "-":
        return args.prompt
    text = decode_utf8(read_input(), "prompt", "standard input")
    return text.replace("\r\n", "\n").removesuffix("\n")


def refuse_masks(prompt: str) -> None:
    """Raise ArgumentError if a prompt, which is taken literally, holds a [MASK]."""
    if match := MASK_PATTERN.search(prompt):
        raise ArgumentError("prompt", f"is read literally, {match[0]} too: give the whole text to --infill instead")


def decode_utf8(content: bytes, argument: str, source: str) -> str:
    """bytes -> text. Raises ArgumentError that names the source and the first byte that is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        problem = f"{source} is not UTF-8 text (byte {error.start}): convert it first"
        raise ArgumentError(argument, problem) from None


def opening(prompt: str, model: Transformer, tokenizer: Tokenizer) -> str:
    """What the model reads before it writes: the prompt, or for an empty one a newline, which is not printed.

    Windows of training text begin anywhere, even within a word, and so would a text without a prompt. Segments, which
    some models are trained on, begin at their [START]; there nothing is added, nor where a newline is unknown.
    """
    if prompt or model.config.segments != "window" or not knows(tokenizer, "\n"):
        return prompt
    return "\n"
