"""Text in, text out, with either model: starts from prompts and templates, pieces of text from states.

`GeneratorTransformer` is a trained model of any kind with its tokenizer. The arguments have the same names everywhere:
    max_out_tokens: tokens (with a tokenizer of characters: characters) to write after each prompt, at most.
    seed: the same seed gives the same text.
    stop: a string, or several: a text ends after the first of them, which stays part of it.
    settings: fields of config.SamplingConfig (LLaDA) or config.DecodingConfig (GPT).
A setting that the model does not have raises TypeError. Bad values and unknown characters raise ValueError (an
ArgumentError where it names an argument) before anything is written.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive import SlidingContext, beam_search
from checkpoint import load_checkpoint
from config import DecodingConfig, SamplingConfig
from generation.write import State, mask_predictor, write
from logits import in_float64
from model import GPT, Transformer
from tokenizer import END_ID, MASK_ID, SPECIAL_TOKENS, START_ID, StreamDecoder
from utils.errors import ArgumentError, check_number

MASK_PATTERN = re.compile(r"\[MASK(?:\*(\d{1,7}))?\]")  # a run of fewer than ten million characters
LIKE_A_MASK = re.compile(r"\[\s*mask(?![a-z])[^\[\]]{0,12}\]", re.IGNORECASE)  # mistyped
MAX_OUT_TOKENS = 200  # default
Config = SamplingConfig | DecodingConfig


# ------------------------------------------------------------------------------------------------- starts
def encode(text: str, tokenizer, keep_unknown: bool = False, start: int = 0) -> Tensor:
    """(T,) int64 ids. keep_unknown: every unknown character becomes the id vocab_size. Else it raises ValueError, with
    its position, counted from `start`."""
    unknown = "".join(c for c in sorted(set(text)) if not knows(tokenizer, c)) if keep_unknown else ""
    if not unknown:
        return torch.from_numpy(tokenizer.encode(text, start).astype("int64"))
    pieces = re.split(f"([{re.escape(unknown)}])", text)  # known texts, and between them an unknown character
    parts = [encode(piece, tokenizer) for piece in pieces[::2]]
    return torch.cat([F.pad(part, (0, 1), value=tokenizer.vocab_size) for part in parts])[:-1]


def knows(tokenizer, char: str) -> bool:
    """Whether the tokenizer can encode a character."""
    try:
        tokenizer.encode(char)
    except ValueError:
        return False
    return True


def parse_template(template: str, tokenizer, keep_unknown: bool = False) -> Tensor:
    """Text with [MASK] (one token) and [MASK*n] (n tokens) -> (T,) ids.

    >>> from tokenizer import SimpleTokenizer
    >>> parse_template("ab[MASK*2]", SimpleTokenizer("ab"))
    tensor([4, 5, 1, 1])

    Raises ValueError for characters the tokenizer does not know, with their position in the template, and, unless
    unknown characters are kept, for a mask that is mistyped.
    """
    parts, end = [], 0
    for match in () if keep_unknown else LIKE_A_MASK.finditer(template):
        if not MASK_PATTERN.fullmatch(match[0]):
            raise ValueError(f"{match[0]} at position {match.start()}: one mask is [MASK], five are [MASK*5]")
    for match in [*MASK_PATTERN.finditer(template), None]:
        parts.append(encode(template[end : match.start() if match else None], tokenizer, keep_unknown, end))
        if match:
            parts.append(torch.full((int(match[1] or 1),), MASK_ID))
            end = match.end()
    return torch.cat(parts)


def template_start(template: str, model: Transformer, tokenizer, keep_unknown: bool = False) -> Tensor:
    """The start of a template: its text ends where the template does."""
    ids = parse_template(template, tokenizer, keep_unknown)
    return ids if model.config.segments == "window" else F.pad(ids, (0, 1), value=END_ID)


def prompt_start(
    prompt: str, max_out_tokens: int, model: Transformer, tokenizer, history: Sequence[tuple[str, str]] = ()
) -> tuple[Tensor, int]:
    """The start of a text that continues a prompt, taken literally: (T,) ids with max_out_tokens masks at the end, and
    how many ids are given. A model of texts that end has room for block_size - 1 tokens in all.

    history: earlier prompts and completions of a conversation with a model of pairs, the newest of which stand before
    the prompt, as many as leave half of the context. Raises ValueError for unknown characters, and ArgumentError for
    a prompt that leaves no room.
    """
    check_number("max_out_tokens", max_out_tokens, low=0)
    given, size = encode(prompt, tokenizer), model.config.block_size
    if model.config.segments == "window":
        return F.pad(given, (0, max_out_tokens), value=MASK_ID), len(given)
    if model.config.segments == "pairs":
        given = F.pad(given, (0, 1), value=START_ID)
    if len(given) > size - 2:
        problem = f"takes {len(given)} tokens, which leaves no room to write in a context of {size}"
        raise ArgumentError("prompt", f"{problem}: shorten it")
    for earlier, completion in reversed(history):
        pair = [*encode(earlier, tokenizer), START_ID, *encode(completion, tokenizer), END_ID, START_ID]
        if len(pair) + len(given) + min(max_out_tokens, size // 2) > size - 1:
            break
        given = torch.cat([torch.tensor(pair), given])
    return F.pad(given, (0, min(max_out_tokens, size - 1 - len(given))), value=MASK_ID), len(given)


def tokens_for(characters: int, tokenizer) -> int:
    """How many tokens hold a text of so many characters: of subwords about, rather too many than too few."""
    lengths = tokenizer.characters_per_token[len(SPECIAL_TOKENS) :]
    return math.ceil(characters / max(1.0, 0.7 * float(lengths.mean())))


# ------------------------------------------------------------------------------------------------- pieces of text
def pieces_of(states: Iterable[State], tokenizer, shown: list[int], whole: bool = False) -> Iterator[list[str]]:
    """Yield the next piece of each text once it has no mask left of its end, "" where there is none yet.

    shown[b]: ids of text b not to yield, the prompt's. whole: one piece at the end, where correction may change what
    was written. Never half of a character.
    """
    shown, decoders, texts = list(shown), [StreamDecoder(tokenizer) for _ in shown], []

    def next_pieces() -> list[str]:
        pieces = []
        for b, text in enumerate(texts):
            first = shown[b]
            while shown[b] < len(text) and text[shown[b]] != MASK_ID:
                shown[b] += 1
            pieces.append(decoders[b].push(text[first : shown[b]]))
        return pieces

    for state in states:
        texts = state.texts
        if not whole:
            yield next_pieces()
    last = [piece + decoder.flush() for piece, decoder in zip(next_pieces(), decoders, strict=True)]
    if any(last):
        yield last


def until_stop(rows: Iterable[list[str]], stops: Sequence[str], length: int | None = None) -> Iterator[list[str]]:
    """The pieces of each text up to the first of `stops`, which is part of it, or to `length` characters."""
    if "" in stops:
        raise ArgumentError("stop", "must not be an empty string")
    keep, tails, left = max(map(len, stops), default=1) - 1, {}, {}  # left: characters, 0 after the end
    for row in rows:
        out = []
        for b, piece in enumerate(row):
            tail, room = tails.get(b, ""), left.get(b, math.inf if length is None else length)
            text = (tail + piece)[: len(tail) + min(room, len(piece))]
            end = min([text.index(stop) + len(stop) for stop in stops if stop in text], default=None)
            out.append(text[len(tail) : end])
            left[b] = 0 if end is not None else room - len(out[-1])
            tails[b] = text[-keep:] if keep else ""
        yield out
        if not any(left.values()):
            return


# ------------------------------------------------------------------------------------------------- a trained model
class GeneratorTransformer:
    """A trained model of any kind and its tokenizer. Prompts and results are text."""

    def __init__(self, model: Transformer, tokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.config_class = DecodingConfig if isinstance(model, GPT) else SamplingConfig

    @classmethod
    def load_from_checkpoint(cls, path: str | Path, device: str = "cpu") -> "GeneratorTransformer":
        """The model of a checkpoint that train.py wrote. Raises ValueError for another file or an unknown device."""
        checkpoint = load_checkpoint(path, device)
        return cls(checkpoint.model, checkpoint.tokenizer)

    def settings(self, **settings) -> Config:
        """The settings of this kind of model; answers to pairs are the likeliest ones, unless a temperature is given.

        Raises TypeError for a setting that the model does not have.
        """
        names = [f.name for f in fields(self.config_class)]
        for name in settings:
            if name not in names:
                raise TypeError(f"{name!r} is not a setting of a {self.model.name} model: {', '.join(names)}")
        answers = {"temperature": 0.0} if self.model.config.segments == "pairs" else {}
        return self.config_class(**answers | settings)

    def opening(self, prompt: str) -> str:
        """What the model reads before it writes: the prompt, or for an empty one a newline, which is not to be shown.

        Windows begin anywhere, even within a word, and so would a text without a prompt; segments have their [START].
        """
        at_anywhere = self.model.config.segments == "window" and knows(self.tokenizer, "\n")
        return prompt or ("\n" if at_anywhere else "")

    def stream(
        self,
        prompts: Sequence[str],
        config: Config,
        *,
        max_out_tokens: int = MAX_OUT_TOKENS,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        history: Sequence[tuple[str, str]] = (),
        length: int | None = None,
    ) -> Iterator[list[str]]:
        """Yield the next piece of each text as it is written, without the prompts; "" where there is none.

        length: characters of a text, at most. history: see `prompt_start`.
        A text depends on its prompt, the seed and how many equal prompts stand before it, not on the rest of the batch.
        """
        starts = [prompt_start(p, max_out_tokens, self.model, self.tokenizer, history) for p in prompts]
        return self.pieces(starts, config, seed, stop, length)

    def pieces(
        self, starts: Sequence[tuple[Tensor, int]], config: Config, seed=0, stop=(), length=None, seen=lambda _: None
    ) -> Iterator[list[str]]:
        """As `stream`, after (T,) ids of which so many are not yielded. seen(state) is called after every step."""
        states = write(self.model, [ids for ids, _ in starts], config, torch.Generator().manual_seed(seed))
        whole = getattr(config, "correct", 0) > 0
        followed = (seen(state) or state for state in states)
        pieces = pieces_of(followed, self.tokenizer, [known for _, known in starts], whole)
        return until_stop(pieces, [stop] if isinstance(stop, str) else list(stop), length)

    def generate(
        self, prompt: str = "", *, max_out_tokens: int = MAX_OUT_TOKENS, seed: int = 0, stop=(), **settings
    ) -> str:
        """The prompt and what the model writes after it; of a model of pairs, the completion alone."""
        arguments = {"max_out_tokens": max_out_tokens, "seed": seed, "stop": stop}
        pieces = self.stream([prompt], self.settings(**settings), **arguments)
        return ("" if self.model.config.segments == "pairs" else prompt) + "".join(piece for [piece] in pieces)

    def infill(self, template: str | Sequence[str], *, seed: int = 0, **settings) -> str | list[str]:
        """LLaDA: a template, or several, with its masks filled: "ROMEO: [MASK*12] love [MASK*20]".

        The template decides how long the text is. Raises ValueError for a token behind a [MASK] with a GPT.
        """
        templates = [template] if isinstance(template, str) else template
        starts = [template_start(text, self.model, self.tokenizer) for text in templates]
        *_, state = write(self.model, starts, self.settings(**settings), torch.Generator().manual_seed(seed))
        texts = [self.tokenizer.decode(text) for text in state.texts]
        return texts[0] if isinstance(template, str) else texts

    def beam_search(
        self, prompt: str = "", num_beams: int = 5, max_out_tokens: int = MAX_OUT_TOKENS, **settings
    ) -> list[tuple[str, float]]:
        """GPT: the likeliest texts that `num_beams` beams find, prompt included, as (text, score) pairs, best first.

        settings: fields of config.BeamConfig. Raises ArgumentError for bad values and ValueError for a LLaDA model.
        """
        if not isinstance(self.model, GPT):
            raise ValueError("beam search needs a GPT")
        start, known = prompt_start(prompt, 1, self.model, self.tokenizer)
        ids = F.pad(start[:known], (1, 0), value=START_ID)
        found = beam_search(self.model, ids, num_beams=num_beams, max_out_tokens=max_out_tokens, **settings)
        return [(self.tokenizer.decode(ids.cpu()), score) for ids, score in found]

    @torch.inference_mode()
    def likeliest(
        self, start: Tensor, k: int = 10, context_len: int | None = None
    ) -> list[tuple[int, list[tuple[str, float]]]]:
        """The position of every [MASK] in a start (T,) (GPT: the first), and its k likeliest tokens, given what is
        visible, with their probabilities. Of long starts the block_size tokens around each are used."""
        check_number("k", k, low=1)
        tables, size = [], self.model.config.block_size - (self.model.config.segments != "window")
        for position in (start == MASK_ID).nonzero()[:, 0].tolist():
            if isinstance(self.model, GPT):
                prompt = F.pad(start[None, :position], (1, 0), value=START_ID)
                logits = SlidingContext(self.model, prompt, 0, context_len).next_logits()[0]
            else:
                first = max(0, min(position - size // 2, len(start) - size))
                predict = mask_predictor(self.model, may_end=position == len(start) - 1)
                logits = predict(start[None, first : first + size])[0, position - first]
            best = in_float64(logits).softmax(-1).topk(min(k, int((logits > -torch.inf).sum())))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            tables.append((position, [(self.tokenizer.id_to_char[i], p) for i, p in pairs]))
            if isinstance(self.model, GPT):
                break
        return tables
