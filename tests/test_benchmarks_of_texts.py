"""The benchmarks of pairs, tokenizers and fine-tuning: their data, their questions, their flags. Little is trained."""

import json
import sys

import pytest
import torch

import benchmarks.__main__
from benchmarks import finetuning, pairs, tokens, training
from checkpoint import Checkpoint
from data import corpus_from_text, load_corpus, load_pairs, make_dataset
from model import MODELS, ModelConfig
from trainer import TrainConfig, load_training_corpus, objective_for
from utils import console

SMALL = pairs.Sizes(words=40, held_out=10, facts=6, word_steps=1, fact_steps=1, seeds=2)


def random_checkpoint(corpus, name: str, segments: str) -> Checkpoint:
    config = ModelConfig(corpus.tokenizer.vocab_size, 24, 16, 2, 1, ngram_rows=101, segments=segments)
    torch.manual_seed(0)
    model = MODELS[name](config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Checkpoint(model.eval(), corpus.tokenizer, {"name": corpus.name, "sha256": corpus.sha256})


@pytest.fixture
def random_training(monkeypatch):
    """In place of trainings: random models on the data they would be trained on."""

    def train(folder, model, steps, seed, *flags):
        if flags[0].startswith("--pairs="):
            corpus, segments = load_pairs(flags[0].removeprefix("--pairs=")), "pairs"
        else:
            corpus, segments = load_corpus(flags[0].removeprefix("--data=")), "line"
        return 7.0, random_checkpoint(corpus, model, segments)

    monkeypatch.setattr(pairs, "train", train)


# ------------------------------------------------------------------------------------------------- pairs: the data
def test_held_out_words_tell_nothing_of_the_others():
    found = pairs.reversals(2000, seed=0)
    words = [pair.prompt for pair in found]
    assert len(set(words)) == len(words) == 2000
    assert all(pair.completion == pair.prompt[::-1] for pair in found)
    assert not set(words) & {pair.completion for pair in found}, "no word is the reversal of another"
    assert {len(word) for word in words} == set(range(pairs.SHORTEST, pairs.LONGEST + 1))
    assert found == pairs.reversals(2000, seed=0)
    assert found != pairs.reversals(2000, seed=1)


def test_every_second_fact_is_trained_in_one_direction_only():
    facts = pairs.facts_of(20, seed=0)
    assert len({name for fact in facts for name in fact}) == 40
    text = pairs.facts_text(facts, seed=0)
    corpus = corpus_from_text("facts", text)
    parts = [corpus.tokenizer.decode(part.numpy()) for part in corpus.split(0.5)]
    for part in parts:  # the training part has every line
        lines = part.strip("\n").split("\n")
        assert len(lines) == 30
        assert set(lines) == {f"{a} > {b}" for a, b in facts} | {f"{b} < {a}" for a, b in facts[::2]}


def test_the_data_fit_the_context_of_the_models(tmp_path):
    held_out, facts = pairs.write_data(tmp_path, SMALL, seed=0)
    trained = load_pairs(str(tmp_path / "train.jsonl"))
    assert len(trained.pairs) == 40
    assert load_pairs(str(tmp_path / "heldout.jsonl")).pairs == held_out
    assert not {pair.prompt for pair in held_out} & {pair.prompt for pair in trained.pairs}
    make_dataset(trained.pairs, trained.tokenizer, 24, "pairs")  # raises for a pair that is too long
    lines = load_corpus(str(tmp_path / "facts.txt"))
    rows = make_dataset(lines.ids, lines.tokenizer, 24, "line")
    assert len(rows) == 2 * (len(facts) + len(facts[::2])), "no line is cut"
    config = TrainConfig("gpt", segments="line", data=str(tmp_path / "facts.txt"), val_fraction=0.5, steps=1)
    assert load_training_corpus(config).characters == len((tmp_path / "facts.txt").read_text())


# ------------------------------------------------------------------------------------------------- pairs: questions
def test_gpt_ranks_names_by_the_likelihood_of_the_line():
    facts = pairs.facts_of(8, seed=0)
    corpus = corpus_from_text("facts", pairs.facts_text(facts, seed=0))
    gpt = random_checkpoint(corpus, "gpt", "line")
    names, ends = [a for a, _ in facts], [f" > {b}" for _, b in facts[:3]]
    chosen = pairs.likeliest_names(gpt, names, ends)
    for end, name in zip(ends, chosen, strict=True):
        nats = {}
        for candidate in names:
            part = torch.from_numpy(corpus.tokenizer.encode(candidate + end))
            dataset = make_dataset(part, corpus.tokenizer, 24, "line")
            likelihood = objective_for(gpt.model).likelihood(gpt.model, [dataset.rows(torch.tensor([0]))])
            nats[candidate] = float(likelihood.window_nats)
        assert name == min(nats, key=nats.get)


def test_llada_infills_names_of_the_right_length():
    facts = pairs.facts_of(8, seed=0)
    llada = random_checkpoint(corpus_from_text("facts", pairs.facts_text(facts, seed=0)), "llada", "line")
    names = pairs.fill_names(llada, [f" > {b}" for _, b in facts[:3]])
    assert [len(name) for name in names] == [pairs.NAME] * 3


def test_right_answers_are_counted(monkeypatch):
    """With models that know everything that was trained, and nothing else."""
    facts = pairs.facts_of(6, seed=0)
    known = {f"{a} > ": b for a, b in facts} | {f"{b} < ": a for a, b in facts[::2]}
    monkeypatch.setattr(pairs, "answer", lambda checkpoint, prompts: [known.get(prompt, "?") for prompt in prompts])
    monkeypatch.setattr(pairs, "likeliest_names", lambda checkpoint, names, ends: names[1::2])
    monkeypatch.setattr(pairs, "fill_names", lambda checkpoint, ends: ["wrong!", *(a for a, _ in facts[3::2])])
    results = {(question, model): check(None) for (question, model, _), check in pairs.fact_questions(facts).items()}
    for model in MODELS:
        assert results["a > ?, trained", model] == [True] * 3
        assert results["b < ?, trained", model] == [True] * 3
        assert results["b < ?, only a > b trained", model] == [False] * 3
    assert results["? > b, only a > b trained", "gpt"] == [True] * 3
    assert results["? > b, only a > b trained", "llada"] == [False, True, True]


def test_the_table_has_both_models_and_all_seeds(random_training, monkeypatch):
    monkeypatch.setattr(pairs, "FULL", SMALL)
    heading, *rows = pairs.compare_tasks(quick=False)
    rows = [dict(zip(heading, row, strict=True)) for row in rows]
    assert [row["model"] for row in rows] == ["gpt", "llada"] * 5
    for row in rows:
        assert len(row["all seeds"].split()) == 2
        assert 0 <= float(row["right, %"]) <= 100
        low, high = map(float, row["95 % interval"].split(".."))
        assert 0 <= low <= float(row["right, %"]) <= high <= 100


def test_a_real_training_answers(tmp_path, monkeypatch):
    """One training of two steps of each task, by train.py."""
    monkeypatch.setattr(pairs, "MODELS", ("llada",))
    sizes = pairs.Sizes(words=40, held_out=4, facts=4, word_steps=2, fact_steps=2)
    found = [key for key, _, _ in pairs.answer_all(tmp_path, sizes, seed=0)]
    assert found[0] == ("reversing", "a held-out word", "llada", "writes")
    assert found[-1] == ("facts", "? > b, only a > b trained", "llada", "infills")
    assert len(found) == 5


# ------------------------------------------------------------------------------------------------- tokens, fine-tuning
def summary_of(flags: list[str]) -> dict:
    """A summary as train.py would write it, of a run that learned nothing."""
    change = {"new_before": 4.0, "new_after": 2.0, "old_before": 1.5, "old_after": 3.0}
    return {
        "nats_per_char": 2.0, "is_bound": "--model=llada" in flags, "params": 1000, "params_trainable": 10,
        "tokens": 800, "tokens_per_second": 100.0, "epochs": 0.5, "fine_tuning": change,
    }  # fmt: skip


@pytest.fixture
def trainings(monkeypatch):
    """The flags of each training, of which none takes place."""
    calls = []

    def run_train(out, *flags):
        calls.append(flags)
        return summary_of(flags), 1.0

    for module in (tokens, finetuning):
        monkeypatch.setattr(module, "run_train", run_train)
    return calls


def test_models_of_all_tokenizers_have_equal_parameters():
    characters = tokens.parameters(69, tokens.ROWS)
    for vocab_size in tokens.VOCAB_SIZES:
        rows = tokens.rows_for(vocab_size, 69)
        each = tokens.parameters(vocab_size, rows + 1) - tokens.parameters(vocab_size, rows)
        assert 0 < rows < tokens.ROWS
        assert abs(tokens.parameters(vocab_size, rows) - characters) <= each / 2


def test_tokenizers_are_compared_in_bits_a_character(trainings, corpus_file):
    heading, *rows = tokens.compare_tokenizers(quick=True, data=str(corpus_file), seconds=60)
    rows = [dict(zip(heading, row, strict=True)) for row in rows]
    assert [(row["model"], row["bits/char"], row["kind"]) for row in rows] == [
        *[("gpt", "2.8854", "exact")] * 2,
        *[("llada", "2.8854", "upper bound")] * 2,
    ]
    assert "--tokenizer=bpe --vocab-size=512" in rows[1]["train.py"]
    assert all("--minutes=1.0000" in flags for flags in trainings)
    *_, full = tokens.compare_tokenizers(quick=False, data=str(corpus_file), seconds=60)
    assert full[4] == "2.8854 2.8854 2.8854"


def test_fine_tuning_is_compared_with_adapters(trainings):
    heading, *rows = finetuning.compare_fine_tuning(quick=True, data="old.txt")
    rows = [dict(zip(heading, row, strict=True)) for row in rows]
    assert [(row["model"], row["trained"]) for row in rows] == [
        (model, trained) for model in ("gpt", "llada") for trained in ("all weights", "rank 4")
    ]
    assert [rows[0][key] for key in heading[2:]] == ["10", "1.00", "4.0000", "2.0000", "1.5000", "3.0000", "exact", "8"]
    assert sum("--data=old.txt" in flags for flags in trainings) == 2
    assert sum(f"--data={finetuning.NEW_TEXT}" in flags for flags in trainings) == 4


def test_train_py_accepts_the_flags(tmp_path, trainings, corpus_file):
    """Its first complaint is about a missing file."""
    list(tokens.compare_tokenizers(True, str(corpus_file), None))
    missing = [flag.replace(str(corpus_file), "missing.txt") for flag in trainings[1]]
    with pytest.raises(OSError, match=r"missing\.txt: no such file"):
        training.run_train(tmp_path, *missing)
    trainings.clear()
    list(finetuning.compare_fine_tuning(True, None))
    with pytest.raises(OSError, match="no such checkpoint"):
        training.run_train(tmp_path, *trainings[2])  # of rank 4


# ------------------------------------------------------------------------------------------------- command line
def test_pairs_can_be_written_alone(tmp_path, monkeypatch, capsys):
    for name, words in (("data", None), ("file/data", "--write"), (None, "--seed needs --write")):
        (tmp_path / "file").write_text("")
        write = ["--write", str(tmp_path / name)] if name else []
        monkeypatch.setattr(sys, "argv", ["benchmarks", "pairs", "--quick", "--seed", "3", *write])
        if words is None:
            benchmarks.__main__.main()
            first = json.loads((tmp_path / "data/train.jsonl").read_text().splitlines()[0])
            assert first["completion"] == first["prompt"][::-1]
            assert "heldout.jsonl" in capsys.readouterr().err
            continue
        with pytest.raises(SystemExit) as stop:
            console.run_program(benchmarks.__main__.main)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
