"""The report: tables that say what their figures are, and no more than their intervals allow."""

import pytest
import torch

from evaluation.likelihoods import curve_half_widths
from evaluation.plots import draw_pictures, visible
from evaluation.report import comparison, interval, policies, table
from likelihood import Likelihood

ROW = {"order": "sweep", "steps": 16, "threshold": None, "nfe": 16.0, "nats_per_char": 1.9, "ci95": [1.8, 2.0],
       "is_bound": False, "windows": 64, "difference": 0.0, "difference_ci95": [0.0, 0.0]}  # fmt: skip


@pytest.mark.parametrize(
    ("ci95", "is_bound", "words"),
    [
        ([-0.01, 0.02], False, "not distinguishable"),
        ([-0.01, 0.02], True, "bound not distinguishable"),
        ([0.01, 0.03], False, "higher"),
        ([0.01, 0.03], True, "bound is higher"),  # the loss itself may be lower
        ([-0.03, -0.01], False, "lower"),
        ([-0.03, -0.01], True, "lower"),
        (None, False, "no interval"),
    ],
)
def test_a_difference_is_only_stated_if_its_interval_excludes_zero(ci95, is_bound, words):
    assert comparison({"difference_ci95": ci95, "is_bound": is_bound}) == words


def test_the_policy_table_labels_bounds_and_differences():
    random = ROW | {"order": "random", "is_bound": True, "difference": 0.05, "difference_ci95": [0.02, 0.08]}
    schedule = {"steps": 1, "nfe": 1, "nats_per_char": 3.3, "ci95": None, "is_bound": True, "counts": [16]}
    text = "\n".join(policies({"policies": [ROW, random], "schedules": {"uniform": [schedule]}}))
    assert "| sweep order, 16 steps | 16.0 | 1.900 | 1.800 to 2.000 | exact | - | - | reference |" in text
    assert "| random order, 16 steps | 16.0 | 1.900 | 1.800 to 2.000 | upper bound | +0.050 | 0.020 to 0.080 |" in text
    assert "| nats/char, upper bound, in steps: | 1 |" in text
    assert "optimal" not in text  # there is no such row


def test_cells():
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| :-- | --: |\n| x | 1 |"
    assert interval(None) == "-"
    assert interval([1.0, 2.5], 1) == "1.0 to 2.5"
    assert visible("a b\n") == "a␣b↵"


def test_the_loss_curve_marks_the_calibrated_loss_apart(tmp_path, monkeypatch):
    """The curve holds uncalibrated losses only; the loss after temperature scaling is a single labelled point."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: figures.append(figure))
    history = [{"tokens": n, "train_loss": 2.0, "val_loss": 2.0 - n} for n in (1, 2)]
    history[-1] |= {"temperature": 1.5, "calibrated_val_loss": -0.5}
    draw_pictures({"history": {"gpt": history}, "models": {"gpt": {"is_bound": False}}}, tmp_path)
    lines = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[0].lines}
    assert lines["GPT, exact: validation"] == [1.0, 0.0]
    assert lines["GPT, exact: validation after scaling by temperature 1.50"] == [-0.5]


def test_the_band_of_the_masking_curve_is_the_spread_of_the_masks():
    """Masks whose losses scatter by a known amount: n of them with m tokens give c(m) to 1.96 times that / sqrt(n)."""
    generator, (N, K, T), sigma = torch.Generator().manual_seed(0), (400, 4, 32), 0.5
    counts = torch.randint(1, T, (N, K), generator=generator)
    noise = sigma * torch.randn(N, K, generator=generator, dtype=torch.float64)
    draws = counts, counts / T + noise, torch.randn(N, T, generator=generator, dtype=torch.float64)
    bound = Likelihood(torch.zeros(N, T), torch.zeros(N), torch.full((N,), T), True, draws)
    n = torch.bincount(counts.flatten(), minlength=T)[1:].double()
    expected = 1.96 * sigma / n.sqrt()
    widths = torch.tensor(curve_half_widths(bound), dtype=torch.float64)
    assert torch.allclose(widths[:-1], expected, rtol=0.15)
    assert widths[-1] == pytest.approx(1.96 / (N * T) ** 0.5, rel=0.15)
    assert curve_half_widths(bound, 2.0) == pytest.approx((2 * widths).tolist())
