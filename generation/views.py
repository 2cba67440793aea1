"""`python generate.py` with --watch, --html, --gif and --race: the first text is shown, or kept, step by step."""

from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from autoregressive import decode
from generation.animation import write_gif
from generation.flags import make_config, opening
from generation.history import History
from generation.infilling import GenerationState
from generation.live import PAUSE, Recorder, View
from generation.page import write_page
from generation.race import race
from generation.screen import text_stands
from generation.text import GeneratorTransformer, prompt_ids, stop_rule
from generation.writing import fill, make_template, say_speed, shown_prompt, write_texts
from tokenizer import MASK_ID
from utils.console import say, write


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
