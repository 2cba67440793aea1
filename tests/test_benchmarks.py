"""The benchmarks' arithmetic, turns, tables and command line. No test depends on how fast anything is."""

import ast
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from autoregressive import exact_nll
from checkpoint import Checkpoint, load_checkpoint, new_model, save_checkpoint
from config import ModelConfig
from data import load_corpus
from extras import bench
from model import MODELS
from tokenizer import END_ID, MASK_ID, START_ID


# ------------------------------------------------------------------------------------------------- timing
def test_what_is_timed_is_called_in_turns_after_an_uncounted_call_of_each(monkeypatch):
    calls, seconds = [], iter([4.0, 2.0, 6.0, 2.0, 5.0, 2.0])
    monkeypatch.setattr(bench, "timeit", lambda function, number: function() or next(seconds))
    found = bench.in_turns(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert calls == ["a", "b"] * 4
    assert found == (2.0, "2.50x (2.00..3.00)")  # median 5 over median 2


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_table_is_printed_with_its_caption_and_the_machine_or_as_far_as_it_was_measured(
    monkeypatch, capsys, interrupted
):
    def rows(args):
        """What it measures. How."""
        yield from [("name", "ms"), ("a longer name", "7"), ("b", "1234")]
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(bench, "gigaflops", lambda: 100.0)
    monkeypatch.setattr(bench, "BENCHMARKS", {"decoding": rows})
    monkeypatch.setattr(sys, "argv", ["bench", "decoding", "--quick"])
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        bench.main()
    printed = capsys.readouterr()
    table, rest = printed.out.splitlines()[:4], printed.out.splitlines()[4:]
    assert table[-1] == "| b             | 1234 |"
    assert printed.err.splitlines() == ["a longer name  7", "b  1234"]
    assert [line.partition(" threads")[0][-1:] for line in rest] == ([] if interrupted else [".", "1"])
    assert interrupted or (rest[0] == "What it measures. How." and "100 GFLOP/s before and 100 after" in rest[1])


# ------------------------------------------------------------------------------------------------- sampling, gaps
@pytest.fixture
def trained(tmp_path, corpus_file) -> Path:
    """A folder with checkpoints of a tiny LLaDA and GPT, untrained, of context 16."""
    corpus = load_corpus(str(corpus_file))
    for name in MODELS:
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "ngram_rows": 101}
        model = new_model(name, ModelConfig(corpus.tokenizer.vocab_size, 16, **sizes))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)  # new models are uniform predictors
        about = {"name": corpus.name, "sha256": corpus.sha256, "val_fraction": 0.2}
        save_checkpoint(tmp_path / name / "best.pt", Checkpoint(model, corpus.tokenizer, about))
    return tmp_path


def rows_of(benchmark, **settings) -> list[dict[str, str]]:
    heading, *rows = benchmark(Namespace(data=None, quick=True, **settings))
    assert all(len(row) == len(heading) for row in rows)
    return [dict(zip(heading, row, strict=True)) for row in rows]


def test_each_sampler_is_scored_and_timed_with_the_same_settings(trained, monkeypatch):
    """At temperature 1, uncorrected; each row has its own turns of the first one."""
    calls, write_texts = [], bench.write_texts
    monkeypatch.setattr(bench, "write_texts", lambda *args: calls.append(args[3]) or write_texts(*args))
    rows = rows_of(bench.sampling, checkpoints=[trained / name for name in MODELS])
    assert rows[0]["sampler"] == "llada, sweep, 16 steps"
    assert rows[0]["minus the first row"] == "+0.000"
    assert [row["NFE"] for row in rows if row["sampler"] in ("llada, confidence, 16 steps", "gpt, as trained")] == [
        *("16.0", "16.0"),
    ]
    assert {row["kind"] for row in rows} == {"exact"}
    configs = [calls[i + 1] for i in range(0, len(calls), 8)]
    assert len(configs) == len(rows)
    assert calls == [config for own in configs for config in [configs[0], own] * 4]  # two batch sizes, warm, measured
    assert all((config.temperature, getattr(config, "correct", 0)) == (1, 0) for config in configs)


def test_holes_are_filled_by_each_model(trained, monkeypatch):
    """What is kept of GPT's candidates is the likeliest with the right side; the given text never changes."""
    paths = [trained / name for name in MODELS]
    rows = rows_of(bench.gaps, checkpoints=paths)
    writers = ["the text", "LLaDA", "GPT, left side", "GPT, best of 16"]
    assert [(row["hole"], row["writer"]) for row in rows] == [(n, name) for n in ("1", "4", "16") for name in writers]
    for row in rows:
        assert len(ast.literal_eval(row["the first of them"])) == int(row["hole"])
        assert row["all right"] == row["characters right"] or row["hole"] != "1"
    *_, windows = bench.held_out(Namespace(data=None, quick=False, checkpoints=paths), 2)
    gpt, hole = load_checkpoint(paths[1]).model, slice(6, 7)
    gpt.never[END_ID] = True
    monkeypatch.setattr(bench, "filled", lambda gpt, rows, hole, **settings: torch.arange(4, 20)[:, None])
    texts = windows.repeat_interleave(16, 0)  # all that could have been drawn
    texts[:, hole] = torch.arange(4, 20).repeat(2)[:, None]
    best = exact_nll(gpt, texts, START_ID).sum(1).view(2, 16).argmin(1) + 4
    assert bench.best_of_drawn(gpt, windows, hole).tolist() == best[:, None].tolist()
    with pytest.raises(ValueError, match="name the checkpoints of a LLaDA and a GPT"):
        rows_of(bench.gaps, checkpoints=paths[:1])


# ------------------------------------------------------------------------------------------------- decoding
def test_decoders_write_as_many_characters_as_they_say(monkeypatch):
    """One small network, not compiled, and short texts."""
    monkeypatch.setattr(bench, "NETWORKS", ((1, 2, 16),))
    monkeypatch.setattr(bench, "CONTEXT", 64)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    written, filled = [], bench.filled
    monkeypatch.setattr(bench, "filled", lambda *args, **settings: written.append(filled(*args, **settings)))
    rows = rows_of(bench.decoding)
    assert [row["B"] for row in rows] == ["cached", "cached, compiled"]
    assert {text.numel() for text in written} == {8}
    assert not any((text == END_ID).any() or (text == MASK_ID).any() for text in written)


# ------------------------------------------------------------------------------------------------- budget
SCRIPT = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for flag in ("--model", "--minutes", "--seed", "--val-fraction", "--data", "--sweep-share", "--out"):
    parser.add_argument(flag)
args = parser.parse_args()
folder = pathlib.Path(args.out) / args.model
folder.mkdir()
summary = {"nats_per_char": float(args.minutes) + int(args.seed), "is_bound": args.model == "llada"}
(folder / "summary.json").write_text(json.dumps(summary | {"tokens_per_second": 7.0}))
"""


def test_a_budget_is_scaled_by_the_machine_and_its_losses_are_medians(tmp_path, monkeypatch):
    """With a script in place of train.py that returns what it was given."""
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.setattr(bench, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(bench, "gigaflops", lambda: 200.0)
    args = Namespace(quick=False, data=["text.txt"], seconds=[60.0])
    _, llada, gpt = bench.budget(args)
    assert gpt == ("60", "gpt", "1.5000", "exact", "0.5000 1.5000 2.5000", "7")
    assert llada[3] == "upper bound"
    monkeypatch.undo()  # the real train.py takes the flags: its first complaint is about the text
    monkeypatch.chdir(tmp_path)
    flags = ("--model=llada", "--seed=0", "--val-fraction=0.1", "--minutes=0.6", "--sweep-share=0")
    with pytest.raises(OSError, match=r"--data.*missing\.txt: no such file"):
        bench.run_train(*flags, "--data", "missing.txt")


# ------------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, ("budget", "sampling", "decoding", "gaps")),
        (["sampling", "--help"], 0, ("upper bound",)),
        (["speed"], 2, ("invalid choice: 'speed'",)),
        (["budget", "--seconds", "0"], 2, ("--seconds",)),
    ],
)
def test_the_command_line(run_script, arguments, status, words):
    printed = "".join(run_script("extras/bench.py", *arguments, check=status))
    assert all(word in printed for word in words)
