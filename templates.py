"""Text with holes, of any length, filled by the mask predictor: prompts, suffixes, templates and pages are one thing.

"ROMEO: [MASK*12] love [MASK*20]" has 32 characters to write. What fits the model's context is written as one canvas; a
longer text through a window that slides over what is written already, at constant cost per character.

Letters: B texts, T characters.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from drawing import row_generators
from model import LLaDAModel
from sampler import Step, reverse_process
from tokenizer import END_ID, MASK_ID, PAD_ID, SimpleTokenizer
from unmasking import STRATA, left_padding

STRIDE = 16  # characters written together are so far apart, and a window costs so many network evaluations
HOLE = re.compile(r"\[MASK(?:\*(\d{1,7}))?\]")  # of fewer than ten million characters


def parse_template(template: str, tokenizer: SimpleTokenizer) -> Tensor:
    """Text with [MASK] (one character) and [MASK*n] (n of them) -> (T,) ids. "ab[MASK*2]" -> [a, b, MASK, MASK].

    Raises ValueError for characters the tokenizer does not know.
    """
    parts, end = [], 0
    for hole in HOLE.finditer(template):
        parts.append(torch.from_numpy(tokenizer.encode(template[end : hole.start()]).astype("int64")))
        parts.append(torch.full((int(hole[1] or 1),), MASK_ID))
        end = hole.end()
    parts.append(torch.from_numpy(tokenizer.encode(template[end:]).astype("int64")))
    return torch.cat(parts)


def prompt_template(prompt: str, length: int, tokenizer: SimpleTokenizer) -> Tensor:
    """A prompt, taken literally, and `length` characters to write after it: (T,) ids."""
    return F.pad(torch.from_numpy(tokenizer.encode(prompt).astype("int64")), (0, length), value=MASK_ID)


def mask_predictor(model: LLaDAModel) -> Callable[[Tensor], Tensor]:
    """predict(tokens) for `reverse_process`: the [PAD]s a row begins with are hidden from the network.

    [END] is never written: a hole of n characters gets n characters. Takes tokens from any device, the model's or not,
    and gives logits on the CPU, where drawing is done in float64 (which some devices do not have).
    """
    device = next(model.parameters()).device

    def predict(tokens: Tensor) -> Tensor:
        pad = left_padding(tokens)
        logits = model(tokens.to(device), pad=pad.to(device) if pad.any() else None).cpu()
        logits[..., END_ID] = -torch.inf
        return logits

    return predict


# ------------------------------------------------------------------------------------------------- any length
@dataclass
class Draft:
    """The texts as they stand after a step. `texts` change in place as writing goes on: copy what is to be kept."""

    texts: list[Tensor]  # B of (T,), lengths may differ
    step: Step  # the latest, of the canvases being written
    rows: list[int]  # whose they are,
    starts: list[int]  # and where in the text they begin
    nfe: int  # calls of the network so far, all windows together
    evaluations: Tensor  # (B,) how often the network has read each text, guidance twice a step


def window_starts(length: int, block_size: int, slide: int) -> list[int]:
    """Where the windows over a text begin: every `slide` characters, the last one at its end.

    >>> window_starts(10, block_size=10, slide=3), window_starts(15, block_size=10, slide=3)
    ([0], [0, 3, 5])
    """
    last = max(0, length - block_size)
    return [*range(0, last, slide), last]


def write(
    model: LLaDAModel,
    templates: Sequence[Tensor],
    *,
    slide: int | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    **sampling,
) -> Iterator[Draft]:
    """Write the [MASK]s of B templates, (T,) ids each, of any lengths; yield the draft after every step.

    `sampling` are the arguments of `reverse_process`, completed by `defaults`; `steps` are those of one window. The
    window holds block_size characters and moves on by `slide` (default: half of that) when all in it is written. A text
    does not depend on its batch. Raises ValueError, at once, for bad values.
    """
    block_size = model.config.block_size
    slide = max(1, block_size // 2) if slide is None else slide
    if not 1 <= slide <= block_size:
        raise ValueError(f"slide must be in 1..{block_size} (block_size), got {slide}")
    if not len(templates) or not all(len(template) for template in templates):
        raise ValueError("there is nothing to write: a text has at least one character or [MASK]")
    texts = [template.to("cpu", copy=True) for template in templates]
    generators = row_generators(generator, pad_left(texts))
    predict, sampling = mask_predictor(model), defaults(sampling)
    first = pad_left([text[:block_size] for text in texts])
    reverse_process(predict, first, MASK_ID, generator=generators, **sampling)  # raises for what it does not accept
    return slide_over(predict, texts, generators, block_size, slide, sampling)


def defaults(sampling: dict) -> dict:
    """This project's way of writing, where nothing else is asked for: a sweep of STRIDE evaluations a window.

    An adaptive rule, a schedule or remasking goes with LLaDA's order instead, and other orders write one at a time.
    """
    others = ("schedule", "threshold", "factor", "entropy_bound", "remask")
    order = "confidence" if any(sampling.get(name) is not None for name in others) else "sweep"
    order = sampling.get("order", order)
    return {"temperature": 1.0, "order": order, "steps": STRIDE if order in STRATA else None} | sampling


def slide_over(
    predict: Callable[[Tensor], Tensor],
    texts: list[Tensor],
    generators: list[torch.Generator],
    block_size: int,
    slide: int,
    sampling: dict,
) -> Iterator[Draft]:
    """The loop of `write`: the k-th windows of all texts that have one are a batch."""
    starts_of = [window_starts(len(text), block_size, slide) for text in texts]
    nfe, evaluations = 0, torch.zeros(len(texts), dtype=torch.long)
    for k in range(max(map(len, starts_of))):
        rows = [b for b in range(len(texts)) if k < len(starts_of[b])]
        starts = [starts_of[b][k] for b in rows]
        canvases = [texts[b][start : start + block_size] for b, start in zip(rows, starts, strict=True)]  # views
        streams = [generators[b] for b in rows]
        before = nfe, evaluations.clone()
        for step in reverse_process(predict, pad_left(canvases), MASK_ID, generator=streams, **sampling):
            for canvas, tokens in zip(canvases, step.tokens, strict=True):
                canvas.copy_(tokens[len(tokens) - len(canvas) :])
            nfe, evaluations[rows] = before[0] + step.nfe, before[1][rows] + step.evaluations
            yield Draft(texts, step, rows, starts, nfe, evaluations)


def pad_left(texts: Sequence[Tensor]) -> Tensor:
    """B of (T,) -> (B, longest T), [PAD] to the left."""
    longest = max(map(len, texts))
    return torch.stack([F.pad(text, (longest - len(text), 0), value=PAD_ID) for text in texts])


# ------------------------------------------------------------------------------------------------- text in, text out
def infill(
    model: LLaDAModel, tokenizer: SimpleTokenizer, template: str | Sequence[str], seed: int = 0, **settings
) -> str | list[str]:
    """Fill the holes of a template, or of several at once: "ROMEO: [MASK*12] love [MASK*20]" -> text of that length.

    `settings`: see `write` and `reverse_process`; a `generator` replaces the seed. Raises ValueError for unknown
    characters and bad values.
    """
    settings.setdefault("generator", torch.Generator().manual_seed(seed))
    templates = [template] if isinstance(template, str) else template
    drafts = write(model, [parse_template(text, tokenizer) for text in templates], **settings)
    texts = [tokenizer.decode(text) for text in last(drafts).texts]
    return texts[0] if isinstance(template, str) else texts


def last(drafts: Iterator[Draft]) -> Draft:
    """The finished draft."""
    *_, draft = drafts
    return draft


def stream_prompts(
    model: LLaDAModel, tokenizer: SimpleTokenizer, prompts: Sequence[str], length: int, **settings
) -> Iterator[list[str]]:
    """Yield the next piece of each text as soon as all to its left is settled, "" where there is none yet.

    With remasking nothing is settled before the end. `settings`: see `write` and `reverse_process`.
    """
    drafts = write(model, [prompt_template(prompt, length, tokenizer) for prompt in prompts], **settings)
    return settled_pieces(drafts, tokenizer, list(map(len, prompts)), wait=settings.get("remask") is not None)


def settled_pieces(
    drafts: Iterator[Draft], tokenizer: SimpleTokenizer, shown: list[int], wait: bool
) -> Iterator[list[str]]:
    """The loop of `stream_prompts`: shown[b] characters of text b have been seen already."""
    texts: list[Tensor] = []
    for draft in drafts:
        texts = draft.texts
        if not wait:
            settled = [first_mask(text, start) for text, start in zip(texts, shown, strict=True)]
            yield [tokenizer.decode(text[a:b]) for text, a, b in zip(texts, shown, settled, strict=True)]
            shown = settled
    if wait:
        yield [tokenizer.decode(text[start:]) for text, start in zip(texts, shown, strict=True)]


def first_mask(text: Tensor, start: int) -> int:
    """Position of the first [MASK] of text (T,) from `start` on; T if there is none."""
    masks = (text[start:] == MASK_ID).nonzero()
    return start + int(masks[0]) if len(masks) else len(text)
