"""Text in, text out: `python generate.py --help`.

Prompts become ids with [START] before them, ids become text; the writing itself is autoregressive.py (GPT) and
sampler.py (LLaDA).
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from autoregressive import SlidingContext, beam_search, decode
from chat import chat
from checkpoint import load_checkpoint, newest_checkpoint
from console import POSITIVE_INT, number, run, say
from model import MODELS, Transformer
from tokenizer import START_ID, SimpleTokenizer
from train import pick_device

LENGTH = 200  # tokens written unless asked otherwise
EARLY_STOPPING = {"no": False, "yes": True, "never": "never"}
DRAWING = ("temperature", "top_k", "top_p", "seed", "stop")  # flags that mean nothing to a beam search,
BEAMS = ("length_penalty", "early_stopping")  # and those that mean something to nothing else


# ------------------------------------------------------------------------------------------------- text level
def generate_text(model: Transformer, tokenizer: SimpleTokenizer, prompt: str = "", **settings) -> str:
    """The prompt and what the model writes after it. Settings: see `stream_texts`."""
    return generate_texts(model, tokenizer, [prompt], **settings)[0]


def generate_texts(
    model: Transformer, tokenizer: SimpleTokenizer, prompts: Sequence[str], **settings
) -> list[str]:
    """Each prompt, of any length, with what the model writes after it; one batch. Settings: see `stream_texts`."""
    texts = list(prompts)
    for pieces in stream_texts(model, tokenizer, prompts, **settings):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return texts


def stream_texts(
    model: Transformer,
    tokenizer: SimpleTokenizer,
    prompts: Sequence[str],
    length: int = LENGTH,
    seed: int = 0,
    stop: Sequence[str] = (),
    **settings,
) -> Iterator[list[str]]:
    """Yield the next piece of each text as it is written, "" for those that have ended, without the prompts.

    length: tokens to write at most. A text depends on its prompt, the seed and how many equal prompts stand before it,
    not on the rest of the batch. It ends after [END] or any of the strings `stop`, which stay part of it. Other
    settings: those of `autoregressive.decode`. Raises ValueError for unknown characters and bad values, at once.
    """
    longest = max(map(len, stop), default=0)

    def stopped(written: list[int]) -> bool:
        tail = tokenizer.decode(written[-longest:])  # every token is a character at least
        return any(string in tail for string in stop)

    tokens = decode(
        model,
        [prompt_ids(tokenizer, prompt) for prompt in prompts],
        max_out_tokens=length,
        generator=torch.Generator().manual_seed(seed),
        stop=stopped if longest else None,
        **settings,
    )
    return ([tokenizer.decode([token]) for token in row.tolist()] for row in tokens)


def prompt_ids(tokenizer: SimpleTokenizer, prompt: str) -> Tensor:
    """(1 + len(prompt),) ids: [START] opens every text. Raises ValueError for unknown characters."""
    return torch.tensor([START_ID, *tokenizer.encode(prompt).tolist()])


class GeneratorTransformer:
    """A trained model that writes. Prompts are text, so are answers; all randomness follows from `seed`."""

    def __init__(self, model: Transformer, tokenizer: SimpleTokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load_from_checkpoint(cls, path: str | Path, device: str = "cpu") -> "GeneratorTransformer":
        """The model of a file train.py wrote. Raises ValueError that names the file if it is none."""
        checkpoint = load_checkpoint(path, device)
        return cls(checkpoint.model, checkpoint.tokenizer)

    def generate(
        self,
        prompt: str = "",
        context_len: int | None = None,
        temperature: float = 1.0,
        max_out_tokens: int = LENGTH,
        **settings,
    ) -> str:
        """The prompt and at most `max_out_tokens` more. Settings: see `stream_texts` and `autoregressive.decode`."""
        return prompt + "".join(self.stream(prompt, context_len, temperature, max_out_tokens, **settings))

    def stream(
        self,
        prompt: str = "",
        context_len: int | None = None,
        temperature: float = 1.0,
        max_out_tokens: int = LENGTH,
        **settings,
    ) -> Iterator[str]:
        """What `generate` writes after the prompt, as it is written."""
        if context_len is not None:
            settings["context_len"] = context_len
        pieces = stream_texts(
            self.model, self.tokenizer, [prompt], length=max_out_tokens, temperature=temperature, **settings
        )
        return (piece for [piece] in pieces)

    def beam_search(
        self, prompt: str = "", num_beams: int = 5, max_out_tokens: int = LENGTH, **settings
    ) -> list[tuple[str, float]]:
        """(text, score) pairs, best first, prompt included. Settings: see `autoregressive.beam_search`."""
        ids = prompt_ids(self.tokenizer, prompt)
        found = beam_search(self.model, ids, num_beams=num_beams, max_out_tokens=max_out_tokens, **settings)
        return [(self.tokenizer.decode(ids.cpu()), score) for ids, score in found]

    @torch.inference_mode()
    def next_tokens(self, prompt: str = "", k: int = 10, context_len: int | None = None) -> list[tuple[str, float]]:
        """The k likeliest next tokens with their probabilities, likeliest first. Raises ValueError for bad values."""
        context = SlidingContext(self.model, [prompt_ids(self.tokenizer, prompt)], 0, context_len)
        return self.likeliest(context.next_logits()[0], k)

    def likeliest(self, logits: Tensor, k: int) -> list[tuple[str, float]]:
        """logits (V,) -> the k likeliest tokens with their probabilities, likeliest first."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        best = logits.double().softmax(-1).topk(min(k, int((logits > -torch.inf).sum())))
        return [
            (self.tokenizer.id_to_char[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


# ------------------------------------------------------------------------------------------------- command line
def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """What both models understand."""
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="the model (default: the newest under out/)")
    add("--model", choices=MODELS, help="the newest of this kind")
    add("--device", help="cpu, cuda, mps (default: the best there is)")
    add("--prompt", help="how the text begins (default: nothing)")
    add("--length", type=POSITIVE_INT, help=f"characters to write (default: {LENGTH})")
    add("--num-samples", type=POSITIVE_INT, metavar="N", help="texts to write (default: 1)")
    add("--seed", type=number(int, low=0, high=2**63 - 1), help="same seed, same text (default: 0)")
    add("--temperature", type=number(float, low=0), help="0 takes the likeliest token")
    add("--top-k", type=POSITIVE_INT, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=number(float, above=0, high=1), metavar="P", help="... from the likeliest that make up P")
    add("--repetition-penalty", type=number(float, above=0), metavar="R", help="above 1: avoid tokens that are there")


def add_gpt_flags(parser: argparse.ArgumentParser, modes: argparse._MutuallyExclusiveGroup) -> set[str]:
    """What only GPT understands; returns the names."""
    add = parser.add_argument_group("GPT").add_argument
    actions = [
        add("--context-len", type=POSITIVE_INT, metavar="T", help="tokens it sees (default: the model's block_size)"),
        add("--slide", type=POSITIVE_INT, metavar="N", help="move the window N tokens at a time (default: 1)"),
        add("--stop", action="append", metavar="TEXT", help="end after this text; may be given several times"),
        add("--length-penalty", type=number(float), metavar="A", help="beams: score = log p / length^A (default: 1)"),
        add("--early-stopping", choices=EARLY_STOPPING, help="beams: stop as soon as there are N texts (default: no)"),
        modes.add_argument("--beams", type=POSITIVE_INT, metavar="N", help="GPT: the likeliest text N beams find"),
    ]
    return {action.dest for action in actions}


def parse_args() -> tuple[dict, dict[str, set[str]]]:
    """The flags that were given, by name, and for each model the names of those that are not for it."""
    parser = argparse.ArgumentParser(description="Write text with a trained model.", argument_default=argparse.SUPPRESS)
    add_common_flags(parser)
    modes = parser.add_argument_group("instead of a drawn text").add_mutually_exclusive_group()
    modes.add_argument("--chat", action="store_true", help="read prompts line by line, answer each; `quit` leaves")
    modes.add_argument("--top", type=POSITIVE_INT, metavar="K", help="a table of the K likeliest next tokens")
    foreign = {"llada": add_gpt_flags(parser, modes)}
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
    checkpoint = load_checkpoint(path, pick_device(device))
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
    seconds = time.perf_counter() - start
    written = len(text) - num_samples * len(prompt)
    say(f"{written} characters in {seconds:.2f} s: {written / seconds:.0f} characters/s")


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
    """The prompt's tokens with their ids, then the likeliest next ones with their probabilities."""
    prompt, k, context_len = settings.pop("prompt", ""), settings.pop("top"), settings.pop("context_len", None)
    refuse(settings, settings, "--top looks at the model's own probabilities and writes nothing")
    table = writer.next_tokens(prompt, k, context_len)
    tokens = [f"{show(writer.tokenizer.id_to_char[i])} {i}" for i in prompt_ids(writer.tokenizer, prompt).tolist()]
    for start in range(0, len(tokens), 12):
        print("   ".join(tokens[start : start + 12]))
    print()
    for token, p in table:
        print(f"{show(token):8}{100 * p:7.3f} %")


def show(token: str) -> str:
    """A character in quotes, a special token as it is: "a" -> "'a'", "[END]" -> "[END]"."""
    return repr(token) if len(token) == 1 else token


def answer_prompts(writer: GeneratorTransformer, settings: dict) -> None:
    """The conversation: each turn has its own seed."""
    refuse(settings, BEAMS, "only with --beams")
    refuse(settings, ("prompt", "num_samples"), "--chat reads its prompts, and answers each once")
    seed = settings.pop("seed", 0)

    def answer(prompt: str, turn: int) -> Iterator[str]:
        pieces = stream_texts(writer.model, writer.tokenizer, [prompt], seed=seed + turn, **settings)
        return (piece for [piece] in pieces)

    chat(answer)


def main() -> None:
    settings, foreign = parse_args()
    writer = load(settings, foreign)
    if "top" in settings:
        print_next_tokens(writer, settings)
    elif "beams" in settings:
        print_beams(writer, settings)
    elif settings.pop("chat", False):
        answer_prompts(writer, settings)
    else:
        print_texts(writer, settings)


if __name__ == "__main__":
    run(main)
