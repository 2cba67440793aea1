"""The benchmark of repeated data: its text, its epochs, its figures, its picture. Its quick version is trained."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks import repeated_data
from benchmarks.repeated_data import FULL, QUICK, Training
from data import training_length
from trainer import TrainConfig, Trainer, load_training_corpus
from utils.errors import ArgumentError
from utils.processes import Processes


@pytest.fixture
def text_file(tmp_path) -> Path:
    """Twenty thousand characters, no two lines of which are equal."""
    path = tmp_path / "corpus.txt"
    lines = (f"{i:04}: {i * i % 9973:04} {'dead' if i % 3 else 'alive'}\n" for i in range(1250))
    path.write_text("".join(lines)[:20_000])
    return path


@pytest.fixture
def trainings(monkeypatch, run_script):
    """Trainings in this process; the flags of each."""
    calls = []

    def run_train(out, *flags):
        calls.append(flags)
        run_script("train.py", *flags, "--out", str(out))
        return json.loads(next(Path(out).glob("*/summary.json")).read_text()), 1.0

    monkeypatch.setattr(repeated_data, "run_train", run_train)
    return calls


def made_up(losses: list[float], final: float, is_bound: bool) -> Training:
    """A training of 100 tokens in 0.5 epochs between validations."""
    history = [{"tokens": 100 * (i + 1), "val_loss": loss} for i, loss in enumerate(losses)]
    history[-1]["calibrated_val_loss"] = losses[-1] - 0.25
    summary = {"tokens": 100 * len(losses), "epochs": 0.5 * len(losses), "nats_per_char": final, "is_bound": is_bound}
    return Training(history, summary)


# ------------------------------------------------------------------------------------------------- text, lengths
def test_nothing_that_is_validated_on_is_trained_on(tmp_path, text_file):
    val_fraction = repeated_data.write_text(tmp_path / "text.txt", str(text_file), 4000)
    config = TrainConfig(
        "gpt", str(tmp_path / "text.txt"), val_fraction, n_layer=1, n_embd=16, n_head=2, block_size=64, ngram_rows=101,
        calibration=repeated_data.CALIBRATION, steps=1,
    )  # fmt: skip
    trainer = Trainer(config, load_training_corpus(config), Processes("cpu"))
    decode, text = trainer.corpus.tokenizer.decode, text_file.read_text()
    trained, validated = decode(trainer.train_set.ids.numpy()), decode(trainer.val_part.numpy())
    assert trained == text[80:4000], "the first 2 % are for calibration"
    assert validated == text[18_000:]
    assert not set(trained.split("\n")[:-1]) & set(validated.split("\n"))


def test_the_split_of_tinyshakespeare_is_exact():
    assert training_length(100_000 + 111_540, 111_540 / 211_540) == 100_000


def test_a_text_that_is_too_short_is_refused(tmp_path, text_file):
    with pytest.raises(ArgumentError, match=r"data .*18000 characters to train on, 20000 are needed"):
        repeated_data.write_text(tmp_path / "text.txt", str(text_file), 20_000)


def test_the_models_get_equal_steps_for_equal_epochs():
    def steps(model: str, epochs: int) -> tuple[str, str]:
        return repeated_data.flags_of(FULL, model, epochs, 0)[2:4]

    assert steps("gpt", 20) == steps("llada", 20) == ("--steps=957", "--eval-every=48")
    assert steps("llada", 100) == ("--steps=4785", "--eval-every=191")  # 47.85 steps an epoch


# ------------------------------------------------------------------------------------------------- figures
def test_figures_by_hand(monkeypatch):
    runs = {
        ("gpt", 1): [made_up([3.0, 2.0], 1.9, False), made_up([3.0, 2.5], 2.1, False), made_up([2.0, 2.5], 2.0, False)],
        ("gpt", 2): [made_up([2.0, 3.0], 2.0 + x, False) for x in (0.1, 0.2, 0.3)],
        ("llada", 2): [made_up([4.0, 3.0], x, True) for x in (2.0, 2.3, 2.3)],
    }
    monkeypatch.setattr(repeated_data, "train_all", lambda *_: runs)
    heading, *rows = repeated_data.compare_epochs(quick=False, data=None, out=None, picture=None)
    first, second, third = (dict(zip(heading, row, strict=True)) for row in rows)
    assert [row["kind"] for row in (first, second, third)] == ["exact", "exact", "upper bound"]
    assert first["sample: best (epochs)"] == "2.3333 (1.0)"
    assert second["sample: best (epochs)"] == "2.0000 (0.5)"
    assert (second["sample: end"], second["sample: calibrated"]) == ("3.0000", "2.7500")
    assert first["whole: calibrated"] == "2.0000 (1.7516..2.2484)"  # 4.303 * 0.1 / sqrt(3)
    assert [row["minus the best GPT"] for row in (first, second)] == ["-", "+0.2000 (-0.0484..+0.4484)"]
    assert third["minus the best GPT"].startswith("+0.2000 (")
    assert third["all seeds"] == "2.0000 2.3000 2.3000"


# ------------------------------------------------------------------------------------------------- the whole
def test_the_quick_benchmark(tmp_path, text_file, trainings, run_script, monkeypatch):
    saved, out, picture = [], tmp_path / "out", tmp_path / "p.png"
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: saved.append((figure, path)))
    flags = ("--quick", "--data", str(text_file), "--out", str(out), "--picture", str(picture))
    output, _ = run_script("-m", "benchmarks", "repeated_data", *flags)
    heading, *rows = repeated_data.compare_epochs(True, str(text_file), out, None)
    assert all(cell in output for row in (heading, *rows) for cell in row)
    assert len(trainings) == 3, "finished trainings are not repeated"
    rows = [dict(zip(heading, row, strict=True)) for row in rows]
    assert [(row["model"], row["kind"]) for row in rows] == [("gpt", "exact")] * 2 + [("llada", "upper bound")]
    for row, asked in zip(rows, itertools.chain(*QUICK.epochs), strict=True):
        assert float(row["epochs"]) == pytest.approx(asked, abs=0.1)
    [(figure, path)] = saved
    assert path == picture
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == ["GPT stopped early", "GPT, exact", "LLaDA, upper bound"]
    (out / "llada-4-0.json").unlink()
    list(repeated_data.compare_epochs(True, str(text_file), out, None))
    assert len(trainings) == 4
    text_file.write_text(text_file.read_text().replace("dead", "gone"))
    with pytest.raises(ArgumentError, match=r"out .*choose another folder"):
        list(repeated_data.compare_epochs(True, str(text_file), out, None))


def test_a_picture_that_cannot_be_drawn_is_refused_at_once(tmp_path, trainings):
    for name in ("p.jpeg", "missing/p.png"):
        with pytest.raises(ArgumentError, match=r"picture .*name a \.png file"):
            list(repeated_data.compare_epochs(True, None, None, tmp_path / name))
    assert trainings == []
