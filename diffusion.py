"""Masked diffusion: the forward process and LLaDA's training loss.

The network is not known here: `predict(tokens) -> logits` is any function. That is what makes exact tests possible.
`DiffusionObjective` is what the trainer needs of LLaDA; `autoregressive.CausalObjective` is its counterpart for GPT.

Letters: B batch, T positions, V vocabulary, N masked positions; t is the masking probability in (0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Rows
from likelihood import Likelihood, Predict, conditional_bound, likelihood_bound
from tokenizer import END_ID, MASK_ID, PAD_ID, START_ID

MIN_T = 1e-3  # t is drawn from [MIN_T, 1], so that 1/t stays finite
SWEEP_STEPS = 16  # of the default sampler's sweep, unmasking.STRIDE
SWEEP_DECAY = 0.7  # what a position counts in the loss of a sweep, for each step that it is ahead
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
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    t: float | Tensor,
    density: float | Tensor = 1.0,
    units: Tensor | None = None,
) -> Tensor:
    """LLaDA's loss (arXiv 2502.09992, eq. 3): (1/(B T)) sum over masked positions of cross-entropy / t.

    logits (B, T, V), or (N, V) for just the N masked positions in order; targets and mask (B, T); t a float or (B,).
    In expectation over t and masks it is an upper bound on the negative log-likelihood, in nats/token. The sum is
    divided by all B T tokens, never by the number of masked ones, and by t once. Any other division weights sequences
    by their t, and the result bounds nothing. `density` is that of t if it was not drawn uniformly (importance
    sampling). With `units` (B,), the sum is divided by their sum and not by B T: with each row's characters of text,
    the loss is in nats/character.
    """
    t = torch.as_tensor(t, dtype=logits.dtype, device=targets.device).expand(len(targets))  # (B,)
    weights = (1 / (t * density))[:, None].expand_as(mask)
    return masked_cross_entropy(logits, targets, mask, weights) / (mask.numel() if units is None else units.sum())


def masked_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """The sum of weights (B, T) times cross-entropy, in nats, over the masked positions. Logits: see above."""
    if logits.dim() == 3:
        logits = logits[mask]
    losses = F.cross_entropy(logits, targets[mask], reduction="none")  # (N,)
    return (losses * weights[mask]).sum()


def sweep_masks(
    may_mask: Tensor, generator: torch.Generator | None = None, steps: int = SWEEP_STEPS, decay: float = SWEEP_DECAY
) -> tuple[Tensor, Tensor]:
    """What the sweep's network evaluations see: masks (B, T) as at a random step k of it, and weights for the loss.

    may_mask (B, T): what is to be written. The sweep reveals positions k, k + steps, k + 2 steps, ... of these at step
    k; here it begins anywhere, so that all positions are alike. A position that is revealed next has weight 1, one that
    is revealed d steps later decay^d. Weights are scaled to the row's number of positions: a row's loss is then one in
    nats/token. With decay 0 its mean over k is the exact negative log-likelihood of such a sweep.
    """
    B = len(may_mask)
    k = ((torch.randperm(B, generator=generator) + torch.rand(1, generator=generator)) / B * steps).long()  # stratified
    first = torch.randint(steps, (B, 1), generator=generator)
    ahead = (may_mask.cumsum(1) - 1 + first) % steps - k[:, None]  # in how many steps it is revealed; < 0: it was
    mask = may_mask & (ahead >= 0)
    weights = decay ** ahead.clamp(min=0).float() * mask
    return mask, weights * (may_mask.sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1e-9))


# ------------------------------------------------------------------------------------------------- segments and pairs
def full_context(rows: Rows) -> tuple[Tensor, Tensor]:
    """What LLaDA sees of running text, segments or pairs: tokens (B, T) and the positions that may be masked, (B, T).

    A segment or pair begins with [START] and is filled up with [END], as LLaDA's fine-tuning data are: T is one more
    than in `rows`, and the model learns where a text ends. [PAD] is in none of them.
    """
    if rows.given is None:
        return rows.tokens, torch.ones_like(rows.tokens, dtype=torch.bool)
    tokens = F.pad(rows.tokens.masked_fill(rows.tokens == PAD_ID, END_ID), (1, 0), value=START_ID)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device) > rows.given[:, None]


def with_start(predict: Predict) -> Predict:
    """A predictor of tokens (B, T) that shows [START] in front of them to `predict`."""

    def predict_after_start(tokens: Tensor) -> Tensor:
        return predict(F.pad(tokens, (1, 0), value=START_ID))[:, 1:]

    return predict_after_start


# ------------------------------------------------------------------------------------------------- for the trainer
class MaskedBatch(NamedTuple):
    """A training batch: everything random in it has been drawn."""

    inputs: Tensor  # (B, T) with [MASK]s
    targets: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool
    weights: Tensor  # (B, T) of the masked positions' cross-entropies
    units: Tensor  # (B,) the mean number of characters in a row of the whole batch: its parts weigh alike


@dataclass(frozen=True)
class DiffusionObjective:
    """LLaDA's side of what differs between the two objectives.

    sweep_share: the share of rows that are masked in training as the default sampler meets them, and not at random.
    """

    sweep_share: float = 0.0
    is_bound: ClassVar[bool] = True  # losses and likelihoods are upper bounds

    def make_batch(self, rows: Rows, generator: torch.Generator, is_training: bool = False) -> MaskedBatch:
        """Rows -> a batch, each row masked at a random level, or as at a step of the sweep. What is given never is.

        Not in training there are no sweeps: the loss is LLaDA's.
        """
        targets, may_mask = full_context(rows)
        n = round(self.sweep_share * len(targets)) if is_training else 0
        t = sample_t(len(targets) - n, generator, power=T_POWER)
        _, mask = forward_process(targets[n:], t, MASK_ID, generator)
        weights = (1 / (t * density_of_t(t, T_POWER)))[:, None].expand_as(mask)
        if n:
            sweeps, sweep_weights = sweep_masks(may_mask[:n], generator)
            mask, weights = torch.cat([sweeps, mask]), torch.cat([sweep_weights, weights])
        mask &= may_mask
        units = rows.characters.float().mean().expand(len(targets))
        return MaskedBatch(targets.masked_fill(mask, MASK_ID), targets, mask, weights, units)

    def predict(self, model: Callable[..., Tensor], batch: MaskedBatch) -> Tensor:
        """Logits (N, V) of the masked positions alone: the model's last MLP and head skip the others."""
        return model(batch.inputs, at=batch.mask)

    def loss(self, logits: Tensor, batch: MaskedBatch) -> Tensor:
        """nats/character; without sweeps an upper bound in expectation."""
        return masked_cross_entropy(logits, batch.targets, batch.mask, batch.weights) / batch.units.sum()

    def likelihood(
        self, predict: Predict, batches: list[Rows], *, pairs: int = 8, batch_size: int = 128, seed: int = 0
    ) -> Likelihood:
        """Upper bound on the negative log-likelihood of rows, in nats/character: see `likelihood_bound`.

        Of segments and pairs it is that of the text in a context of this size, its [END]s included. Pairs: given their
        prompts, see `conditional_bound`. Raises ValueError if there is no text.
        """
        batches = [rows for rows in batches if rows.tokens.numel()]
        settings = {"pairs": pairs, "batch_size": batch_size, "generator": torch.Generator().manual_seed(seed)}
        characters = torch.cat([rows.characters for rows in batches]) if batches else torch.zeros(0)
        if not batches or batches[0].given is None:
            return likelihood_bound(predict, [rows.tokens for rows in batches], MASK_ID, **settings).per(characters)
        predict = with_start(predict)
        contexts = [tuple(x[:, 1:] for x in full_context(rows)) for rows in batches]
        if any(rows.given.any() for rows in batches):
            parts = [conditional_bound(predict, tokens, free, MASK_ID, **settings) for tokens, free in contexts]
            return Likelihood.join(parts).per(characters)
        return likelihood_bound(predict, [tokens for tokens, _ in contexts], MASK_ID, **settings).per(characters)


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
