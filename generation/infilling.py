"""LLaDA fills the [MASK]s of texts of any length: prompts, suffixes and infilling templates are one thing to it.

"ROMEO: [MASK*12] love [MASK*20]" asks for 32 characters. Texts up to block_size characters are one window; longer ones
are filled window by window, each beginning `slide` characters after the one before. By default a window costs 16
network evaluations, so a text costs 16 for each window that slides over it.

A model of segments or pairs writes texts that end. Such a text is one window: the network sees [START] before it and
[END]s after it, up to block_size, as in its training data, and the text is cut at the first [END] that it writes.

Letters: B texts, T tokens (with a tokenizer of characters: characters).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from logits import row_generators
from model import LLaDAModel, Transformer
from sampler import SamplingConfig, Step, left_padding, reverse_process
from tokenizer import END_ID, MASK_ID, NEVER_WRITTEN, PAD_ID, START_ID, StreamDecoder, Tokenizer
from unmasking import RULES
from utils.errors import ArgumentError, check_number

MASK_PATTERN = re.compile(r"\[MASK(?:\*(\d{1,7}))?\]")  # a run of fewer than ten million characters


# ------------------------------------------------------------------------------------------------- templates
def parse_template(template: str, tokenizer: Tokenizer, keep_unknown: bool = False) -> Tensor:
    """Text with [MASK] (one character) and [MASK*n] (n characters) -> (T,) ids.

    >>> from tokenizer import SimpleTokenizer
    >>> parse_template("ab[MASK*2]", SimpleTokenizer("ab"))
    tensor([4, 5, 1, 1])

    Raises ValueError for characters the tokenizer does not know, unless they are to be kept, see `encode_known`.
    """
    encode_text, parts, end = encode_known if keep_unknown else encode, [], 0
    for match in MASK_PATTERN.finditer(template):
        parts.append(encode_text(template[end : match.start()], tokenizer))
        parts.append(torch.full((int(match[1] or 1),), MASK_ID))
        end = match.end()
    return torch.cat([*parts, encode_text(template[end:], tokenizer)])


def fill_template(template: str, written: Tensor, tokenizer: Tokenizer) -> str:
    """The template with its masks replaced by the ids that were written there, in order: (number of masks,).

    >>> from tokenizer import SimpleTokenizer
    >>> fill_template("a[MASK] \\r é[MASK*2]", torch.tensor([5, 4, 4]), SimpleTokenizer("ab"))
    'ab \\r éaa'
    """
    ids = iter(written.tolist())
    return MASK_PATTERN.sub(lambda match: tokenizer.decode(list(islice(ids, int(match[1] or 1)))), template)


def given_ids(
    prompt: str, model: Transformer, tokenizer: Tokenizer, history: Sequence[tuple[str, str]] = (), room: int = 1
) -> Tensor:
    """The ids of a prompt, taken literally, without the [START] before it. The prompt of a pair ends with a [START].

    history: earlier prompts and completions of a conversation with a model of pairs. They stand before the prompt, the
    newest ones, as many as leave `room` tokens to write. Raises ValueError for unknown characters, and ArgumentError
    for a prompt that leaves a model of segments no room at all.
    """
    ids, size = encode(prompt, tokenizer), model.config.block_size
    if model.config.segments == "pairs":
        ids = F.pad(ids, (0, 1), value=START_ID)
    if model.is_segmented and len(ids) > size - 2:
        problem = f"takes {len(ids)} tokens, which leaves no room to write in a context of {size}"
        raise ArgumentError("prompt", f"{problem}: shorten it")
    for earlier, completion in reversed(history):
        pair = [*encode(earlier, tokenizer), START_ID, *encode(completion, tokenizer), END_ID, START_ID]
        if len(pair) + len(ids) + room > size - 1:
            break
        ids = torch.cat([torch.tensor(pair), ids])
    return ids


def prompt_template(
    prompt: str,
    max_out_tokens: int,
    model: Transformer,
    tokenizer: Tokenizer,
    history: Sequence[tuple[str, str]] = (),
) -> tuple[Tensor, int]:
    """A prompt and masks after it, (T,) ids, and the number of ids that are given.

    max_out_tokens masks, or as many as the context of a model of segments has room for. history, and what is raised:
    see `given_ids`.
    """
    check_number("max_out_tokens", max_out_tokens, low=0)
    given = given_ids(prompt, model, tokenizer, history, answer_room(model, max_out_tokens))
    if model.is_segmented:
        max_out_tokens = min(max_out_tokens, model.config.block_size - 1 - len(given))
    return F.pad(given, (0, max_out_tokens), value=MASK_ID), len(given)


def answer_room(model: Transformer, max_out_tokens: int) -> int:
    """How many tokens of its context a conversation leaves to the next answer: half of it at most."""
    return min(max_out_tokens, model.config.block_size // 2)


def encode(text: str, tokenizer: Tokenizer) -> Tensor:
    """(T,) int64 ids. Raises ValueError for unknown characters."""
    return torch.from_numpy(tokenizer.encode(text).astype("int64"))


def encode_known(text: str, tokenizer: Tokenizer) -> Tensor:
    """As `encode`, but every unknown character becomes the id vocab_size, where `mask_predictor` shows a [MASK].

    >>> from tokenizer import SimpleTokenizer
    >>> encode_known("aéb", SimpleTokenizer("ab"))
    tensor([4, 6, 5])
    """
    unknown = "".join(char for char in sorted(set(text)) if not knows(tokenizer, char))
    if not unknown:
        return encode(text, tokenizer)
    pieces = re.split(f"([{re.escape(unknown)}]+)", text)  # known and unknown in turn
    ids = [
        torch.full((len(piece),), tokenizer.vocab_size) if i % 2 else encode(piece, tokenizer)
        for i, piece in enumerate(pieces)
    ]
    return torch.cat(ids)


def knows(tokenizer: Tokenizer, char: str) -> bool:
    """Whether the tokenizer can encode a character."""
    try:
        tokenizer.encode(char)
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------------------------- model, settings
def mask_predictor(model: LLaDAModel, may_end: bool = False) -> Callable[[Tensor], Tensor]:
    """predict(tokens) for `reverse_process`: tokens (B, T) on any device -> logits (B, T, V) on the CPU.

    The [PAD]s that a row begins with are hidden from the network. A model of segments reads each row as `in_context`
    makes it. The id V stands for a character that the model does not know: the network reads [MASK] there, while the
    sampler sees a given token, which it never replaces. Unless the text may end, [END] has logit -inf: a template asks
    for an exact number of tokens. Tokens are drawn on the CPU in float64, which some devices do not have.
    Raises ValueError for a causal model.
    """
    if model.causal:
        raise ValueError(f"filling masks needs a LLaDA model, and this is a {model.name} model")

    def predict(tokens: Tensor) -> Tensor:
        first = torch.tensor(left_padding(tokens, PAD_ID))  # (B,)
        tokens = tokens.masked_fill(tokens == model.config.vocab_size, MASK_ID)
        if model.is_segmented:
            context, columns = in_context(tokens, first, model.config.block_size)
            logits = model(context.to(model.device)).cpu()
            logits = logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1]))
        else:
            pad = first.to(model.device) if first.any() else None
            logits = model(tokens.to(model.device), pad=pad).cpu()
        if not may_end:
            logits[..., END_ID] = -torch.inf
        return logits

    return predict


def in_context(tokens: Tensor, first: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Rows as a model of segments learned them: [START], the text, [END]s up to block_size.

    tokens (B, T) begin with first[b] [PAD]s. Returns the contexts (B, block_size), and the columns (B, T) of a context
    at which the tokens stand; those of [PAD]s are that of the [START].
    """
    columns = (torch.arange(tokens.shape[1]) - first[:, None] + 1).clamp(min=0)  # (B, T)
    contexts = torch.full((len(tokens), block_size), END_ID).scatter(1, columns, tokens.cpu())
    contexts[:, 0] = START_ID
    return contexts, columns


def text_sampling(**settings) -> SamplingConfig:
    """SamplingConfig with this project's defaults for text: temperature 1 and the sweep.

    With a schedule or remasking, which do not go with the sweep, or an adaptive rule, the default order is
    "confidence". None means "not given". Raises TypeError for unknown settings and ArgumentError for bad values.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    order = "confidence" if {"schedule", "remask", *RULES} & given.keys() else "sweep"
    return SamplingConfig(**{"temperature": 1.0, "order": order, **given})


# ------------------------------------------------------------------------------------------------- sliding windows
@dataclass
class GenerationState:
    """The texts after a step. `texts` are changed in place by later steps: copy what is to be kept."""

    texts: list[Tensor]  # B of (T,), lengths may differ
    step: Step  # the sampler's latest step, of the windows that are being filled
    nfe: int  # calls of the network so far, all windows together
    evaluations: Tensor  # (B,) rows the network has computed for each text; guidance counts twice a step


def window_starts(length: int, block_size: int, slide: int) -> list[int]:
    """Where the windows over a text begin: every `slide` characters, the last one at its end.

    >>> window_starts(10, block_size=10, slide=3), window_starts(15, block_size=10, slide=3)
    ([0], [0, 3, 5])
    """
    last = max(0, length - block_size)
    return [*range(0, last, slide), last]


def fill_masks(
    model: LLaDAModel,
    templates: Sequence[Tensor],
    config: SamplingConfig | None = None,
    *,
    generator: torch.Generator | list[torch.Generator] | None = None,
    may_end: bool = False,
) -> Iterator[GenerationState]:
    """Fill the [MASK]s of B templates, (T,) ids each, of any lengths; yield the state after every step.

    may_end: a model of segments may end the texts with [END] before their last mask; what it has written behind an
    [END] is replaced by [END]s. Otherwise it writes no [END].
    config: see `text_sampling`, whose defaults are used for None; its steps, schedule and block_length are those of one
    window. A window holds block_size characters; when it is filled, the next begins config.slide characters further
    (default: half of block_size). A text does not depend on its batch; `generator`: see `logits.row_generators`.
    Raises ArgumentError or ValueError at the call, before anything is written: also for settings that fit the first
    window of a text and not a later one.
    """
    config = config or text_sampling()
    block_size = model.config.block_size
    slide = max(1, block_size // 2) if config.slide is None else config.slide
    if not 1 <= slide <= block_size:
        raise ArgumentError("slide", f"must be in 1..{block_size} (block_size), got {slide}")
    if not len(templates) or not all(len(template) for template in templates):
        raise ValueError("there is nothing to write: a text needs at least one character or [MASK]")
    longest = max(map(len, templates))
    if model.is_segmented and longest > block_size - 1:
        problem = f"a text of {longest} tokens is too long: a model of segments with a context of {block_size} writes"
        raise ValueError(f"{problem} at most {block_size - 1}")
    predict = mask_predictor(model, may_end and model.is_segmented)
    texts = [template.to("cpu", copy=True) for template in templates]
    starts_of = [window_starts(len(text), block_size, slide) for text in texts]
    for text, starts in zip(texts, starts_of, strict=True):
        check_windows(config, text == MASK_ID, starts, block_size)
    generators = row_generators(generator, pad_left(texts), PAD_ID)
    return filling_loop(predict, texts, starts_of, generators, block_size, config)


def check_windows(config: SamplingConfig, masked: Tensor, starts: list[int], block_size: int) -> None:
    """Raise ArgumentError unless the policy fits every window of a text with masked (T,).

    What each window will have to fill is known in advance: the masks that the windows before it do not reach.
    """
    patterns, filled = set(), 0
    for start in starts:
        window = masked[start : start + block_size].clone()
        window[: max(0, filled - start)] = False
        filled = start + block_size
        if window.numpy().tobytes() not in patterns:  # most windows of a long text look the same
            patterns.add(window.numpy().tobytes())
            config.plan(window)


def filling_loop(
    predict: Callable[[Tensor], Tensor],
    texts: list[Tensor],
    starts_of: list[list[int]],
    generators: list[torch.Generator],
    block_size: int,
    config: SamplingConfig,
) -> Iterator[GenerationState]:
    """The loop of `fill_masks`: the k-th windows of all texts that have one are a batch."""
    nfe, evaluations = 0, torch.zeros(len(texts), dtype=torch.long)
    masked = [text == MASK_ID for text in texts]
    for k in range(max(map(len, starts_of))):
        rows = [b for b in range(len(texts)) if k < len(starts_of[b])]
        windows = [texts[b][starts_of[b][k] :][:block_size] for b in rows]  # views
        nfe_before, evaluations_before = nfe, evaluations[rows]
        for step in reverse_process(
            predict,
            pad_left(windows),
            MASK_ID,
            config,
            never=NEVER_WRITTEN,
            pad_token_id=PAD_ID,
            generator=[generators[b] for b in rows],
        ):
            for window, tokens in zip(windows, step.tokens, strict=True):
                window.copy_(tokens[len(tokens) - len(window) :])
            for text, mask in zip(texts, masked, strict=True):
                cut_at_end(text, mask)
            nfe, evaluations[rows] = nfe_before + step.nfe, evaluations_before + step.evaluations
            yield GenerationState(texts, step, nfe, evaluations.clone())


def cut_at_end(text: Tensor, free: Tensor) -> None:
    """Replace what is written behind the first written [END] of text (T,) by [END]s, once no mask is before it.

    free (T,): the positions that were not given.

    >>> text = torch.tensor([4, END_ID, 5, MASK_ID])
    >>> cut_at_end(text, torch.ones(4, dtype=torch.bool))
    >>> text.tolist() == [4, END_ID, END_ID, MASK_ID]
    True
    """
    ends = ((text == END_ID) & free).nonzero()
    if len(ends) and not (text[: ends[0]] == MASK_ID).any():
        behind = torch.arange(len(text)) > ends[0]
        text[behind & free & (text != MASK_ID)] = END_ID


def pad_left(texts: Sequence[Tensor]) -> Tensor:
    """B of (T,) -> (B, longest T), [PAD] to the left."""
    longest = max(map(len, texts))
    return torch.stack([F.pad(text, (longest - len(text), 0), value=PAD_ID) for text in texts])


# ------------------------------------------------------------------------------------------------- finished text
def completed_pieces(
    states: Iterator[GenerationState], tokenizer: Tokenizer, shown: list[int], at_end: bool
) -> Iterator[list[str]]:
    """Yield the next piece of each text once it has no mask left of its end, "" where there is none yet.

    shown[b]: ids of text b not to yield, the prompt's. at_end: yield one piece when all is written, because remasking
    may change any token before.
    """
    decoders, shown = [StreamDecoder(tokenizer) for _ in shown], list(shown)
    texts: list[Tensor] = []
    for state in states:
        texts = state.texts
        if not at_end:
            yield next_pieces(texts, decoders, shown)
    last = next_pieces(texts, decoders, shown)
    last = [piece + decoder.flush() for piece, decoder in zip(last, decoders, strict=True)]
    if any(last):
        yield last


def next_pieces(texts: list[Tensor], decoders: list[StreamDecoder], shown: list[int]) -> list[str]:
    """What each text has from shown[b] to its first mask; moves shown[b] there."""
    starts, shown[:] = list(shown), [first_mask(text, start) for text, start in zip(texts, shown, strict=True)]
    parts = [text[a:b] for text, a, b in zip(texts, starts, shown, strict=True)]
    return [decoder.push(part) for decoder, part in zip(decoders, parts, strict=True)]


def first_mask(text: Tensor, start: int) -> int:
    """Position of the first [MASK] of text (T,) from `start` on; T if there is none."""
    masks = (text[start:] == MASK_ID).nonzero()
    return start + int(masks[0]) if len(masks) else len(text)
