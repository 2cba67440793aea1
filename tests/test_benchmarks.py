"""The benchmarks' arithmetic, turns, tables and command line. No test depends on how fast anything is."""

import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import TINY
from toy import random_model

from autoregressive import exact_nll
from checkpoint import Checkpoint, save_checkpoint
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


def test_the_table_is_printed_with_its_caption_and_the_machine_or_as_far_as_it_was_measured(monkeypatch, capsys):
    def rows(args):
        """What it measures. How."""
        yield from [("name", "ms"), ("a longer name", "7"), ("b", "1234")]
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(bench, "gigaflops", lambda: 100.0)
    monkeypatch.setattr(bench, "BENCHMARKS", {"decoding": rows})
    monkeypatch.setattr(sys, "argv", ["bench", "decoding", "--quick"])
    for interrupted in (False, True):
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            bench.main()
        printed = capsys.readouterr()
        assert printed.err.splitlines() == ["a longer name  7", "b  1234"]
        *_, last, caption, machine = [*printed.out.splitlines(), *["", ""] * interrupted]
        assert last == "| b             | 1234 |"
        assert caption == ("" if interrupted else "What it measures. How.")
        assert machine == "" or "100 GFLOP/s before and 100 after" in machine


# ------------------------------------------------------------------------------------------------- sampling, gaps
@pytest.fixture
def trained(tmp_path, corpus_file) -> Path:
    """A folder with checkpoints of a tiny LLaDA and GPT, untrained, of context 16."""
    corpus = load_corpus(str(corpus_file))
    about = {"name": corpus.name, "sha256": corpus.sha256, "val_fraction": 0.2}
    for name in MODELS:
        model = random_model(name, vocab_size=corpus.tokenizer.vocab_size, n_layer=1)
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
    assert rows[0]["sampler"] == "LLaDA, sweep, 16 steps"
    assert rows[0]["minus first"] == "+0.000"
    assert {row["NFE"] for row in rows if "8 steps" not in row["sampler"]} == {"16.0"}
    assert {row["kind"] for row in rows if "random" not in row["sampler"]} == {"exact"}
    configs = [calls[i + 1] for i in range(0, len(calls), 8)]
    assert len(configs) == len(rows)
    assert calls == [config for own in configs for config in [configs[0], own] * 4]  # two batch sizes, warm, measured
    assert all((config.temperature, getattr(config, "correct", 0)) == (1, 0) for config in configs)


def test_holes_are_filled_by_each_model(trained, monkeypatch):
    """What is kept of GPT's candidates is the likeliest with the right side; the given text never changes."""
    paths = [trained / name for name in MODELS]
    rows = rows_of(bench.gaps, checkpoints=paths)
    writers = ["LLaDA", "GPT, left side", "GPT, best of 16"]
    assert [(row["hole"], row["writer"]) for row in rows] == [(n, name) for n in ("1", "4", "16") for name in writers]
    for row in rows:
        assert row["all right"] == row["characters right"] or row["hole"] != "1"
    runs, (windows, *_) = bench.held_out(Namespace(data=None, quick=False, checkpoints=paths), 2)
    gpt, hole = runs["gpt"].model, slice(6, 7)
    assert gpt.never[END_ID]
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
    assert [row["decoder"] for row in rows] == ["cached", "cached, compiled"]
    assert {text.numel() for text in written} == {8}
    assert not any((text == END_ID).any() or (text == MASK_ID).any() for text in written)


# ------------------------------------------------------------------------------------------------- budget
def test_a_budget_is_scaled_by_the_machine_and_its_losses_are_medians(monkeypatch):
    def run_train(*flags):
        given = dict(flag.split("=") for flag in flags if "=" in flag)
        assert flags[-2:] == ("text.txt", f"--seed={given['--seed']}")
        assert given["--val-fraction"] == "0.1"
        assert given.get("--sweep-share") == ("0" if given["--model"] == "llada" else None)
        loss, is_bound = float(given["--minutes"]) + int(given["--seed"]), given["--model"] == "llada"
        return {"nats_per_char": loss, "is_bound": is_bound, "tokens_per_second": 7.0}

    monkeypatch.setattr(bench, "run_train", run_train)
    monkeypatch.setattr(bench, "gigaflops", lambda: 200.0)
    monkeypatch.setattr(bench, "BUDGETS", (60,))
    _, llada, gpt = bench.budget(Namespace(quick=False, data=["text.txt"]))
    assert gpt == ("60", "gpt", "1.5000", "exact", "0.5000 1.5000 2.5000", "7")
    assert llada[3] == "upper bound"


def test_a_budget_trains_in_a_process_of_its_own(corpus_file):
    flags = "--model=llada", "--val-fraction=0.1", "--minutes=0.001", "--sweep-share=0", "--seed=0", *TINY, "--data"
    summary = bench.run_train(*flags, str(corpus_file))
    assert summary["is_bound"]
    assert min(summary["nats_per_char"], summary["tokens_per_second"]) > 0
    with pytest.raises(OSError, match=r"--data.*missing\.txt: no such file"):
        bench.run_train(*flags, "missing.txt")


# ------------------------------------------------------------------------------------------------- command line
def test_the_help_names_every_benchmark_and_says_what_each_measures(run_script):
    output, _ = run_script("extras/bench.py", "--help")
    assert all(name in output for name in bench.BENCHMARKS)
    assert "upper bound" in run_script("extras/bench.py", "sampling", "--help")[0]
