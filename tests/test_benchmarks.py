"""The benchmarks' arithmetic, tables and command line. No test depends on how fast anything is."""

import copy
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import toy
from conftest import ROOT

import benchmarks.__main__
from autoregressive import decode
from benchmarks import decoding, sampling, timing, training
from checkpoint import Checkpoint, save_checkpoint
from data import load_corpus
from likelihood import standard_error
from model import MODELS, ModelConfig
from sampler import SamplingConfig
from tokenizer import END_ID, PAD_ID


# ------------------------------------------------------------------------------------------------- timing
def test_pairs_by_hand():
    pairs = timing.Pairs([4.0, 6.0, 5.0], [2.0, 2.0, 2.0])
    assert pairs.ratio == 2.5  # median 5 over median 2
    assert str(pairs) == "2.50x (2.00..3.00)"


def test_alternate_calls_in_turns_after_an_uncounted_call_of_each():
    calls = []
    pairs = timing.alternate(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert calls == ["a", "b"] * 4
    assert len(pairs.a) == len(pairs.b) == 3
    assert min(pairs.a + pairs.b) >= 0


def test_steady_machine():
    assert timing.is_steady(100, 119)
    assert not timing.is_steady(100, 121)
    assert not timing.is_steady(121, 100)


def test_print_table_aligns_columns(capsys):
    timing.print_table(iter([("name", "ms"), ("a longer name", "7"), ("b", "1234")]))
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["name           ms", "a longer name  7", "b              1234"]
    assert printed.err.splitlines() == ["a longer name  7", "b  1234"]


def test_an_interrupted_table_prints_the_rows_it_has(capsys):
    def rows():
        yield "name", "ms"
        yield "a", "1"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.print_table(rows())
    assert capsys.readouterr().out.splitlines() == ["name  ms", "a     1"]


# ------------------------------------------------------------------------------------------------- sampling: figures
def test_the_random_row_is_an_upper_bound_and_labelled_so():
    """Its mean is E over orders of -log p(x | order), which is above the -log of the mean over orders (Jensen)."""
    predict, x = toy.TablePredictor(), torch.tensor([0, 2, 1, 1])
    order_nats = torch.tensor([chain_rule(predict, x, order) for order in itertools.permutations(range(toy.T))])
    marginal = math.log(len(order_nats)) - (-order_nats).logsumexp(0).item()  # the exact NLL of the random order
    config = SamplingConfig(order="random", steps=toy.T, temperature=1.0)
    likelihood = sampling.score(predict, x.expand(4000, -1), config, toy.MASK)
    figure, error = likelihood.window_nats.mean().item(), standard_error(likelihood.window_nats, torch.ones(4000))
    assert sampling.kind(likelihood) == "upper bound"
    assert figure == pytest.approx(order_nats.mean().item(), abs=4 * error)
    assert figure - 4 * error > marginal


def test_scores_of_deterministic_orders_are_exact():
    """Left to right by hand; and over all strings the probabilities of every exact sampler sum to 1."""
    predict, strings = toy.TablePredictor(), toy.all_strings()
    left = sampling.score(predict, strings, SamplingConfig(order="left", steps=toy.T, temperature=1.0), toy.MASK)
    assert left.window_nats[5].item() == pytest.approx(chain_rule(predict, strings[5], range(toy.T)))
    configs = sampling.samplers(toy.T)
    exact = {name: config for name, config in configs.items() if config.has_exact_likelihood}
    assert {config.order for config in exact.values()} == {"left", "confidence", "entropy", "sweep", "strided"}
    for config in exact.values():
        likelihood = sampling.score(predict, strings, config, toy.MASK)
        assert sampling.kind(likelihood) == "exact"
        assert (-likelihood.window_nats).exp().sum().item() == pytest.approx(1)


def test_the_published_rule_has_no_likelihood():
    config = SamplingConfig(order="drawn_confidence", steps=toy.T, temperature=1.0)
    likelihood = sampling.score(toy.TablePredictor(), toy.all_strings(), config, toy.MASK)
    assert likelihood is None
    assert sampling.kind(likelihood) == sampling.nats(likelihood) == sampling.difference(likelihood, None) == "-"


def test_differences_are_paired():
    """Two likelihoods that differ by the same amount on every window: the interval of the difference is 0."""
    config = SamplingConfig(order="left", steps=toy.T, temperature=1.0)
    a = sampling.score(toy.TablePredictor(), toy.all_strings(), config, toy.MASK)
    b = type(a).from_token_nats([a.token_nats - 0.5])
    assert sampling.difference(a, b) == "+0.500 +- 0.000"
    assert sampling.difference(a, a) == "-"


def test_every_sampler_is_scored_and_timed_at_temperature_1():
    assert all(config.temperature == 1 for config in sampling.samplers(128).values())
    assert next(iter(sampling.samplers(128).values())).has_exact_likelihood  # the reference of the paired differences
    assert sampling.BOUND_REFERENCE in sampling.samplers(128)


def chain_rule(predict, x: torch.Tensor, order) -> float:
    """-log p(x | order): reveal one position at a time."""
    nats, masked = 0.0, torch.ones(len(x), dtype=torch.bool)
    for i in order:
        nats += toy.cross_entropies(predict, x, masked[None])[0, i].item()
        masked[i] = False
    return nats


# ------------------------------------------------------------------------------------------------- sampling: the table
@pytest.fixture
def trained(tmp_path, corpus_file, monkeypatch):
    """Checkpoints of a tiny LLaDA and GPT of context 16, untrained, in the folder that is returned."""
    monkeypatch.setattr(sampling, "BATCH_SIZES", (1, 2))
    for name in MODELS:
        save_tiny(tmp_path / name / "best.pt", name, corpus_file, val_fraction=0.2)
    return tmp_path


def save_tiny(path, name: str, corpus_file, val_fraction: float, parallel: int = 1) -> None:
    corpus = load_corpus(str(corpus_file))
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "ngram_rows": 101, "parallel": parallel}
    config = ModelConfig(corpus.tokenizer.vocab_size, 16, **sizes)
    about = {"name": corpus.name, "sha256": corpus.sha256, "val_fraction": val_fraction}
    torch.manual_seed(0)
    save_checkpoint(path, Checkpoint(MODELS[name](config), corpus.tokenizer, about))


def test_each_row_says_what_its_figure_is(trained, corpus_file):
    save_tiny(trained / "streams" / "gpt" / "best.pt", "gpt", corpus_file, val_fraction=0.2, parallel=4)
    picture = trained / "frontier.png"
    heading, *rows = sampling.compare_samplers(trained, 4, (16, 32), [trained / "streams"], picture)
    assert picture.stat().st_size > 10_000
    rows = [dict(zip(heading, row, strict=True)) for row in rows]
    assert {row["T"] for row in rows} == {"16"}  # the context: 32 is cut to it
    others = [f"GPT trained in 4, {n} streams" for n in (1, 2, 8)]
    assert [row["sampler"] for row in rows] == [*sampling.samplers(16), "GPT, 1 stream", *others, "GPT, 4 streams"]
    for row in rows:
        order = row["sampler"].split(",")[0]
        assert row["kind"] == {"random": "upper bound", "drawn_confidence": "-"}.get(order, "exact")
        assert (row["nats/char"] == "-") == (order == "drawn_confidence")
    by_name = {row["sampler"]: row for row in rows}
    assert by_name["left, 1 a step"]["NFE"] == by_name["GPT, 1 stream"]["NFE"] == "16.0"
    assert by_name["sweep, 8 a step"]["NFE"] == "2.0"
    assert by_name["GPT, 4 streams"]["NFE"] == "4.0"
    assert by_name["GPT trained in 4, 8 streams"]["NFE"] == "2.0"
    assert by_name["left, 1 a step"]["minus left, 1 a step (exact)"] == "-"
    assert by_name["left, 1 a step"]["minus random, 1 a step (upper bound)"] != "-"


def test_no_gpt_that_was_trained_on_the_scored_windows(trained, corpus_file, capsys):
    save_tiny(trained / "gpt" / "best.pt", "gpt", corpus_file, val_fraction=0.1)
    _, *rows = sampling.compare_samplers(trained, 4, lengths=(16,))
    assert len(rows) == len(sampling.samplers(16))
    assert "no row for GPT" in capsys.readouterr().err


def test_no_checkpoint_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint under"):
        next(sampling.compare_samplers(tmp_path, 4, lengths=(16,)))


# ------------------------------------------------------------------------------------------------- decoding
@pytest.fixture
def tiny_networks(monkeypatch):
    """One small network, not compiled, and short texts."""
    networks = {"1 layer x 16": {"n_layer": 1, "n_head": 2, "n_embd": 16, "ngram_rows": 101}}
    monkeypatch.setattr(decoding, "NETWORKS", networks)
    monkeypatch.setattr(decoding, "compiled_copy", copy.deepcopy)
    monkeypatch.setattr(decoding, "SHORT", 5)
    monkeypatch.setattr(decoding, "LONG", 20)
    monkeypatch.setattr(decoding, "CONTEXT", 64)


def test_decoders_are_compared_on_the_same_number_of_characters(tiny_networks):
    heading, *rows = decoding.compare_decoders(quick=True)
    assert [row[1] for row in rows] == ["5", "5", "64", "64", "64", "20", "20", "5"]
    assert all(len(row) == len(heading) for row in rows)


def test_a_decoder_writes_exactly_as_many_characters_as_asked(tiny_networks, monkeypatch):
    written = []
    model = decoding.random_gpt(decoding.NETWORKS["1 layer x 16"])
    monkeypatch.setattr(decoding, "decode", lambda *args, **settings: written.extend(decode(*args, **settings)) or [])
    decoding.Decoder("cached", model, decoding.DecodingConfig()).write(50)
    assert len(written) == 50
    assert not torch.isin(torch.cat(written), torch.tensor([END_ID, PAD_ID])).any()


# ------------------------------------------------------------------------------------------------- training
SCRIPT = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for flag in ("--model", "--minutes", "--seed", "--val-fraction", "--data", "--arch", "--out"):
    parser.add_argument(flag)
args = parser.parse_args()
folder = pathlib.Path(args.out) / args.model
folder.mkdir()
summary = {"nats_per_char": float(args.minutes), "is_bound": args.arch == "rotary", "tokens_per_second": 7.0}
(folder / "summary.json").write_text(json.dumps(summary))
"""


def test_a_training_is_a_process_and_its_summary(tmp_path, monkeypatch):
    """With a script in place of train.py that returns what it was given."""
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.setattr(training, "TRAIN", tmp_path / "train.py")
    result = training.run_training("gpt", 30.0, 0, "text.txt", "--arch=rotary")
    assert (result.seconds, result.nats_per_char, result.is_bound, result.tokens_per_second) == (30, 0.5, True, 7)
    assert result.peak_megabytes > 1
    assert len(training.result_cells([result])) == len(training.RESULT_COLUMNS)
    with pytest.raises(OSError, match="unrecognized arguments: --bad"):
        training.run_training("gpt", 30.0, 0, None, "--bad")


@pytest.mark.parametrize("side", [0, 1])
def test_train_py_accepts_the_flags_of_the_benchmark(side, tmp_path, monkeypatch):
    """It is found from any folder, and its first complaint is about the text."""
    monkeypatch.chdir(tmp_path)
    flags = [pair[side] for pair in training.COMPARISONS]
    with pytest.raises(OSError, match=r"--data.*missing\.txt: no such file"):
        training.run_training("gpt", 0.6, 0, "missing.txt", *flags)


def test_results_over_seeds():
    results = [training.TrainingResult(42, loss, True, 1000 * loss, 500 + loss) for loss in (3.0, 1.0, 2.0)]
    cells = training.result_cells(results)
    assert cells == ("2.0000", "upper bound", "1.0000 2.0000 3.0000", "2,000", "42", "503")


# ------------------------------------------------------------------------------------------------- command line
def run_module(*arguments: str) -> subprocess.CompletedProcess:
    """`python -m benchmarks ARGUMENTS`, from the root of the repository."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-X", "importtime", "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)


def test_help_names_every_benchmark_without_importing_torch():
    process = run_module("--help")
    assert process.returncode == 0
    assert all(name in process.stdout for name in benchmarks.__main__.BENCHMARKS)
    assert "| torch\n" not in process.stderr


def test_help_of_sampling_says_what_the_figures_are():
    process = run_module("sampling", "--help")
    assert process.returncode == 0
    assert "upper bound" in process.stdout


def test_a_bad_name_is_one_line():
    process = run_module("speed")
    lines = [line for line in process.stderr.splitlines() if not line.startswith("import time:")]
    assert process.returncode == 2
    assert len(lines) == 1
    assert "speed" in lines[0]


def test_the_table_is_followed_by_its_caption_and_the_machine(monkeypatch, capsys):
    monkeypatch.setattr(timing, "gigaflops", lambda: 100.0)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "decoding", "--quick"])
    monkeypatch.setattr(decoding, "compare_decoders", lambda quick: iter([("heading",), ("row",)]))
    benchmarks.__main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["heading", "row"]
    assert lines[2].startswith("GPT with random weights")
    assert "100 GFLOP/s before and 100 after" in lines[-1]


def test_models_on_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "budget", "--model", *MODELS])
    assert benchmarks.__main__.parse_args().model == list(MODELS)
