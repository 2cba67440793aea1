"""Round trips, files that are not checkpoints, atomic writing, devices that are missing."""

import os
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy import random_model

import checkpoint
from checkpoint import (
    SCALE,
    TABLES,
    Checkpoint,
    CheckpointWriter,
    checkpoint_file,
    continued,
    export_weights,
    find_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from extras.bpe import train_bpe
from model import MODELS
from tokenizer import SimpleTokenizer
from utils.files import seal

TOKENS = torch.tensor([[4, 5, 6]])
SIZES = {"block_size": 8, "n_embd": 8, "n_layer": 1}


def small(name: str = "gpt", tokenizer=SimpleTokenizer("abc"), **settings) -> Checkpoint:  # noqa: B008
    """A small model with random weights."""
    model = random_model(name, std=0.5, vocab_size=tokenizer.vocab_size, **SIZES | settings)
    corpus = {"name": "x", "sha256": "0", "val_fraction": 0.1}
    return Checkpoint(model, tokenizer, corpus, 3, [{"step": 3, "val_loss": 1.5}], {"generator": torch.arange(3)})


SUBWORDS = {"tokenizer": train_bpe(["the theme, the thesis"], 300)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{}, {"arch": "vanilla"}, {"segments": "pairs"}, {"ngram_width": 4}, SUBWORDS])
def test_round_trip(tmp_path, name, settings):
    saved = small(name, **settings)
    save_checkpoint(tmp_path / "a" / "last.pt", saved)
    before = torch.get_rng_state()
    loaded = load_checkpoint(tmp_path / "a" / "last.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded.model) is type(saved.model)
    assert not loaded.model.training
    assert torch.equal(loaded.model(TOKENS), saved.model(TOKENS))
    assert loaded.tokenizer.to_dict() == saved.tokenizer.to_dict()
    assert (loaded.corpus, loaded.step, loaded.history) == (saved.corpus, saved.step, saved.history)
    assert torch.equal(loaded.training["generator"], saved.training["generator"])
    assert os.listdir(tmp_path / "a") == ["last.pt"]


@pytest.mark.parametrize("rank", [0, 2])
def test_exported_weights_are_those_of_the_model_in_half_precision_and_the_tables_in_8_bits(tmp_path, rank):
    """Adapters are merged there; in a run's file they stay for those who resume it."""
    saved = small()
    if rank:  # adapters that change the model, and a head that calibration has scaled
        torch.manual_seed(0)  # of the adapters
        saved.model = continued(saved.model, replace(saved.model.config, lora_rank=rank)).eval()
        for p in saved.model.parameters():
            p.data += 0.1 if p.requires_grad else 0.0
        saved.model.head.weight.data *= 1.5
    expected = saved.model(TOKENS)
    save_checkpoint(tmp_path / "last.pt", saved)
    assert torch.equal(load_checkpoint(tmp_path / "last.pt", resuming=True).model(TOKENS), expected)
    export_weights(tmp_path / "x.pt", saved)
    for name, rtol, atol in (("last.pt", 1e-4, 1e-4), ("x.pt", 3e-2, 0.1)):
        loaded = load_checkpoint(tmp_path / name)
        assert loaded.model.config.lora_rank == 0
        assert torch.allclose(loaded.model(TOKENS), expected, rtol=rtol, atol=atol)
    assert loaded.training == {}
    stored = torch.load(tmp_path / "x.pt")["model"]
    assert {tensor.dtype for name, tensor in stored.items() if name != TABLES} == {torch.float16}
    assert stored[TABLES].dtype == torch.int8
    table, read = saved.model.encoder.ngrams.tables.weight, loaded.model.encoder.ngrams.tables.weight
    assert ((read - table).abs() <= 0.6 / 127 * table.abs().amax(1, keepdim=True)).all()


# ------------------------------------------------------------------------------------------------- files to refuse
def test_unpickling_runs_no_code(tmp_path):
    torch.save(SimpleTokenizer("code"), tmp_path / "pickle.pt")
    seal(tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match=r"pickle.pt: not a readable checkpoint"):
        load_checkpoint(tmp_path / "pickle.pt")


def test_every_changed_byte_cut_and_addition_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, small())
    content, draw = path.read_bytes(), random.Random(0)
    ends = [*range(100), *range(len(content) - 100, len(content))]
    places = [*ends, *(draw.randrange(len(content)) for _ in range(200))]
    flipped = (content[:i] + bytes([content[i] ^ 1 << draw.randrange(8)]) + content[i + 1 :] for i in places)
    for other in (*flipped, content[:-1], content[:100], b"", content + b"\0", content + content, content[1:]):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"a\.pt: its content does not match its SHA-256"):
            load_checkpoint(path)
    path.write_bytes(content)
    assert load_checkpoint(path).step == 3


def altered(entry: str, **values):
    return lambda state: state | {entry: state[entry] | values}


HEAD = "head.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: [1, 2], "not a checkpoint of this version"),
        (lambda state: state | {"format": 3}, "format 4"),
        (lambda state: {k: v for k, v in state.items() if k != "step"}, "step"),
        (lambda state: state | {"name": "bert"}, "of another version of the network .'bert'.: train it again"),
        (altered("model", extra=torch.zeros(2)), "Unexpected key"),
        (altered("model", **{HEAD: torch.zeros(7, 9)}), "size mismatch"),
        (altered("model", **{HEAD: "weights"}), "of another version"),
        (altered("model", **{SCALE: torch.zeros(7, dtype=torch.float16)}), "must match the size"),
        (altered("config", n_expert=8), "n_expert"),
        (altered("config", n_embd="8"), "of another version"),
        (altered("config", n_embd=1 << 20), "of another version"),
        (altered("config", n_layer=3), "Missing key"),
        (altered("config", vocab_size=8), "7 tokens, its network 8"),
        (altered("tokenizer", characters=5), "iterable"),
        (altered("tokenizer", special_tokens=["[PAD]"]), "special tokens"),
        (lambda state: state | {"tokenizer": {}}, "special_tokens"),
    ],
)
def test_contents_that_do_not_fit_are_refused(tmp_path, change, problem):
    """Although their hash fits."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, small())
    torch.save(change(torch.load(path)), path)
    seal(path)
    with pytest.raises(ValueError, match=problem) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- writing, finding
def test_weights_that_are_not_finite_leave_the_file_that_was_there(tmp_path):
    save_checkpoint(tmp_path / "last.pt", small())
    before, diverged = (tmp_path / "last.pt").read_bytes(), small()
    diverged.model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"last.pt: head.weight is not finite: .* --lr"):
        save_checkpoint(tmp_path / "last.pt", diverged)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_run_that_goes_on_in_another_folder_has_a_best_there(tmp_path, is_taken):
    history = [{"step": 1, "val_loss": 1.0}, {"step": 3, "val_loss": 2.0}]
    trainer = SimpleNamespace(history=history, checkpoint=lambda: replace(small(), history=history))
    if is_taken:
        save_checkpoint(tmp_path / "new/best.pt", small())
    writer = CheckpointWriter(trainer, tmp_path / "new", tmp_path / "old/last.pt")
    writer.on_validation(history[-1])
    assert load_checkpoint(tmp_path / "new/best.pt").history == history
    assert (tmp_path / "new.1/best.pt").is_file() == is_taken
    (tmp_path / "new/last.pt").unlink()
    for pause in (60, 0):  # last.pt was written a moment ago
        writer.save_last(pause)
        assert (tmp_path / "new/last.pt").is_file() == (pause == 0)


def test_runs_are_found_by_model_and_without_one_the_pretrained_unless_a_folder_was_named(tmp_path, monkeypatch):
    """LLaDA by default, whichever was trained last: issue 24, point 7; a named folder without a model: point 6."""
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="train one"):
        newest_checkpoint()
    for name in ("pretrained/llada", "pretrained/gpt", "runs/llada/last", "runs/gpt/best", "runs/gpt/last"):
        save_checkpoint(tmp_path / f"{name}.pt", small())
    runs, best, last = tmp_path / "runs", tmp_path / "runs/gpt/best.pt", tmp_path / "runs/llada/last.pt"
    assert find_checkpoints(runs) == [last, best]
    assert (newest_checkpoint(runs), newest_checkpoint(runs, "gpt")) == (last, best)
    assert newest_checkpoint() == tmp_path / "pretrained/llada.pt"
    assert newest_checkpoint(name="gpt") == tmp_path / "pretrained/gpt.pt"
    with pytest.raises(ValueError, match=r"no checkpoint under nowhere/"):
        newest_checkpoint("nowhere")
    last.unlink()
    assert newest_checkpoint(runs) == best
    assert load_checkpoint(runs / "gpt").path == best  # the folder of a run stands for its best checkpoint
    assert checkpoint_file(runs / "gpt", ("last.pt",)) == runs / "gpt/last.pt"
    assert checkpoint_file(runs / "any") == runs / "any"
    with pytest.raises(ValueError, match="in this folder"):
        load_checkpoint(runs)
