"""The evaluate command on tiny checkpoints, end to end; bad input; comparisons of likelihoods, schedules, policies."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import MASK, TablePredictor, all_strings

import evaluate
from autoregressive import exact_nll
from checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from data import Rows, load_corpus
from evaluation.likelihoods import compare_estimators, mean_and_interval, paired_difference
from evaluation.plots import PICTURES
from evaluation.policies import compare_policies, compare_schedules
from evaluation.report import report_text
from evaluation.settings import FULL, QUICK, EvaluationSettings
from evaluation.suite import Evaluation, select_checkpoints
from generation.infilling import mask_predictor
from likelihood import Likelihood, likelihood_bound, policy_likelihood, student_t
from model import MODELS, ModelConfig
from tokenizer import MASK_ID, START_ID
from trainer import TrainConfig
from unmasking import UnmaskingPolicy
from utils import console
from utils.counter import EvaluationCounter
from utils.errors import ArgumentError

ROOT = Path(__file__).parent.parent
T = 16
LINES = ["to be, or not to be: that is the question.", "whether 'tis nobler to suffer?", "to die! to sleep;"]


def command(folder: Path, *arguments) -> subprocess.CompletedProcess:
    """The real command, in a process of its own."""
    words = [sys.executable, str(ROOT / "evaluate.py"), *arguments]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.fixture
def refusal(monkeypatch, capsys):
    """The program's one line of standard error when it ends with exit code 2."""

    def refuse(folder: Path, *arguments) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            console.run_program(evaluate.main)
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
        config = ModelConfig(corpus.tokenizer.vocab_size, T, n_embd=16, n_head=2, n_layer=1, ngram_rows=101)
        history = [
            {"step": s, "tokens": 100 * s, "seconds": 1.0 * s, "train_loss": 4 / s, "val_loss": 4 / s + 0.1, "lr": 0.1}
            for s in range(1, 8)
        ]
        history[-1] |= {"temperature": 1.25, "calibrated_val_loss": 0.5}
        training = {"config": TrainConfig(model=name, steps=7, lr=0.0123).to_dict()}
        known = {"name": corpus.name, "sha256": corpus.sha256, "val_fraction": 0.2}
        model = MODELS[name](config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)  # new models are uniform predictors
        checkpoint = Checkpoint(model, corpus.tokenizer, known, 7, history, training)
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
    bound = likelihood_bound(llada, parts, MASK_ID, pairs=QUICK.pairs, generator=torch.Generator().manual_seed(0))
    assert metrics["models"]["llada"]["nats_per_char"] == pytest.approx(bound.nats_per_char, rel=1e-6)
    assert metrics["models"]["llada"]["is_bound"]
    for m in metrics["models"].values():
        assert m["chars"] == len(val)
        assert m["ci95"][0] < m["nats_per_char"] < m["ci95"][1]
        assert m["params"] == gpt.num_parameters() == llada.num_parameters()


def test_metrics_are_consistent(metrics):
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
    assert all(row["is_bound"] == (row["order"] == "random") for row in metrics["policies"])
    assert metrics["policies"][0]["difference"] == 0
    assert metrics["policies"][-1]["nats_per_char"] == pytest.approx(bound, rel=0.02)  # without the short last window
    assert {row["sampler"] for row in metrics["samples"]} >= {"default sampler (sweep)"}
    assert all(len(row["prompt"] + row["text"]) <= T for row in metrics["samples"])
    for row in metrics["sample_metrics"][1:]:
        assert row["nfe"] == (T if row["source"] == "gpt" else row["steps"])
    assert {entry["span"] for entry in metrics["infilling"]["llada"]} == {1, 4}  # 16 is the whole window


def test_the_report_has_the_figures_the_training_and_the_pictures(runs, metrics):
    report = (runs / "out/report/report.md").read_text()
    for name, m in metrics["models"].items():
        assert f"{m['nats_per_char']:.4f}" in report, name
        assert f"`out/{name}/best.pt`" in report
    for words in ("| 1.250 |", "| `lr` | 0.0123 | 0.0123 |", "| steps done | 7 | 7 |", "default sampler (sweep), NFE"):
        assert words in report
    for name in PICTURES:
        assert f"({name})" in report
        assert (runs / "out/report" / name).read_bytes().startswith(b"\x89PNG")
    assert "nan" not in report.lower().split()


def test_one_model_alone_and_few_windows(runs):
    """Either model by itself; a text so short that one full window is all there is."""
    for name in MODELS:
        checkpoints = select_checkpoints([runs / "out" / name / "best.pt"], "cpu")
        corpus = load_corpus(str(runs / "text.txt"))
        corpus.ids = corpus.ids[: 8 * T]
        metrics = Evaluation(checkpoints, corpus, QUICK, seed=0).run()
        assert json.dumps(metrics, allow_nan=False)
        assert report_text(metrics)
        assert list(metrics["models"]) == [name]
        assert "difference" not in metrics


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out/llada/best.pt", "out/llada/best.pt"], "both llada"),
        (["--data", "other.txt"], "not the text"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: no such file"),
        (["out/none.pt"], "out/none.pt"),
        (["out/gpt/best.pt", "--compare-estimators"], "LLaDA"),
        (["--device", "abacus"], "--device abacus"),
        (["--report", "text.txt"], "--report text.txt: cannot write there (text.txt: Not a directory)"),
        (["--report", "text.txt/report"], "--report text.txt/report: cannot write there (text.txt"),
        (["--out", "nowhere"], "no checkpoint under nowhere/"),
        (["out"], "out: no best.pt"),
    ],
)
def test_bad_input_is_an_error_of_one_line(runs, refusal, arguments, words):
    (runs / "other.txt").write_text("another text entirely")
    assert words in refusal(runs, *arguments)


def test_a_folder_that_cannot_be_written_is_refused_before_torch_is_imported(tmp_path):
    """Before anything is read: there is not even a checkpoint."""
    words = [sys.executable, "-X", "importtime", str(ROOT / "evaluate.py"), "--report", "file/report"]
    (tmp_path / "file").write_text("")
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("evaluate.py: error: --report file/report: cannot write there")
    assert "| torch" not in process.stderr
    evaluate.check_folder(tmp_path / "new/report")
    assert not (tmp_path / "new").exists()


def test_runs_and_reports_may_be_elsewhere(runs, tmp_path):
    """The models of two folders of runs, given as such and as the folder of a run; the report beside them."""
    shutil.copytree(runs / "out/gpt", tmp_path / "runs/gpt")
    result = command(runs, "--out", str(tmp_path / "runs"), "--quick")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/report/report.md").exists()
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["model", "gpt"]


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
        select_checkpoints([runs / "out/llada/best.pt", tmp_path / "gpt.pt"], "cpu")


def test_estimators_are_compared(runs):
    llada = load_checkpoint(runs / "out/llada/best.pt").model
    val = load_corpus(str(runs / "text.txt")).split(0.2)[1].long()
    result = compare_estimators(llada, val[: 40 * T].view(40, T), seed=0)
    plain, paired = result["plain"], result["paired"]
    tolerance = 5 * (plain["variance"] / 2 / 30) ** 0.5  # 30 repeats of two evaluations a window
    assert abs(plain["nats_per_char"] - paired["nats_per_char"]) <= tolerance
    assert paired["variance"] < plain["variance"] / 3


def test_estimators_are_printed(runs):
    lines = command(runs, "--compare-estimators").stdout.splitlines()
    plain, paired = (float(line.split()[-1]) for line in lines[1:3])
    assert float(lines[3].split()[-1]) == pytest.approx(plain / paired, rel=0.05)


# ------------------------------------------------------------------------------------------------- likelihoods
def test_paired_difference_by_hand():
    a = Likelihood.from_token_nats([torch.tensor([[2.0, 2.0], [3.0, 3.0]])])
    b = Likelihood.from_token_nats([torch.tensor([[1.0, 1.0], [1.0, 1.0]])])
    result = paired_difference(a, b)
    assert result["nats_per_char"] == pytest.approx(1.5)
    half = 12.706 * 0.5  # Student's t of two windows, one degree of freedom
    assert result["ci95"] == pytest.approx([1.5 - half, 1.5 + half])


def test_optimal_schedules_are_scored_on_windows_that_did_not_choose_them():
    """Where c(m) is noise around a constant no schedule is better than another: the chosen ones gain nothing, and the
    interval of T steps is that of the bound itself. A single window cannot be split into two halves."""
    generator = torch.Generator().manual_seed(0)
    predict, windows = TablePredictor(), all_strings()[torch.randint(81, (300,), generator=generator)]
    bound = likelihood_bound(predict, [windows], MASK, pairs=2, generator=generator)
    rows = compare_schedules(bound, 4)
    assert [row["counts"] for row in rows["optimal"]][-1] == [1, 1, 1, 1]
    for row in (rows["uniform"][-1], rows["optimal"][-1]):
        assert row["nats_per_char"] == pytest.approx(bound.nats_per_char, rel=1e-9)
        assert row["ci95"] == pytest.approx(bound.ci95, abs=0.25 * (bound.ci95[1] - bound.ci95[0]))
    counts, means, hidden = bound.draws
    noise = torch.randn(means.shape, generator=generator, dtype=torch.float64)
    bound.draws = counts, 1 + noise, torch.ones_like(hidden)
    for row in compare_schedules(bound, 4)["optimal"]:
        assert row["nats_per_char"] - bound.curve.mean() * 5 / 4 >= -0.1
    alone = likelihood_bound(predict, [windows[:1]], MASK, pairs=2, generator=generator)
    rows = compare_schedules(alone, 4)
    assert "optimal" not in rows
    assert rows["uniform"][0]["ci95"] is None


def test_means_and_intervals():
    """Student's t against its published quantiles."""
    for freedom, exact in ((1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (15, 2.131), (63, 1.998)):
        assert student_t(freedom) == pytest.approx(exact, rel=0.012)
    mean, ci95 = mean_and_interval(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]))
    half = 2.365 * 6**0.5 / 8**0.5  # the variance of 1..8 is 6
    assert mean == 4.5
    assert ci95 == pytest.approx([4.5 - half, 4.5 + half], rel=1e-3)
    assert mean_and_interval(torch.tensor([1.0])) == (1.0, None)


def test_policies_are_compared_over_the_same_windows(runs):
    """Each row by hand from `policy_likelihood`: figures relative to the bound, differences to the first policy."""
    llada = load_checkpoint(runs / "out/llada/best.pt").model
    val = load_corpus(str(runs / "text.txt")).split(0.2)[1].long()
    windows = val[: 20 * T].view(20, T)
    bound = likelihood_bound(llada, [windows], MASK_ID, pairs=4, generator=torch.Generator().manual_seed(0))
    policies = [UnmaskingPolicy(4, "sweep"), UnmaskingPolicy(4, "confidence"), UnmaskingPolicy(4, "random")]
    of_characters = Rows(windows, torch.full((20,), T))
    rows = compare_policies(llada, of_characters, 5, policies, bound, seed=0)
    chosen = windows[[0, 4, 9, 14, 19]]
    sweep, confidence = (
        policy_likelihood(mask_predictor(llada), chosen, policy, MASK_ID)[0].window_nats / T for policy in policies[:2]
    )
    known = bound.window_nats[[0, 4, 9, 14, 19]] / T
    assert rows[0]["nats_per_char"] == pytest.approx(float((sweep - known).mean()) + bound.nats_per_char)
    assert rows[1]["difference"] == pytest.approx(float((confidence - sweep).mean()))
    assert rows[1]["difference_ci95"] == pytest.approx(mean_and_interval(confidence - sweep)[1])
    assert rows[1]["difference"] == pytest.approx(rows[1]["nats_per_char"] - rows[0]["nats_per_char"])
    assert [row["is_bound"] for row in rows] == [False, False, True, True]
    assert rows[-1]["order"] == "random"
    assert rows[-1]["nfe"] == T
    assert rows[-1]["nats_per_char"] == pytest.approx(bound.nats_per_char)
    assert rows[-1]["difference"] == pytest.approx(float((known - sweep).mean()))
    variances = (sweep - known).var() / 5, bound.window_nats.div(T).var() / 20  # of the two parts of a figure
    half = (2.776**2 * variances[0] + 2.093**2 * variances[1]).sqrt().item()  # 4 and 19 degrees of freedom
    low, high = rows[0]["ci95"]
    assert (high - low) / 2 == pytest.approx(half, rel=0.01)
    everything = compare_policies(llada, of_characters, 20, policies[:1], bound, seed=0)[0]  # nothing is extrapolated
    nats = policy_likelihood(mask_predictor(llada), windows, policies[0], MASK_ID)[0].window_nats / T
    figure, ci95 = mean_and_interval(nats)
    assert everything["nats_per_char"] == pytest.approx(figure)
    assert everything["ci95"] == pytest.approx(ci95)
    halved = compare_policies(llada, Rows(windows, torch.full((20,), 2 * T)), 5, policies, bound, seed=0)
    for row, half in zip(rows, halved, strict=True):  # a token of two characters: half the nats/char
        for key in ("nats_per_char", "difference", "ci95", "difference_ci95"):
            assert half[key] == pytest.approx(torch.tensor(row[key]).div(2).tolist(), abs=1e-6)


# ------------------------------------------------------------------------------------------------- settings, counter
def test_settings_are_validated_and_every_scored_policy_has_a_stated_kind():
    with pytest.raises(ArgumentError, match="pairs"):
        replace(FULL, pairs=0)
    with pytest.raises(ArgumentError, match="policy_steps"):
        EvaluationSettings(policy_steps=(8, 0))
    for settings in (FULL, QUICK):
        for length in (1, 8, 16, 256):
            policies = settings.policies(length)
            assert policies[0] == UnmaskingPolicy(steps=min(16, length), order="sweep")
            assert len(set(policies)) == len(policies)
            assert all(policy.has_exact_likelihood or policy.order == "random" for policy in policies)
            assert all(1 <= kind["steps"] <= length for kind in settings.sample_kinds(length))


def test_evaluations_are_counted():
    model, seen = torch.nn.Linear(3, 2), []
    with EvaluationCounter(model, update=seen.append) as counter:
        model(torch.zeros(4, 3))
        model(torch.zeros(1, 3))
    model(torch.zeros(7, 3))
    assert (counter.nfe, counter.positions) == (2, 15)
    assert seen == [12, 15]
