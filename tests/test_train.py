"""Training: objectives, exact resume, calibration, accumulation, two processes, Ctrl-C, memory, presets, bad flags."""

import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from kill_training import differences

import train
import utils.devices
from checkpoint import CheckpointWriter, deciding_loss, load_checkpoint, save_checkpoint
from config import TrainConfig, fine_tuning_preset, gpu_preset
from data import load_corpus, window_rows
from diffusion import DiffusionObjective
from tokenizer import MASK_ID, SimpleTokenizer
from trainer import Trainer, check_memory, objective_of, summarize
from utils.console import progress
from utils.errors import ArgumentError
from utils.processes import Processes


@pytest.fixture
def run(run_script, corpus_file, tmp_path, monkeypatch):
    """run(*flags) runs train.py in a folder, on a tiny network unless the flags say otherwise; returns its messages."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> str:
        usual = zip(["--data", *TINY[::2]], [str(corpus_file), *TINY[1::2]], strict=True)
        words = [word for pair in usual if pair[0] not in flags for word in pair]
        return run_script("train.py", *([] if "--resume" in flags else words), *flags)[1]

    return run


def test_mean_of_the_diffusion_loss_is_the_bound():
    """Training does not draw t uniformly, so its density must cancel. The predictor's loss is m/2 with m masks."""
    T, B = 4, 4096
    sequences = torch.full((B, T), 4)

    def model(tokens, at):
        loss = (tokens == MASK_ID).sum(1, keepdim=True).expand(B, T).flatten()[at] / 2
        logits = torch.full((len(loss), 6), -torch.inf)
        logits[:, 4], logits[:, 5] = -loss, torch.log1p(-torch.exp(-loss))
        return logits

    objective, generator = DiffusionObjective(), torch.Generator().manual_seed(0)
    batches = [objective.make_batch(window_rows(sequences, SimpleTokenizer("ab")), generator) for _ in range(200)]
    for batch in batches:
        assert torch.equal(batch.inputs, torch.where(batch.mask, MASK_ID, batch.targets))
    batches = [batch.on(torch.device("cpu")) for batch in batches]
    losses = torch.stack([objective.loss(objective.predict(model, batch), batch) for batch in batches])
    bound = sum(m / 2 for m in range(1, T + 1)) / T  # the mean over m = 1..T of c(m)
    assert losses.mean().item() == pytest.approx(bound, abs=5 * losses.std().item() / 200**0.5 + 2e-3)  # t >= MIN_T


def small_trainer(name: str, corpus_file, clock=time.monotonic, **settings) -> Trainer:
    """A tiny run. All its weights are random, so that none has a gradient of zero."""
    settings = {"steps": 1, "batch_size": 8} | ({"steps": None} if "minutes" in settings else {}) | settings
    config = TrainConfig(model=name, n_layer=1, n_head=2, n_embd=16, block_size=16, ngram_rows=101, **settings)
    trainer = Trainer(config, load_corpus(str(corpus_file)), Processes("cpu"), clock)
    torch.manual_seed(0)
    for p in trainer.model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return trainer


# ------------------------------------------------------------------------------------------------- calibration
def trained(model, corpus_file, **settings) -> Trainer:
    trainer = small_trainer(model, corpus_file, calibration=0.1, **settings)
    for _ in range(40):
        trainer.train_step(0.0)
    return trainer


@pytest.mark.parametrize("settings", [{"model": "llada"}, {"model": "llada", "sweep_share": 0.75}, {"model": "gpt"}])
@pytest.mark.parametrize("factor", [0.5, 2.5])
def test_calibration_finds_the_temperature_of_least_loss_for_any_scale_of_the_head(corpus_file, settings, factor):
    trainer = trained(corpus_file=corpus_file, **settings)
    trainer.calibrate()
    trainer.val_rows, score = trainer.calibration_rows, trainer.objective.scores[-1]
    best, weight = trainer.validate(score), trainer.model.head.weight
    with torch.no_grad():
        for other in (0.95, 1.05 / 0.95):
            weight.mul_(other)
            assert trainer.validate(score) > best
        weight.mul_(factor / 1.05)
    assert trainer.calibrate() == pytest.approx(factor, rel=1e-3)
    assert trainer.validate(score) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_rows_are_scored_a_few_at_a_time_whatever_the_vocabulary(corpus_file, model, monkeypatch):
    """Issue 24, point 21: no call of the model makes more logits than the limit, and the results are the same."""
    trainer = trained(model, corpus_file, sweep_share=0.5 if model == "llada" else 0.0)
    score, weight = trainer.objective.scores[-1], trainer.model.head.weight.detach().clone()
    whole = [*map(trainer.validate, trainer.objective.scores), trainer.calibrate(), trainer.score().nats_per_char]
    with torch.no_grad():
        trainer.model.head.weight.copy_(weight)
    sizes, limit = [], 3 * 16 * trainer.corpus.tokenizer.vocab_size
    monkeypatch.setattr("trainer.LOGITS_AT_ONCE", limit)
    trainer.model.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.numel()))
    parts = [*map(trainer.validate, trainer.objective.scores), trainer.calibrate(), trainer.score().nats_per_char]
    assert parts == pytest.approx(whole, rel=1e-4)
    assert max(sizes) <= limit
    assert score in ("val_loss", "sampler_loss")


def test_text_held_out_for_calibration_is_neither_trained_nor_validated_on(corpus_file):
    trainer = small_trainer("gpt", corpus_file, calibration=0.25)
    train_ids, val_ids = trainer.corpus.split(0.2)
    held_out = int(0.25 * len(train_ids))
    expected = trainer.corpus.validation_rows(train_ids[:held_out], 16)[0]
    assert torch.equal(trainer.train_set.ids, train_ids[held_out:])
    assert torch.equal(trainer.calibration_rows.tokens, expected.tokens)
    assert torch.equal(trainer.val_part, val_ids)


def test_best_checkpoint_is_chosen_by_what_the_sampler_writes_and_never_by_a_calibrated_loss(corpus_file, tmp_path):
    """Issue 22, point 7; issue 24, point 23."""
    trainer = small_trainer("gpt", corpus_file)
    writer = CheckpointWriter(trainer, tmp_path / "gpt")
    records = [
        ({"val_loss": 2.0}, 0),
        ({"val_loss": 1.5}, 1),
        ({"val_loss": 1.9, "calibrated_val_loss": 1.3}, 1),
        ({"val_loss": 1.8, "sampler_loss": 1.4}, 3),
        ({"val_loss": 1.2, "sampler_loss": 1.45}, 3),
    ]
    for step, (record, best) in enumerate(records):
        trainer.step = step
        trainer.history.append(record)
        writer.on_validation(record)
        assert load_checkpoint(tmp_path / "gpt/best.pt").step == best
        assert load_checkpoint(tmp_path / "gpt/last.pt").step == step
    assert [deciding_loss(record) for record, _ in records] == [2.0, 1.5, 1.9, 1.4, 1.45]


def test_what_is_kept_is_calibrated_scored_and_named_and_an_overfitted_model_is_not(run, tmp_path):
    """A short text: the loss rises after a while. Issue 24, points 10, 22 and 23; the summary is that of best.pt."""
    draw = random.Random(0)
    (tmp_path / "tiny").write_text("".join(draw.choice("abcdefgh \n") for _ in range(2000)))
    flags = ["--model", "gpt", "--data", "tiny", "--n-embd", "32", "--lr", "0.02", "--calibration", "0.2"]
    err = run(*flags, "--steps", "300", "--eval-every", "30")
    best, last = (load_checkpoint(f"out/gpt/{name}.pt") for name in ("best", "last"))
    summary = json.loads(Path("out/gpt/summary.json").read_text())
    assert best.step < last.step == 300
    assert f"overfitting since step {best.step}" in err
    assert summary["overfitting_since"] == best.step
    assert ["temperature" in checkpoint.history[-1] for checkpoint in (best, last)] == [True, False]
    assert f"best.pt: step {best.step}, calibrated at temperature {best.history[-1]['temperature']:.3f}" in err
    corpus = load_corpus("tiny")
    rows = corpus.validation_rows(corpus.split(0.2)[1], 16)
    score = objective_of(best.model).likelihood(best.model, rows).nats_per_char
    assert summary["nats_per_char"] == pytest.approx(score, rel=1e-5)
    assert f"validation of best.pt: {score:.4f} nats/char, exact" in err
    before = Path("out/gpt/best.pt").read_bytes()
    run("--model", "gpt", "--resume")  # nothing is left to train: nothing changes
    assert Path("out/gpt/best.pt").read_bytes() == before


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


def test_the_clock_starts_at_the_first_step_and_counts_all_sessions(corpus_file, tmp_path):
    """What comes before, such as scoring the model to continue, is not training: issue 24, point 8."""
    times = iter(range(1000, 10**6, 10))
    trainer = small_trainer("gpt", corpus_file, clock=lambda: next(times), minutes=1, eval_every=100)
    assert trainer.seconds == 0
    trainer.train(stopping=lambda: trainer.step >= 2)
    assert 0 < trainer.seconds < 120
    CheckpointWriter(trainer, tmp_path).save_last()
    before = load_checkpoint(tmp_path / "last.pt", resuming=True)
    resumed = Trainer.resume(before, Processes("cpu"), clock=lambda: 3.0)
    assert resumed.seconds == before.training["seconds"] > 0


def test_short_windows_hold_the_same_tokens_for_their_share_of_the_run(corpus_file):
    windows = {}
    for share in (0.0, 0.5):
        trainer = small_trainer("gpt", corpus_file, short_share=share)
        windows[share] = [trainer.sample_rows(done).tokens for done in (0, 0.25, 0.5, 0.75)]
    assert [x.shape for x in windows[0.0]] == [(8, 16)] * 4
    assert [x.shape for x in windows[0.5]] == [(16, 8), (16, 8), (8, 16), (8, 16)]
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(*windows.values(), strict=True))


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_accumulated_gradients_are_those_of_the_large_batch(corpus_file, model):
    """Gradients are compared, not weights: the steps of Muon and AdamW do not depend on a wrong factor."""
    losses, gradients = [], []
    for accumulate in (1, 4):
        trainer = small_trainer(model, corpus_file, accumulate=accumulate)
        trainer.optimizers = []
        losses.append(trainer.train_step(0.0).item())
        gradients.append({name: p.grad.to_dense() for name, p in trainer.model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_gpu_paths_compute_the_same_loss(corpus_file, model):
    """What CUDA does by default, as far as a CPU can: bfloat16 autocast, and the encoder captured as a graph."""
    trainer = small_trainer(model, corpus_file)
    objective, network = trainer.objective, trainer.model
    batch = objective.make_batch(trainer.train_set.sample(8, trainer.generator), trainer.generator)
    batch = batch.on(torch.device("cpu"))
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


def test_two_processes_train_the_same_model_as_one_and_go_on_where_sigterm_stopped_them(command, corpus_file, tmp_path):
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
    assert errors.count(f"\nstopped at step {step}; next: python train.py --resume part/llada\n") == 1
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


def test_a_new_run_moves_the_old_one_aside(run):
    def weights(folder):
        return load_checkpoint(f"{folder}/last.pt").model.state_dict()

    run("--steps", "2", "--seed", "1")
    first = weights("out/llada")
    run("--steps", "2", "--seed", "2")
    second = weights("out/llada")
    assert differences(first, weights("out/llada.1")) == []
    assert differences(first, second)
    run("--resume", "out/llada.1/last.pt", "--steps", "4", "--out", "out")
    assert differences(second, weights("out/llada.2")) == []
    assert load_checkpoint("out/llada/last.pt").step == 4


def test_a_named_run_goes_on_where_it_is_and_tells_the_model(run, tmp_path):
    """Issue 24, point 24. A folder stands for its last.pt in --resume, for its best.pt in --init-from."""
    run("--steps", "1")
    run("--steps", "2", "--model", "gpt", "--out", "novel", "--eval-every", "2")
    before = Path("out/llada/last.pt").read_bytes()
    for steps, named in ((4, "novel/gpt"), (6, "novel/gpt/last.pt")):
        run("--resume", named, "--steps", str(steps))
        assert load_checkpoint("novel/gpt/last.pt").step == steps
    assert Path("out/llada/last.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["novel", "out"]
    run("--resume", "novel/gpt", "--steps", "8", "--out", "resumed")
    assert [record["step"] for record in load_checkpoint("resumed/gpt/last.pt").history] == [2, 4, 6, 8]
    run("--init-from", "novel/gpt", "--steps", "1", "--out", "tuned")
    tuned = load_checkpoint("tuned/gpt/last.pt").training
    assert tuned["fine_tuning"]["base"] == str(tmp_path / "novel/gpt/best.pt")
    assert tuned["config"]["lr"] == 0.002  # of the preset of fine-tuning
    run("--resume", "--steps", "2")  # without a name: OUT/llada
    assert load_checkpoint("out/llada").step == 2


def test_a_run_that_is_over_can_be_resumed_without_a_best_checkpoint(run):
    """Stopped before its first validation and told to end earlier, or continued in another folder: it is scored."""
    run("--steps", "6", "--out", "a")
    trainer = Trainer.resume(load_checkpoint("a/llada/last.pt", resuming=True), Processes("cpu"))
    trainer.history.clear()
    Path("a/llada/best.pt").unlink()
    save_checkpoint("a/llada/last.pt", trainer.checkpoint())
    messages = run("--resume", "a/llada", "--steps", "3")
    assert "step      7" in messages
    assert "validation of best.pt" in messages
    assert "validation of best.pt" in run("--resume", "a/llada", "--out", "b", "--steps", "3")
    assert Path("b/llada/last.pt").is_file()


def test_without_a_compiler_training_is_not_compiled_and_says_so(command, corpus_file, tmp_path):
    """Issue 24, point 9."""
    env = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    err = command("train.py", "--data", corpus_file, *TINY, "--steps", 2, "--compile", env=env).stderr
    assert err.count("not compiled: torch.compile does not work here") == 1
    assert not load_checkpoint(tmp_path / "out/llada/last.pt").training["config"]["compile"]


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_training_learns_and_the_console_names_every_loss(run, monkeypatch, model):
    """On a text with structure the loss falls well below the entropy of independent characters. Issue 24, point 10."""
    monkeypatch.setattr("utils.console.SECONDS_PER_LINE", 0)  # progress is in lines where there is no terminal
    lines = run("--model", model, "--n-embd", "32", "--steps", "400", "--out", "a b").splitlines()
    checkpoint = load_checkpoint(f"a b/{model}/best.pt")
    corpus = load_corpus(checkpoint.corpus["name"])
    train_ids, val_ids = corpus.split(0.2)
    frequencies = torch.bincount(train_ids.long()).float() / len(train_ids)
    unigram = -frequencies[val_ids.long()].clamp(min=1e-9).log().mean().item()
    rows = corpus.validation_rows(val_ids, 16)
    result = objective_of(checkpoint.model).likelihood(checkpoint.model, rows, pairs=2, seed=0)
    assert result.nats_per_char < 0.6 * unigram
    losses = {"llada": "train # (75 % weighted for the sweep)  bound #  sampler #", "gpt": "train #  val #"}
    line = next(re.sub(r"\d\.\d{4}", "#", line) for line in lines if line.startswith("step    200"))
    assert line.endswith(f"s  {losses[model]} nats/char")
    progress_line = r"train: 75 %, 0:00:\d\d left  step 300  loss \d\.\d{3}  [\d,]+ tokens/s"
    assert any(re.fullmatch(progress_line, line) for line in lines)
    # The last line is the next command, also for names that a shell would split.
    assert shlex.split(lines[-1]) == ["next:", "python", "generate.py", "--checkpoint", f"a b/{model}/best.pt"]
    stored = load_checkpoint(f"a b/{model}/last.pt").training["config"]  # plain values
    assert (stored["data"], stored["steps"], stored["n_embd"]) == ((corpus.name,), 400, 32)
    assert TrainConfig(**stored).to_dict() == stored


def test_minutes_follow_the_clock_and_a_slow_machine_is_told_what_the_run_lacked(corpus_file, capsys):
    """Each reading of this clock is one second later. The learning rate falls with time. Issue 24, point 19."""
    seconds = itertools.count()
    trainer = small_trainer("gpt", corpus_file, clock=lambda: next(seconds), minutes=2)
    trainer.train()
    rates = [record["lr"] for record in trainer.history]
    assert trainer.done() == 1
    assert 30 < trainer.step < 120  # 120 seconds, each step reads the clock at least once
    assert len(rates) == 10
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.1 * max(rates)
    train.say_summary(summarize(trainer), trainer.history[-1], trainer.config)
    minutes = -(-2 * 1200 // trainer.step)
    words = f"lacked steps: a usual laptop makes 1,200 in this time; here --minutes {minutes} would do"
    assert words in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- settings
def new_config(*flags: str, on_cuda: bool = False) -> TrainConfig:
    return train.new_config(train.make_parser().parse_args(flags), on_cuda)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"n_embd": 96, "block_size": 256, "minutes": 2.75, "steps": None, "ngram_lr": 0.75, "epochs": None}),
        ("--steps 300", {"n_embd": 64, "steps": 300, "minutes": None}),
        ("--minutes 15", {"n_embd": 128, "block_size": 512, "minutes": 15, "short_share": 0.6}),
        ("--model gpt", {"n_embd": 96, "ngram_dropout": 0.2, "ngram_lr": 0.15, "short_share": 0, "epochs": 8}),
        ("--model gpt --minutes 15", {"ngram_dropout": 0.5, "ngram_lr": 0.015, "epochs": 50}),
        ("--model gpt --steps 15", {"steps": 15, "epochs": None}),
        ("--model gpt --ngram-lr 0.1 --no-compile", {"ngram_lr": 0.1}),
        ("--preset gpu --minutes 5", {"n_layer": 6, "steps": None, "minutes": 5}),
        ("--preset pretrained --minutes 7", {"n_embd": 192, "steps": None, "minutes": 7, "val_fraction": 0.1}),
        ("--preset pretrained --model gpt", {"n_embd": 128, "steps": 4000, "ngram_rows": 2699}),
    ],
)
def test_flags_replace_the_settings_of_the_preset(flags, expected):
    config = new_config(*flags.split())
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.seed, config.compile) == (0, False)
    assert config.sweep_share == (0 if "gpt" in flags else 0.75)  # it writes by the sweep: issue 22, point 7


def test_on_a_gpu_the_default_is_its_preset_and_compiled():
    assert new_config(on_cuda=True) == replace(gpu_preset("llada"), compile=True)
    assert new_config("--preset", "laptop", on_cuda=True).minutes == 2.75
    assert [fine_tuning_preset(model).sweep_share for model in ("llada", "gpt")] == [0.75, 0]


def test_epochs_end_a_run_before_its_time(corpus_file):
    """GPT memorizes a short text: issue 24, point 23."""
    trainer = small_trainer("gpt", corpus_file, clock=lambda: 0.0, minutes=1, epochs=2)
    trainer.train()
    assert 2 <= trainer.epochs < 2.1
    assert len(trainer.history) == 10


def test_memory_counts_what_a_large_vocabulary_takes(monkeypatch):
    """Issue 24, point 21: GPT-2's vocabulary needs gigabytes in a step."""
    monkeypatch.setattr(utils.devices, "free_memory", lambda device: 10**9)
    config = TrainConfig(steps=1, model="gpt", n_embd=64, ngram_rows=101, batch_size=8)
    check_memory(config, config.network(100), Processes("cpu"))
    with pytest.raises(ArgumentError, match=r"batch_size 8 needs at least 1.* GB of memory, and 1.0 GB are free"):
        check_memory(config, config.network(60_000), Processes("cpu"))


def test_resuming_needs_the_state_of_a_run_and_its_text_and_changes_only_how_a_step_is_computed(corpus_file):
    """Issue 24, point 5: compilation and micro-batches may change."""
    trainer = small_trainer("gpt", corpus_file, steps=4, accumulate=2)
    trainer.train(stopping=lambda: trainer.step >= 2)
    checkpoint = replace(trainer.checkpoint(), path=Path("last.pt"))
    checkpoint.training["config"]["compile"] = True

    def settings(flags: str) -> dict:
        args = train.make_parser().parse_args(["--resume", *flags.split()])
        return train.given_settings(args, True, checkpoint)

    for flags, words in (
        ("--lr 1", r"lr 1\.0: the run in last\.pt has 0\.006, which cannot change: drop it"),
        ("--model gpt --n-layer 3", "n_layer 3: the run in last.pt has 1, "),
        ("--model llada", "model llada: the run in last.pt has gpt"),
        ("--preset gpu", "preset gpu: the run in last.pt has its own"),
    ):
        with pytest.raises(ArgumentError, match=words):
            settings(flags)
    changes = settings("--lr 0.006 --n-layer 1 --steps 9 --no-compile --accumulate 4")
    ends = {"steps": 9, "minutes": None, "epochs": None}
    assert changes == {"lr": 0.006, "n_layer": 1, "accumulate": 4, "compile": False} | ends
    assert settings("") == {"compile": True}
    resumed = Trainer.resume(checkpoint, Processes("cpu"), **changes)
    resumed.train()
    assert (resumed.step, resumed.config.accumulate, resumed.config.compile) == (9, 4, False)
    with pytest.raises(ValueError, match="no training state"):
        Trainer.resume(replace(checkpoint, training={}), Processes("cpu"))
    corpus_file.write_text("quite another text " * 100)
    with pytest.raises(ValueError, match="is not the text the model was trained on"):
        Trainer.resume(checkpoint, Processes("cpu"))
