"""The mathematics of masking: forward process, training loss, likelihood bound.

Nothing here knows the network: `predict(tokens) -> logits` is any function, which is what makes exact tests possible.
Letters: B batch, T positions, V vocabulary; t is the masking probability in (0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_T = 1e-3  # t is drawn from [MIN_T, 1]: 1/t stays finite


# ------------------------------------------------------------------------------------------------- forward process
def sample_t(
    batch_size: int, generator: torch.Generator | None = None, device="cpu", power: float = 1.0
) -> Tensor:
    """(B,) masking probabilities in [MIN_T, 1], stratified: u is drawn once in each of B equal intervals of [0, 1).

    A low-discrepancy draw (one uniform offset, shuffled; Kingma et al., arXiv 2107.00630, I.1): the same mean as
    independent draws, much less variance. t = u^power; power > 1 draws small t more often, see `density_of_t`.
    """
    offset = torch.rand(1, generator=generator, device=device)
    strata = torch.randperm(batch_size, generator=generator, device=device)
    return MIN_T + (1 - MIN_T) * ((strata + offset) / batch_size) ** power


def density_of_t(t: Tensor, power: float) -> Tensor:
    """The probability density of `sample_t`'s t, (B,): dividing a loss by it leaves its mean what uniform t gives."""
    u_to_the_power = ((t - MIN_T) / (1 - MIN_T)).clamp(min=1e-6)
    return u_to_the_power ** (1 / power - 1) / (power * (1 - MIN_T))


def forward_process(
    sequences: Tensor, t: float | Tensor, mask_token_id: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Each token of sequences (B, T) independently becomes [MASK] with probability t (a float, or (B,)).

    Returns (masked_sequences, mask), both (B, T); mask is true where a token was hidden (LLaDA, eq. 7).
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
    In expectation over t and masks an upper bound on the negative log-likelihood, in nats/token. It is divided by all
    B T tokens, never by the number of masked ones, and by t once: either slip would reweight sequences by their t and
    the result would bound nothing. `density` is that of t where it was not drawn uniformly (importance sampling).
    """
    if logits.dim() == 3:
        logits = logits[mask]
    losses = F.cross_entropy(logits, targets[mask], reduction="none")  # (N,)
    t = torch.as_tensor(t, dtype=losses.dtype, device=losses.device).expand(len(targets))  # (B,)
    weights = (1 / (t * density))[:, None].expand_as(mask)[mask]  # (N,)
    return (losses * weights).sum() / mask.numel()


def main() -> None:
    """Show one line masked at three levels."""
    from tokenizer import MASK_ID, SimpleTokenizer

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
