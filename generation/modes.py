"""What `python generate.py` does in each mode. A start and settings go to `write`; its states come back as text."""

import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import count, islice
from pathlib import Path

import torch

from checkpoint import PRETRAINED, Checkpoint, load_checkpoint, newest_checkpoint
from config import MODELS, BeamConfig, WriteRun, given, refuse_without_effect
from generation.chat import chat
from generation.gif import write_gif
from generation.history import Recorder
from generation.holes import choose_lengths
from generation.page import write_live_page, write_page
from generation.terminal import View, race, text_stands
from generation.text import MASK_PATTERN, Config, GeneratorTransformer, pieces_of
from generation.write import State, write
from model import Transformer
from tokenizer import MASK_ID, SPECIAL_TOKENS
from utils.console import counted, print_out, say
from utils.devices import compile_problem, memory_problem, pick_device
from utils.errors import ArgumentError
from utils.files import plain_text

LABELS = {"llada": "LLaDA", "gpt": "GPT"}
NO_MASKS = "has nothing to write: mark one token as [MASK], n tokens as [MASK*n]"
WARM_UP_STEPS = 3  # before a race is measured: the first calls of a network are slower than all others


def write_as_asked(args: Namespace, mode: str, name: str | None, settings: Sequence[type]) -> None:
    """Load the models, check the flags and run the mode. name: of the model; None: whichever is the default."""
    both = mode == "race" or (mode == "page" and name is None and args.checkpoint is None)
    checkpoints = [load(args, wanted) for wanted in (MODELS if both else (name,))]
    names = {checkpoint.model.name for checkpoint in checkpoints}
    state = {"mode": mode, "watch": bool(args.watch), "checkpoint": args.checkpoint, "model": names}
    refuse_without_effect(args, state, *settings)
    if args.model and names != {args.model}:
        raise ArgumentError("model", f"{args.model}: {checkpoints[0].path} holds a {checkpoints[0].model.name} model")
    run, writers = WriteRun(**given(args, WriteRun)), [GeneratorTransformer(c.model, c.tokenizer) for c in checkpoints]
    configs = [writer.settings(**given(args, writer.config_class)) for writer in writers]
    prepare(run, writers[0].model)
    prompt, title = read_prompt(run), " and ".join(LABELS[c.model.name] for c in checkpoints)
    paths, command = ", ".join(short(c.path) for c in checkpoints), shlex.join(["generate.py", *sys.argv[1:]])
    about = f"{paths}; seed {run.seed}; {command}"
    match mode:
        case "page":
            write_live_page(run.page, checkpoints, title, about)
        case "file":
            print_file(writers[0], configs[0], run)
        case "chat":
            answer_prompts(writers[0], configs[0], run)
        case "top":
            print_next_tokens(writers[0], run, prompt, given(args, writers[0].config_class))
        case "beams":
            print_beams(writers[0], run, prompt, given(args, BeamConfig))
        case _:
            tasks = [Task(writer, config, run, prompt) for writer, config in zip(writers, configs, strict=True)]
            print_race(tasks) if mode == "race" else print_text(tasks[0])
            histories = [task.recorder.history for task in tasks]
            if run.html:
                write_page(run.html, histories, title, about)
            if run.gif:
                write_gif(run.gif, histories)
    for path in filter(None, (run.page, run.html, run.gif)):
        say(f"wrote {path}: open it in a browser")


# ------------------------------------------------------------------------------------------------- the model
def load(args: Namespace, name: str | None) -> Checkpoint:
    """The model to write with. Says which, and whether a better one comes with the project."""
    checkpoint = load_checkpoint(args.checkpoint or newest_checkpoint(args.out, name), pick_device(args.device))
    loss, pretrained = best_loss(checkpoint), PRETRAINED / f"{checkpoint.model.name}.pt"
    note = f", {loss:.2f} nats/character" if loss < math.inf else ""
    if note and checkpoint.path != pretrained and pretrained.is_file():
        better = best_loss(load_checkpoint(pretrained))
        note += f"; {short(pretrained)}: {better:.2f}" if better < loss else ""
    say(f"{short(checkpoint.path)}: {checkpoint.model.name}, step {checkpoint.step}{note}")
    return checkpoint


def short(path: Path) -> str:
    """The path; of a model that comes with the project, from its folder."""
    return str(path.relative_to(PRETRAINED.parent) if path.parent == PRETRAINED else path)


def best_loss(checkpoint: Checkpoint) -> float:
    """The best validation loss of the run; infinite without one."""
    return min((record["val_loss"] for record in checkpoint.history), default=math.inf)


def prepare(run: WriteRun, model: Transformer) -> None:
    """Compile, if asked for. Raises ArgumentError for more texts than there is memory for."""
    name, config = "num_samples" if run.beams is None else "beams", model.config
    T = 1 if run.infill or run.infill_file else min(config.block_size, run.length)
    a_row = 8 * run.length + 8 * T * config.n_layer * config.n_embd + 16 * config.vocab_size  # ids, cache, logits
    if problem := memory_problem(a_row * getattr(run, name)):
        raise ArgumentError(name, f"{getattr(run, name)} {problem}: ask for fewer")
    if run.compile and (problem := compile_problem(model.device)):
        say(f"not compiled: {problem}")
    elif run.compile:
        say("compiling; later runs reuse the result")
        model.compile()


def read_prompt(run: WriteRun) -> str:
    """The text of --prompt, which `-` reads from standard input. Raises ArgumentError for a [MASK] in it."""
    if run.prompt == "-":
        return literal(plain_text(sys.stdin.buffer.read(), "standard input").removesuffix("\n"))
    return literal(run.prompt or "")


def literal(prompt: str) -> str:
    """The prompt. Raises ArgumentError for a [MASK] in it."""
    if match := MASK_PATTERN.search(prompt):
        raise ArgumentError("prompt", f"is read literally, {match[0]} too: give the whole text to --infill instead")
    return prompt


# ------------------------------------------------------------------------------------------------- texts
class Task:
    """What one model is to write. Its text follows `known` ids, for which `prefix` is printed, and holds `given`
    characters of a template."""

    def __init__(self, writer: GeneratorTransformer, config: Config, run: WriteRun, prompt: str):
        self.writer, self.config, self.run, self.label = writer, config, run, LABELS[writer.model.name]
        self.prefix, self.known, self.given = writer.shown(prompt), 0, 0
        if run.infill is not None:
            self.start = writer.template_start(choose_lengths(run.infill, writer, config, run.seed))
            if not (self.start == MASK_ID).any():
                raise ArgumentError("infill", NO_MASKS)
            self.given = len(writer.tokenizer.decode(self.start[self.start != MASK_ID]))
        else:
            try:
                self.start, self.known = writer.prompt_start(writer.opening(prompt), writer.tokens_for(run.length))
            except ValueError as error:  # an unknown character: which of two models does not know it?
                raise error if isinstance(error, ArgumentError) else ValueError(f"{self.label}: {error}") from None
        self.recorder = Recorder(self.start, writer.tokenizer, self.label, first=0 if self.prefix else self.known)

    def write(self, view: View | None = None, at_once: bool = False) -> list[str]:
        """The texts; `at_once`: print the only one as it is written. Keeps the last state, and the history of the first
        text if it is to be shown."""
        run, rows = self.run, []

        def states() -> Iterator[State]:
            generator = torch.Generator().manual_seed(run.seed)
            for state in write(self.writer.model, [self.start] * run.num_samples, self.config, generator):
                if run.watch or run.html or run.gif or run.race:
                    self.recorder.add(state)
                if view:
                    view.show(self.recorder.history)
                self.state = state
                yield state

        shown, length = [self.known] * run.num_samples, run.length if run.infill is None else None
        for row in pieces_of(states(), self.writer.tokenizer, shown, self.config, length):
            rows.append(row)
            print_out(row[0] if at_once else "")
        return ["".join(parts) for parts in zip(*rows, strict=True)]


def print_text(task: Task) -> None:
    """One text as it is written, or several at the end; the first is shown step by step, if asked for."""
    run = task.run
    at_once = run.num_samples == 1 and not run.watch
    print_out(task.prefix if at_once else "")
    with View(run.pause) if run.watch else nullcontext() as view:
        texts = task.write(view, at_once)
    if at_once:
        print_out("\n")
    elif run.num_samples > 1 or not text_stands():
        print_texts([task.prefix + text for text in texts])
    say_speed(sum(len(text) - task.given for text in texts), task.state)


def print_texts(texts: Sequence[str], name: str = "sample") -> None:
    """Print texts on standard output, several with a line before each."""
    for number, text in enumerate(texts, 1):
        title = f"--- {name} {number} of {len(texts)} ---\n" if len(texts) > 1 else ""
        print_out(f"{title}{text}\n")


def say_speed(characters: int, state: State, label: str = "") -> None:
    """What was written and how fast, on standard error."""
    speed = f"{characters / max(state.seconds, 1e-9):.0f} characters/s, {counted(state.nfe, 'network evaluation')}"
    say(f"{label}{counted(characters, 'character')} in {state.seconds:.2f} s: {speed}")


def print_race(tasks: Sequence[Task]) -> None:
    """Each model writes alone, after a few steps to warm up; then their histories are replayed side by side."""
    texts = []
    for task in tasks:
        list(islice(write(task.writer.model, [task.start], task.config), WARM_UP_STEPS))
        texts += task.write()
        say_speed(len(texts[-1]), task.state, f"{task.label} alone: ")
    race([task.recorder.history for task in tasks])
    if not text_stands():
        for task, text in zip(tasks, texts, strict=True):
            print_out(f"--- {task.label} ---\n{task.prefix}{text}\n")


def print_file(writer: GeneratorTransformer, config: Config, run: WriteRun) -> None:
    """--infill-file: the bytes of the file with its masks filled. All other bytes stay as they are."""
    source = "standard input" if str(run.infill_file) == "-" else str(run.infill_file)
    content = sys.stdin.buffer.read() if str(run.infill_file) == "-" else run.infill_file.read_bytes()
    plain_text(content, source)  # raises ValueError unless it is text
    text, tokenizer = content.decode(), writer.tokenizer
    start = writer.template_start(text, keep_unknown=True)
    masked, unknown = start == MASK_ID, int((start == tokenizer.vocab_size).sum())
    if not masked.any():
        raise ArgumentError("infill_file", f"{source} {NO_MASKS}")
    if unknown:
        say(f"{counted(unknown, 'character')} unknown to the model: left as they are, it reads [MASK] there")
    *_, state = write(writer.model, [start], config, torch.Generator().manual_seed(run.seed))
    ids = state.texts[0][masked]
    say_speed(len(tokenizer.decode(ids)), state)
    tokens = iter(ids.tolist())
    filled = MASK_PATTERN.sub(lambda hole: tokenizer.decode(list(islice(tokens, int(hole[1] or 1)))), text)
    if sys.stdout.isatty():
        print_out(filled)
    else:
        sys.stdout.buffer.write(filled.encode())


# ------------------------------------------------------------------------------------------------- other modes
def answer_prompts(writer: GeneratorTransformer, config: Config, run: WriteRun) -> None:
    """--chat. Each answer has its own seed, and depends on the latest prompt alone."""
    pairs, seeds = writer.model.config.segments == "pairs", count(run.seed)
    limits = {"max_out_tokens": writer.tokens_for(run.length), "length": run.length}

    def answer(prompt: str) -> Iterator[str]:
        pieces = writer.stream([literal(prompt)], config, seed=next(seeds), **limits)
        yield writer.shown(prompt)
        yield from (piece for [piece] in pieces)

    next(writer.stream([""], config, **limits))  # raises for settings that no turn would accept
    chat(answer, "a prompt; the model answers it" if pairs else "the beginning of a text; the model continues it")


def print_beams(writer: GeneratorTransformer, run: WriteRun, prompt: str, settings: dict) -> None:
    """The best texts of a beam search; their scores on standard error. settings: fields of BeamConfig."""
    if run.num_samples > run.beams:
        raise ArgumentError("num_samples", f"must be at most {run.beams}, the number of --beams")
    opened, tokens = writer.opening(prompt), writer.tokens_for(run.length)
    found = writer.beam_search(opened, run.beams, tokens, num_return=run.num_samples, **settings)
    for rank, (_, score) in enumerate(found, 1):
        say(f"beam {rank}: score {score:.4f}")
    print_texts([writer.shown(prompt) + text[len(opened) :] for text, _ in found], "beam")


def print_next_tokens(writer: GeneratorTransformer, run: WriteRun, prompt: str, settings: dict) -> None:
    """--top: the tokens of the prompt or the template with their ids, and the likeliest tokens at each [MASK]."""

    def show(token: str) -> str:
        return token if token in SPECIAL_TOKENS else repr(token)

    start = writer.prompt_start(prompt, 1)[0] if run.infill is None else writer.template_start(run.infill)
    print_out("   ".join(f"{show(writer.tokenizer.id_to_char[i])} {i}" for i in start.tolist()), end="\n")
    for position, table in writer.likeliest(start, run.top, **settings):
        print_out(f"\n[MASK] at position {position}\n")
        for token, p in table:
            print_out(f"{show(token):8}{100 * p:7.3f} %\n")
