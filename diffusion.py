"""Masked diffusion: the forward process and LLaDA's training loss.

The network is not known here: `predict(tokens) -> logits` is any function. That is what makes exact tests possible.
`DiffusionObjective` is what the trainer needs of LLaDA; `autoregressive.CausalObjective` is its counterpart for GPT.

Letters: B batch, T positions, V vocabulary, N masked positions; t is the masking probability in (0, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from likelihood import Likelihood, likelihood_bound
from tokenizer import MASK_ID

MIN_T = 1e-3  # t is drawn from [MIN_T, 1], so that 1/t stays finite
T_POWER = 2.0  # training draws t = u^2: lightly masked windows have the noisiest losses, so they are drawn more often


# ------------------------------------------------------------------------------------------------- forward process
def sample_t(batch_size: int, generator: torch.Generator | None = None, power: float = 1.0) -> Tensor:
    """(B,) masking probabilities in [MIN_T, 1], stratified: u is drawn once in each of B equal intervals of [0, 1).

    A low-discrepancy draw (one uniform offset, shuffled; Kingma et al., arXiv 2107.00630, I.1): it has the mean of
    independent draws and much less variance. t = u^power; power > 1 draws small t more often, see `density_of_t`.
    """
    offset = torch.rand(1, generator=generator)
    strata = torch.randperm(batch_size, generator=generator)
    return MIN_T + (1 - MIN_T) * ((strata + offset) / batch_size) ** power


def density_of_t(t: Tensor, power: float) -> Tensor:
    """The probability density of `sample_t`'s t, (B,). A loss divided by it has the mean that uniform t would give."""
    u_to_the_power = ((t - MIN_T) / (1 - MIN_T)).clamp(min=1e-6)
    return u_to_the_power ** (1 / power - 1) / (power * (1 - MIN_T))


def forward_process(
    sequences: Tensor, t: float | Tensor, mask_token_id: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Each token of sequences (B, T) independently becomes [MASK] with probability t (a float, or (B,)).

    Returns (masked_sequences, mask), both (B, T); mask is true where a token was masked (LLaDA, eq. 7).
    Raises ValueError if t is outside [0, 1].
    """
    t = torch.as_tensor(t, dtype=torch.float32, device=sequences.device)
    if t.dim() > 1 or (t.dim() == 1 and len(t) != len(sequences)):
        raise ValueError(f"t must be a number or of shape ({len(sequences)},), got {tuple(t.shape)}")
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError("t is a probability: it must be in [0, 1]")
    draws = torch.rand(sequences.shape, generator=generator, device=sequences.device)  # in [0, 1): t = 1 masks all
    mask = draws < (t[:, None] if t.dim() else t)
    return sequences.masked_fill(mask, mask_token_id), mask


# ------------------------------------------------------------------------------------------------- training loss
def compute_llada_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, t: float | Tensor, density: float | Tensor = 1.0
) -> Tensor:
    """LLaDA's loss (arXiv 2502.09992, eq. 3): (1/(B T)) sum over masked positions of cross-entropy / t.

    logits (B, T, V), or (N, V) for just the N masked positions in order; targets and mask (B, T); t a float or (B,).
    In expectation over t and masks it is an upper bound on the negative log-likelihood, in nats/token. The sum is
    divided by all B T tokens, never by the number of masked ones, and by t once. Any other division weights sequences
    by their t, and the result bounds nothing. `density` is that of t if it was not drawn uniformly (importance
    sampling).
    """
    if logits.dim() == 3:
        logits = logits[mask]
    losses = F.cross_entropy(logits, targets[mask], reduction="none")  # (N,)
    t = torch.as_tensor(t, dtype=losses.dtype, device=losses.device).expand(len(targets))  # (B,)
    weights = (1 / (t * density))[:, None].expand_as(mask)[mask]  # (N,)
    return (losses * weights).sum() / mask.numel()


# ------------------------------------------------------------------------------------------------- for the trainer
class MaskedBatch(NamedTuple):
    """A training batch: everything random in it has been drawn."""

    inputs: Tensor  # (B, T) with [MASK]s
    targets: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool
    t: Tensor  # (B,)


class DiffusionObjective:
    """LLaDA's side of what differs between the two objectives."""

    is_bound = True  # losses and likelihoods are upper bounds

    def make_batch(self, sequences: Tensor, generator: torch.Generator) -> MaskedBatch:
        """Windows (B, T) -> a batch, masked at a random level for each window."""
        t = sample_t(len(sequences), generator, power=T_POWER)
        masked, mask = forward_process(sequences, t, MASK_ID, generator)
        return MaskedBatch(masked, sequences, mask, t)

    def predict(self, model: Callable[..., Tensor], batch: MaskedBatch) -> Tensor:
        """Logits (N, V) of the masked positions alone: the model's last MLP and head skip the others."""
        return model(batch.inputs, at=batch.mask)

    def loss(self, logits: Tensor, batch: MaskedBatch) -> Tensor:
        """nats/token, an upper bound in expectation."""
        return compute_llada_loss(logits, batch.targets, batch.mask, batch.t, density_of_t(batch.t, T_POWER))

    def likelihood(
        self,
        predict: Callable[[Tensor], Tensor],
        windows: list[Tensor],
        *,
        pairs: int = 8,
        batch_size: int = 128,
        seed: int = 0,
    ) -> Likelihood:
        """Upper bound on the negative log-likelihood of windows, see `likelihood_bound`."""
        generator = torch.Generator().manual_seed(seed)
        return likelihood_bound(predict, windows, MASK_ID, pairs=pairs, batch_size=batch_size, generator=generator)


def main() -> None:
    """Show one line masked at three levels."""
    from tokenizer import SimpleTokenizer

    line = "The course of true love never did run smooth."
    tokenizer = SimpleTokenizer(line)
    sequences = torch.from_numpy(tokenizer.encode(line)).long()[None]
    generator = torch.Generator().manual_seed(0)
    print(f"           {line}")
    for t in (0.1, 0.5, 0.9):
        masked, mask = forward_process(sequences, t, MASK_ID, generator)
        shown = tokenizer.decode(masked[0], skip_special_tokens=False).replace("[MASK]", "_")
        print(f"t = {t}    {shown}    {int(mask.sum())} of {mask.numel()} masked")


if __name__ == "__main__":
    main()
