"""Text in, text out, with either model: starts from prompts and templates, pieces of text from states.

`GeneratorTransformer` is a trained model of any kind with its tokenizer. The arguments have the same names everywhere:
    max_out_tokens: tokens (with a tokenizer of characters: characters) to write after each prompt, at most.
    seed: the same seed gives the same text.
    settings: fields of config.SamplingConfig (LLaDA) or config.DecodingConfig (GPT).
A setting that the model does not have raises TypeError. Bad values and unknown characters raise ValueError (an
ArgumentError where it names an argument) before anything is written.
"""

import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive import beam_search
from checkpoint import load_checkpoint
from config import DecodingConfig, SamplingConfig
from generation.write import State, write
from model import GPT, Transformer
from tokenizer import END_ID, MASK_ID, SPECIAL_TOKENS, START_ID, StreamDecoder
from utils.errors import ArgumentError, check_number

MASK_PATTERN = re.compile(r"\[MASK(?:\*(\d{1,7}))?\]")  # a run of fewer than ten million characters
LIKE_A_MASK = re.compile(r"\[\s*mask(?![a-z])[^\[\]]{0,12}\]", re.IGNORECASE)  # mistyped
MAX_OUT_TOKENS = 200  # default
Config = SamplingConfig | DecodingConfig


# ------------------------------------------------------------------------------------------------- starts
def encode(text: str, tokenizer) -> Tensor:
    """(T,) int64 ids. Raises ValueError for unknown characters."""
    return torch.from_numpy(tokenizer.encode(text).astype("int64"))


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

    keep_unknown: every character that the tokenizer does not know becomes the id vocab_size. Else it raises ValueError
    with their position in the template, as it does for a mask that is mistyped.
    """
    for match in () if keep_unknown else LIKE_A_MASK.finditer(template):
        if not MASK_PATTERN.fullmatch(match[0]):
            raise ValueError(f"{match[0]} at position {match.start()}: one mask is [MASK], five are [MASK*5]")
    unknown = [c for c in sorted(set(template)) if keep_unknown and not knows(tokenizer, c)]
    pattern = "|".join([MASK_PATTERN.pattern, *map(re.escape, unknown)])
    parts, end = [], 0
    for match in re.finditer(pattern, template):
        parts.append(tokenizer.encode(template[end : match.start()], end))
        parts.append(np.full(int(match[1] or 1), tokenizer.vocab_size if match[0] in unknown else MASK_ID))
        end = match.end()
    return torch.from_numpy(np.concatenate([*parts, tokenizer.encode(template[end:], end)]).astype("int64"))


# ------------------------------------------------------------------------------------------------- pieces of text
class TextPieces:
    """Hands out the text of ids as they are written: from ids[shown] on, `length` characters, never half of one."""

    def __init__(self, tokenizer, shown: int, length: int | None = None):
        self.decoder, self.shown = StreamDecoder(tokenizer), shown
        self.left = sys.maxsize if length is None else length  # characters; 0 after the end

    def next(self, ids: Tensor, is_last: bool = False) -> str:
        """What has no mask before it and was not handed out yet."""
        first = self.shown
        while self.shown < len(ids) and ids[self.shown] != MASK_ID:
            self.shown += 1
        piece = self.decoder.push(ids[first : self.shown]) + (self.decoder.flush() if is_last else "")
        piece = piece[: self.left]
        self.left -= len(piece)
        return piece


def pieces_of(
    states: Iterable[State], tokenizer, shown: Sequence[int], config: Config, length: int | None = None
) -> Iterator[list[str]]:
    """Yield the next piece of each text, see `TextPieces`; where correction may change a text, all of it at the end."""
    texts = [TextPieces(tokenizer, known, length) for known in shown]
    for state in states:
        if getattr(config, "correct", 0) == 0:
            yield [text.next(ids) for text, ids in zip(texts, state.texts, strict=True)]
            if not any(text.left for text in texts):
                return
    yield [text.next(ids, is_last=True) for text, ids in zip(texts, state.texts, strict=True)]


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
        """The settings of this kind of model; answers to pairs are the likeliest, unless a temperature is given."""
        answers = {"temperature": 0.0} if self.model.config.segments == "pairs" else {}
        return self.config_class(**answers | settings)

    # --------------------------------------------------------------------------------------------- starts
    def template_start(self, template: str, keep_unknown: bool = False) -> Tensor:
        """The start of a template, see `parse_template`: its text ends where the template does."""
        ids = parse_template(template, self.tokenizer, keep_unknown)
        return ids if self.model.config.segments == "window" else F.pad(ids, (0, 1), value=END_ID)

    def prompt_start(self, prompt: str, max_out_tokens: int) -> tuple[Tensor, int]:
        """The start of a text that continues a prompt, taken literally: (T,) ids with max_out_tokens masks at the end,
        and how many ids are given. A model of texts that end has room for block_size - 1 tokens in all.

        Raises ValueError for unknown characters, and ArgumentError for a prompt that leaves no room.
        """
        check_number("max_out_tokens", max_out_tokens, low=0)
        given = encode(prompt, self.tokenizer)
        size, segments = self.model.config.block_size, self.model.config.segments
        if segments == "pairs":
            given = F.pad(given, (0, 1), value=START_ID)
        if segments != "window":
            if len(given) > size - 2:
                problem = f"takes {len(given)} tokens, which leaves no room to write in a context of {size}"
                raise ArgumentError("prompt", f"{problem}: shorten it")
            max_out_tokens = min(max_out_tokens, size - 1 - len(given))
        return F.pad(given, (0, max_out_tokens), value=MASK_ID), len(given)

    def tokens_for(self, characters: int) -> int:
        """How many tokens hold a text of so many characters: of subwords about, rather too many than too few."""
        lengths = self.tokenizer.characters_per_token[len(SPECIAL_TOKENS) :]
        return math.ceil(characters / max(1.0, 0.7 * float(lengths.mean())))

    def opening(self, prompt: str) -> str:
        """What the model reads before it writes: the prompt, or for an empty one a newline, which is not to be shown.

        Windows begin anywhere, even within a word, and so would a text without a prompt; segments have their [START].
        """
        begins_anywhere = self.model.config.segments == "window" and "\n" in self.tokenizer.char_to_id
        return prompt or ("\n" if begins_anywhere else "")

    def shown(self, prompt: str) -> str:
        """What a text shows of its prompt: an answer to a pair stands alone."""
        return "" if self.model.config.segments == "pairs" else prompt

    # --------------------------------------------------------------------------------------------- texts
    def stream(
        self, prompts: Sequence[str], config, *, max_out_tokens=MAX_OUT_TOKENS, seed=0, length=None
    ) -> Iterator[list[str]]:
        """Yield the next piece of each text as it is written, without the prompts; "" where there is none.

        config: see `settings`. length: characters of a text, at most.
        A text depends on its prompt, the seed and how many equal prompts stand before it, not on the rest of the batch.
        """
        starts = [self.prompt_start(prompt, max_out_tokens) for prompt in prompts]
        states = write(self.model, [ids for ids, _ in starts], config, torch.Generator().manual_seed(seed))
        return pieces_of(states, self.tokenizer, [known for _, known in starts], config, length)

    def generate(self, prompt: str = "", *, max_out_tokens: int = MAX_OUT_TOKENS, seed: int = 0, **settings) -> str:
        """The prompt and what the model writes after it; of a model of pairs, the completion alone."""
        pieces = self.stream([prompt], self.settings(**settings), max_out_tokens=max_out_tokens, seed=seed)
        return self.shown(prompt) + "".join(piece for [piece] in pieces)

    def infill(self, template: str | Sequence[str], *, seed: int = 0, **settings) -> str | list[str]:
        """LLaDA: a template, or several, with its masks filled: "ROMEO: [MASK*12] love [MASK*20]".

        The template decides how long the text is. Raises ValueError for a token behind a [MASK] with a GPT.
        """
        templates = [template] if isinstance(template, str) else template
        starts = [self.template_start(text) for text in templates]
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
        start, known = self.prompt_start(prompt, 1)
        ids = F.pad(start[:known], (1, 0), value=START_ID)
        found = beam_search(self.model, ids, num_beams=num_beams, max_out_tokens=max_out_tokens, **settings)
        return [(self.tokenizer.decode(ids.cpu()), score) for ids, score in found]

    def likeliest(self, start: Tensor, k: int = 10, **settings) -> list[tuple[int, list[tuple[str, float]]]]:
        """The position of every [MASK] in a start (T,) (GPT: the first), and its k likeliest tokens, given what is
        visible, with their probabilities. Of a start longer than the context, those of the first window with masks."""
        check_number("k", k, low=1)
        states = write(self.model, [start], self.settings(**settings))
        state = next((state for state in states if len(state.masked[0])), None)  # before anything is written
        tables = []
        for position, p in zip(state.masked[0].tolist(), state.probabilities[0], strict=True) if state else ():
            best = p.topk(min(k, int((p > 0).sum())))
            tokens = map(self.tokenizer.id_to_char.get, best.indices.tolist())
            tables.append((position, [*zip(tokens, best.values.tolist(), strict=True)]))
        return tables
