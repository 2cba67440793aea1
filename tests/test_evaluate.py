"""The evaluate command on tiny checkpoints, end to end; bad input; figures by hand; the report; texts."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
from autoregressive import exact_nll
from checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from config import ModelConfig, TrainConfig
from data import load_corpus
from evaluation import suite
from evaluation.plots import PICTURES, group_of
from evaluation.report import print_report, report_text, table
from evaluation.suite import (
    Evaluation,
    embedding_map,
    figures,
    paired_difference,
    sampler_likelihood,
    samplers_of,
    select_checkpoints,
)
from evaluation.texts import score_text
from likelihood import Likelihood, half_width95, likelihood_bound, student_t
from model import MODELS
from sampler import has_exact_likelihood
from tokenizer import MASK_ID, START_ID
from utils import console

ROOT = Path(__file__).parent.parent
T = 16
LINES = ["to be, or not to be: that is the question.", "whether 'tis nobler to suffer?", "to die! to sleep;"]


def run_main(monkeypatch, folder: Path, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    monkeypatch.setattr(suite, "QUICK", (24, 2, 4, 2))
    console.run_program(evaluate.main)


@pytest.fixture
def refusal(monkeypatch, capsys):
    """The program's one line of standard error when it ends with exit code 2."""

    def refuse(folder: Path, *arguments) -> str:
        with pytest.raises(SystemExit) as stop:
            run_main(monkeypatch, folder, *arguments)
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        assert not out
        assert len(err.splitlines()) == 1
        return err

    return refuse


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with text.txt and the checkpoints of two random models on it, the last window 5 characters short."""
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
    words = [sys.executable, str(ROOT / "evaluate.py"), "--quick"]
    result = subprocess.run(words, cwd=runs, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("LLaDA ")
    assert "\n\nLikelihood, on text that no model was trained on:\n| model " in result.stdout
    return json.loads((runs / "out/report/metrics.json").read_text())


# ------------------------------------------------------------------------------------------------- the figures
def test_both_models_are_scored_on_every_character_of_the_validation_part(runs, metrics):
    val = load_corpus(str(runs / "text.txt")).split(0.2)[1].long()
    gpt, llada = (load_checkpoint(runs / "out" / name / "best.pt").model for name in ("gpt", "llada"))
    parts = [val[: len(val) // T * T].view(-1, T), val[len(val) // T * T :][None]]
    assert parts[1].numel() not in (0, T)
    exact = sum(exact_nll(gpt, part, START_ID).double().sum().item() for part in parts) / len(val)
    entry = metrics["models"]["gpt"]
    assert entry["nats_per_char"] == pytest.approx(exact, rel=1e-6)
    assert entry["bits_per_char"] == pytest.approx(exact / math.log(2), rel=1e-6)
    assert entry["perplexity"] == pytest.approx(math.exp(exact), rel=1e-6)
    assert metrics["written"]["gpt"]["nats_per_char"] == pytest.approx(exact, rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    bound = Likelihood.join([likelihood_bound(llada, part, MASK_ID, pairs=2, generator=generator) for part in parts])
    assert metrics["models"]["llada"]["nats_per_char"] == pytest.approx(bound.nats_per_char, rel=1e-6)
    assert [m["is_bound"] for m in metrics["models"].values()] == [True, False]
    assert not any(m["is_bound"] for m in metrics["written"].values())
    for m in metrics["models"].values():
        assert m["chars"] == len(val)
        assert m["ci95"][0] < m["nats_per_char"] < m["ci95"][1]
    gap = exact - metrics["written"]["llada"]["nats_per_char"]
    [row] = [row for row in metrics["samplers"] if row["model"] == "gpt"]
    assert row["difference"]["nats_per_char"] == pytest.approx(gap, rel=1e-5)
    assert row["nats_per_char"] == pytest.approx(exact, rel=1e-6)


def test_metrics_are_consistent(metrics):
    """The curve and the positions are views of the same bound."""
    bound = sum(metrics["masking_curve"]["llada"]) / T
    assert len(metrics["masking_curve"]["llada"]) == T
    assert sum(metrics["positions"]["llada"]) / T == pytest.approx(bound)
    rows = metrics["samplers"]
    assert {row["sampler"].split(",")[0] for row in rows} == {"sweep", "random", "confidence", "as trained"}
    assert all(1 <= row["nfe"] <= T and row["is_bound"] == ("random" in row["sampler"]) for row in rows)
    assert rows[0]["difference"]["nats_per_char"] == 0
    last = next(row for row in rows if row["sampler"] == f"random, {T} steps")
    assert last["nats_per_char"] == pytest.approx(bound, rel=0.02)  # without the short last window
    assert metrics["texts"][0]["real_words"] > 0
    assert all(row["nfe"] <= T + 4 * 8 for row in metrics["texts"][1:])
    assert len(metrics["embeddings"]["gpt"]["xy"]) == len(metrics["characters"])


def test_samplers_are_compared_over_the_same_windows(runs):
    """The rows of an evaluation by hand from `sampler_likelihood`."""
    checkpoints = select_checkpoints([runs / "out/llada/best.pt"], "cpu")
    evaluation = Evaluation(checkpoints, load_corpus(str(runs / "text.txt")), quick=True)
    evaluation.likelihood()
    rows = evaluation.samplers()["samplers"]
    model, windows, chosen = evaluation.models["llada"], evaluation.rows[0].tokens, evaluation.some(evaluation.few)
    configs = samplers_of(model, T, quick=True)
    assert all(has_exact_likelihood(config) or config.order == "random" for config in configs.values())
    default = next(iter(configs.values()))
    level = rows[0]["nats_per_char"]
    for row, config in list(zip(rows, configs.values(), strict=False))[1:]:
        a, b = (sampler_likelihood(model, windows[chosen], c)[0] for c in (config, default))
        difference = (a.window_nats - b.window_nats).sum() / (T * len(chosen))
        assert row["difference"]["nats_per_char"] == pytest.approx(difference.item(), abs=1e-9)
        assert row["nats_per_char"] == pytest.approx(level + difference.item(), abs=1e-9)


def test_paired_difference_and_intervals_by_hand():
    a = Likelihood.from_token_nats([torch.tensor([[2.0, 2.0], [3.0, 3.0]])])
    b = Likelihood.from_token_nats([torch.tensor([[1.0, 1.0], [1.0, 1.0]])])
    result = paired_difference(a, b)
    assert result["nats_per_char"] == pytest.approx(1.5)
    assert result["ci95"] == pytest.approx([1.5 - 12.706 * 0.5, 1.5 + 12.706 * 0.5])  # one degree of freedom
    for freedom, exact in ((1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (15, 2.131), (63, 1.998)):
        assert student_t(freedom) == pytest.approx(exact, rel=0.012)
    values = torch.arange(1.0, 9.0)
    assert half_width95(values, torch.ones(8)) == pytest.approx(2.365 * 6**0.5 / 8**0.5, rel=1e-3)  # variance 6
    assert math.isinf(half_width95(values[:1], torch.ones(1)))
    low = figures(Likelihood.from_token_nats([torch.tensor([[0.0], [0.0], [0.003]])]))
    assert low["ci95"][0] == 0 < low["nats_per_char"] < low["ci95"][1]  # no loss is negative


def test_the_embeddings_are_in_their_principal_components():
    """Points on a line in 8 dimensions: one component holds all of the variance, and distances stay."""
    x = torch.arange(5.0)[:, None] * torch.ones(8)
    found = embedding_map(x)
    assert found["shares"][0] == pytest.approx(1)
    first = torch.tensor(found["xy"])[:, 0]
    assert first.diff().abs().tolist() == pytest.approx([8**0.5] * 4)
    assert [group_of(c) for c in "aB3, x"] == [
        *("vowels", "capitals", "digits"), *("punctuation, blanks",) * 2, "consonants",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------- the report
def test_the_report_begins_with_its_results_and_ends_with_the_settings(runs, metrics):
    report = (runs / "out/report/report.md").read_text()
    llada, gpt = (metrics["models"][name]["nats_per_char"] for name in MODELS)
    exact = metrics["written"]["llada"]["nats_per_char"]
    rows = [re.split(r" *\| *", line)[1:-1] for line in report.splitlines() if line.startswith("|")]
    losses = {row[0]: (row[1], row[-1]) for row in rows if row[-1] in ("exact", "upper bound")}
    assert losses["LLaDA"] == (f"{llada:.4f}", "upper bound")
    assert losses["GPT"] == (f"{gpt:.4f}", "exact")
    assert losses["LLaDA, by its sampler"] == (f"{exact:.4f}", "exact")
    summary = report.partition("## ")[0].splitlines()[4:7]
    assert summary[0].strip() == (
        f"LLaDA {llada:.3f} (upper bound), GPT {gpt:.3f} (exact), LLaDA by its sampler {exact:.3f} (exact) nats/char."
    )
    assert summary[1].startswith("GPT minus LLaDA's sampler: ")
    assert summary[2].startswith("Network evaluations for a window of ")
    titles = re.findall(r"^## (.*)", report, re.M)
    assert titles[0].startswith("Likelihood, on text that no model was trained on")
    assert titles[1:] == ["Loss and network evaluations", "Texts", "Pictures", "Settings"]
    assert report.partition("## Settings")[2].count('"lr": 0.0123') == 2
    assert re.search(r"temperature \| real words \| variety", report)
    assert re.search(r"\| LLaDA, default +\| +0.7 \|", report)
    assert "nan" not in report.lower().split()
    for name in PICTURES:
        assert f"({name})" in report
        assert (runs / "out/report" / name).read_bytes().startswith(b"\x89PNG")


def test_one_model_alone_and_few_windows(runs, capsys):
    """Either model by itself; a text so short that one full window is all there is."""
    for name in MODELS:
        checkpoints = select_checkpoints([runs / "out" / name / "best.pt"], "cpu")
        corpus = load_corpus(str(runs / "text.txt"))
        corpus.ids = corpus.ids[: 8 * T]
        found = Evaluation(checkpoints, corpus, quick=True).run()
        assert json.dumps(found, allow_nan=False)
        assert report_text(found, {})
        print_report(found)
        assert list(found["models"]) == [name]
        assert {row["model"] for row in found["samplers"]} == {name}
    assert table(["a", "b"], [["x|y", "1"]]).splitlines() == ["| a    |   b |", "| ---  | --: |", "| x\\|y |   1 |"]


# ------------------------------------------------------------------------------------------------- texts
def test_a_text_is_scored_and_printed_with_its_most_surprising_words(runs, monkeypatch, capsys):
    for name in MODELS:
        checkpoint = load_checkpoint(runs / "out" / name / "best.pt")
        written, bound, nats = score_text(checkpoint, LINES[0])
        assert sum(nats) / len(LINES[0]) == pytest.approx(written.nats_per_char)
        assert len(nats) == len(LINES[0]) == int(written.characters.sum())
        assert bound.is_bound == (name == "llada")
        if name == "gpt":
            assert bound.nats_per_char == pytest.approx(written.nats_per_char, rel=1e-5)
    (runs / "some.txt").write_bytes(b"\xef\xbb\xbfto be, or not\r\nto sleep; to die\r\n")
    run_main(monkeypatch, runs, "--text", "some.txt")
    out = capsys.readouterr().out
    assert re.search(r"LLaDA: \d\.\d{4} nats/char \(exact\); \d\.\d{4} in random order \(upper bound\)", out)
    assert re.search(r"GPT: \d\.\d{4} nats/char \(exact\)\n", out)
    for part in out.split("\n\n")[1::2]:
        assert re.sub(r"[\[\]]", "", part) == "to be, or not\nto sleep; to die"
        assert part.count("[") == 1


# ------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out/llada/best.pt", "out/llada/best.pt"], "both llada"),
        (["--data", "other.txt"], "not the text"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: no such file"),
        (["out/none.pt"], "out/none.pt"),
        (["--device", "abacus"], "--device abacus"),
        (["--report", "text.txt"], "--report text.txt: cannot write there (text.txt: Not a directory)"),
        (["--report", "text.txt/report"], "--report text.txt/report: cannot write there (text.txt"),
        (["--out", "nowhere"], "no checkpoint under nowhere/: train one with `python train.py`"),
        (["out"], "out: no best.pt"),
        (["out/gpt", "--out", "out"], "--out has no effect with models named"),
        (["--text", "text.txt", "--quick"], "--quick has no effect with mode text"),
        (["--text", "text.txt", "--report", "x"], "--report has no effect with mode text"),
        (["--text", "text.txt", "--pairs", "x"], "--pairs does not go with --text"),
        (["--text", "strange.txt"], "strange.txt: unknown character '~' (U+007E) at position 6"),
        (["--text", "empty.txt"], "empty.txt: the text is empty"),
        (["--pairs", "text.txt"], "needs models of pairs"),
    ],
)
def test_bad_input_is_an_error_of_one_line(runs, refusal, arguments, words):
    for name, text in (("other.txt", "another text entirely"), ("strange.txt", "to be,~"), ("empty.txt", "")):
        (runs / name).write_text(text)
    assert words in refusal(runs, *arguments)


def test_a_folder_that_cannot_be_written_is_refused_before_torch_is_imported(tmp_path):
    """Before anything is read: there is not even a checkpoint."""
    words = [sys.executable, "-X", "importtime", str(ROOT / "evaluate.py"), "--report", "file/report"]
    (tmp_path / "file").write_text("")
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("evaluate.py: error: --report file/report: cannot write there")
    assert "| torch" not in process.stderr


def test_runs_and_reports_may_be_elsewhere(runs, tmp_path, monkeypatch):
    """The models of another folder of runs; the report beside them."""
    shutil.copytree(runs / "out/gpt", tmp_path / "runs/gpt")
    run_main(monkeypatch, runs, "--out", str(tmp_path / "runs"), "--quick")
    assert (tmp_path / "runs/report/report.md").exists()


@pytest.mark.parametrize(("entry", "value"), [("sha256", "0" * 64), ("val_fraction", 0.5)])
def test_checkpoints_of_two_texts_are_not_compared(runs, tmp_path, entry, value):
    checkpoint = load_checkpoint(runs / "out/gpt/best.pt")
    checkpoint.corpus = checkpoint.corpus | {entry: value}
    save_checkpoint(tmp_path / "gpt.pt", checkpoint)
    with pytest.raises(ValueError, match="different texts"):
        select_checkpoints([runs / "out/llada/best.pt", tmp_path / "gpt.pt"], "cpu")
