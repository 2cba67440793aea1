"""What `python generate.py` does in each of its modes, given its parsed flags; see flags.py for what these set."""

import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from autoregressive import beam_search
from checkpoint import load_checkpoint, newest_checkpoint
from generation.chat import chat
from generation.flags import (
    DEFAULTS,
    TEMPLATES,
    checkpoint_file,
    decode_utf8,
    make_beam_config,
    make_config,
    mode_of,
    opening,
    read_prompt,
    refuse_masks,
    refuse_unused,
)
from generation.infilling import (
    MASK_PATTERN,
    GenerationState,
    fill_masks,
    fill_template,
    first_mask,
    parse_template,
    prompt_template,
)
from generation.live import watch
from generation.text import Config, GeneratorTransformer, prompt_ids, stream_texts
from model import Transformer
from tokenizer import MASK_ID, SPECIAL_TOKENS
from utils.console import counted, progress, say, write
from utils.devices import memory_problem, pick_device
from utils.errors import ArgumentError
from utils.standard_input import read_input

NO_MASKS = "has nothing to write: mark one character as [MASK], n characters as [MASK*n]"


def write_as_asked(args: Namespace) -> None:
    """Load the model, check the flags and run the mode they ask for. A flag that was not given is None."""
    mode = mode_of(args)
    writer = load(args)
    refuse_unused(args, mode, writer.model)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if mode != "chat" and not is_template(args):
        args.prompt = read_prompt(args)
        if mode != "top" or writer.model.causal:
            refuse_masks(args.prompt)
    check_memory(args, writer.model)
    if args.compile:
        say("compiling; later runs reuse the result")
        writer.model.compile()
    write_text = print_decoded if writer.model.causal else print_file if args.infill_file is not None else print_filled
    modes = {"chat": answer_prompts, "top": print_next_tokens, "num_beams": print_beams, "text": write_text}
    modes[mode](writer, args)


def check_memory(args: Namespace, model: Transformer) -> None:
    """Raise ArgumentError for more texts than there is memory for: their ids, logits, keys and values count."""
    config, name = model.config, "num_samples" if args.num_beams is None else "num_beams"
    T = min(config.block_size, 1 if is_template(args) else args.max_out_tokens)
    cached = 8 * config.n_layer * config.n_embd * T
    a_row = 8 * args.max_out_tokens + (16 * config.vocab_size + cached if model.causal else 16 * config.vocab_size * T)
    if problem := memory_problem(a_row * getattr(args, name)):
        raise ArgumentError(name, f"{getattr(args, name)} {problem}: ask for fewer")


def is_template(args: Namespace) -> bool:
    """Whether a template is given, instead of a prompt."""
    return any(getattr(args, name) is not None for name in TEMPLATES)


def load(args: Namespace) -> GeneratorTransformer:
    """The model that the flags ask for. Raises ValueError if there is none."""
    name = "llada" if args.model is None and is_template(args) else args.model
    path = checkpoint_file(args.checkpoint) if args.checkpoint else newest_checkpoint(args.out or "out", name)
    checkpoint = load_checkpoint(path, pick_device(args.device, float64=True))
    kind = checkpoint.model.name
    say(f"{path}: {kind}, step {checkpoint.step}")
    if args.model not in (None, kind):
        raise ArgumentError("model", f"{args.model}: {path} holds a {kind} model")
    return GeneratorTransformer(checkpoint.model, checkpoint.tokenizer)


# ------------------------------------------------------------------------------------------------- writing text
def print_decoded(writer: GeneratorTransformer, args: Namespace) -> None:
    """GPT: one text as it is written, or several at the end."""
    start = time.perf_counter()
    prompt = opening(args.prompt, writer.model, writer.tokenizer)
    pieces = stream(writer, [prompt] * args.num_samples, make_config(args, writer.model), args, args.seed)
    if args.num_samples == 1:
        write(args.prompt)
        characters = 0
        for [piece] in pieces:
            write(piece)
            characters += len(piece)
        write("\n")
    else:
        texts = ["".join(text) for text in zip(*pieces, strict=True)]
        write_texts([args.prompt + text for text in texts])
        characters = sum(map(len, texts))
    say_speed(characters, start)


def stream(
    writer: GeneratorTransformer, prompts: list[str], config: Config, args: Namespace, seed: int
) -> Iterator[list[str]]:
    """The pieces of one text for each prompt."""
    stop, length = args.stop or (), args.max_out_tokens
    return stream_texts(writer.model, writer.tokenizer, prompts, config, max_out_tokens=length, seed=seed, stop=stop)


def print_filled(writer: GeneratorTransformer, args: Namespace) -> None:
    """LLaDA: one text as it becomes complete from the left, or several at the end."""
    template, hidden = make_template(args, writer)
    start, shown, config = time.perf_counter(), hidden, make_config(args, writer.model)
    streaming = args.num_samples == 1 and not args.watch and config.remask is None
    for state in viewed(fill(writer, args, [template] * args.num_samples), writer, args):
        if streaming:
            end = first_mask(state.texts[0], shown)
            write(writer.tokenizer.decode(state.texts[0][shown:end]))
            shown = end
    texts = [text[hidden:] for text in state.texts]
    if streaming:
        texts[0] = state.texts[0][shown:]
    write_texts([writer.tokenizer.decode(text) for text in texts])
    say_speed(args.num_samples * int((template == MASK_ID).sum()), start, state.nfe)


def make_template(args: Namespace, writer: GeneratorTransformer) -> tuple[Tensor, int]:
    """(T,) ids of --infill, or of --prompt followed by --length masks, and how many of them are not to be printed.

    Raises ArgumentError if nothing is masked.
    """
    if args.infill is None:
        prompt = opening(args.prompt, writer.model, writer.tokenizer)
        template = prompt_template(prompt, args.max_out_tokens, writer.tokenizer)
        return template, 0 if prompt == args.prompt else len(template) - args.max_out_tokens
    template = parse_template(args.infill, writer.tokenizer)
    if not (template == MASK_ID).any():
        raise ArgumentError("infill", NO_MASKS)
    return template, 0


def fill(writer: GeneratorTransformer, args: Namespace, templates: list[Tensor]) -> Iterator[GenerationState]:
    """The states of `fill_masks` with the settings and the seed of the flags."""
    generator = torch.Generator().manual_seed(args.seed)
    return fill_masks(writer.model, templates, make_config(args, writer.model), generator=generator)


def viewed(
    states: Iterator[GenerationState], writer: GeneratorTransformer, args: Namespace
) -> Iterator[GenerationState]:
    """The states, shown as they come in the view that a flag of VIEWS asks for, if any."""
    return watch(states, writer.tokenizer) if args.watch else states


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
    say_speed(total, start, state.nfe)


def write_texts(texts: Sequence[str], name: str = "sample") -> None:
    """Print texts on standard output, several with a line before each that cannot be taken for text of the model."""
    for number, text in enumerate(texts, 1):
        if len(texts) > 1:
            write(f"--- {name} {number} of {len(texts)} ---\n")
        write(text, end="\n")


def say_speed(characters: int, start: float, nfe: int | None = None) -> None:
    """What was written since `start` and how fast, on standard error."""
    seconds = time.perf_counter() - start
    evaluations = "" if nfe is None else f", {counted(nfe, 'network evaluation')}"
    say(f"{counted(characters, 'character')} in {seconds:.2f} s: {characters / seconds:.0f} characters/s{evaluations}")


# ------------------------------------------------------------------------------------------------- other modes
def answer_prompts(writer: GeneratorTransformer, args: Namespace) -> None:
    """--chat. Each turn has its own seed."""
    config = make_config(args, writer.model)

    def answer(prompt: str, turn: int) -> Iterator[str]:
        refuse_masks(prompt)
        return (piece for [piece] in stream(writer, [prompt], config, args, args.seed + turn))

    answer("", 0)  # raises now for settings that no turn would accept
    chat(answer)


def print_beams(writer: GeneratorTransformer, args: Namespace) -> None:
    """The best texts of a beam search; their scores on standard error."""
    config = make_beam_config(args, writer.model)
    prompt = opening(args.prompt, writer.model, writer.tokenizer)
    ids = prompt_ids(writer.tokenizer, prompt)
    found = beam_search(writer.model, ids, config, max_out_tokens=args.max_out_tokens)
    for rank, (_, score) in enumerate(found, 1):
        say(f"beam {rank}: score {score:.4f}")
    write_texts([args.prompt + writer.tokenizer.decode(text[len(ids) :].cpu()) for text, _ in found], "beam")


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
    for line in packed(tokens, shutil.get_terminal_size().columns):
        write(line, end="\n")
    for title, table in tables.items():
        write(f"\n{title}\n" if title else "\n")
        for token, p in table:
            write(f"{show(token):8}{100 * p:7.3f} %\n")


def show(token: str) -> str:
    """Text in quotes, a special token as it is: "a" -> "'a'", "[END]" -> "[END]"."""
    return token if token in SPECIAL_TOKENS else repr(token)


def packed(cells: Sequence[str], width: int, gap: str = "   ") -> list[str]:
    """Lines of cells with gaps between, as many in a line as fit its width.

    >>> packed(["'a' 4", "'b' 5", "'c' 6"], width=13)
    ["'a' 4   'b' 5", "'c' 6"]
    """
    from rich.cells import cell_len  # some characters are two columns wide

    lines: list[str] = []
    for cell in cells:
        if lines and cell_len(lines[-1] + gap + cell) <= width:
            lines[-1] += gap + cell
        else:
            lines.append(cell)
    return lines
