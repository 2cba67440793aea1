"""Training: objectives, exact resume, calibration, accumulation, two processes, Ctrl-C, memory, presets, bad flags."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch
from conftest import ROOT, TINY
from kill_training import differences

import train
from checkpoint import CheckpointWriter, load_checkpoint, loss_of_weights
from data import load_corpus, validation_rows, window_rows
from diffusion import DiffusionObjective
from model import ENCODERS, MODELS
from tokenizer import MASK_ID, SimpleTokenizer
from trainer import OPTIMIZERS, TrainConfig, Trainer, objective_for, score_validation
from utils.console import progress, run_program
from utils.errors import ArgumentError
from utils.processes import Processes


def weights(path) -> dict:
    return load_checkpoint(path).model.state_dict()


def assert_same_run(one, two):
    """Equal weights and equal histories, except for the seconds."""
    a, b = load_checkpoint(one), load_checkpoint(two)
    assert a.step == b.step
    for name, value in a.model.state_dict().items():
        assert torch.equal(value, b.model.state_dict()[name]), name
    for x, y in zip(a.history, b.history, strict=True):
        assert {k: v for k, v in x.items() if k != "seconds"} == {k: v for k, v in y.items() if k != "seconds"}


def test_mean_of_the_diffusion_loss_is_the_bound():
    """Training does not draw t uniformly, so its density must cancel. The predictor's loss is m/2 with m masks."""
    T, B = 4, 4096
    sequences = torch.full((B, T), 4)

    def model(tokens, at):
        loss = (tokens == MASK_ID).sum(1, keepdim=True).expand(B, T)[at] / 2
        logits = torch.full((len(loss), 6), -torch.inf)
        logits[:, 4], logits[:, 5] = -loss, torch.log1p(-torch.exp(-loss))
        return logits

    objective, generator = DiffusionObjective(), torch.Generator().manual_seed(0)
    batches = [objective.make_batch(window_rows(sequences, SimpleTokenizer("ab")), generator) for _ in range(200)]
    for batch in batches:
        assert torch.equal(batch.inputs, torch.where(batch.mask, MASK_ID, batch.targets))
    losses = torch.stack([objective.loss(objective.predict(model, batch), batch) for batch in batches])
    bound = sum(m / 2 for m in range(1, T + 1)) / T  # the mean over m = 1..T of c(m)
    assert losses.mean().item() == pytest.approx(bound, abs=5 * losses.std().item() / 200**0.5 + 2e-3)  # t >= MIN_T


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(command, corpus_file, tmp_path, model):
    flags = ["--model", model, "--data", corpus_file, *TINY, "--dropout", 0.1, "--eval-every", 4, "--seed", 7]
    flags += ["--short-share", 0.5, "--calibration", 0.1]  # windows are short until after the interruption
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


def small_trainer(name: str, corpus_file, clock=None, **settings) -> Trainer:
    """A tiny run. All its weights are random, so that none has a gradient of zero."""
    settings = {"steps": 1, "batch_size": 8} | ({"steps": None} if "minutes" in settings else {}) | settings
    config = TrainConfig(name, n_layer=1, n_head=2, n_embd=16, block_size=16, ngram_rows=101, **settings)
    trainer = Trainer(config, load_corpus(str(corpus_file)), Processes("cpu"), clock)
    torch.manual_seed(0)
    for p in trainer.model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return trainer


# ------------------------------------------------------------------------------------------------- calibration
@pytest.mark.parametrize("model", ["llada", "gpt"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_calibration_finds_the_temperature_of_least_loss_for_any_scale_of_the_head(corpus_file, model, factor):
    trainer = small_trainer(model, corpus_file, calibration=0.1)
    for _ in range(40):
        trainer.train_step(0.0)
    trainer.calibrate()
    trainer.val_rows = trainer.calibration_rows
    best, weight = trainer.validate(), trainer.model.head.weight
    with torch.no_grad():
        for other in (0.95, 1.05 / 0.95):
            weight.mul_(other)
            assert trainer.validate() > best
        weight.mul_(factor / 1.05)
    assert trainer.calibrate() == pytest.approx(factor, rel=1e-3)
    assert trainer.validate() == pytest.approx(best, abs=1e-5)


def test_text_held_out_for_calibration_is_neither_trained_nor_validated_on(corpus_file):
    trainer = small_trainer("gpt", corpus_file, calibration=0.25)
    train_ids, val_ids = trainer.corpus.split(0.2)
    held_out = int(0.25 * len(train_ids))
    expected = validation_rows(train_ids[:held_out], trainer.corpus.tokenizer, 16)[0]
    assert torch.equal(trainer.train_set.ids, train_ids[held_out:])
    assert torch.equal(trainer.calibration_rows.tokens, expected.tokens)
    assert torch.equal(trainer.val_part, val_ids)


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_val_loss_is_never_calibrated_and_the_last_record_has_both_losses(command, corpus_file, tmp_path, model):
    """The same run without fitting a temperature has the same val_loss throughout, the last one included."""
    trainer = small_trainer(model, corpus_file, steps=20, calibration=0.25)
    trainer.train()
    last = trainer.history[-1]
    assert ["temperature" in record for record in trainer.history] == [False] * 9 + [True]
    assert trainer.validate() == last["calibrated_val_loss"]
    uncalibrated = small_trainer(model, corpus_file, steps=20, calibration=0.25)
    uncalibrated.calibration_rows = None
    uncalibrated.train()
    assert [r["val_loss"] for r in uncalibrated.history] == [r["val_loss"] for r in trainer.history]
    assert uncalibrated.validate() == last["val_loss"] != last["calibrated_val_loss"]

    messages = command("train.py", "--data", corpus_file, *TINY, "--steps", 20, "--calibration", 0.25).stderr
    record = json.loads((tmp_path / "out/llada/metrics.jsonl").read_text().splitlines()[-1])
    line = next(line for line in messages.splitlines() if line.startswith("step     20"))
    for key, digits in (("val_loss", 4), ("calibrated_val_loss", 4), ("temperature", 3)):
        assert f"{record[key]:.{digits}f}" in line


def test_best_checkpoint_has_the_lowest_loss_of_the_weights_it_holds(corpus_file, tmp_path):
    """The last record's val_loss is that of weights which no file holds: calibration has replaced them."""
    trainer = small_trainer("gpt", corpus_file)
    writer = CheckpointWriter(trainer, tmp_path / "gpt")
    records = [
        ({"val_loss": 2.0}, 0),
        ({"val_loss": 1.5}, 1),
        ({"val_loss": 1.4, "calibrated_val_loss": 1.6}, 1),  # calibration made it worse than record 1
        ({"val_loss": 1.7, "calibrated_val_loss": 1.3}, 3),  # and here better than all
    ]
    for step, (record, best) in enumerate(records):
        trainer.step = step
        trainer.history.append(record)
        writer.on_validation(record)
        assert load_checkpoint(tmp_path / "gpt/best.pt").step == best
        assert load_checkpoint(tmp_path / "gpt/last.pt").step == step
    assert [loss_of_weights(record) for record, _ in records] == [2.0, 1.5, 1.6, 1.3]


# ------------------------------------------------------------------------------------------------- steps
def test_the_loss_is_not_read_from_the_device_unless_it_is_shown(corpus_file, monkeypatch):
    """Reading it waits for the device. The loop reads it once for each validation, and for a status that is shown."""
    trainer = small_trainer("gpt", corpus_file, steps=20, eval_every=20)
    reads = []
    for method in ("item", "__float__", "__format__", "tolist"):
        original = getattr(torch.Tensor, method)

        def counted(tensor, *args, original=original, method=method):
            reads.append(method)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, method, counted)
    with progress(1, "train", visible=False) as update:
        trainer.train(update=update)
    assert reads.count("item") == 2  # the training loss and the validation loss of the only record
    assert set(reads) == {"item"}
    reads.clear()
    trainer.losses = [torch.tensor(1.25)]
    assert trainer.status().startswith("step 20  loss 1.250  ")
    assert reads


def test_update_is_called_after_each_step_with_a_function_for_the_status(corpus_file):
    trainer, seen = small_trainer("gpt", corpus_file, steps=4), []
    trainer.train(update=lambda done, status: seen.append((done, status().split("  ")[0])))
    assert seen == [(0.25, "step 1"), (0.5, "step 2"), (0.75, "step 3"), (1.0, "step 4")]


def test_seconds_count_all_sessions(corpus_file, tmp_path):
    times = iter(range(0, 1000, 10))
    trainer = small_trainer("gpt", corpus_file, clock=lambda: next(times))
    writer = CheckpointWriter(trainer, tmp_path)
    writer.save_last()  # the clock's first answer is 0 s
    writer.save_last()  # the second is 10 s
    resumed = Trainer.resume(load_checkpoint(tmp_path / "last.pt"), Processes("cpu"), clock=lambda: 3.0)
    assert resumed.seconds == 13.0


def test_short_windows_hold_the_same_tokens_for_their_share_of_the_run(corpus_file):
    windows = {}
    for share in (0.0, 0.5):
        trainer = small_trainer("gpt", corpus_file, short_share=share)
        windows[share] = [trainer.sample_rows(done).tokens for done in (0, 0.25, 0.5, 0.75)]
    assert [x.shape for x in windows[0.0]] == [(8, 16)] * 4
    assert [x.shape for x in windows[0.5]] == [(16, 8), (16, 8), (8, 16), (8, 16)]
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(*windows.values(), strict=True))
    flops = []
    for done in (0.4, 0.6):
        trainer = small_trainer("gpt", corpus_file, short_share=0.5)
        trainer.train_step(done)
        flops.append(trainer.flops)
    assert flops[1] - flops[0] == 12 * 16 * (16 - 8) * 8 * 16  # 12 C T per token and layer


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_accumulated_gradients_are_those_of_the_large_batch(corpus_file, model):
    """Gradients are compared, not weights: the steps of Muon and AdamW do not depend on a wrong factor."""
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
        trainer = small_trainer(model, corpus_file, accumulate=accumulate)
        trainer.optimizers = [Recorder(trainer.model)]
        losses.append(trainer.train_step(0.0).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_gpu_paths_compute_the_same_loss(corpus_file, model):
    """What CUDA does by default, as far as a CPU can: bfloat16 autocast, and the encoder captured as a graph."""
    trainer = small_trainer(model, corpus_file)
    objective, network = trainer.objective, trainer.model
    batch = objective.make_batch(trainer.train_set.sample(8, trainer.generator), trainer.generator)
    exact = objective.loss(objective.predict(network, batch), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = objective.loss(objective.predict(network, batch), batch)
    rounded.backward()
    assert all(p.grad.to_dense().isfinite().all() for p in network.parameters())
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)
    assert rounded.item() != exact.item()
    assert network.encoder.ngrams.tables.sparse  # on a CPU, not compiled
    network.encoder.compile(backend="aot_eager", fullgraph=True)
    compiled = objective.loss(objective.predict(network, batch), batch)
    assert compiled.item() == pytest.approx(exact.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------- processes, files
def torchrun(tmp_path, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "train.py"), *map(str, arguments)],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_train_the_same_model_as_one_and_go_on_where_sigterm_stopped_them(
    command, corpus_file, tmp_path
):
    flags = ["--data", corpus_file, *TINY, "--steps", 300, "--eval-every", 10]
    command("train.py", *flags, "--out", "one")
    process = torchrun(tmp_path, *flags, "--out", "two")
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert errors.count("nats/char, upper bound") == 1, "only process 0 reports"
    one, two = (load_checkpoint(tmp_path / out / "llada/last.pt").history for out in ("one", "two"))
    for key in ("train_loss", "val_loss"):  # at steps 10 and 20; later, rounding has grown
        assert [line[key] for line in one[:2]] == pytest.approx([line[key] for line in two[:2]], rel=1e-4)
    process = torchrun(tmp_path, *flags, "--out", "part")
    for line in process.stderr:
        if line.startswith("step     20"):
            process.send_signal(signal.SIGTERM)  # torchrun passes it on, and kills who has not left after 30 seconds
            break
    errors = process.communicate(timeout=120)[1]
    step = load_checkpoint(tmp_path / "part/llada/last.pt").step
    assert 20 <= step < 300
    assert errors.count(f"\nstopped at step {step}; next: python train.py --resume --model llada --out part\n") == 1
    assert errors.count("train.py: error") == 0, errors
    assert torchrun(tmp_path, "--resume", "--out", "part").wait(120) == 0
    whole, resumed = (torch.load(tmp_path / out / "llada/last.pt") for out in ("two", "part"))
    assert differences(whole, resumed) == []


def test_a_killed_worker_ends_the_run_with_a_message_and_a_whole_checkpoint(corpus_file, tmp_path):
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
    """Of 200 MB of text only the touched pages are in memory. Unmapped, text and ids would take 400 MB."""
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


def test_a_new_run_moves_the_old_one_aside(run_script, corpus_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(corpus_file), *TINY, "--steps", "2"]
    run_script("train.py", *flags, "--seed", "1")
    first = weights(tmp_path / "out/llada/last.pt")
    run_script("train.py", *flags, "--seed", "2")
    assert all(torch.equal(v, weights(tmp_path / "out/llada.1/last.pt")[k]) for k, v in first.items())
    second = weights(tmp_path / "out/llada/last.pt")
    assert any(not torch.equal(v, second[k]) for k, v in first.items())
    run_script("train.py", "--resume", "out/llada.1/last.pt", "--steps", "4")
    assert all(torch.equal(v, weights(tmp_path / "out/llada.2/last.pt")[k]) for k, v in second.items())
    assert load_checkpoint(tmp_path / "out/llada/last.pt").step == 4


def test_a_run_is_resumed_from_and_started_from_a_folder(run_script, corpus_file, tmp_path, monkeypatch):
    """--resume means its last.pt, --init-from its best.pt."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(corpus_file), *TINY, "--eval-every", "2"]
    run_script("train.py", *flags, "--steps", "2", "--out", "runs")
    shutil.copy("runs/llada/best.pt", "step2.pt")
    run_script("train.py", "--resume", "runs/llada", "--steps", "4", "--out", "runs")
    shutil.copy("step2.pt", "runs/llada/best.pt")
    run_script("train.py", "--resume", "runs/llada", "--steps", "6", "--out", "resumed")
    assert [record["step"] for record in load_checkpoint("resumed/llada/last.pt").history] == [2, 4, 6]
    run_script("train.py", "--init-from", "runs/llada", "--data", str(corpus_file), "--steps", "1", "--out", "tuned")
    base = load_checkpoint("tuned/llada/last.pt").training["fine_tuning"]["base"]
    assert base["path"] == str(tmp_path / "runs/llada/best.pt")


def test_without_a_flag_the_model_is_that_of_the_named_checkpoint(run_script, corpus_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(corpus_file), *TINY]
    for model in ("llada", "gpt"):
        run_script("train.py", *flags, "--model", model, "--steps", "1")
    for named in ("out/gpt/last.pt", "out/gpt"):
        run_script("train.py", "--resume", named, "--steps", "2", "--out", "resumed")
        run_script("train.py", "--init-from", named, "--data", str(corpus_file), "--steps", "1", "--out", "tuned")
    assert {path.parent.name for path in tmp_path.glob("[rt]*ed/*/last.pt")} == {"gpt", "gpt.1"}
    run_script("train.py", "--resume", "--steps", "2")  # without a name: OUT/llada
    assert [load_checkpoint(f"out/{model}").step for model in ("llada", "gpt")] == [2, 1]


def test_minutes_follow_the_clock(corpus_file):
    """Each reading of this clock is one second later. The run ends in time, and its learning rate falls with time."""
    seconds = itertools.count()
    trainer = small_trainer("gpt", corpus_file, clock=lambda: next(seconds), minutes=2)
    trainer.train()
    rates = [record["lr"] for record in trainer.history]
    assert trainer.done() == 1
    assert 30 < trainer.step < 120  # 120 seconds, each step reads the clock at least once
    assert len(rates) == 10
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.1 * max(rates)


def test_training_learns(run_script, corpus_file, tmp_path):
    """On a text with structure both losses fall well below the entropy of independent characters."""
    for model in ("llada", "gpt"):
        flags = ["--data", str(corpus_file), *TINY, "--n-embd", "32", "--steps", "400", "--out", str(tmp_path / "out")]
        run_script("train.py", "--model", model, *flags)
        checkpoint = load_checkpoint(tmp_path / f"out/{model}/best.pt")
        corpus = load_corpus(str(corpus_file))
        train_ids, val_ids = corpus.split(0.2)
        frequencies = torch.bincount(train_ids.long()).float() / len(train_ids)
        unigram = -frequencies[val_ids.long()].clamp(min=1e-9).log().mean().item()
        rows = validation_rows(val_ids, corpus.tokenizer, 16)
        result = objective_for(checkpoint.model).likelihood(checkpoint.model, rows, pairs=2, seed=0)
        assert result.nats_per_char < 0.6 * unigram


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_the_progress_of_the_final_score_ends_at_100_percent(corpus_file, model, capsys, monkeypatch):
    """With a short last window, which LLaDA scores with more masks than the others."""
    monkeypatch.setattr("utils.console.SECONDS_PER_LINE", 0)
    trainer = small_trainer(model, corpus_file)
    score_validation(trainer)
    shown = [int(line.split()[1]) for line in capsys.readouterr().err.splitlines() if line.startswith("validate: ")]
    assert len(shown) > 1
    assert shown == sorted(shown)
    assert shown[-1] == 100
    assert len(trainer.val_part) % trainer.config.block_size


# ------------------------------------------------------------------------------------------------- settings
def test_command_line_choices_are_the_registries():
    assert set(train.MODELS) == set(MODELS)
    assert set(train.ARCHITECTURES) == set(ENCODERS)
    assert set(train.OPTIMIZERS) == set(OPTIMIZERS)


def test_every_setting_has_a_flag_and_every_flag_is_a_setting():
    args = vars(train.make_parser().parse_args([]))
    assert set(args) - set(train.NO_SETTINGS) == set(asdict(TrainConfig(steps=1)))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"n_embd": 96, "block_size": 256, "minutes": 2.75, "steps": None, "ngram_lr": 0.75, "sweep_share": 0.75}),
        (["--steps", "300"], {"n_embd": 64, "steps": 300, "minutes": None}),
        (["--minutes", "15"], {"n_embd": 128, "block_size": 512, "minutes": 15, "short_share": 0.6}),
        (["--model", "gpt"], {"n_embd": 96, "ngram_dropout": 0.2, "ngram_lr": 0.15, "short_share": 0}),
        (["--model", "gpt", "--minutes", "15"], {"ngram_dropout": 0.5, "ngram_lr": 0.015, "weight_decay": 0.1}),
        (["--model", "gpt", "--minutes", "15", "--ngram-lr", "0.1", "--no-compile"], {"ngram_lr": 0.1}),
        (["--preset", "gpu"], {"n_embd": 384, "steps": 5000, "minutes": None, "ngram_lr": 0.004}),
        (["--preset", "gpu", "--minutes", "5"], {"n_embd": 384, "steps": None, "minutes": 5}),
    ],
)
def test_flags_replace_the_settings_of_the_preset(flags, expected):
    config = train.new_config(train.make_parser().parse_args(flags), on_cuda=False)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.seed == 0
    assert not config.compile
    assert train.new_config(train.make_parser().parse_args(["--preset", "laptop"]), on_cuda=True).compile


def test_config_is_frozen_and_stored_as_plain_values(command, corpus_file, tmp_path):
    command("train.py", "--data", corpus_file, *TINY, "--steps", 2)
    stored = load_checkpoint(tmp_path / "out/llada/last.pt").training["config"]
    config = TrainConfig(**stored)
    assert (config.data, config.steps, config.n_embd) == (str(corpus_file), 2, 16)
    assert config.to_dict() == stored
    with pytest.raises(FrozenInstanceError):
        config.steps = 3


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("model", "bert"), ("arch", "lstm"), ("optimizer", "sgd"), ("val_fraction", 0.0), ("calibration", 1.0)),
        *(("short_share", 1.5), ("batch_size", 0), ("accumulate", 0), ("lr", 0.0), ("ngram_lr", float("nan"))),
        *(("weight_decay", -1), ("minutes", 1.0), ("steps", 0), ("eval_every", 0), ("n_embd", 30), ("seed", -1)),
    ],
)
def test_config_refuses_values_out_of_range_and_names_the_argument(argument, value):
    with pytest.raises(ArgumentError) as error:
        replace(TrainConfig(steps=1), **{argument: value})
    assert error.value.argument == ("steps" if argument == "minutes" else argument)  # steps and minutes: one of both


def test_resuming_needs_the_state_of_a_run_and_its_text(corpus_file, tmp_path):
    trainer = small_trainer("gpt", corpus_file)
    checkpoint = trainer.checkpoint()
    with pytest.raises(ValueError, match="no training state"):
        Trainer.resume(replace(checkpoint, training={}), Processes("cpu"))
    for flags, words in (
        (["--lr", "1"], r"lr 1\.0: the run in .* has 0\.006, which cannot change: drop it"),
        (["--model", "gpt", "--n-layer", "3"], "n_layer 3: the run in .* has 1, "),
        (["--model", "llada", "--preset", "gpu"], "preset has no effect when resuming"),
    ):
        with pytest.raises(ArgumentError, match=words):
            train.changed_settings(train.make_parser().parse_args(["--resume", *flags]), checkpoint)
    same = ["--resume", "--lr", "0.006", "--n-layer", "1", "--steps", "9"]
    changes = train.changed_settings(train.make_parser().parse_args(same), checkpoint)
    assert changes == {"steps": 9, "minutes": None}
    corpus_file.write_text("quite another text " * 100)
    with pytest.raises(ValueError, match="is not the text the model was trained on"):
        Trainer.resume(checkpoint, Processes("cpu"))


def test_the_last_line_is_the_next_command(command, tmp_path):
    """Also for names that a shell would split, and a text in which ROMEO is unknown."""
    lines = ["-a line like a flag", "[MASK] is no prompt", "it's a 'quoted' line; with $HOME and more", "and so on", ""]
    (tmp_path / "my text.txt").write_text("\n".join(lines) * 100)
    flags = ["--data", "my text.txt", *TINY, "--calibration", 0, "--steps", 2, "--out", "a b"]
    last = command("train.py", "--model", "gpt", *flags).stderr.strip().splitlines()[-1]
    program, *arguments = shlex.split(re.fullmatch(r"next: python (.*)", last)[1])
    assert arguments == ["--checkpoint", "a b/gpt/best.pt", "--prompt", "it's a 'quoted' line;"]
    assert command(program, *arguments, "--length", 5).stdout.startswith(arguments[-1])


@pytest.mark.parametrize("text", ["\n\n\n", "---\n-\n", "\x07a\n\x1b[2J\n"])
def test_a_text_without_a_line_to_begin_with_has_the_empty_prompt(corpus_file, text):
    corpus_file.write_text(text * 100)
    assert train.beginning_of_a_line(small_trainer("gpt", corpus_file)) == ""


# ------------------------------------------------------------------------------------------------- what is shown
@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_samples_are_shown_and_do_not_change_the_training(command, corpus_file, tmp_path, model):
    flags = ["--model", model, "--data", corpus_file, *TINY, "--dropout", 0.1, "--steps", 12, "--eval-every", 3]
    plain = command("train.py", *flags, "--out", "plain").stderr
    shown = command("train.py", *flags, "--out", "shown", "--sample-every", 2).stderr
    assert_same_run(tmp_path / f"plain/{model}/last.pt", tmp_path / f"shown/{model}/last.pt")
    assert "\n    " not in plain  # standard error is no terminal
    samples = [line for line in shown.splitlines() if line.startswith("    ")]
    assert len(samples) == 2
    assert all(len(sample) <= 4 + train.SAMPLE_CHARACTERS for sample in samples)


def test_progress_is_shown_in_lines_where_there_is_no_terminal(corpus_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.console.SECONDS_PER_LINE", 0)
    flags = ["--data", str(corpus_file), *map(str, TINY), "--steps", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert len(lines) >= 3
    pattern = r"train: 75 %  0:00:\d\d left, step 3  loss \d\.\d{3}  [\d,]+ tokens/s"
    assert any(re.fullmatch(pattern, line) for line in lines), lines


def test_the_first_ctrl_c_during_the_final_validation_ends_the_program(corpus_file, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("Ctrl-C was swallowed")

    monkeypatch.setattr("trainer.score_validation", interrupted)
    flags = ["--data", str(corpus_file), *map(str, TINY), "--steps", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_program(train.main)
    assert end.value.code == 130
    assert f"{tmp_path}/llada/best.pt is complete; its final score is missing" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "llada/best.pt").step == 2


# ------------------------------------------------------------------------------------------------- bad flags
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0"], ["--steps", "at least 1"]),
        (["--minutes", "nan"], ["--minutes"]),
        (["--lr", "fast"], ["--lr", "'fast' is not a number"]),
        (["--val-fraction", "1"], ["--val-fraction", "less than 1"]),
        (["--calibration", "0.9999"], ["--calibration 0.9999", "too few"]),
        (["--n-embd", "30", "--n-head", "4"], ["--n-embd", "30"]),
        (["--data", "missing.txt"], ["--data missing.txt", "no such file"]),
        (["--block-size", "10000000"], ["--block-size", "too few"]),
        (["--batch-size", "6", "--accumulate", "4"], ["--batch-size 6"]),
        (["--device", "quantum"], ["--device quantum", "cpu"]),
        (["--device", "cpu:1"], ["--device cpu:1", "cpu"]),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], ["--device cuda: not available", "cpu"])]),
        (["--device", "cpu:foo"], ["--device cpu:foo", "cpu"]),
        (["--arch", "vanilla", "--ngram-rows", "7"], ["--ngram-rows", "vanilla"]),
        (["--resume"], ["out/llada/last.pt", "no such checkpoint"]),
        (["--minutes", "0.0001"], ["--minutes 0.0001", "before the first step"]),
        (["--steps", "1", "--minutes", "1"], ["--minutes", "--steps"]),
    ],
)
def test_bad_flags_get_one_line(command, flags, words):
    process = command("train.py", "--data", "pydoc", *flags, check=2)
    last = process.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), process.stderr
