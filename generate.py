"""Write text with a trained model: `python generate.py --help`."""

import argparse
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from chat import chat
from checkpoint import load_checkpoint, newest_checkpoint
from console import POSITIVE_INT, Parser, number, run, say
from model import MODELS
from sampler import REMASKERS
from templates import HOLE, first_mask, infill, parse_template, prompt_template, write
from tokenizer import MASK_ID
from train import pick_device
from unmasking import ORDERS, SCHEDULES
from watch import watch
from writer import LENGTH, GeneratorTransformer, generate_text, generate_texts, prompt_ids, stream_texts

__all__ = ["GeneratorTransformer", "generate_text", "generate_texts", "infill"]  # what is for others to import

EARLY_STOPPING = {"no": False, "yes": True, "never": "never"}
DRAWING = ("temperature", "top_k", "top_p", "seed", "stop")  # flags that mean nothing to a beam search,
BEAMS = ("length_penalty", "early_stopping")  # and those that mean something to nothing else


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """What both models understand."""
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="the model (default: the newest under out/)")
    add("--model", choices=MODELS, help="the newest of this kind")
    add("--device", help="cpu, cuda (default: the best there is)")
    add("--prompt", help="how the text begins (default: nothing)")
    add("--length", type=number(int, low=1, high=10**7), help=f"characters to write (default: {LENGTH})")
    add("--num-samples", type=POSITIVE_INT, metavar="N", help="texts to write (default: 1)")
    add("--seed", type=number(int, low=0, high=2**63 - 1), help="same seed, same text (default: 0)")
    add("--temperature", type=number(float, low=0), help="0 takes the likeliest token")
    add("--top-k", type=POSITIVE_INT, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=number(float, above=0, high=1), metavar="P", help="... from the likeliest that make up P")
    add("--repetition-penalty", type=number(float, above=0), metavar="R", help="above 1: avoid tokens that are there")
    add("--slide", type=POSITIVE_INT, metavar="N", help="move the window N tokens at a time (default: 1; LLaDA: half)")


def add_llada_flags(parser: argparse.ArgumentParser) -> set[str]:
    """What only LLaDA understands; returns the names."""
    group = parser.add_argument_group("LLaDA")
    add, rule = group.add_argument, group.add_mutually_exclusive_group().add_argument
    actions = [
        add("--infill", metavar="TEMPLATE", help='fill the holes of a text: "ROMEO: [MASK*12] love [MASK*20]"'),
        add("--steps", type=number(int, low=1, high=10**6), metavar="K", help="network evaluations a window, at most"),
        add("--order", choices=ORDERS, help="which characters are written first (default: sweep)"),
        add("--schedule", type=schedule, metavar="S", help=f"how many a step: {', '.join(SCHEDULES)}, or 8,8,16"),
        rule("--threshold", type=number(float, low=0, high=1), metavar="P", help="... and all that are so sure"),
        rule("--factor", type=number(float, low=0), metavar="F", help="... and what Fast-dLLM's factor rule allows"),
        rule("--entropy-bound", type=number(float, low=0), metavar="H", help="... while entropies sum to H nats"),
        add("--block-length", type=POSITIVE_INT, metavar="N", help="write N characters after N, from left to right"),
        add("--remask", choices=REMASKERS, help="second thoughts: mask written characters again"),
        add("--eta", type=number(float, low=0, high=1), metavar="E", help="how often, with cap, rescale and loop"),
        add("--cfg", "--cfg-scale", dest="cfg_scale", type=number(float, low=0), metavar="S", help="guidance"),
        add("--watch", action="store_true", help="show the text filling in, on standard error"),
    ]
    return {action.dest for action in actions}


def schedule(text: str) -> str | tuple[int, ...]:
    """An argparse type: the name of a schedule, or its counts with commas between."""
    if text in SCHEDULES:
        return text
    try:
        return tuple(int(count) for count in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {', '.join(SCHEDULES)} or counts like 8,8,16") from None


def add_gpt_flags(parser: argparse.ArgumentParser, modes: argparse._MutuallyExclusiveGroup) -> set[str]:
    """What only GPT understands; returns the names."""
    add = parser.add_argument_group("GPT").add_argument
    actions = [
        add("--context-len", type=POSITIVE_INT, metavar="T", help="tokens it sees (default: the model's block_size)"),
        add("--stop", action="append", metavar="TEXT", help="end after this text; may be given several times"),
        add("--length-penalty", type=number(float, low=-10, high=10), metavar="A", help="beams: log p / length^A"),
        add("--early-stopping", choices=EARLY_STOPPING, help="beams: stop as soon as there are N texts (default: no)"),
        add("--compile", action="store_true", help="two to four times as fast after half a minute (later: seconds)"),
        modes.add_argument("--beams", type=POSITIVE_INT, metavar="N", help="GPT: the likeliest text N beams find"),
    ]
    return {action.dest for action in actions}


def parse_args() -> tuple[dict, dict[str, set[str]]]:
    """The flags that were given, by name, and for each model the names of those that are not for it."""
    parser = Parser(description="Write text with a trained model.", argument_default=argparse.SUPPRESS)
    add_common_flags(parser)
    modes = parser.add_argument_group("instead of a drawn text").add_mutually_exclusive_group()
    modes.add_argument("--chat", action="store_true", help="read prompts line by line, answer each; `quit` leaves")
    modes.add_argument("--top", type=POSITIVE_INT, metavar="K", help="a table of the K likeliest next tokens")
    foreign = {"llada": add_gpt_flags(parser, modes), "gpt": add_llada_flags(parser)}
    return vars(parser.parse_args()), foreign


def refuse(settings: dict, names: Iterable[str], why: str) -> None:
    """Raise ValueError if any of these flags was given."""
    wrong = ["--" + name.replace("_", "-") for name in names if name in settings]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: {why}")


def load(settings: dict, foreign: dict[str, set[str]]) -> GeneratorTransformer:
    """The model that the flags ask for. Raises ValueError if it is of the other kind, or a flag is."""
    name, path, device = (settings.pop(flag, None) for flag in ("model", "checkpoint", "device"))
    path = path or newest_checkpoint("out", name)
    checkpoint = load_checkpoint(path, pick_device(device, float64=True))
    kind = checkpoint.model.name
    say(f"{path}: {kind}, step {checkpoint.step}")
    if name not in (None, kind):
        raise ValueError(f"--model {name}: {path} holds a {kind} model")
    refuse(settings, sorted(foreign.get(kind, ())), f"not for a {kind} model, which {path} is; see --model")
    return GeneratorTransformer(checkpoint.model, checkpoint.tokenizer)


def print_texts(writer: GeneratorTransformer, settings: dict) -> None:
    """One text as it is written, or several, separated by empty lines."""
    refuse(settings, BEAMS, "only with --beams")
    prompt, num_samples = settings.pop("prompt", ""), settings.pop("num_samples", 1)
    start = time.perf_counter()
    if num_samples == 1:
        pieces = stream_texts(writer.model, writer.tokenizer, [prompt], **settings)
        text = prompt
        print(text, end="", flush=True)
        for [piece] in pieces:
            print(piece, end="", flush=sys.stdout.isatty())
            text += piece
        print()
    else:
        text = "\n\n".join(generate_texts(writer.model, writer.tokenizer, [prompt] * num_samples, **settings))
        print(text)
    say_speed(len(text) - num_samples * len(prompt) - 2 * (num_samples - 1), start)


def print_written(writer: GeneratorTransformer, settings: dict) -> None:
    """What LLaDA writes into a template or after a prompt: one text as it settles, or several."""
    num_samples, watching = settings.pop("num_samples", 1), settings.pop("watch", False)
    settings["generator"] = torch.Generator().manual_seed(settings.pop("seed", 0))
    template = template_of(settings, writer)
    start, shown = time.perf_counter(), 0
    drafts = write(writer.model, [template] * num_samples, **settings)
    for draft in watch(drafts, writer.tokenizer) if watching else drafts:
        if num_samples == 1 and not watching and "remask" not in settings:
            settled = first_mask(draft.texts[0], shown)
            print(writer.tokenizer.decode(draft.texts[0][shown:settled]), end="", flush=True)
            shown = settled
    texts = [writer.tokenizer.decode(text) for text in draft.texts]
    print("\n\n".join([texts[0][shown:], *texts[1:]]))
    say_speed(num_samples * int((template == MASK_ID).sum()), start, f", {draft.nfe} network evaluations")


def template_of(settings: dict, writer: GeneratorTransformer) -> torch.Tensor:
    """The ids of --infill, or of --prompt with --length characters to write. Raises ValueError if there are none."""
    if "infill" not in settings:
        return prompt_template(settings.pop("prompt", ""), settings.pop("length", LENGTH), writer.tokenizer)
    refuse(settings, ("prompt", "length"), "the template of --infill says what to write")
    template = parse_template(settings.pop("infill"), writer.tokenizer)
    if not (template == MASK_ID).any():
        raise ValueError("--infill: nothing to write; mark a hole as [MASK], or one of n characters as [MASK*n]")
    return template


def say_speed(written: int, start: float, cost: str = "") -> None:
    """Characters written since `start`, on standard error."""
    seconds = time.perf_counter() - start
    say(f"{written} characters in {seconds:.2f} s: {written / seconds:.0f} characters/s{cost}")


def print_beams(writer: GeneratorTransformer, settings: dict) -> None:
    """The best texts that the beams found; their scores on standard error."""
    refuse(settings, DRAWING, "--beams searches, it does not draw")
    num_beams, num_samples = settings.pop("beams"), settings.pop("num_samples", 1)
    if num_samples > num_beams:
        raise ValueError(f"--num-samples {num_samples}: {num_beams} beams find {num_beams} texts, use more --beams")
    settings["early_stopping"] = EARLY_STOPPING[settings.pop("early_stopping", "no")]
    length = settings.pop("length", LENGTH)
    found = writer.beam_search(settings.pop("prompt", ""), num_beams, length, num_return=num_samples, **settings)
    for rank, (text, score) in enumerate(found):
        say(f"score {score:.4f}")
        print(text if rank == 0 else f"\n{text}")


def print_next_tokens(writer: GeneratorTransformer, settings: dict) -> None:
    """The prompt's tokens with their ids, and the likeliest next ones with their probabilities.

    Of LLaDA: those of a template, and a table for each [MASK], or for one after the end if there is none.
    """
    if "infill" in settings:
        refuse(settings, ["prompt"], "--infill says all of the text")
        settings["prompt"] = settings.pop("infill")
    prompt, k, context_len = settings.pop("prompt", ""), settings.pop("top"), settings.pop("context_len", None)
    refuse(settings, settings, "--top looks at the model's own probabilities and writes nothing")
    if writer.model.causal:
        ids = prompt_ids(writer.tokenizer, prompt)
        tables = {"": writer.next_tokens(prompt, k, context_len)}
    else:
        template = prompt if HOLE.search(prompt) else prompt + "[MASK]"
        ids = parse_template(template, writer.tokenizer)
        tables = {f"[MASK] at position {i}": table for i, table in writer.tokens_at_masks(template, k)}
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


def answer_prompts(writer: GeneratorTransformer, settings: dict) -> None:
    """The conversation: each turn has its own seed."""
    refuse(settings, BEAMS, "only with --beams")
    refuse(settings, ("prompt", "num_samples", "infill", "watch"), "--chat reads its prompts, and answers each once")
    seed = settings.pop("seed", 0)

    def answer(prompt: str, turn: int) -> Iterator[str]:
        pieces = stream_texts(writer.model, writer.tokenizer, [prompt], seed=seed + turn, **settings)
        return (piece for [piece] in pieces)

    answer("", 0)  # raises here and now for what no turn would accept
    chat(answer)


def speak(writer: GeneratorTransformer, settings: dict) -> None:
    """Whatever the flags ask for."""
    if settings.get("remask") not in ("cap", "rescale", "loop"):
        refuse(settings, ["eta"], "only with --remask cap, rescale or loop")
    if "top" in settings:
        return print_next_tokens(writer, settings)
    if settings.pop("compile", False):
        say("compiling; kept for the next time")
        writer.model.compile()
    if "beams" in settings:
        print_beams(writer, settings)
    elif settings.pop("chat", False):
        answer_prompts(writer, settings)
    elif not writer.model.causal:
        print_written(writer, settings)
    else:
        print_texts(writer, settings)


def main() -> None:
    settings, foreign = parse_args()
    given = set(settings)
    try:
        speak(load(settings, foreign), settings)
    except ValueError as error:  # the library's words begin with the name of an argument: here it is a flag's
        name, mark, rest = re.match(r"(\w*)(\W?)(.*)", str(error), re.DOTALL).groups()
        raise ValueError(("--" + name.replace("_", "-") if name in given else name) + mark + rest) from None


if __name__ == "__main__":
    run(main)
