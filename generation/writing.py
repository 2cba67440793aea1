"""`python generate.py` writes texts: printed as they are written, several at the end, or into the gaps of a file."""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from generation.flags import decode_utf8, is_template, make_config, opening
from generation.infilling import GenerationState, completed_pieces, fill_template, parse_template, prompt_template
from generation.text import Config, GeneratorTransformer, fill_templates, stream_texts
from model import Transformer
from tokenizer import MASK_ID
from utils.console import counted, progress, say, write
from utils.counter import EvaluationCounter
from utils.errors import ArgumentError
from utils.standard_input import read_input

NO_MASKS = "has nothing to write: mark one character as [MASK], n characters as [MASK*n]"


def print_decoded(writer: GeneratorTransformer, args: Namespace) -> None:
    """Writing from left to right: one text as it is written, or several at the end."""
    start = time.perf_counter()
    prompt = opening(args.prompt, writer.model, writer.tokenizer)
    pieces = stream(writer, [prompt] * args.num_samples, make_config(args, writer.model), args, args.seed)
    if args.num_samples == 1:
        write(shown_prompt(args, writer.model))
        characters = 0
        for [piece] in pieces:
            write(piece)
            characters += len(piece)
        write("\n")
    else:
        texts = ["".join(text) for text in zip(*pieces, strict=True)]
        write_texts([shown_prompt(args, writer.model) + text for text in texts])
        characters = sum(map(len, texts))
    say_speed(characters, time.perf_counter() - start)


def stream(
    writer: GeneratorTransformer, prompts: list[str], config: Config, args: Namespace, seed: int, history=()
) -> Iterator[list[str]]:
    """The pieces of one text for each prompt. history: see `stream_texts`."""
    arguments = {"max_out_tokens": args.max_out_tokens, "seed": seed, "stop": args.stop or (), "history": history}
    return stream_texts(writer.model, writer.tokenizer, prompts, config, **arguments)


def print_filled(writer: GeneratorTransformer, args: Namespace) -> None:
    """Writing in many places: one text as it becomes complete from the left, or several at the end."""
    template, hidden = make_template(args, writer)
    start, n = time.perf_counter(), args.num_samples
    at_end = args.remask is not None
    given, texts = writer.tokenizer.decode(template[hidden:][template[hidden:] != MASK_ID]), [""] * n
    with EvaluationCounter(writer.model) as counter:
        states = fill(writer, args, [template] * n)
        for pieces in completed_pieces(states, writer.tokenizer, [hidden] * n, at_end):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            if n == 1:
                write(pieces[0])
    write_texts([""] if n == 1 else texts)
    say_speed(sum(len(text) - len(given) for text in texts), time.perf_counter() - start, counter.nfe)


def make_template(args: Namespace, writer: GeneratorTransformer) -> tuple[Tensor, int]:
    """(T,) ids of --infill, or of --prompt followed by --length masks, and how many of them are not to be printed.

    Raises ArgumentError if nothing is masked.
    """
    if args.infill is None:
        prompt = opening(args.prompt, writer.model, writer.tokenizer)
        template, given = prompt_template(prompt, args.max_out_tokens, writer.model, writer.tokenizer)
        return template, 0 if prompt == shown_prompt(args, writer.model) else given
    template = parse_template(args.infill, writer.tokenizer)
    if not (template == MASK_ID).any():
        raise ArgumentError("infill", NO_MASKS)
    return template, 0


def fill(writer: GeneratorTransformer, args: Namespace, templates: list[Tensor]) -> Iterator[GenerationState]:
    """The states of the texts with the settings and the seed of the flags."""
    config, generator = make_config(args, writer.model), torch.Generator().manual_seed(args.seed)
    return fill_templates(writer.model, templates, config, generator, may_end=not is_template(args))


def print_file(writer: GeneratorTransformer, args: Namespace) -> None:
    """LLaDA, --infill-file: the bytes of the file with its masks filled. All other bytes stay as they are."""
    source = "standard input" if str(args.infill_file) == "-" else str(args.infill_file)
    content = read_input() if str(args.infill_file) == "-" else args.infill_file.read_bytes()
    text = decode_utf8(content, "infill_file", source)
    template = parse_template(text, writer.tokenizer, keep_unknown=True)
    masked, start = template == MASK_ID, time.perf_counter()
    total, unknown = int(masked.sum()), int((template == writer.tokenizer.vocab_size).sum())
    if not total:
        raise ArgumentError("infill_file", f"{source} {NO_MASKS}")
    states = fill(writer, args, [template])
    if unknown:
        say(f"{counted(unknown, 'character')} unknown to the model: left as they are, it reads [MASK] there")
    with progress(total, "fill", unit="characters") as update:
        for state in states:
            update(total - int((state.texts[0] == MASK_ID).sum()))
    filled = fill_template(text, state.texts[0][masked], writer.tokenizer)
    if sys.stdout.isatty():
        write(filled)
    else:
        sys.stdout.buffer.write(filled.encode())
    say_speed(total, time.perf_counter() - start, state.nfe)


def write_texts(texts: Sequence[str], name: str = "sample") -> None:
    """Print texts on standard output, several with a line before each that cannot be taken for text of the model."""
    for number, text in enumerate(texts, 1):
        if len(texts) > 1:
            write(f"--- {name} {number} of {len(texts)} ---\n")
        write(text, end="\n")


def say_speed(characters: int, seconds: float, nfe: int | None = None) -> None:
    """What was written and how fast, on standard error."""
    evaluations = "" if nfe is None else f", {counted(nfe, 'network evaluation')}"
    say(f"{counted(characters, 'character')} in {seconds:.2f} s: {characters / seconds:.0f} characters/s{evaluations}")


def shown_prompt(args: Namespace, model: Transformer) -> str:
    """The part of the text that --prompt gives. A model of pairs answers with the completion alone."""
    return "" if model.config.segments == "pairs" else args.prompt
