"""From logits to tokens, for both models: temperature, top-k, top-p, repetition penalty, one generator a row.

Each row draws from a generator of its own, so that its text does not depend on the batch. All probabilities are
float64: float32 draws lower the effective temperature (arXiv 2409.02908).

Letters: B rows, N draws, V vocabulary.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from config import LogitsConfig


# ------------------------------------------------------------------------------------------------- generators
def row_generators(
    generator: torch.Generator | list[torch.Generator] | None, tokens: Sequence[Tensor]
) -> list[torch.Generator]:
    """One CPU generator for each of B rows of tokens, (T,) each or together (B, T).

    A list of B generators is used as it is. From a single one (None: seed 0), row b's seed follows from a number drawn
    from it, the row's own tokens and how many equal rows are above it. So a row gives the same text alone and in any
    batch, while equal rows still give different samples. Raises ValueError for a wrong number of generators.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(tokens):
            raise ValueError(f"{len(generator)} generators for {len(tokens)} rows: give one a row, or a single one")
        return list(generator)
    generator = generator or torch.Generator().manual_seed(0)
    key = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    above, generators = Counter(), []  # above: how many rows there were of each content
    for row in tokens:
        content = row.cpu().numpy().tobytes()
        digest = hashlib.blake2b(content + key.to_bytes(8, "big") + above[content].to_bytes(8, "big"), digest_size=8)
        above[content] += 1
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big") >> 1))
    return generators


def noise(generators: list[torch.Generator], where: Tensor) -> Tensor:
    """(B, T) float64: uniforms in [0, 1) where `where` (B, T) is true, else 0.

    Row b draws exactly as many numbers as it needs from its own generator.
    """
    u = torch.zeros(where.shape, dtype=torch.float64)
    for row, (needed, generator) in enumerate(zip(where.cpu(), generators, strict=True)):
        u[row, needed] = torch.rand(int(needed.sum()), generator=generator, dtype=torch.float64)
    return u.to(where.device)


# ------------------------------------------------------------------------------------------------- distributions
def penalize_repetition(logits: Tensor, texts: Tensor, penalty: float, rows: Tensor | slice = slice(None)) -> Tensor:
    """Divide positive logits (N, V) of ids that are in a text by `penalty`, multiply negative ones (arXiv 1909.05858).

    texts (B, T): ids; `rows` (N,): the text of each of the logits, by default the i-th of the i-th.
    """
    if penalty == 1.0:
        return logits
    V = logits.shape[-1]
    seen = torch.zeros(len(texts), V + 1, dtype=torch.bool, device=texts.device)
    seen = seen.scatter_(1, texts.clamp(max=V), True)[rows, :V].to(logits.device)  # (N, V)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def in_float64(x: Tensor) -> Tensor:
    """The tensor in float64: on its device, or on the CPU if it is on MPS, which has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def probabilities(logits: Tensor, config: LogitsConfig) -> Tensor:
    """(N, V) logits -> (N, V) float64 probabilities after temperature, then top-k, then top-p.

    Temperature 0 puts everything on the argmax (the lowest id on ties). Top-k keeps all ties with the k-th token; top-p
    keeps the token that crosses p. The repetition penalty is not applied here, see `penalize_repetition`.
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
    """Inverse-transform draw: p (N, V) float64 probabilities, u (N,) uniform in [0, 1) -> (N,) tokens of p > 0."""
    cumulative = p.cumsum(-1)
    # u <= 1 - 2^-53, so the product is rounded to a number below the total: some cumulative probability is above it.
    return torch.searchsorted(cumulative, (u.to(p) * cumulative[..., -1])[..., None], right=True)[..., 0]


def draw_tokens(logits: Tensor, where: Tensor, generators: list[torch.Generator], config: LogitsConfig) -> Tensor:
    """One token for each of logits (N, V), the true positions of where (B, T) in row-major order: (N,)."""
    if config.temperature == 0:  # no random number is drawn
        return logits.argmax(-1)
    return draw(probabilities(logits, config), noise(generators, where)[where]).to(where.device)
