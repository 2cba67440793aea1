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
from tokenizer import END_ID, MASK_ID, PAD_ID, START_ID, SimpleTokenizer

MIN_T = 1e-3  # t is drawn from [MIN_T, 1], so that 1/t stays finite
TRAINED_STEPS = 16  # of the sweep in training. Texts are written better by longer ones, which need no other training
SWEEP_DECAY = 0.7  # in the loss of a sweep a position's weight decays with the steps until it is revealed
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
    t = torch.as_tensor(t, dtype=torch.float32, device=sequences.device).view(-1, 1)
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError("t is a probability: it must be in [0, 1]")
    draws = torch.rand(sequences.shape, generator=generator, device=sequences.device)  # in [0, 1): t = 1 masks all
    mask = draws < t
    return sequences.masked_fill(mask, mask_token_id), mask


# ------------------------------------------------------------------------------------------------- training loss
def compute_llada_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, t: float | Tensor, units: Tensor | None = None
) -> Tensor:
    """LLaDA's loss (arXiv 2502.09992, eq. 3): (1/(B T)) sum over masked positions of cross-entropy / t.

    logits (B, T, V), or (N, V) for just the N masked positions in order; targets (B, T). mask (B, T) bool: if it is on
    the CPU, a GPU need not be waited for. t: a float, (B,), or (B, T) if positions were masked with probabilities of
    their own; a t that was not drawn uniformly must be multiplied by its density.

    In expectation over t and masks it is an upper bound on the negative log-likelihood, in nats/token. The sum is
    divided by all B T tokens, never by the number of masked ones, and by t once. Any other division weights sequences
    by their t, and the result bounds nothing. With `units` (B,), the sum is divided by their sum and not by B T: with
    each row's characters of text, the loss is in nats/character.
    """
    at = positions_of(mask).to(targets.device)
    if logits.dim() == 3:
        logits = logits.flatten(0, 1)[at]
    t = torch.as_tensor(t, dtype=logits.dtype, device=logits.device)
    t = (t[:, None] if t.dim() == 1 else t).expand_as(targets).flatten()[at]  # (N,)
    losses = F.cross_entropy(logits, targets.flatten()[at], reduction="none")
    return (losses / t).sum() / (targets.numel() if units is None else units.sum())


def positions_of(mask: Tensor) -> Tensor:
    """The N true positions of mask (B, T), counted through all rows: (N,)."""
    return mask.flatten().nonzero()[:, 0]


def sweep_masks(
    may_mask: Tensor, generator: torch.Generator | None = None, steps: int = TRAINED_STEPS, decay: float = SWEEP_DECAY
) -> tuple[Tensor, Tensor]:
    """Masks (B, T) at a random step k of the sweep, by which text is written, and t (B, T) for the loss.

    may_mask (B, T): what is to be written. The sweep reveals positions k, k + steps, k + 2 steps, ... of these at step
    k; here it begins anywhere, so that all positions are alike. A position's weight 1/t decays with the number of steps
    until it is revealed, decay^d. A constant makes the mean weight of a position 1. With decay 0 only what is revealed
    next counts: the mean over k is then the exact negative log-likelihood of such a sweep, for any number of positions.
    """
    B = len(may_mask)
    k = ((torch.randperm(B, generator=generator) + torch.rand(1, generator=generator)) / B * steps).long()  # stratified
    first = torch.randint(steps, (B, 1), generator=generator)
    ahead = (may_mask.cumsum(1) - 1 + first) % steps - k[:, None]  # in how many steps it is revealed; < 0: it was
    mask = may_mask & (ahead >= 0)
    d = torch.arange(steps)
    mean_weight = ((steps - d) * decay**d).sum() / steps**2  # over k and over the turns of a position
    return mask, torch.where(mask, mean_weight / decay ** ahead.clamp(min=0).float(), torch.inf)


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


# ------------------------------------------------------------------------------------------------- for the trainer
class MaskedBatch(NamedTuple):
    """A batch: everything random in it has been drawn."""

    inputs: Tensor  # (B, T) with [MASK]s
    targets: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool, always on the CPU: masked positions are counted there, and a GPU is not waited for
    divisors: Tensor  # (B, T) by which the masked positions' cross-entropies are divided: see `compute_llada_loss`'s t
    units: Tensor  # (B,) the mean number of characters in a row of the whole batch: its parts weigh alike

    def on(self, device: torch.device) -> "MaskedBatch":
        """The batch on a device, except for the mask."""
        return MaskedBatch(*(x.to(device, non_blocking=True) for x in self))._replace(mask=self.mask)


@dataclass(frozen=True)
class DiffusionObjective:
    """LLaDA's side of what differs between the two objectives.

    sweep_share: the share of rows in training whose masks are those of a random step of the sweep.
    """

    sweep_share: float = 0.0
    is_bound: ClassVar[bool] = True  # losses and likelihoods are upper bounds

    @property
    def scores(self) -> tuple[str, ...]:
        """What is validated: the bound, and if the sweep is trained also the loss of what it writes."""
        return ("val_loss", "sampler_loss") if self.sweep_share else ("val_loss",)

    def make_batch(self, rows: Rows, generator: torch.Generator, purpose: str = "val_loss") -> MaskedBatch:
        """Rows -> a batch. What is given is never masked.

        purpose: "val_loss", each row masked at a random level: LLaDA's bound. "train_loss": a share of the rows as at a
        step of the sweep. "sampler_loss": all of them, and only what is revealed next counts: exact in expectation.
        """
        targets, may_mask = full_context(rows)
        n = round({"val_loss": 0.0, "train_loss": self.sweep_share, "sampler_loss": 1.0}[purpose] * len(targets))
        t = sample_t(len(targets) - n, generator, power=T_POWER)
        _, mask = forward_process(targets[n:], t, MASK_ID, generator)
        divisors = (t * density_of_t(t, T_POWER))[:, None].expand_as(mask)
        if n:
            decay = 0.0 if purpose == "sampler_loss" else SWEEP_DECAY
            sweeps, sweep_divisors = sweep_masks(may_mask[:n], generator, decay=decay)
            mask, divisors = torch.cat([sweeps, mask]), torch.cat([sweep_divisors, divisors])
        mask = mask & may_mask
        units = rows.characters.float().mean().expand(len(targets))
        return MaskedBatch(targets.masked_fill(mask, MASK_ID), targets, mask, divisors, units)

    def predict(self, model: Callable[..., Tensor], batch: MaskedBatch) -> Tensor:
        """Logits (N, V) of the masked positions alone: the model's last MLP and head skip the others."""
        return model(batch.inputs, at=positions_of(batch.mask).to(batch.inputs.device))

    def loss(self, logits: Tensor, batch: MaskedBatch) -> Tensor:
        """nats/character, see `make_batch`."""
        return compute_llada_loss(logits, batch.targets, batch.mask, batch.divisors, batch.units)

    def weighted_targets(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """(N,) targets and (N,) weights: `loss` is the sum of weights times cross-entropies."""
        at = positions_of(batch.mask).to(batch.targets.device)
        return batch.targets.flatten()[at], 1 / batch.divisors.flatten()[at] / batch.units.sum()

    def likelihood(
        self, predict: Predict, batches: list[Rows], *, pairs: int = 8, batch_size: int = 128, seed: int = 0
    ) -> Likelihood:
        """Upper bound on the negative log-likelihood of rows, in nats/character: see `likelihood_bound`.

        Of segments and pairs it is that of the text in a context of this size, its [END]s included. Pairs: given their
        prompts, see `conditional_bound`. Raises ValueError if there is no text.
        """
        settings = {"pairs": pairs, "batch_size": batch_size, "generator": torch.Generator().manual_seed(seed)}
        parts = []
        for rows in batches:
            (windows, may_mask), scored = full_context(rows), predict
            if rows.given is not None:  # [START] is seen, not scored
                windows, may_mask = windows[:, 1:], may_mask[:, 1:]
                scored = lambda tokens: predict(F.pad(tokens, (1, 0), value=START_ID))[:, 1:]  # noqa: E731
            if may_mask.all():
                parts.append(likelihood_bound(scored, windows, MASK_ID, **settings))
            else:  # prompts are given
                parts.append(conditional_bound(scored, windows, may_mask, MASK_ID, **settings))
        return Likelihood.join(parts).per(torch.cat([rows.characters for rows in batches]))


def main() -> None:
    """Show one line masked at three levels."""
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
