"""What `python generate.py` does in each of its modes, given its parsed flags."""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import fields

import torch
from torch import Tensor

from autoregressive import BeamConfig, DecodingConfig, beam_search
from checkpoint import load_checkpoint, newest_checkpoint
from generation.chat import chat
from generation.infilling import MASK_PATTERN, fill_masks, first_mask, parse_template, prompt_template, text_sampling
from generation.live import watch
from generation.text import MAX_OUT_TOKENS, Config, GeneratorTransformer, prompt_ids, stream_texts
from model import Transformer
from sampler import SamplingConfig
from tokenizer import MASK_ID
from utils.console import say
from utils.devices import pick_device
from utils.errors import ArgumentError

MODES = {"chat": "--chat", "top": "--top", "num_beams": "--beams"}  # besides writing text
DEFAULTS = {"prompt": "", "max_out_tokens": MAX_OUT_TOKENS, "num_samples": 1, "seed": 0}
EARLY_STOPPING = {"no": False, "yes": True, "never": "never"}


def write_as_asked(args: Namespace) -> None:
    """Load the model, check the flags and run the mode they ask for. A flag that was not given is None."""
    mode = next((name for name in MODES if getattr(args, name) is not None), "text")
    writer = load(args)
    refuse_unused(args, mode, writer.model)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.compile:
        say("compiling; later runs reuse the result")
        writer.model.compile()
    write_text = print_decoded if writer.model.causal else print_filled
    modes = {"chat": answer_prompts, "top": print_next_tokens, "num_beams": print_beams, "text": write_text}
    modes[mode](writer, args)


def load(args: Namespace) -> GeneratorTransformer:
    """The model that the flags ask for. Raises ValueError if there is none."""
    name = "llada" if args.model is None and args.infill is not None else args.model
    path = args.checkpoint or newest_checkpoint("out", name)
    checkpoint = load_checkpoint(path, pick_device(args.device, float64=True))
    kind = checkpoint.model.name
    say(f"{path}: {kind}, step {checkpoint.step}")
    if args.model not in (None, kind):
        raise ArgumentError("model", f"{args.model}: {path} holds a {kind} model")
    return GeneratorTransformer(checkpoint.model, checkpoint.tokenizer)


# ------------------------------------------------------------------------------------------------- flags, settings
def used_flags(mode: str, model: Transformer) -> set[str]:
    """The flags that have an effect in this mode with this model, by their destinations."""
    used = {"checkpoint", "model", "device", "prompt", mode}
    if mode == "top":
        return used | {"context_len" if model.causal else "infill"}
    used |= {"max_out_tokens"} | ({"compile"} if model.causal else set())
    if mode == "num_beams":
        return used | {"num_samples", *names(BeamConfig)} if model.causal else set()
    used |= {"seed", "stop", *names(DecodingConfig)} if model.causal else {"seed", *names(SamplingConfig)}
    if mode == "chat":
        return used - {"prompt"}
    return used | {"num_samples"} | (set() if model.causal else {"infill", "watch"})


def names(config_class: type) -> list[str]:
    """The fields of a class of settings."""
    return [field.name for field in fields(config_class)]


def refuse_unused(args: Namespace, mode: str, model: Transformer) -> None:
    """Raise ArgumentError if a flag was given that has no effect."""
    used, used_by_model = used_flags(mode, model), set().union(*(used_flags(m, model) for m in ("text", *MODES)))
    flags = [name for name, value in vars(args).items() if value is not None]
    for name in flags:
        if name not in used_by_model:
            raise ArgumentError(name, f"has no effect on a {model.name} model; choose another with --model")
    for name in flags:
        if name not in used:
            raise ArgumentError(name, f"has no effect with {MODES[mode]}" if mode in MODES else "needs --beams")
        if name in ("prompt", "max_out_tokens") and args.infill is not None:
            raise ArgumentError(name, "has no effect with --infill: its template is the whole text")
    if args.eta is not None and args.remask not in ("cap", "rescale", "loop"):
        raise ArgumentError("eta", "needs --remask cap, rescale or loop")


def given(args: Namespace, config_class: type) -> dict:
    """The flags that were given among the fields of a class of settings."""
    values = {name: getattr(args, name, None) for name in names(config_class)}
    return {name: value for name, value in values.items() if value is not None}


def make_config(args: Namespace, model: Transformer) -> Config:
    """The settings with which this model writes. Raises ArgumentError for settings that do not go together."""
    if model.causal:
        return DecodingConfig(**given(args, DecodingConfig))
    return text_sampling(**given(args, SamplingConfig))


# ------------------------------------------------------------------------------------------------- writing text
def print_decoded(writer: GeneratorTransformer, args: Namespace) -> None:
    """GPT: one text as it is written, or several, separated by empty lines."""
    start = time.perf_counter()
    pieces = stream(writer, [args.prompt] * args.num_samples, make_config(args, writer.model), args, args.seed)
    if args.num_samples == 1:
        print(args.prompt, end="", flush=True)
        characters = 0
        for [piece] in pieces:
            print(piece, end="", flush=sys.stdout.isatty())
            characters += len(piece)
        print()
    else:
        texts = ["".join(text) for text in zip(*pieces, strict=True)]
        print("\n\n".join(args.prompt + text for text in texts))
        characters = sum(map(len, texts))
    say_speed(characters, start)


def stream(
    writer: GeneratorTransformer, prompts: list[str], config: Config, args: Namespace, seed: int
) -> Iterator[list[str]]:
    """The pieces of one text for each prompt."""
    stop, length = args.stop or (), args.max_out_tokens
    return stream_texts(writer.model, writer.tokenizer, prompts, config, max_out_tokens=length, seed=seed, stop=stop)


def print_filled(writer: GeneratorTransformer, args: Namespace) -> None:
    """LLaDA: one text as it becomes complete from the left, or several, separated by empty lines."""
    template, config = make_template(args, writer), make_config(args, writer.model)
    generator = torch.Generator().manual_seed(args.seed)
    start, shown = time.perf_counter(), 0
    states = fill_masks(writer.model, [template] * args.num_samples, config, generator=generator)
    streaming = args.num_samples == 1 and not args.watch and config.remask is None
    for state in watch(states, writer.tokenizer) if args.watch else states:
        if streaming:
            end = first_mask(state.texts[0], shown)
            print(writer.tokenizer.decode(state.texts[0][shown:end]), end="", flush=True)
            shown = end
    texts = [writer.tokenizer.decode(text) for text in state.texts]
    print("\n\n".join([texts[0][shown:], *texts[1:]]))
    evaluations = f", {state.nfe} network evaluation{'' if state.nfe == 1 else 's'}"
    say_speed(args.num_samples * int((template == MASK_ID).sum()), start, evaluations)


def make_template(args: Namespace, writer: GeneratorTransformer) -> Tensor:
    """(T,) ids of --infill, or of --prompt followed by --length masks. Raises ArgumentError if nothing is masked."""
    if args.infill is None:
        return prompt_template(args.prompt, args.max_out_tokens, writer.tokenizer)
    template = parse_template(args.infill, writer.tokenizer)
    if not (template == MASK_ID).any():
        raise ArgumentError("infill", "has nothing to write: mark one character as [MASK], n characters as [MASK*n]")
    return template


def say_speed(characters: int, start: float, evaluations: str = "") -> None:
    """What was written since `start` and how fast, on standard error."""
    seconds = time.perf_counter() - start
    say(f"{characters} characters in {seconds:.2f} s: {characters / seconds:.0f} characters/s{evaluations}")


# ------------------------------------------------------------------------------------------------- other modes
def answer_prompts(writer: GeneratorTransformer, args: Namespace) -> None:
    """--chat. Each turn has its own seed."""
    config = make_config(args, writer.model)

    def answer(prompt: str, turn: int) -> Iterator[str]:
        return (piece for [piece] in stream(writer, [prompt], config, args, args.seed + turn))

    answer("", 0)  # raises now for settings that no turn would accept
    chat(answer)


def print_beams(writer: GeneratorTransformer, args: Namespace) -> None:
    """The best texts of a beam search; their scores on standard error."""
    if args.num_samples > args.num_beams:
        raise ArgumentError("num_samples", f"must be at most {args.num_beams}, the number of --beams")
    early_stopping = EARLY_STOPPING[args.early_stopping or "no"]
    settings = given(args, BeamConfig) | {"num_return": args.num_samples, "early_stopping": early_stopping}
    prompt = prompt_ids(writer.tokenizer, args.prompt)
    found = beam_search(writer.model, prompt, BeamConfig(**settings), max_out_tokens=args.max_out_tokens)
    for rank, (ids, score) in enumerate(found):
        say(f"score {score:.4f}")
        text = writer.tokenizer.decode(ids.cpu())
        print(text if rank == 0 else f"\n{text}")


def print_next_tokens(writer: GeneratorTransformer, args: Namespace) -> None:
    """The prompt's tokens with their ids, and the likeliest next tokens with their probabilities.

    LLaDA: the tokens of the template or prompt, and a table for each [MASK], or for one after the end if it has none.
    """
    text = args.prompt if args.infill is None else args.infill
    if writer.model.causal:
        ids = prompt_ids(writer.tokenizer, text)
        tables = {"": writer.next_tokens(text, args.top, args.context_len)}
    else:
        template = text if MASK_PATTERN.search(text) else text + "[MASK]"
        ids = parse_template(template, writer.tokenizer)
        tables = {f"[MASK] at position {i}": table for i, table in writer.tokens_at_masks(template, args.top)}
    tokens = [f"{show(writer.tokenizer.id_to_char[i])} {i}" for i in ids.tolist()]
    for start in range(0, len(tokens), 10):
        print("   ".join(tokens[start : start + 10]))
    for title, table in tables.items():
        print(f"\n{title}" if title else "")
        for token, p in table:
            print(f"{show(token):8}{100 * p:7.3f} %")


def show(token: str) -> str:
    """A character in quotes, a special token as it is: "a" -> "'a'", "[END]" -> "[END]"."""
    return repr(token) if len(token) == 1 else token
