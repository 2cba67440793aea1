"""Exact resume, accumulation, two processes, Ctrl-C, a killed worker, memory, and bad flags: the real command."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

from checkpoint import load_checkpoint
from data import load_corpus, validation_windows
from examine import score
from model import CONFIGS, MODELS
from parallel import Processes
from run import Run, Settings
from tokenizer import MASK_ID
from train import calibrate, compute_loss, make_batch, predict, train_loop, train_step, validate


def weights(path) -> dict:
    return load_checkpoint(path).model.state_dict()


def assert_same_run(one, two):
    """Equal weights and equal histories, but for the clock."""
    a, b = load_checkpoint(one), load_checkpoint(two)
    assert a.step == b.step
    for name, value in a.model.state_dict().items():
        assert torch.equal(value, b.model.state_dict()[name]), name
    for x, y in zip(a.history, b.history, strict=True):
        assert {k: v for k, v in x.items() if k != "seconds"} == {k: v for k, v in y.items() if k != "seconds"}


def test_lladas_objective_has_the_bound_as_its_mean():
    """t is not drawn uniformly in training; its density must cancel. A predictor whose loss is m/2 with m masks."""
    T, B = 4, 4096
    sequences = torch.full((B, T), 4)

    def model(tokens, at):
        loss = (tokens == MASK_ID).sum(1, keepdim=True).expand(B, T)[at] / 2
        logits = torch.full((len(loss), 6), -torch.inf)
        logits[:, 4], logits[:, 5] = -loss, torch.log1p(-torch.exp(-loss))
        return logits

    generator = torch.Generator().manual_seed(0)
    batches = [make_batch("llada", sequences, generator) for _ in range(200)]
    for masked, targets, mask, _ in batches:
        assert torch.equal(masked, torch.where(mask, MASK_ID, targets))
    losses = torch.stack([compute_loss("llada", predict("llada", model, batch), batch) for batch in batches])
    bound = sum(m / 2 for m in range(1, T + 1)) / T  # the mean over m = 1..T of c(m)
    assert losses.mean().item() == pytest.approx(bound, abs=5 * losses.std().item() / 200**0.5 + 2e-3)  # t >= MIN_T


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(command, corpus_file, tmp_path, model):
    flags = ["--model", model, "--data", corpus_file, *TINY, "--dropout", 0.1, "--eval-every", 4, "--seed", 7]
    flags += ["--short-share", 0.5]  # until after the stop
    command("train.py", *flags, "--steps", 20, "--out", "whole")
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, flags), "--steps", "20", "--out", "parts"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("step      8"):
            process.send_signal(signal.SIGINT)  # Ctrl-C somewhere after step 8
            break
    rest = process.stderr.read()
    assert process.wait(60) == 0, rest
    stopped = load_checkpoint(tmp_path / f"parts/{model}/last.pt")
    if stopped.step < 20:
        assert "--resume" in rest
        command("train.py", "--model", model, "--resume", "--out", "parts")
    assert_same_run(tmp_path / f"whole/{model}/last.pt", tmp_path / f"parts/{model}/last.pt")
    lines = (tmp_path / f"parts/{model}/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12, 16, 20]


def small_run(name: str, corpus_file, **settings) -> Run:
    corpus = load_corpus(str(corpus_file))
    torch.manual_seed(0)
    model = MODELS[name](CONFIGS[name](corpus.tokenizer.vocab_size, 16, n_embd=16, n_head=2, n_layer=1, ngram_rows=101))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return Run(model, corpus, 0.2, Settings(batch_size=8, **settings), Processes("cpu"))


@pytest.mark.parametrize("model", ["llada", "gpt"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_calibration_finds_the_temperature_of_least_loss_whatever_the_head_was_scaled_by(corpus_file, model, factor):
    run = small_run(model, corpus_file, steps=1, calibration=0.1)
    for _ in range(40):
        train_step(run, run.model, 0.0)
    calibrate(run)
    run.val_windows = run.calibration_windows
    best, weight = validate(run), run.model.head.weight
    with torch.no_grad():
        for other in (0.95, 1.05 / 0.95):
            weight.mul_(other)
            assert validate(run) > best
        weight.mul_(factor / 1.05)
    assert calibrate(run) == pytest.approx(factor, rel=1e-3)
    assert validate(run) == pytest.approx(best, abs=1e-5)


def test_text_kept_to_calibrate_is_neither_trained_nor_validated_on(command, corpus_file, tmp_path):
    run = small_run("gpt", corpus_file, calibration=0.25)
    train_ids, val_ids = run.corpus.split(0.2)
    kept = int(0.25 * len(train_ids))
    assert torch.equal(run.train_set.ids, train_ids[kept:])
    assert torch.equal(run.calibration_windows, validation_windows(train_ids[:kept], 16, run.corpus.tokenizer)[0])
    assert torch.equal(run.val_ids, val_ids)
    notes = command("train.py", "--data", corpus_file, *TINY, "--steps", 20, "--calibration", 0.25).stderr
    lines = [json.loads(line) for line in (tmp_path / "out/llada/metrics.jsonl").read_text().splitlines()]
    assert ["temperature" in line for line in lines] == [False] * 9 + [True]
    assert f"temperature {lines[-1]['temperature']:.3f}" in notes


def test_short_windows_hold_the_same_tokens_for_their_share_of_the_run(corpus_file):
    windows = {}
    for share in (0.0, 0.5):
        run = small_run("gpt", corpus_file, steps=4, short_share=share)
        windows[share] = [run.sample_windows(done) for done in (0, 0.25, 0.5, 0.75)]
    assert [x.shape for x in windows[0.0]] == [(8, 16)] * 4
    assert [x.shape for x in windows[0.5]] == [(16, 8), (16, 8), (8, 16), (8, 16)]
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(*windows.values(), strict=True))
    flops = []
    for done in (0.4, 0.6):
        run = small_run("gpt", corpus_file, short_share=0.5)
        train_step(run, run.model, done)
        flops.append(run.flops)
    assert flops[1] - flops[0] == 12 * 16 * (16 - 8) * 8 * 16  # 12 C T a token, one layer


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_accumulated_gradients_are_those_of_the_large_batch(corpus_file, model):
    """Gradients, not weights: both optimizers would forgive a wrong factor."""
    gradients = []

    class Recorder:
        def __init__(self, model):
            self.model = model

        def step(self):
            gradients.append({name: p.grad.clone().to_dense() for name, p in self.model.named_parameters()})

        def zero_grad(self):
            pass

    losses = []
    for accumulate in (1, 4):
        run = small_run(model, corpus_file, accumulate=accumulate)
        run.optimizers = [Recorder(run.model)]
        losses.append(train_step(run, run.model, 0.0).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_gpu_paths_compute_the_same_loss(corpus_file, model):
    """What CUDA does by default, as far as a CPU can: bfloat16 autocast, and the encoder captured as a graph."""
    run = small_run(model, corpus_file)
    batch = make_batch(model, run.train_set.sample(8, run.generator), run.generator)
    exact = compute_loss(model, predict(model, run.model, batch), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = compute_loss(model, predict(model, run.model, batch), batch)
    rounded.backward()
    assert all(p.grad.to_dense().isfinite().all() for p in run.model.parameters())
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)
    assert rounded.item() != exact.item()
    assert run.model.encoder.ngrams.tables.sparse  # on a CPU, not compiled
    run.model.encoder.compile(backend="aot_eager", fullgraph=True)
    assert compute_loss(model, predict(model, run.model, batch), batch).item() == pytest.approx(exact.item(), rel=1e-5)


def torchrun(tmp_path, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "train.py"), *map(str, arguments)],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_train_the_same_model_as_one(command, corpus_file, tmp_path):
    flags = ["--data", corpus_file, *TINY, "--steps", 6, "--eval-every", 2]
    command("train.py", *flags, "--out", "one")
    process = torchrun(tmp_path, *flags, "--out", "two")
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert errors.count("nats/char, upper bound") == 1, "only process 0 reports"
    one, two = (load_checkpoint(tmp_path / out / "llada/last.pt").history for out in ("one", "two"))
    for key in ("train_loss", "val_loss"):
        assert [line[key] for line in one] == pytest.approx([line[key] for line in two], rel=1e-4)


def test_a_killed_worker_ends_the_run_clearly_and_the_checkpoint_is_whole(corpus_file, tmp_path):
    process = torchrun(tmp_path, "--data", corpus_file, *TINY, "--steps", 10**6, "--eval-every", 5)
    seen = ""
    for line in process.stderr:
        seen += line
        if line.startswith("step     10"):
            break
    workers = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    seen += process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "another training process died; the last checkpoint is intact" in seen
    assert load_checkpoint(tmp_path / "out/llada/last.pt").step >= 10


def test_training_on_a_large_text_keeps_memory_flat(tmp_path):
    """200 MB of text cost at most the touched pages of its map; in memory it would be text and ids, 400 MB."""
    path = tmp_path / "large.txt"
    with open(path, "w") as file:
        for i in range(200):
            file.write(f"{i} the king is dead, long live the king\n" * (10**6 // 40))
    peaks = {}
    for name in (str(path), "pydoc"):
        program = "import resource, train; train.main(); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        flags = ["--data", name, *TINY, "--steps", "30", "--out", str(tmp_path / "out")]
        process = subprocess.run(
            [sys.executable, "-c", program, *flags], cwd=tmp_path, capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        peaks[name] = int(process.stdout) / 1024
    assert peaks[str(path)] < peaks["pydoc"] + 300, peaks


def test_a_new_run_moves_the_old_one_aside(command, corpus_file, tmp_path):
    flags = ["--data", corpus_file, *TINY, "--steps", 2]
    command("train.py", *flags, "--seed", 1)
    first = weights(tmp_path / "out/llada/last.pt")
    command("train.py", *flags, "--seed", 2)
    assert all(torch.equal(v, weights(tmp_path / "out/llada.1/last.pt")[k]) for k, v in first.items())
    second = weights(tmp_path / "out/llada/last.pt")
    assert any(not torch.equal(v, second[k]) for k, v in first.items())
    command("train.py", "--resume", "out/llada.1/last.pt", "--steps", 4)
    assert all(torch.equal(v, weights(tmp_path / "out/llada.2/last.pt")[k]) for k, v in second.items())
    assert load_checkpoint(tmp_path / "out/llada/last.pt").step == 4


def test_minutes_follow_the_clock(corpus_file):
    """With a clock that ticks once a reading, the run ends when it says so, and the learning rate falls with it."""
    ticks = itertools.count()
    run = small_run("gpt", corpus_file, minutes=2)
    train_loop(run, clock=lambda: next(ticks))
    rates = [line["lr"] for line in run.history]
    assert run.progress(next(ticks)) == 1
    assert 30 < run.step < 120  # 120 seconds, each step reads the clock at least once
    assert len(rates) == 10
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.1 * max(rates)


def test_training_learns(command, corpus_file, tmp_path):
    """Both objectives fall well below the entropy of independent characters on a text with structure."""
    for model in ("llada", "gpt"):
        command("train.py", "--model", model, "--data", corpus_file, *TINY, "--n-embd", 32, "--steps", 400)
        checkpoint = load_checkpoint(tmp_path / f"out/{model}/best.pt")
        corpus = load_corpus(str(corpus_file))
        train_ids, val_ids = corpus.split(0.2)
        frequencies = torch.bincount(train_ids.long()).float() / len(train_ids)
        unigram = -frequencies[val_ids.long()].clamp(min=1e-9).log().mean().item()
        windows = validation_windows(val_ids, 16, corpus.tokenizer)
        result = score(checkpoint.model, windows, pairs=2, seed=0, tick=lambda windows: None)
        assert result.nats_per_char < 0.6 * unigram


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0"], ["--steps", "at least 1"]),
        (["--minutes", "nan"], ["--minutes"]),
        (["--lr", "fast"], ["--lr", "'fast' is not a number"]),
        (["--val-fraction", "1"], ["--val-fraction", "less than 1"]),
        (["--calibration", "0.9999"], ["--calibration 0.9999", "too few"]),
        (["--n-embd", "30", "--n-head", "4"], ["n_embd", "30"]),
        (["--data", "missing.txt"], ["--data missing.txt", "no such file"]),
        (["--block-size", "10000000"], ["--block-size", "too few"]),
        (["--batch-size", "6", "--accumulate", "4"], ["--batch-size 6"]),
        (["--device", "quantum"], ["--device quantum", "cpu"]),
        (["--device", "cpu:1"], ["--device cpu:1", "cpu"]),
        (["--device", "cpu:foo"], ["--device cpu:foo", "cpu"]),
        (["--arch", "vanilla", "--ngram-rows", "7"], ["--ngram-rows", "vanilla"]),
        (["--resume"], ["out/llada/last.pt", "no such checkpoint"]),
        (["--resume", "--lr", "1"], ["--lr", "drop it"]),
        (["--steps", "1", "--minutes", "1"], ["--minutes", "--steps"]),
    ],
)
def test_bad_flags_get_one_line(command, flags, words):
    process = command("train.py", "--data", "pydoc", *flags, check=2)
    last = process.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), process.stderr
