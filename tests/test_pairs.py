"""Pairs of prompt and completion: rows, files, metrics by hand, likelihoods by the chain rule, bad input."""

import json
import os
import sys

import pytest
import torch
from toy import random_model

import extras.pairs as pairs_module
from checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from data import load_same_corpus
from extras.pairs import Pair, PairCorpus, load_pairs, print_scores, score_pairs, text_metrics
from model import MODELS
from tokenizer import END_ID, PAD_ID, START_ID, SimpleTokenizer
from utils.errors import ArgumentError

PAIRS = [{"prompt": f"say {word}", "completion": word[::-1]} for word in ("abc", "bad", "cab", "dab", "add", "fee")] * 3
HELD_OUT = [{"prompt": "say dad", "completion": "dad"}, *PAIRS[:4]]


def write_pairs(path, entries) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with random models of pairs of both kinds in out/, and held-out pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    corpus = load_pairs(write_pairs(folder / "train.jsonl", PAIRS))
    sizes = {"vocab_size": corpus.tokenizer.vocab_size, "block_size": 32, "n_layer": 1, "segments": "pairs"}
    for name in MODELS:
        about = {"name": corpus.name, "sha256": corpus.sha256, "val_fraction": 0.2}
        checkpoint = Checkpoint(random_model(name, std=0.3, **sizes), corpus.tokenizer, about, 1)
        save_checkpoint(folder / "out" / name / "best.pt", checkpoint)
    write_pairs(folder / "heldout.jsonl", HELD_OUT)
    return folder


def checkpoints(run, *names: str) -> dict[str, Checkpoint]:
    return {name: load_checkpoint(run / "out" / name) for name in names or MODELS}


# ------------------------------------------------------------------------------------------------- rows and files
def test_pairs_from_a_pipe_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("data.CACHE", tmp_path / "cache")
    reader, writer = os.pipe()
    os.write(writer, json.dumps(PAIRS[0]).encode())
    os.close(writer)
    corpus = load_pairs(f"/dev/fd/{reader}")
    assert load_pairs(corpus.name).pairs == corpus.pairs == [Pair("say abc", "cba")]


@pytest.mark.parametrize("mark", ["", "\ufeff"])  # a byte order mark is no part of the text: issue 24, point 28
def test_pairs_are_rows_of_which_the_prompt_is_given(tmp_path, mark):
    path, pairs = tmp_path / "pairs.jsonl", [Pair("abc", "cba"), Pair("", "x"), Pair("[START]", "")]
    path.write_text(mark + "\r\n".join(json.dumps(pair._asdict()) for pair in pairs) + "\n\n")
    corpus = load_pairs(str(path))
    assert corpus.pairs == pairs
    assert corpus.characters == 3 + 3 + 1 + 7
    rows = corpus.dataset(corpus.pairs, 11).rows(torch.arange(3))
    a, b, c = corpus.tokenizer.encode("abc").tolist()
    assert rows.tokens[0].tolist() == [a, b, c, START_ID, c, b, a, END_ID, PAD_ID, PAD_ID]
    assert rows.given.tolist() == [4, 1, 8]
    assert rows.characters.tolist() == [3, 1, 0]
    assert rows.counted.sum(1).tolist() == [4, 2, 1]
    assert corpus.split(0.34) == (pairs[:1], pairs[1:])
    [validation] = corpus.validation_rows(pairs, 11, "pairs")
    assert torch.equal(validation.tokens, rows.tokens)
    known = {"name": corpus.name, "sha256": corpus.sha256}
    assert load_same_corpus(known, "pairs", corpus.tokenizer).pairs == pairs


@pytest.mark.parametrize(
    "line", ["no json", '{"prompt": "a"}', '["a", "b"]', '"text"', "1", '{"prompt": 1, "completion": "b"}']
)
def test_a_bad_pair_is_named_by_its_line(tmp_path, line):
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(PAIRS[0])}\n{line}\n")
    with pytest.raises(ValueError, match="line 2: not"):
        load_pairs(str(tmp_path / "pairs.jsonl"))


def test_empty_and_missing_files_and_too_long_pairs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no pairs"):
        load_pairs(write_pairs(tmp_path / "empty.jsonl", []))
    with pytest.raises(ArgumentError, match=r"nowhere.jsonl: no such file"):
        load_pairs(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="pair 'aaaa' takes 10 tokens, more than the context of 9"):
        PairCorpus("", "", SimpleTokenizer("a"), torch.zeros(0)).dataset([Pair("aaaa", "aaa")], 9)


# ------------------------------------------------------------------------------------------------- scores
def test_metrics_by_hand(monkeypatch):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    metrics = text_metrics(["the cat sat on the mat", "a b c d"], ["the cat sat on a mat", "a b c d"])
    assert metrics["exact"] == 50
    # n-gram matches of both texts: 5 + 4 of 6 + 4, 3 + 3 of 5 + 3, 2 + 2 of 4 + 2, 1 + 1 of 3 + 1; equal lengths
    assert metrics["BLEU"] == pytest.approx(100 * (9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25)
    assert metrics["ROUGE-L"] == pytest.approx(100 * (5 / 6 + 1) / 2)  # "the cat sat on mat": 5 of 6 words
    # chrF of "ab" for "ac": unigrams 1 of 2 on both sides, bigrams 0 of 1; orders above 2 do not exist
    assert text_metrics(["ab"], ["ac"])["chrF"] == pytest.approx(25)
    perfect = text_metrics(["one two three four"], ["one two three four"])
    assert list(perfect.values()) == pytest.approx([100] * 4)
    assert text_metrics(["olleh"], ["olleh"])["BLEU"] == 0, "BLEU counts 4-grams of words"
    for module in ("sacrebleu", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert text_metrics(["a"], ["a"]) == {"exact": 100, "chrF": None, "BLEU": None, "ROUGE-L": None}


def test_held_out_pairs_are_scored_with_both_models(run, capsys, monkeypatch):
    """GPT's likelihood is that of the completions given the prompts, by the chain rule, written out."""
    monkeypatch.setattr(pairs_module, "scoring_batch_size", lambda model: 2)  # batches keep the order of the pairs
    found = checkpoints(run)
    results = score_pairs(found, str(run / "heldout.jsonl"), quick=True)
    assert score_pairs(found, str(run / "heldout.jsonl"), quick=True, seed=1)["gpt"] == results["gpt"]
    model, tokenizer = found["gpt"].model, found["gpt"].tokenizer
    nats, likeliest = 0.0, []
    for pair in HELD_OUT:
        prompt, completion = (tokenizer.encode(pair[key]).tolist() for key in ("prompt", "completion"))
        row = [START_ID, *prompt, START_ID, *completion, END_ID]
        log_p = model(torch.tensor([row])).log_softmax(-1)[0]
        nats -= sum(log_p[i - 1, row[i]].item() for i in range(len(prompt) + 2, len(row)))
        ids = [START_ID, *prompt, START_ID]
        while ids[-1] != END_ID and len(ids) < 32:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        likeliest.append(tokenizer.decode(ids[len(prompt) + 2 :]))
    assert results["gpt"]["nats_per_char"] == pytest.approx(nats / 15, rel=1e-5)
    assert results["gpt"]["texts"] == likeliest
    for name, m in results.items():
        assert len(m["texts"]) == 5
        assert m["is_bound"] == (name == "llada")
        assert m["ci95"][0] < m["nats_per_char"] < m["ci95"][1]
    capsys.readouterr()
    results["gpt"] |= {"ci95": None, "BLEU": None}
    print_scores(results)
    out, err = capsys.readouterr()
    heading, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines())
    assert [line[0] for line in lines] == ["llada", "gpt"]
    found = dict(zip(heading, lines[1], strict=True))
    assert (found["pairs"], found["BLEU"], found["95 % interval"], found["kind"]) == ("5", "-", "-", "exact")
    assert found["nats/char"] == f"{results['gpt']['nats_per_char']:.4f}"
    assert "BLEU and ROUGE-L count words" in err  # issue 24, point 28
    assert "for the columns with -: pip install sacrebleu" in err


def test_pairs_that_were_trained_on_are_noticed_and_other_models_and_files_refused(run, capsys):
    score_pairs(checkpoints(run, "gpt"), str(run / "train.jsonl"), quick=True)
    assert "not all held out" in capsys.readouterr().err
    for name, entries, problem in (
        ("unknown", [{"prompt": "é", "completion": "b"}], "unknown character"),
        ("long", [{"prompt": "a" * 40, "completion": "b"}], "the pair 'aaaa"),
        ("empty", [{"prompt": "a", "completion": ""}], "empty.jsonl: all completions are empty"),
    ):
        with pytest.raises(ValueError, match=problem):
            score_pairs(checkpoints(run, "gpt"), write_pairs(run / f"{name}.jsonl", entries))
    other = checkpoints(run, "gpt")
    other["gpt"].model.config = random_model("gpt").config
    with pytest.raises(ArgumentError, match="pairs needs models of pairs"):
        score_pairs(other, str(run / "heldout.jsonl"))
