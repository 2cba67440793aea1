"""From logits to tokens, for both models: temperature, top-k, top-p, repetition penalty, one random stream a row.

Each row draws from a stream of its own, so that its text does not depend on the batch. All probabilities are float64:
float32 draws lower the effective temperature (arXiv 2409.02908).

Letters: B rows, N draws, V vocabulary.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitsConfig:
    """How a token is drawn from logits; `sampler.SamplingConfig` and `autoregressive.DecodingConfig` extend it.

    temperature 0 takes the likeliest token. top_k keeps the k likeliest tokens, top_p the smallest set of likeliest
    tokens whose probability reaches p. repetition_penalty > 1 makes tokens that are already there less likely.
    Raises ValueError for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be greater than 0, got {self.repetition_penalty}")


# ------------------------------------------------------------------------------------------------- random streams
def row_generators(
    generator: torch.Generator | list[torch.Generator] | None, tokens: Tensor, pad_token_id: int | None = None
) -> list[torch.Generator]:
    """One CPU generator for each row of tokens (B, T).

    A list of B generators is used as it is. From a single one (None: seed 0), row b's stream follows from a number
    drawn from it, the row's own tokens (padding left out) and how many equal rows stand above it. So a row gives the
    same text alone and in any batch, while equal rows still give different samples. Raises ValueError for a wrong
    number of generators.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(tokens):
            raise ValueError(f"{len(generator)} generators for {len(tokens)} rows: give one a row, or a single one")
        return list(generator)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    key = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    copies: dict[bytes, int] = {}
    generators = []
    for row in tokens.cpu():
        content = (row if pad_token_id is None else row[row != pad_token_id]).numpy().tobytes()
        copies[content] = copies.get(content, -1) + 1
        digest = hashlib.blake2b(content + key.to_bytes(8, "big") + copies[content].to_bytes(8, "big"), digest_size=8)
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big") >> 1))
    return generators


def uniforms(generators: list[torch.Generator]) -> Tensor:
    """(B,) float64 uniforms in [0, 1), on the CPU: row b from its own generator."""
    return torch.cat([torch.rand(1, generator=g, dtype=torch.float64, device=g.device).cpu() for g in generators])


def noise(generators: list[torch.Generator], where: Tensor) -> Tensor:
    """(B, T) float64: uniforms in [0, 1) where `where` (B, T) is true, else 0.

    Row b draws exactly as many numbers as it needs from its own generator: padding costs none.
    """
    u = torch.zeros(where.shape, dtype=torch.float64)
    for row, (needed, generator) in enumerate(zip(where.cpu(), generators, strict=True)):
        u[row, needed] = torch.rand(int(needed.sum()), generator=generator, dtype=torch.float64)
    return u.to(where.device)


# ------------------------------------------------------------------------------------------------- distributions
def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Where seen (N, V), divide positive logits by `penalty` and multiply negative ones (CTRL, arXiv 1909.05858)."""
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def in_float64(x: Tensor) -> Tensor:
    """The tensor in float64: on its device, or on the CPU if it is on MPS, which has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def probabilities(logits: Tensor, config: LogitsConfig) -> Tensor:
    """(N, V) logits -> (N, V) float64 probabilities after temperature, then top-k, then top-p.

    Temperature 0 puts everything on the argmax (the lowest id on ties). Top-k keeps all ties with the k-th token; top-p
    keeps the token that crosses p. The repetition penalty is not applied here, see `penalize_repetition`. The result
    is on the device of the logits, or on the CPU if that device has no float64.
    """
    logits = in_float64(logits)
    if config.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        kth = logits.topk(config.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    p = logits.softmax(-1)
    if config.top_p is not None and config.top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        likelier = ordered.cumsum(-1) - ordered  # probability of all likelier tokens
        p = p.masked_fill(torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, likelier >= config.top_p), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Inverse-transform draw: p (N, V) float64 probabilities, u (N,) uniform in [0, 1) -> (N,) tokens.

    Never returns a token of probability zero.
    """
    cumulative = p.cumsum(-1)
    # u <= 1 - 2^-53, so the product is rounded to a number below the total: some cumulative probability is above it.
    return torch.searchsorted(cumulative, (u.to(p) * cumulative[..., -1])[..., None], right=True)[..., 0]
