"""What `python generate.py` does in each of its modes, given its parsed flags; see flags.py for what these set."""

import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

from autoregressive import beam_search
from checkpoint import load_checkpoint, newest_checkpoint
from generation.chat import chat
from generation.flags import (
    DEFAULTS,
    check_writable,
    is_template,
    make_beam_config,
    make_config,
    mode_of,
    models_of,
    opening,
    read_prompt,
    refuse_masks,
    refuse_unused,
)
from generation.infilling import MASK_PATTERN, parse_template, prompt_template
from generation.text import GeneratorTransformer, prompt_ids
from generation.views import print_race, print_viewed
from generation.writing import print_decoded, print_file, print_filled, shown_prompt, stream, write_texts
from model import Transformer
from tokenizer import SPECIAL_TOKENS
from utils.console import say, write
from utils.devices import memory_problem, pick_device
from utils.errors import ArgumentError


def write_as_asked(args: Namespace) -> None:
    """Load the model, check the flags and run the mode they ask for. A flag that was not given is None."""
    mode = mode_of(args)
    check_writable(args)
    writers = [load(args, name) for name in models_of(args, mode)]
    writer = writers[0]
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
    if mode == "race":
        return print_race(writers, args)
    modes = {"chat": answer_prompts, "top": print_next_tokens, "num_beams": print_beams}
    modes.get(mode, text_mode(writer, args))(writer, args)


def text_mode(writer: GeneratorTransformer, args: Namespace) -> Callable[[GeneratorTransformer, Namespace], None]:
    """How to write texts."""
    if args.infill_file is not None:
        return print_file
    if args.watch or args.html or args.gif:
        return print_viewed
    return print_filled if writer.model.fills_masks else print_decoded


def check_memory(args: Namespace, model: Transformer) -> None:
    """Raise ArgumentError for more texts than there is memory for: their ids, logits, keys and values count."""
    config, name = model.config, "num_samples" if args.num_beams is None else "num_beams"
    T = min(config.block_size, 1 if is_template(args) else args.max_out_tokens)
    cached = 8 * config.n_layer * config.n_embd * T
    a_row = 8 * args.max_out_tokens + (16 * config.vocab_size + cached if model.causal else 16 * config.vocab_size * T)
    if problem := memory_problem(a_row * getattr(args, name)):
        raise ArgumentError(name, f"{getattr(args, name)} {problem}: ask for fewer")


def load(args: Namespace, name: str | None) -> GeneratorTransformer:
    """The model that the flags ask for, of kind `name` if it is given. Raises ValueError if there is none."""
    path = args.checkpoint or newest_checkpoint(args.out or "out", name)
    checkpoint = load_checkpoint(path, pick_device(args.device))
    kind = checkpoint.model.name
    say(f"{checkpoint.path}: {kind}, step {checkpoint.step}")
    if args.model not in (None, kind):
        raise ArgumentError("model", f"{args.model}: {checkpoint.path} holds a {kind} model")
    if args.streams is not None and checkpoint.model.causal:
        checkpoint.model.set_streams(args.streams)
    return GeneratorTransformer(checkpoint.model, checkpoint.tokenizer)


# ------------------------------------------------------------------------------------------------- other modes
def answer_prompts(writer: GeneratorTransformer, args: Namespace) -> None:
    """--chat. Each turn has its own seed. A model of pairs sees the conversation, others only the latest prompt."""
    config, answers = make_config(args, writer.model), writer.model.config.segments == "pairs"
    history: list[tuple[str, str]] = []

    def answer(prompt: str, turn: int) -> Iterator[str]:
        refuse_masks(prompt)
        pieces = stream(writer, [prompt], config, args, args.seed + turn, history)
        return remembered(prompt, pieces) if answers else (piece for [piece] in pieces)

    def remembered(prompt: str, pieces: Iterator[list[str]]) -> Iterator[str]:
        history.append((prompt, ""))
        for [piece] in pieces:
            history[-1] = prompt, history[-1][1] + piece
            yield piece

    answer("", 0)  # raises now for settings that no turn would accept
    chat(answer, answers)


def print_beams(writer: GeneratorTransformer, args: Namespace) -> None:
    """The best texts of a beam search; their scores on standard error."""
    config = make_beam_config(args, writer.model)
    prompt = opening(args.prompt, writer.model, writer.tokenizer)
    ids = prompt_ids(writer.model, writer.tokenizer, prompt)
    found = beam_search(writer.model, ids, config, max_out_tokens=args.max_out_tokens)
    for rank, (_, score) in enumerate(found, 1):
        say(f"beam {rank}: score {score:.4f}")
    beginning = shown_prompt(args, writer.model)
    write_texts([beginning + writer.tokenizer.decode(text[len(ids) :].cpu()) for text, _ in found], "beam")


def print_next_tokens(writer: GeneratorTransformer, args: Namespace) -> None:
    """The prompt's tokens with their ids, and the likeliest next tokens with their probabilities.

    LLaDA: the tokens of the template or prompt, and a table for each [MASK], or for one after the end if it has none.
    """
    text = args.prompt if args.infill is None else args.infill
    if writer.model.causal:
        ids = prompt_ids(writer.model, writer.tokenizer, text)
        tables = {"": writer.next_tokens(text, args.top, args.context_len)}
    elif args.infill is None and not MASK_PATTERN.search(text):
        ids, _ = prompt_template(text, 1, writer.model, writer.tokenizer)
        tables = {f"[MASK] at position {len(ids) - 1}": writer.next_tokens(text, args.top)}
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
