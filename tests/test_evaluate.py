"""The evaluate command on tiny checkpoints, end to end; what it refuses; findings that follow the figures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import MASK, TablePredictor, all_strings

import console
import evaluate
from autoregressive import exact_nll
from checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from data import load_corpus
from evaluate import QUICK, Evaluation, choose
from examine import compare_estimators, compare_schedules, difference
from findings import ahead, next_steps, overfitting, saturation
from likelihood import Likelihood, likelihood_bound
from model import CONFIGS, MODELS
from plots import PICTURES
from tokenizer import MASK_ID, START_ID

ROOT = Path(__file__).parent.parent
T = 16
LINES = ["to be, or not to be: that is the question.", "whether 'tis nobler to suffer?", "to die! to sleep;"]


def command(folder: Path, *arguments) -> subprocess.CompletedProcess:
    """The real thing, in a process of its own."""
    words = [sys.executable, str(ROOT / "evaluate.py"), *arguments]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.fixture
def refusal(monkeypatch, capsys):
    """What the program says when it refuses: its one line of standard error, after exit code 2."""

    def refuse(folder: Path, *arguments) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            console.run(evaluate.main)
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        assert not out
        assert len(err.splitlines()) == 1
        return err

    return refuse


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with text.txt and the checkpoints of two untrained models on it, the last window 5 characters short."""
    folder = tmp_path_factory.mktemp("runs")
    text = "".join(f"SPEAKER {i}:\n{LINES[i % 3]}\n\n" for i in range(100))
    (folder / "text.txt").write_text(text[: len(text) // (5 * T) * 5 * T - 5])
    corpus = load_corpus(str(folder / "text.txt"))
    for seed, name in enumerate(MODELS):
        torch.manual_seed(seed)
        config = CONFIGS[name](corpus.tokenizer.vocab_size, T, n_embd=16, n_head=2, n_layer=1, ngram_rows=101)
        history = [
            {"step": s, "tokens": 100 * s, "seconds": 1.0 * s, "train_loss": 4 / s, "val_loss": 4 / s + 0.1, "lr": 0.1}
            for s in range(1, 8)
        ]
        known = {"name": corpus.name, "sha256": corpus.sha256, "val_fraction": 0.2}
        model = MODELS[name](config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)  # fresh from the shop they would all be uniform predictors
        checkpoint = Checkpoint(model, corpus.tokenizer, known, 7, history)
        save_checkpoint(folder / "out" / name / "best.pt", checkpoint)
    return folder


@pytest.fixture(scope="module")
def metrics(runs) -> dict:
    """metrics.json of the real command, run where both checkpoints are under out/."""
    result = command(runs, "--quick")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "llada", "gpt"]
    assert lines[1].endswith("upper bound")
    assert lines[2].endswith("exact")
    return json.loads((runs / "out/report/metrics.json").read_text())


def test_both_models_are_scored_on_every_character_of_the_validation_part(runs, metrics):
    corpus = load_corpus(str(runs / "text.txt"))
    val = corpus.split(0.2)[1].long()
    gpt, llada = (load_checkpoint(runs / "out" / name / "best.pt").model for name in ("gpt", "llada"))
    parts = [val[: len(val) // T * T].view(-1, T), val[len(val) // T * T :][None]]
    assert parts[1].numel() not in (0, T)
    exact = sum(exact_nll(gpt, part, START_ID).double().sum().item() for part in parts) / len(val)
    entry = metrics["models"]["gpt"]
    assert entry["nats_per_char"] == pytest.approx(exact, rel=1e-6)
    assert entry["bits_per_char"] == pytest.approx(exact / math.log(2), rel=1e-6)
    assert entry["perplexity"] == pytest.approx(math.exp(exact), rel=1e-6)
    assert not entry["is_bound"]
    bound = likelihood_bound(llada, parts, MASK_ID, QUICK.pairs, generator=torch.Generator().manual_seed(0))
    assert metrics["models"]["llada"]["nats_per_char"] == pytest.approx(bound.nats_per_char, rel=1e-6)
    assert metrics["models"]["llada"]["is_bound"]
    for m in metrics["models"].values():
        assert m["chars"] == len(val)
        assert m["ci95"][0] < m["nats_per_char"] < m["ci95"][1]
        assert m["params"] == gpt.num_parameters() == llada.num_parameters()


def test_metrics_hang_together(metrics):
    """The curve, the schedules, the positions and the characters are all views of the same bound."""
    curve, schedules = metrics["masking_curve"], metrics["schedules"]
    bound = sum(curve) / T
    assert len(curve) == T
    for name, rows in schedules.items():
        assert rows[0]["nfe"] == 1
        assert rows[0]["nats_per_char"] == pytest.approx(curve[-1], rel=1e-2 if name == "optimal" else 1e-9)
    assert schedules["uniform"][-1]["nats_per_char"] == pytest.approx(bound)
    assert schedules["optimal"][-1]["nats_per_char"] == pytest.approx(bound)
    assert sum(metrics["positions"]["llada"]) / T == pytest.approx(bound)
    for name, model in metrics["models"].items():
        total = sum(entry[name] * entry["count"] for entry in metrics["characters"].values())
        share = 1e-9 if name == "gpt" else 0.02  # the window estimates of the bound have a control variate, shares none
        assert total == pytest.approx(model["nats_per_char"] * model["chars"], rel=share)
    assert {row["order"] for row in metrics["policies"]} >= {"confidence", "sweep"}
    assert all(1 <= row["nfe"] <= T for row in metrics["policies"])
    assert metrics["samples"]
    assert all(len(row["prompt"] + row["text"]) <= T for row in metrics["samples"])
    assert {entry["span"] for entry in metrics["infilling"]["llada"]} == {1, 4}  # 16 is the whole window


def test_the_report_tells_the_figures_and_shows_the_pictures(runs, metrics):
    report = (runs / "out/report/report.md").read_text()
    for name, m in metrics["models"].items():
        assert f"{m['nats_per_char']:.4f}" in report, name
    for name in PICTURES:
        assert f"({name})" in report
        assert (runs / "out/report" / name).read_bytes().startswith(b"\x89PNG")
    assert "nan" not in report.lower().split()


def test_one_model_alone_and_few_windows(runs):
    """Either model by itself; a text so short that one full window is all there is."""
    for name in MODELS:
        checkpoints = choose([runs / "out" / name / "best.pt"], "cpu")
        corpus = load_corpus(str(runs / "text.txt"))
        corpus.ids = corpus.ids[: 8 * T]
        metrics = Evaluation(checkpoints, corpus, QUICK, seed=0).run()
        assert json.dumps(metrics, allow_nan=False)
        assert list(metrics["models"]) == [name]
        assert "difference" not in metrics


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out/llada/best.pt", "out/llada/best.pt"], "both llada"),
        (["--data", "other.txt"], "not the text"),
        (["out/none.pt"], "out/none.pt"),
        (["out/gpt/best.pt", "--compare-estimators"], "LLaDA"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(runs, refusal, arguments, words):
    (runs / "other.txt").write_text("another text entirely")
    assert words in refusal(runs, *arguments)


def test_no_checkpoints_at_all(tmp_path, refusal):
    assert "train.py" in refusal(tmp_path)


def test_a_changed_corpus_is_noticed(runs):
    text = runs / "text.txt"
    original = text.read_text()
    try:
        text.write_text(original.replace("question", "answer"))
        result = command(runs)
    finally:
        text.write_text(original)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "SHA-256" in result.stderr
    assert "--data" in result.stderr


def test_checkpoints_of_two_texts_are_not_compared(runs, tmp_path):
    checkpoint = load_checkpoint(runs / "out/gpt/best.pt")
    checkpoint.corpus = checkpoint.corpus | {"sha256": "0" * 64}
    save_checkpoint(tmp_path / "gpt.pt", checkpoint)
    with pytest.raises(ValueError, match="different texts"):
        choose([runs / "out/llada/best.pt", tmp_path / "gpt.pt"], "cpu")


def test_estimators_are_compared(runs, capsys):
    llada = load_checkpoint(runs / "out/llada/best.pt").model
    val = load_corpus(str(runs / "text.txt")).split(0.2)[1].long()
    compare_estimators(llada, val[: 40 * T].view(40, T), seed=0)
    lines = capsys.readouterr().out.splitlines()
    (plain, plain_variance), (paired, variance) = (map(float, line.split("mean")[1].split()) for line in lines[1:3])
    assert abs(plain - paired) <= 5 * (plain_variance / 2 / 30) ** 0.5  # 30 repeats of two evaluations a window
    assert float(lines[3].split()[-1]) == pytest.approx(plain_variance / variance, rel=0.05)
    assert variance < plain_variance / 3


# ------------------------------------------------------------------------------------------------- figures to words
def test_paired_difference_by_hand():
    a, b = (Likelihood.exact([torch.tensor(rows)]) for rows in ([[2.0, 2.0], [3.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]))
    result = difference(a, b)
    assert result["nats_per_char"] == pytest.approx(1.5)
    assert result["ci95"] == pytest.approx([1.5 - 1.96 * 0.5, 1.5 + 1.96 * 0.5])


def test_optimal_schedules_are_priced_on_windows_that_did_not_choose_them():
    """Where c(m) is noise around a constant no schedule is better than another: the chosen ones gain nothing, and the
    interval of T steps is that of the bound itself. With a single window nothing can be priced apart."""
    generator = torch.Generator().manual_seed(0)
    predict, windows = TablePredictor(), all_strings()[torch.randint(81, (300,), generator=generator)]
    bound = likelihood_bound(predict, [windows], MASK, 2, generator=generator)
    rows = compare_schedules(bound)
    assert [row["counts"] for row in rows["optimal"]][-1] == [1, 1, 1, 1]
    for row in (rows["uniform"][-1], rows["optimal"][-1]):
        assert row["nats_per_char"] == pytest.approx(bound.nats_per_char, rel=1e-9)
        assert row["ci95"] == pytest.approx(bound.ci95, abs=0.25 * (bound.ci95[1] - bound.ci95[0]))
    counts, means, hidden = bound.draws
    noise = torch.randn(means.shape, generator=generator, dtype=torch.float64)
    bound.draws = counts, 1 + noise, torch.ones_like(hidden)
    for row in compare_schedules(bound)["optimal"]:
        assert row["nats_per_char"] - bound.curve.mean() * 5 / 4 >= -0.1
    alone = likelihood_bound(predict, [windows[:1]], MASK, 2, generator=generator)
    rows = compare_schedules(alone)
    assert "optimal" not in rows
    assert rows["uniform"][0]["ci95"] is None


def entry(nats: float, half: float, is_bound: bool) -> dict:
    return {"nats_per_char": nats, "ci95": [nats - half, nats + half], "is_bound": is_bound}


@pytest.mark.parametrize(
    ("gap", "ci95", "words"),
    [
        (0.3, [0.25, 0.35], "GPT is ahead by 0.300 nats/char (0.250 to 0.350, paired)"),
        (-0.3, [-0.35, -0.25], "LLaDA is ahead by 0.300 nats/char (0.250 to 0.350, paired)"),
        (0.01, [-0.01, 0.03], "Neither model is ahead"),
    ],
)
def test_who_is_ahead_follows_from_the_difference(gap, ci95, words):
    metrics = {
        "models": {"llada": entry(1.6 + gap, 0.2, True), "gpt": entry(1.6, 0.2, False)},
        "difference": {"nats_per_char": gap, "ci95": ci95},
    }
    sentence = ahead(metrics)
    assert sentence.startswith(words)
    if gap > 0.1:
        assert "own intervals overlap" in sentence
        assert "upper bound" in sentence


def test_advice_follows_from_the_curves_and_nothing_is_said_without_figures():
    def history(*losses):
        return [{"val_loss": loss} for loss in losses]

    metrics = {
        "models": {"llada": entry(2.0, 0.01, True), "gpt": entry(1.6, 0.01, False)},
        "training_text": {"llada": entry(1.99, 0.01, True), "gpt": entry(1.3, 0.01, False)},
        "history": {"llada": history(4, 3, 2.5, 2.3, 2.1, 2.0), "gpt": history(3, 2, 1.5, 1.5, 1.55, 1.6)},
    }
    advice = next_steps(metrics).splitlines()
    assert advice[0] == "- Train LLaDA longer: its loss still fell by 0.300 over the run's last third."
    assert advice[1].startswith("- Regularise GPT")
    assert "0.300 better on the training text" in advice[1]
    assert "1.300" in overfitting(metrics)
    assert next_steps({"models": metrics["models"], "history": {}}) == ""
    assert saturation({}) == ahead({}) == overfitting({}) == ""


def test_saturation_is_the_cheapest_policy_close_to_the_best():
    rows = [(128, 1.50), (32, 1.515), (16, 1.6)]
    policies = [{"order": "strided", "threshold": None, "nfe": n, "nats_per_char": x, "ci95": None} for n, x in rows]
    assert saturation({"policies": policies, "window": 128}).startswith("Quality saturates at about 32 of 128")
