"""How each kind of model writes, for measuring it: its samplers, their likelihoods, and settings for texts.

Letters: N windows, T positions.
"""

import torch
from torch import Tensor

from autoregressive import exact_nll
from config import SWEEP_STEPS, DecodingConfig, SamplingConfig
from generation.write import mask_predictor, write
from likelihood import Likelihood, policy_likelihood
from model import GPT, Transformer
from sampler import has_exact_likelihood, policy_of
from tokenizer import MASK_ID, START_ID
from trainer import scoring_batch_size

Config = SamplingConfig | DecodingConfig


def samplers_of(model: Transformer, T: int, quick: bool = False) -> dict[str, Config]:
    """The samplers to compare on windows of T tokens, at temperature 1 and uncorrected; first the default one.

    LLaDA: the sweep and the random order in several numbers of steps, others one token a step.
    """
    if isinstance(model, GPT):
        return {"as trained": DecodingConfig(temperature=1.0)}
    steps, single = ((16, 32), ("confidence",)) if quick else ((8, 16, 32), ("left", "confidence"))
    found = {f"sweep, {min(SWEEP_STEPS, T)} steps": {}}
    several = [(order, K) for order in ("sweep", "random") for K in steps if K < T]
    found |= {f"{order}, {K} steps": {"order": order, "steps": K} for order, K in several}
    found |= {f"{order}, {T} steps": {"order": order} for order in single}
    found["confidence, threshold 0.9"] = {"order": "confidence", "threshold": 0.9}
    return {name: SamplingConfig(temperature=1.0, correct=0, **settings) for name, settings in found.items()}


def sampler_likelihood(model: Transformer, windows: Tensor, config: Config, seed: int = 0) -> tuple[Likelihood, float]:
    """Negative log-likelihood of windows (N, T) under a sampler, in nats/token, and its evaluations for a window.

    LLaDA's is teacher-forced, in the sampler's own order. Exact where the positions follow from what is visible; of
    random order an upper bound in expectation over the drawn orders (Jensen). Raises ValueError for other samplers.
    """
    size = scoring_batch_size(model)
    if isinstance(model, GPT):
        nats = exact_nll(model, windows.to(model.device), START_ID, size).cpu()
        return Likelihood.from_token_nats([nats]), write_texts(model, 1, windows.shape[1], config, seed)[1]
    exact = has_exact_likelihood(config)
    if not exact and config.order != "random":
        raise ValueError(f"this sampler of order {config.order} has no likelihood")
    policy = policy_of(config, None if exact else torch.Generator().manual_seed(seed))
    predict, is_bound = mask_predictor(model), not exact
    result, nfe = policy_likelihood(predict, windows.cpu(), policy, MASK_ID, batch_size=size, is_bound=is_bound)
    return result, float(nfe.double().mean())


def writers_of(model: Transformer, quick: bool = False) -> dict[str, Config]:
    """The settings to write texts with, by name; first those of generate.py.

    LLaDA: also with more steps, without correction, and by the published rule.
    """
    found = {"default": {}, "temperature 1": {"temperature": 1.0}}
    if isinstance(model, GPT):
        return {name: DecodingConfig(**settings) for name, settings in found.items()}
    found |= {"64 steps": {"steps": 64}, "without correction": {"correct": 0}}
    found |= {} if quick else {"drawn_confidence, 1 a step": {"order": "drawn_confidence", "correct": 0}}
    return {name: SamplingConfig(**settings) for name, settings in found.items()}


def write_texts(model: Transformer, N: int, T: int, config: Config, seed: int = 0) -> tuple[Tensor, int]:
    """N texts of T tokens from nothing, (N, T), and the network evaluations that took."""
    *_, state = write(model, [torch.full((T,), MASK_ID)] * N, config, torch.Generator().manual_seed(seed))
    return torch.stack(state.texts), state.nfe
