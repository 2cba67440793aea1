"""The causal counterpart of `diffusion` and `sampler`: loss, exact likelihood, decoding.

Letters: B batch, T positions, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_inputs(sequences: Tensor, start_token_id: int) -> Tensor:
    """(B, T) -> (B, T): [START] and all but the last token, so that position t predicts sequences[:, t].

    [START] opens every window: GPT and LLaDA score the same T characters.
    """
    start = torch.full_like(sequences[:, :1], start_token_id)
    return torch.cat([start, sequences[:, :-1]], dim=1)


def compute_gpt_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Next-token cross-entropy of logits (B, T, V) against targets (B, T): exact, nats/token, mean over B T."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
