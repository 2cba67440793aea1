"""GPT with several streams writes each window of a text in several places at once, one token a stream and step.

A window begins with what is written so far, its prefix. The rest is cut into streams of equal length, see
`layers.Streams`. What has been written moves into the prefix of the next window, half of the context at most.

Letters: B texts, n streams, m positions of the prefix, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from autoregressive import DecodingConfig
from generation.infilling import GenerationState, pad_left
from layers import Streams
from logits import in_float64, penalize_repetition, row_generators
from model import GPT
from sampler import Step, draw_tokens
from tokenizer import MASK_ID, NEVER_WRITTEN, PAD_ID, START_ID
from utils.errors import ArgumentError


def next_window(known: int, masked: int, block_size: int, parallel: int) -> tuple[Streams, int]:
    """The next window of a text of `known` tokens with `masked` ones to write: its layout, and how many streams.

    Streams are as long as the context allows, so that few characters are at the beginning of one. Short texts have
    fewer streams: below half of the full length they were not trained.

    >>> next_window(known=7, masked=500, block_size=256, parallel=8)
    (Streams(prefix=7, length=31), 8)
    >>> next_window(known=255, masked=252, block_size=256, parallel=8)
    (Streams(prefix=128, length=16), 8)
    >>> next_window(known=0, masked=40, block_size=256, parallel=8)
    (Streams(prefix=0, length=16), 3)
    """
    prefix = min(known, block_size // 2)
    shortest, longest = max(1, block_size // (2 * parallel)), (block_size - prefix) // parallel
    length = min(longest, max(shortest, -(-masked // parallel)))
    return Streams(prefix, length), min(parallel, -(-masked // length))


def write_streams(
    model: GPT,
    templates: Sequence[Tensor],
    config: DecodingConfig | None = None,
    *,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Iterator[GenerationState]:
    """Continue B texts: templates are ids (T,), tokens and then [MASK]s; yield the state after every step.

    The counterpart of `infilling.fill_masks` for a GPT with `parallel` > 1. A text does not depend on its batch. Texts
    whose prompts have different lengths are written one after the other. [END] is not written. Raises ArgumentError for
    settings that have no effect here, and ValueError for a template with a token behind a mask.
    """
    config = config or DecodingConfig()
    for name in ("context_len", "slide", "use_cache"):
        if getattr(config, name) != getattr(DecodingConfig, name):
            raise ArgumentError(name, f"has no effect on a model with {model.config.parallel} streams: drop it")
    texts = [template.to("cpu", copy=True) for template in templates]
    known = [int((text != MASK_ID).sum()) for text in texts]
    if not texts or any(len(text) == n or (text[:n] == MASK_ID).any() for text, n in zip(texts, known, strict=True)):
        raise ValueError("streams continue a text: it must be a prompt followed by at least one [MASK]")
    return writing_loop(model, texts, known, config, row_generators(generator, pad_left(texts), PAD_ID))


def writing_loop(
    model: GPT, texts: list[Tensor], known: list[int], config: DecodingConfig, generators: list[torch.Generator]
) -> Iterator[GenerationState]:
    """The loop of `write_streams`: texts of equal lengths are a batch; window by window until no mask is left."""
    nfe, evaluations = 0, torch.zeros(len(texts), dtype=torch.long)
    for size, start in sorted({(len(text), n) for text, n in zip(texts, known, strict=True)}):
        rows = [b for b in range(len(texts)) if (len(texts[b]), known[b]) == (size, start)]
        batch, own = torch.stack([texts[b] for b in rows]), [generators[b] for b in rows]  # (b, T)
        while start < size:
            streams, n = next_window(start, size - start, model.config.block_size, model.config.parallel)
            nfe_before, evaluations_before = nfe, evaluations[rows]
            for step in write_window(model, batch, start, streams, n, config, own):
                for row, b in enumerate(rows):
                    texts[b].copy_(batch[row])
                nfe, evaluations[rows] = nfe_before + step.nfe, evaluations_before + step.evaluations
                yield GenerationState(texts, step, nfe, evaluations.clone())
            start += n * streams.length


@torch.inference_mode()
def write_window(
    model: GPT,
    texts: Tensor,
    start: int,
    streams: Streams,
    n: int,
    config: DecodingConfig,
    generators: list[torch.Generator],
) -> Iterator[Step]:
    """Write texts (B, T) in place from column `start` on in n streams; a step writes a token of each.

    Streams may reach beyond the last column; what they write there is dropped.
    """
    (B, T), m, device = texts.shape, streams.prefix, model.device
    cache = model.new_cache(B, m + n * streams.length)
    latest = torch.full((B, n), START_ID)
    if m:
        prefix = texts[:, start - m : start]
        model(torch.cat([latest[:, :1], prefix[:, :-1]], dim=1).to(device), cache=cache)
        latest[:, 0] = prefix[:, -1]
    cache.open_streams(n)
    first, everywhere = start - m, torch.ones(B, n, dtype=torch.bool)  # first: column of the window
    for k in range(streams.length):
        logits = model(latest.to(device), cache=cache, streams=streams).cpu()  # (B, n, V)
        penalized = logits
        if config.repetition_penalty != 1:
            seen = torch.zeros(B, logits.shape[-1], dtype=torch.bool).scatter_(1, texts, True)  # [MASK] has logit -inf
            penalized = penalize_repetition(logits, seen[:, None], config.repetition_penalty)
        latest = draw_tokens(penalized.flatten(0, 1), everywhere, generators, config, NEVER_WRITTEN).view(B, n)
        columns = start + k + streams.length * torch.arange(n)
        columns = columns[columns < T]
        texts[:, columns] = latest[:, : len(columns)]
        p = in_float64(logits[:, : len(columns)]).softmax(-1)  # (B, n, V)
        yield window_step(texts[:, first : start + n * streams.length], columns - first, p, k + 1 + bool(m))


def window_step(tokens: Tensor, columns: Tensor, p: Tensor, nfe: int) -> Step:
    """The state of a window, tokens (B, W), after a step that wrote `columns` (n,) with probabilities p (B, n, V)."""
    revealed, confidence = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros(tokens.shape, dtype=torch.float64)
    revealed[:, columns] = True
    confidence[:, columns] = p.gather(-1, tokens[:, columns, None])[..., 0]
    evaluations = torch.full((len(tokens),), nfe)
    return Step(tokens.clone(), revealed, torch.zeros_like(revealed), confidence, p.flatten(0, 1), nfe, evaluations)
