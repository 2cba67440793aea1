"""The evaluate command on tiny checkpoints, end to end; bad input; figures by hand; the report; texts."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from toy import random_model

import evaluate
from autoregressive import exact_nll
from checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from config import SamplingConfig, TrainConfig
from data import Corpus, load_corpus
from evaluation import suite, texts
from evaluation.plots import PICTURES
from evaluation.report import table
from evaluation.suite import embedding_map, figures, paired_difference, sampler_likelihood, samplers_of
from likelihood import Likelihood, half_width95, likelihood_bound, student_t
from model import MODELS
from sampler import has_exact_likelihood
from tokenizer import MASK_ID, START_ID
from utils import console

T = 16
LINES = ["to be, or not to be: that is the question.", "whether 'tis nobler to suffer?", "to die! to sleep;"]


def run_main(monkeypatch, folder: Path, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    monkeypatch.setattr(suite, "QUICK", (128, 2, 4, 2))
    console.run_program(evaluate.main)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with text.txt and the checkpoints of two random models on it, the last window 5 characters short."""
    folder = tmp_path_factory.mktemp("runs")
    text = "".join(f"SPEAKER {i}:\n{LINES[i % 3]}\n\n" for i in range(100))
    (folder / "text.txt").write_text(text[: len(text) // (5 * T) * 5 * T - 5])
    corpus = load_corpus(str(folder / "text.txt"))
    sizes = {"vocab_size": corpus.tokenizer.vocab_size, "block_size": T, "n_layer": 1}
    for seed, name in enumerate(MODELS):
        history = [
            {"step": s, "tokens": 100 * s, "seconds": 1.0 * s, "train_loss": 4 / s, "val_loss": 4 / s + 0.1, "lr": 0.1}
            for s in range(1, 8)
        ]
        history[-1] |= {"temperature": 1.25, "calibrated_val_loss": 0.5}
        training = {"config": TrainConfig(model=name, steps=7, lr=0.0123).to_dict()}
        known = {"name": corpus.name, "sha256": corpus.sha256, "val_fraction": 0.2}
        model = random_model(name, seed=seed, std=0.3, **sizes)
        checkpoint = Checkpoint(model, corpus.tokenizer, known, 7, history, training)
        save_checkpoint(folder / "out" / name / "best.pt", checkpoint)
    return folder


@pytest.fixture(scope="module")
def metrics(runs) -> dict:
    """metrics.json of the command, run where both checkpoints are under out/; what it prints is in out.txt."""
    with pytest.MonkeyPatch.context() as patch, (runs / "out.txt").open("w") as printed:
        patch.setattr(sys, "stdout", printed)
        run_main(patch, runs, "--quick")
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


def test_curve_positions_and_texts_are_views_of_the_same_run(metrics):
    bound = sum(metrics["masking_curve"]["llada"]) / T
    assert len(metrics["masking_curve"]["llada"]) == T
    assert sum(metrics["positions"]["llada"]) / T == pytest.approx(bound)
    last = next(row for row in metrics["samplers"] if row["sampler"] == f"random, {T} steps")
    assert last["nats_per_char"] == pytest.approx(bound, rel=0.02)  # without the short last window
    assert metrics["texts"][0]["real_words"] > 0
    assert all(row["nfe"] <= T + 4 * 8 for row in metrics["texts"][1:])
    assert len(metrics["embeddings"]["gpt"]["xy"]) == len(metrics["characters"])


def test_samplers_are_compared_over_the_same_windows(runs, metrics):
    """The rows of the comparison by hand from `sampler_likelihood`."""
    [*rows, bound, gpt] = metrics["samplers"]
    assert {row["sampler"].split(",")[0] for row in rows} == {"sweep", "random", "left", "confidence"}
    assert (bound["sampler"], gpt["sampler"]) == (f"random, {T} steps", "as trained")
    assert all(1 <= row["nfe"] <= T for row in metrics["samplers"])
    assert all(row["is_bound"] == ("random" in row["sampler"]) for row in metrics["samplers"])
    assert rows[0]["difference"]["nats_per_char"] == 0
    model, corpus = load_checkpoint(runs / "out/llada").model, load_corpus(str(runs / "text.txt"))
    windows = corpus.validation_rows(corpus.split(0.2)[1], T)[0].tokens
    chosen = windows[torch.linspace(0, len(windows) - 1, 4).long()]
    default, *configs = samplers_of(model, T).values()
    for row, config in zip(rows[1:], configs, strict=True):
        assert has_exact_likelihood(config) or config.order == "random"
        a, b = (sampler_likelihood(model, chosen, c)[0] for c in (config, default))
        difference = ((a.window_nats - b.window_nats).sum() / chosen.numel()).item()
        assert row["difference"]["nats_per_char"] == pytest.approx(difference, abs=1e-6)
        assert row["nats_per_char"] == pytest.approx(rows[0]["nats_per_char"] + difference, abs=1e-6)


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
    titles = re.findall(r"^## (.*)", report, re.M)
    assert titles[0].startswith("Likelihood, on text that no model was trained on")
    assert titles[1:] == ["Loss and network evaluations", "Texts", "Pictures", "Settings"]
    assert report.partition("## Settings")[2].count('"lr": 0.0123') == 2
    assert re.search(r"temperature \| real words \| variety", report)
    assert re.search(rf"\| LLaDA, default +\| +{SamplingConfig().temperature:.1f} \|", report)
    assert "nan" not in report.lower().split()
    for name in PICTURES:
        assert f"({name})" in report
        assert (runs / "out/report" / name).read_bytes().startswith(b"\x89PNG")
    printed = [line for line in (runs / "out.txt").read_text().splitlines() if line]
    assert printed[0] == titles[0] + ":"
    assert [line for line in printed if line[0] == "|"] == [line for line in report.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize("name", MODELS)
def test_one_model_alone_and_few_windows(runs, tmp_path, monkeypatch, name):
    """Either model by itself, in another folder of runs, and the report beside it; one full window is all there is."""
    shutil.copytree(runs / "out" / name, tmp_path / name)
    split = Corpus.split
    monkeypatch.setattr(Corpus, "split", lambda *args: [part[: 3 * T // 2] for part in split(*args)])
    run_main(monkeypatch, runs, "--out", str(tmp_path), "--quick")
    found = json.loads((tmp_path / "report/metrics.json").read_text())
    assert list(found["models"]) == [name]
    assert {row["model"] for row in found["samplers"]} == {name}
    assert (tmp_path / "report/report.md").exists()


def test_a_table_is_aligned_and_its_cells_cannot_break_it():
    assert table(["a", "b"], [["x|y", "1"]]).splitlines() == ["| a    |   b |", "| ---  | --: |", "| x\\|y |   1 |"]


# ------------------------------------------------------------------------------------------------- texts
def test_a_text_is_scored_and_printed_with_its_most_surprising_words(runs, monkeypatch, capsys):
    for name in MODELS:
        checkpoint = load_checkpoint(runs / "out" / name / "best.pt")
        written, bound, nats = texts.score_text(checkpoint, LINES[0])
        assert sum(nats) / len(LINES[0]) == pytest.approx(written.nats_per_char)
        assert len(nats) == len(LINES[0]) == int(written.characters.sum())
        assert bound.is_bound == (name == "llada")
        if name == "gpt":
            ids = torch.from_numpy(checkpoint.tokenizer.encode(LINES[0])).long()
            windows = [ids[:32].view(2, T), ids[None, 32:]]
            expected = torch.cat([exact_nll(checkpoint.model, x, START_ID).flatten() for x in windows])
            assert nats == pytest.approx(expected.tolist(), rel=1e-5)
            assert bound.nats_per_char == pytest.approx(written.nats_per_char, rel=1e-5)
    (runs / "some.txt").write_bytes(b"\xef\xbb\xbfto be, or not\r\nto sleep; a die\r\n")
    monkeypatch.setattr(texts, "MARKED", 0.99)  # all eight words
    run_main(monkeypatch, runs, "--text", "some.txt")
    out = capsys.readouterr().out
    assert re.search(r"LLaDA: \d\.\d{4} nats/char \(exact\); \d\.\d{4} in random order \(upper bound\)", out)
    assert re.search(r"GPT: \d\.\d{4} nats/char \(exact\)\n", out)
    for part in out.split("\n\n")[1::2]:
        assert re.sub(r"[\[\]]", "", part) == "to be, or not\nto sleep; a die"
        assert part.count("[") == part.count("]") == 8


# ------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--report text.txt/report", "--report text.txt/report: cannot write there"),
        ("out/gpt --out out", "--out has no effect with models named"),
        ("--text text.txt --quick", "--quick has no effect with mode text"),
        ("--text text.txt --report x", "--report has no effect with mode text"),
        ("--text text.txt --pairs x", "--pairs does not go with --text"),
        ("--text strange.txt", "strange.txt: unknown character '~' (U+007E) at position 6"),
        ("--text empty.txt", "empty.txt: the text is empty"),
        ("--pairs text.txt", "needs models of pairs"),
        ("out/llada other_text.pt", "out/llada/best.pt and other_text.pt have different texts"),
        ("out/llada other_split.pt", "out/llada/best.pt and other_split.pt have different texts"),
    ],
)
def test_bad_input_is_an_error_of_one_line(runs, monkeypatch, capsys, arguments, words):
    (runs / "strange.txt").write_text("to be,~")
    (runs / "empty.txt").write_text("")
    for name, entry in (("text", {"sha256": "0" * 64}), ("split", {"val_fraction": 0.5})):
        checkpoint = load_checkpoint(runs / "out/gpt")
        checkpoint.corpus = checkpoint.corpus | entry
        save_checkpoint(runs / f"other_{name}.pt", checkpoint)
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, runs, *arguments.split())
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert words in err
