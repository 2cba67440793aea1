"""GPT in streams: it writes a window in several places at once, one token a stream and step (`train.py --parallel`).

A window begins with what is known, its prefix, which is read from left to right. The rest is cut into n streams of
equal length. At step k position k of every stream is written. It may depend on the prefix and on the positions before k
of all streams: attention sees them; n-grams and convolution see what stands in the stream itself.

    prefix 2, length 3, n 2:   position   0  1  2  3  4  5  6  7
                               step       -  -  0  1  2  0  1  2

Letters: B rows, T positions, V vocabulary, C embedding, n streams.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive import IGNORED, CausalObjective, causal_inputs
from config import DecodingConfig
from data import Rows
from generation.write import State, at_rows, continued, groups_of, write
from layers import Context
from logits import draw_tokens, in_float64, row_generators
from model import GPT
from tokenizer import END_ID, NEVER_WRITTEN, PAD_ID, START_ID
from trainer import objective_of
from utils.errors import ArgumentError, check_number

PREFIX_SHARE = 0.5  # of the training batches: they begin with a random prefix


class StreamsGPT(GPT):
    """A GPT that writes in config.parallel streams. They do not end: none could know that another one has."""

    def __init__(self, config):
        super().__init__(config)
        self.never[END_ID] = True

    def set_streams(self, n: int) -> None:
        """Write, and be scored, in n streams from now on. Raises ArgumentError for more than half of the context."""
        check_number("streams", n, low=1, high=self.config.block_size // 2)
        self.config = replace(self.config, parallel=n)


class Layout(NamedTuple):
    """A window in streams: `prefix` positions from left to right, then n streams of `length` positions each."""

    prefix: int
    length: int
    n: int

    @property
    def end(self) -> int:
        """Positions in all."""
        return self.prefix + self.n * self.length

    def inputs(self, tokens: Tensor) -> Tensor:
        """The inputs that predict tokens (B, T): [START] opens the prefix and every stream that follows another."""
        inputs = causal_inputs(tokens, START_ID)
        inputs[:, self.prefix + self.length :: self.length] = START_ID
        return inputs


def layout(known: int, masked: int, block_size: int, parallel: int) -> Layout:
    """How a text of `known` tokens with `masked` ones after them is written, and scored.

    Streams are as long as the context allows, so that few characters are at the beginning of one. Short texts have
    fewer streams: below half of the full length they were not trained. The last may reach beyond the text.

    >>> layout(known=7, masked=500, block_size=256, parallel=8)
    Layout(prefix=7, length=31, n=8)
    >>> layout(known=0, masked=40, block_size=256, parallel=8)
    Layout(prefix=0, length=16, n=3)
    """
    prefix = min(known, block_size // 2)
    shortest, longest = max(1, block_size // (2 * parallel)), (block_size - prefix) // parallel
    length = min(longest, max(shortest, -(-masked // parallel)))
    return Layout(prefix, length, min(parallel, -(-masked // length)))


# ------------------------------------------------------------------------------------------------- contexts
@dataclass
class WindowContext(Context):
    """A whole window at once, for training and scoring: a position sees those that are read before it or with it. Its
    streams are rows of their own to local functions."""

    at: Layout | None = None

    def local(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        end = self.at.prefix + self.at.length  # prefix and first stream are read without a gap
        first, others = x[:, :end], x[:, end:].reshape(-1, self.at.length, *x.shape[2:])
        first, others = function(first), function(others) if len(others) else others
        return torch.cat([first, others.reshape(len(first), -1, *first.shape[2:])], dim=1) if len(others) else first


@dataclass
class StepContext(Context):
    """One position of every stream, for writing: x (B, n, ...), of which the cache keeps B * n rows."""

    def local(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        out = function(x.flatten(0, 1)[:, None])
        return out.view(*x.shape[:2], *out.shape[2:])


def window_context(model: GPT, at: Layout) -> WindowContext:
    """The context of a window with this layout."""
    positions = torch.arange(at.end, device=model.device) - at.prefix
    steps = torch.where(positions < 0, positions, positions % at.length)
    return WindowContext(model.encoder.rotations[: at.end], steps <= steps[:, None], at=at)


# ------------------------------------------------------------------------------------------------- objective
class StreamsBatch(NamedTuple):
    """As `autoregressive.CausalBatch`; layout (B, 3) is the `Layout`, the same in all rows, and stays on the CPU."""

    inputs: Tensor
    targets: Tensor
    units: Tensor
    layout: Tensor

    def on(self, device: torch.device) -> "StreamsBatch":
        return StreamsBatch(*(x.to(device) for x in self[:3]), self.layout)


@dataclass(frozen=True)
class StreamsObjective(CausalObjective):
    """The exact likelihood of writing in streams. Half of the training batches begin with a random prefix."""

    parallel: int = 1
    block_size: int = 256

    def make_batch(self, rows: Rows, generator: torch.Generator, purpose: str = "val_loss") -> StreamsBatch:
        (B, T), prefix = rows.tokens.shape, 0
        if purpose == "train_loss" and torch.rand((), generator=generator) < PREFIX_SHARE:
            prefix = int(torch.randint(1, max(2, T // 2 + 1), (), generator=generator))
        at = layout(prefix, T - prefix, self.block_size, self.parallel)
        batch = CausalObjective.make_batch(self, rows, generator)
        targets = F.pad(batch.targets[:, : at.end], (0, max(0, at.end - T)), value=IGNORED)
        tokens = F.pad(rows.tokens[:, : at.end], (0, max(0, at.end - T)))
        units = batch.units * min(at.end, T) / T
        return StreamsBatch(at.inputs(tokens), targets, units, torch.tensor(at).expand(B, -1))

    def predict(self, model: GPT, batch: StreamsBatch) -> Tensor:
        context = window_context(getattr(model, "module", model), Layout(*batch.layout[0].tolist()))
        return model(batch.inputs, context=context)

    def nll(self, predict: GPT, windows: Tensor, batch_size: int) -> Tensor:
        """Exact for the writer: the layout is that in which a text of this length is written."""
        nll = []
        with torch.inference_mode():
            for targets in windows.split(batch_size):
                batch = self.make_batch(Rows(targets, torch.zeros(len(targets))), None).on(windows.device)
                logits = self.predict(predict, batch)[:, : targets.shape[1]]
                nll.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
        return torch.cat(nll)


@objective_of.register
def _(model: StreamsGPT, sweep_share: float = 0.0) -> StreamsObjective:
    return StreamsObjective(model.config.parallel, model.config.block_size)


# ------------------------------------------------------------------------------------------------- writer
@write.register
def write_streams(model: StreamsGPT, starts, config: DecodingConfig, generator=None) -> Iterator[State]:
    """What has been written moves into the prefix of the next window. [END] is not written. Raises ArgumentError for
    settings that have no effect here."""
    for name, default in (("context_len", None), ("slide", None), ("repetition_penalty", 1.0)):
        if getattr(config, name) != default:
            raise ArgumentError(name, f"has no effect on a model with {model.config.parallel} streams: drop it")
    texts, known = continued(starts)
    generators, nfe = row_generators(generator, texts), 0
    for rows in groups_of([(len(text), n) for text, n in zip(texts, known, strict=True)]):
        start, batch, own = known[rows[0]], torch.stack([texts[b] for b in rows]), [generators[b] for b in rows]
        while start < batch.shape[1]:
            at = layout(start, batch.shape[1] - start, model.config.block_size, model.config.parallel)
            nfe += bool(at.prefix)
            for columns, p in write_window(model, batch, start, at, config, own):
                nfe += 1
                for b, row in zip(rows, batch, strict=True):
                    texts[b].copy_(row)
                positions = at_rows(len(texts), rows, [columns] * len(rows), columns)
                yield State(texts, positions, positions, at_rows(len(texts), rows, list(p), p[0]), nfe)
            start += at.n * at.length


@torch.inference_mode()
def write_window(
    model: GPT, texts: Tensor, start: int, at: Layout, config: DecodingConfig, generators: list[torch.Generator]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Write texts (B, T) in place from column `start` on; yield the columns (n,) of a step and p (B, n, V) there."""
    (B, T), m, n = texts.shape, at.prefix, at.n
    cache, latest = model.new_cache(B, at.end), torch.full((B, n), START_ID)
    if m:
        prefix = texts[:, start - m : start]
        model(causal_inputs(prefix, START_ID).to(model.device), cache=cache)
        latest[:, 0] = prefix[:, -1]
    # The first stream follows what was read; nothing stands to the left of the others.
    cache.tokens = F.pad(cache.tokens[:, None], (0, 0, 0, n - 1)).flatten(0, 1)
    cache.inputs = F.pad(cache.inputs[:, :, None], (0, 0, 0, 0, 0, n - 1)).flatten(1, 2)
    everywhere = torch.ones(B, n, dtype=torch.bool)
    for k in range(at.length):
        context = StepContext(model.encoder.rotations[m + k :: at.length][:n], cache=cache)
        logits = in_float64(model(latest.to(model.device), context=context).cpu())  # (B, n, V)
        latest = draw_tokens(logits.flatten(0, 1), everywhere, generators, config, NEVER_WRITTEN).view(B, n)
        columns = start + k + at.length * torch.arange(n)
        columns = columns[columns < T]
        latest[:, len(columns) :] = PAD_ID  # beyond the text: as it is scored, so that the others see nothing drawn
        texts[:, columns] = latest[:, : len(columns)]
        yield columns, logits[:, : len(columns)].softmax(-1)


