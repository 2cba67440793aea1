"""What `python generate.py` does in each of its modes, given its parsed flags; see flags.py for what these set."""

import shutil
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from autoregressive import beam_search, decode
from checkpoint import load_checkpoint, newest_checkpoint
from generation.animation import write_gif
from generation.chat import chat
from generation.flags import (
    DEFAULTS,
    check_writable,
    decode_utf8,
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
from generation.history import History
from generation.infilling import (
    MASK_PATTERN,
    GenerationState,
    completed_pieces,
    fill_template,
    parse_template,
    prompt_template,
)
from generation.live import PAUSE, Recorder, View
from generation.page import write_page
from generation.race import race
from generation.screen import text_stands
from generation.text import Config, GeneratorTransformer, fill_templates, prompt_ids, stop_rule, stream_texts
from model import Transformer
from tokenizer import MASK_ID, SPECIAL_TOKENS
from utils.console import counted, progress, say, write
from utils.counter import EvaluationCounter
from utils.devices import memory_problem, pick_device
from utils.errors import ArgumentError
from utils.standard_input import read_input

NO_MASKS = "has nothing to write: mark one character as [MASK], n characters as [MASK*n]"


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


# ------------------------------------------------------------------------------------------------- writing text
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


# ------------------------------------------------------------------------------------------------- views
def print_viewed(writer: GeneratorTransformer, args: Namespace) -> None:
    """--watch, --html, --gif: the texts at the end; the first of them is shown or kept step by step."""
    model, tokenizer, n = writer.model, writer.tokenizer, args.num_samples
    ids, hidden = beginning(writer, args)
    view = Recorder(hidden)
    if args.watch:
        steps, pause = None if model.fills_masks else args.max_out_tokens, PAUSE if args.pause is None else args.pause
        view = View(pause, steps, hidden, stays=n == 1)
    with view:
        if not model.fills_masks:
            columns = list(follow(writer, args, ids, view))
            nfe, tails = len(columns), [tokenizer.decode(row) for row in torch.stack(columns, 1).cpu()]
            characters, texts = sum(map(len, tails)), [shown_prompt(args, model) + tail for tail in tails]
        else:
            [state] = deque(follow(writer, args, ids, view), maxlen=1)
            nfe, written = state.nfe, [text[ids == MASK_ID] for text in state.texts]
            characters = sum(len(tokenizer.decode(text)) for text in written)
            texts = [tokenizer.decode(text[hidden:]) for text in state.texts]
    if not (args.watch and n == 1 and text_stands()):
        write_texts(texts)
    say_speed(characters, view.seconds, nfe)
    save_views(args, [view.history])


def print_race(writers: Sequence[GeneratorTransformer], args: Namespace) -> None:
    """--race: each model writes alone; then all are replayed side by side."""
    args.num_samples = 1
    ids, hidden = zip(*(beginning(writer, args) for writer in writers), strict=True)

    def run(writer: GeneratorTransformer, ids: Tensor) -> Iterator[History]:
        recorder = Recorder()
        for _ in follow(writer, args, ids, recorder):
            yield recorder.history

    histories = race([partial(run, *pair) for pair in zip(writers, ids, strict=True)], hidden)
    if not text_stands():
        for history, writer, n in zip(histories, writers, hidden, strict=True):
            written = [writer.tokenizer.char_to_id[cell.token] for cell in history.cells[n:]]
            write(f"--- {history.label} ---\n{writer.tokenizer.decode(written)}\n")
    save_views(args, histories)


def beginning(writer: GeneratorTransformer, args: Namespace) -> tuple[Tensor, int]:
    """What a text begins with: (T,) ids, LLaDA's with masks; and how many positions of it are not to be printed."""
    if writer.model.fills_masks:
        return make_template(args, writer)
    prompt = opening(args.prompt, writer.model, writer.tokenizer)
    ids = prompt_ids(writer.model, writer.tokenizer, prompt)
    return ids, 0 if prompt == shown_prompt(args, writer.model) else len(ids) - 1  # the first [START] has no position


def shown_prompt(args: Namespace, model: Transformer) -> str:
    """The part of the text that --prompt gives. A model of pairs answers with the completion alone."""
    return "" if model.config.segments == "pairs" else args.prompt


def follow(
    writer: GeneratorTransformer, args: Namespace, ids: Tensor, view: Recorder
) -> Iterator[Tensor] | Iterator[GenerationState]:
    """Write texts that begin with ids (T,) and show the first in a view: columns of tokens (GPT) or states (LLaDA)."""
    model, tokenizer = writer.model, writer.tokenizer
    if model.fills_masks:
        label = "GPT" if model.causal else "LLaDA"
        return view.filling(fill(writer, args, [ids] * args.num_samples), ids, tokenizer, label)
    columns = decode(
        model,
        [ids] * args.num_samples,
        make_config(args, model),
        max_out_tokens=args.max_out_tokens,
        generator=torch.Generator().manual_seed(args.seed),
        stop=stop_rule(args.stop or (), tokenizer),
    )
    return view.decoding(columns, model, ids, tokenizer)


def save_views(args: Namespace, histories: Sequence[History]) -> None:
    """Write the files of --html and --gif."""
    beginning = (args.infill or args.prompt or "").strip().partition("\n")[0]
    title = " and ".join(history.label for history in histories) + (f": {beginning:.60}" if beginning else "")
    if args.html is not None:
        write_page(args.html, histories, title)
        say(f"wrote {args.html}: open it in a browser")
    if args.gif is not None:
        write_gif(args.gif, histories)
        say(f"wrote {args.gif}")


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
