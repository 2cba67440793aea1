"""Likelihoods of both models on the same windows: figures, paired difference, loss by position and by character.

Everything is returned as plain values, ready for metrics.json. Losses are in nats/char. LLaDA's are upper bounds, GPT's
are exact.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Rows
from diffusion import MIN_T, compute_llada_loss, forward_process
from likelihood import Likelihood, Predict, half_width95, likelihood_bound, pairs_needed
from model import Transformer
from tokenizer import MASK_ID, PAD_ID, SPECIAL_TOKENS, SimpleTokenizer, Tokenizer
from utils.console import track

NEAR = 8  # counts of masks to each side whose variances are pooled


def finite(interval: tuple[float, float]) -> list[float] | None:
    """An interval as JSON can hold it. None for the infinite interval of a single window."""
    return list(interval) if all(map(math.isfinite, interval)) else None


def likelihood_figures(result: Likelihood, model: Transformer, tokenizer: Tokenizer) -> dict:
    """A model's entry in metrics.json. Perplexity is per character.

    Of subwords, every figure is an upper bound: the text has other segmentations too, which are not scored.
    """
    return {
        "nats_per_char": result.nats_per_char,
        "ci95": finite(result.ci95),
        "ci95_of_masks": result.mask_error if math.isfinite(result.mask_error) else None,
        "bits_per_char": result.nats_per_char / math.log(2),
        "perplexity": math.exp(result.nats_per_char),
        "is_bound": result.is_bound or not isinstance(tokenizer, SimpleTokenizer),
        "chars": int(result.characters.sum()),
        "windows": len(result.characters),
        "params": model.num_parameters(),
        "params_looked_up": model.num_looked_up(),
    }


def paired_difference(a: Likelihood, b: Likelihood) -> dict:
    """nats/char of a minus b with its 95 % interval over the same windows.

    Pairing removes how hard each window is, so the interval is narrower than those of a and b.
    """
    nats = a.window_nats - b.window_nats
    mean, half = float(nats.sum() / a.characters.sum()), half_width95(nats, a.characters)
    return {"nats_per_char": mean, "ci95": finite((mean - half, mean + half))}


def loss_by_position(results: dict[str, Likelihood], rows: Rows) -> dict[str, list[float]]:
    """nats/token of each model at each of the T positions, the mean over full rows (N, T)."""
    N, T = rows.tokens.shape
    return {name: result.token_nats[:N, :T].mean(0).tolist() for name, result in results.items()}


def position_half_widths(results: dict[str, Likelihood], rows: Rows) -> dict[str, list[float | None]]:
    """Half the width of the 95 % interval of each of these losses over the windows; None for a single window."""
    N, T = rows.tokens.shape
    columns = {name: result.token_nats[:N, :T].unbind(1) for name, result in results.items()}
    return {name: finite_or_none([half_width95(nats, torch.ones(N)) for nats in columns[name]]) for name in columns}


def curve_half_widths(bound: Likelihood, scale: float = 1.0) -> list[float | None]:
    """Half the width of the 95 % interval of c(1), ..., c(T) times `scale`, over masks and windows.

    A count m has few masks, so the variance of one mask's c is that of all masks with at most NEAR counts more or less.
    """
    counts, means, all_masked = (draws.cpu() for draws in bound.draws)  # (N, K), (N, K), (N, T)
    (N, T), flat = all_masked.shape, counts.flatten()
    squares = torch.zeros(T, dtype=torch.float64).index_add_(0, flat, (means - bound.curve[counts]).flatten().square())
    n = torch.bincount(flat, minlength=T).double()
    sums = torch.stack([squares, (n - 1).clamp(min=0)])[None]
    squares, freedom = F.avg_pool1d(sums, 2 * NEAR + 1, stride=1, padding=NEAR)[0]
    half_widths = 1.96 * (squares / freedom / n).sqrt()[1:]  # of c(1), ..., c(T - 1)
    half_widths = [*half_widths.tolist(), half_width95(all_masked.mean(1), torch.ones(N))]
    return finite_or_none([scale * width for width in half_widths])


def finite_or_none(values: list[float]) -> list[float | None]:
    """Numbers as JSON can hold them."""
    return [value if math.isfinite(value) else None for value in values]


def loss_by_character(results: dict[str, Likelihood], batches: list[Rows], tokenizer: Tokenizer) -> dict[str, dict]:
    """For each token of the rows (a character, if the tokenizer is one of characters): its count, and each model's
    nats on it. Only text counts, and no special tokens."""
    T = max(rows.tokens.shape[1] for rows in batches)
    tokens = torch.cat([F.pad(rows.tokens, (0, T - rows.tokens.shape[1]), value=PAD_ID) for rows in batches]).cpu()
    counted = torch.cat([F.pad(rows.counted, (0, T - rows.tokens.shape[1])) for rows in batches]).cpu()
    counted &= tokens >= len(SPECIAL_TOKENS)
    counts = torch.bincount(tokens[counted], minlength=tokenizer.vocab_size)
    present = counts.nonzero()[:, 0].tolist()
    entries = {i: {"count": int(counts[i])} for i in present}
    for name, result in results.items():
        totals = torch.zeros(len(counts), dtype=torch.float64)
        totals.index_add_(0, tokens[counted], result.token_nats[:, :T][counted])
        for i in present:
            entries[i][name] = float(totals[i] / counts[i])
    return {tokenizer.id_to_char[i]: entry for i, entry in entries.items()}


def mean_and_interval(values: Tensor, characters: Tensor | None = None) -> tuple[float, list[float] | None]:
    """The mean of values (n,) and its 95 % interval by Student's t; None for a single value.

    With characters (n,): the sum of the values over that of the characters.

    >>> mean_and_interval(torch.tensor([1.0, 2.0, 3.0]))[0]
    2.0
    """
    characters = torch.ones(len(values)) if characters is None else characters
    mean, half = float(values.sum() / characters.sum()), half_width95(values, characters)
    return mean, finite((mean - half, mean + half))


# ------------------------------------------------------------------------------------------------- estimators
@torch.inference_mode()
def uniform_t_bound(
    predict: Predict, windows: Tensor, mask_token_id: int, draws: int, generator: torch.Generator | None = None
) -> float:
    """Upper bound in nats/token by plain Monte Carlo: the training loss at `draws` independent uniform t a window.

    Only for comparison with `likelihood_bound`.
    """
    total = 0.0
    for _ in range(draws):
        t = MIN_T + (1 - MIN_T) * torch.rand(len(windows), generator=generator)
        masked, mask = forward_process(windows, t, mask_token_id, generator)
        total += compute_llada_loss(predict(masked), windows, mask, t).item()
    return total / draws


def compare_estimators(model: Transformer, windows: Tensor, seed: int, repeats: int = 30) -> dict[str, dict]:
    """Two estimators of the same bound: plain uniform-t Monte Carlo, and stratified complementary masks.

    Each scores the same windows (N, T) `repeats` times with fresh masks. Returns for each its mean (nats/char) and its
    variance over repeats times the network evaluations a window, (nats/char)^2. The choice of windows does not enter.
    """
    generator = torch.Generator().manual_seed(seed)
    N, T = windows.shape
    pairs = pairs_needed(N, T, 1)
    plain, paired = [], []
    for _ in track(range(repeats), "compare estimators"):
        plain.append(uniform_t_bound(model, windows, MASK_ID, 2, generator))
        bound = likelihood_bound(model, [windows], MASK_ID, pairs=pairs, generator=generator)
        paired.append(bound.nats_per_char)
    results = {}
    for name, values, evaluations in (("plain", plain, 2), ("paired", paired, 2 * pairs + 1 / N)):
        values = torch.tensor(values, dtype=torch.float64)
        results[name] = {"nats_per_char": float(values.mean()), "variance": float(values.var() * evaluations)}
    return results
