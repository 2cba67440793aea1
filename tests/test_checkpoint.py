"""Round trips, files that are not checkpoints, atomic writing, devices that are missing."""

import os
import random
import shutil
from itertools import product

import pytest
import torch

import checkpoint
from checkpoint import (
    SCALE,
    TABLES,
    Checkpoint,
    checkpoint_file,
    continued,
    export_weights,
    find_checkpoints,
    load_checkpoint,
    new_model,
    newest_checkpoint,
    save_adapters,
    save_checkpoint,
)
from config import ModelConfig
from extras.bpe import train_bpe
from model import MODELS
from tokenizer import SimpleTokenizer
from utils.files import seal, sha256_of

TOKENS = torch.tensor([[4, 5, 6]])
SIZES = {"block_size": 8, "n_embd": 8, "n_head": 2, "n_layer": 1, "ngram_rows": 101}


def small(name: str = "gpt", tokenizer=SimpleTokenizer("abc"), **settings) -> Checkpoint:  # noqa: B008
    """A small model with random weights, also where they start at zero."""
    model = new_model(name, ModelConfig(tokenizer.vocab_size, **(SIZES | settings)))
    for p in model.parameters():
        p.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    corpus = {"name": "x", "sha256": "0", "val_fraction": 0.1}
    return Checkpoint(model, tokenizer, corpus, 3, [{"step": 3, "val_loss": 1.5}], {"generator": torch.arange(3)})


KINDS = [{}, {"arch": "vanilla"}, {"segments": "pairs"}, {"ngram_width": 4}]


@pytest.mark.parametrize(("name", "settings"), [*product(MODELS, KINDS)])
def test_round_trip(tmp_path, name, settings):
    saved = small(name, **settings)
    save_checkpoint(tmp_path / "a" / "last.pt", saved)
    before = torch.get_rng_state()
    loaded = load_checkpoint(tmp_path / "a" / "last.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded.model) is type(saved.model)
    assert not loaded.model.training
    assert torch.equal(loaded.model(TOKENS), saved.model.eval()(TOKENS))
    assert loaded.tokenizer.to_dict() == saved.tokenizer.to_dict()
    assert (loaded.corpus, loaded.step, loaded.history) == (saved.corpus, saved.step, saved.history)
    assert torch.equal(loaded.training["generator"], saved.training["generator"])
    assert os.listdir(tmp_path / "a") == ["last.pt"]


@pytest.mark.parametrize("name", MODELS)
def test_a_subword_tokenizer_is_in_the_file(tmp_path, name):
    saved = small(name, tokenizer=train_bpe(["the theme, the thesis"], 300))
    save_checkpoint(tmp_path / "last.pt", saved)
    assert load_checkpoint(tmp_path / "last.pt").tokenizer.to_dict() == saved.tokenizer.to_dict()


def adapted(base: Checkpoint) -> Checkpoint:
    """The model with adapters that change it, and a head that calibration has scaled."""
    other = small()
    other.model = continued(base.model, ModelConfig(**(base.model.config.to_dict() | {"lora_rank": 2})))
    for p in other.model.parameters():
        p.data += 0.1 if p.requires_grad else 0.0
    other.model.head.weight.data *= 1.5
    return other


@pytest.mark.parametrize("rank", [0, 2])
def test_exported_weights_are_those_of_the_model_in_half_precision_and_the_tables_in_8_bits(tmp_path, rank):
    saved = adapted(small()) if rank else small()
    expected = saved.model.eval()(TOKENS)
    export_weights(tmp_path / "x.pt", saved)
    loaded = load_checkpoint(tmp_path / "x.pt")
    assert loaded.model.config.lora_rank == 0
    assert loaded.training == {}
    assert torch.allclose(loaded.model(TOKENS), expected, rtol=3e-2, atol=0.1)
    stored = torch.load(tmp_path / "x.pt")["model"]
    assert {tensor.dtype for name, tensor in stored.items() if name != TABLES} == {torch.float16}
    assert stored[TABLES].dtype == torch.int8
    table, read = saved.model.encoder.ngrams.tables.weight, loaded.model.encoder.ngrams.tables.weight
    largest = table.abs().amax(1, keepdim=True)
    assert ((read - table).abs() <= 0.6 / 127 * largest).all()


def test_adapters_alone_need_the_model_that_they_change_wherever_it_is(tmp_path):
    """Also with a calibrated head: issue 22, point 1. The base may be moved beside the adapters: issue 24, point 25."""
    base = small()
    (tmp_path / "a").mkdir()
    save_checkpoint(tmp_path / "base.pt", base)
    tuned = adapted(load_checkpoint(tmp_path / "base.pt"))
    note = {"path": str(tmp_path / "base.pt"), "sha256": sha256_of(tmp_path / "base.pt")}
    save_adapters(tmp_path / "a/adapters.pt", tuned, note)
    expected = tuned.model.eval()(TOKENS)
    assert torch.equal(load_checkpoint(tmp_path / "a/adapters.pt", resuming=True).model(TOKENS), expected)
    loaded = load_checkpoint(tmp_path / "a/adapters.pt").model
    assert loaded.config.lora_rank == 0
    assert torch.allclose(loaded(TOKENS), expected, rtol=1e-4, atol=1e-4)
    shutil.move(tmp_path / "base.pt", tmp_path / "a/any.pt")
    assert torch.equal(load_checkpoint(tmp_path / "a/adapters.pt").model(TOKENS), loaded(TOKENS))
    (tmp_path / "a/any.pt").unlink()
    save_checkpoint(tmp_path / "base.pt", small(segments="line"))
    with pytest.raises(ValueError, match=r"adapters.pt: holds adapters of .*base.pt, which is missing or has changed"):
        load_checkpoint(tmp_path / "a/adapters.pt")


@pytest.fixture
def forge(tmp_path):
    """forge(change) writes a checkpoint whose entries change(state) has altered, with a hash that fits."""
    save_checkpoint(tmp_path / "good.pt", small())

    def write(change):
        state = torch.load(tmp_path / "good.pt")
        torch.save(change(state) or state, tmp_path / "forged.pt")
        seal(tmp_path / "forged.pt")
        return tmp_path / "forged.pt"

    return write


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "sealed.pt").write_text("not a checkpoint")
    seal(tmp_path / "sealed.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    torch.save(SimpleTokenizer("code"), tmp_path / "pickle.pt")  # unpickling it would run code
    seal(tmp_path / "pickle.pt")
    for name in ("text.pt", "empty.pt", "sealed.pt", "other.pt", "pickle.pt", "missing.pt"):
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)


def test_every_changed_byte_cut_and_addition_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, small())
    content = path.read_bytes()
    draw = random.Random(0)
    ends = [*range(100), *range(len(content) - 100, len(content))]
    for position in [*ends, *(draw.randrange(len(content)) for _ in range(200))]:
        changed = content[position] ^ 1 << draw.randrange(8)
        path.write_bytes(content[:position] + bytes([changed]) + content[position + 1 :])
        with pytest.raises(ValueError, match=r"a\.pt: its content does not match its SHA-256"):
            load_checkpoint(path)
    for other in (content[:-1], content[:100], content + b"\0", content + content, content[1:], b"\0" + content):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"a\.pt: its content does not match its SHA-256"):
            load_checkpoint(path)
    path.write_bytes(content)
    assert load_checkpoint(path).step == 3


HEAD = "head.weight"


def altered(entry: str, **values):
    return lambda state: state[entry].update(values)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: [1, 2], "other entries"),
        (lambda state: {k: v for k, v in state.items() if k != "step"}, "other entries"),
        (lambda state: state | {"extra": 1}, "other entries"),
        (lambda state: state | {"step": "3"}, "other entries"),
        (lambda state: state | {"format": 99}, "format"),
        (lambda state: state | {"name": "bert"}, "format"),
        (lambda state: state | {"model": {k: v for k, v in state["model"].items() if k != HEAD}}, "Missing key"),
        (altered("model", extra=torch.zeros(2)), "Unexpected key"),
        (altered("model", **{HEAD: torch.zeros(7, 9)}), "size mismatch"),
        (altered("model", **{HEAD: torch.zeros(7, 8, dtype=torch.float64)}), "head.weight is no tensor of float32"),
        (altered("model", **{HEAD: torch.zeros(7, 8, dtype=torch.long)}), "head.weight is no tensor of float32"),
        (altered("model", **{HEAD: "weights"}), "head.weight is no tensor of float32"),
        (altered("model", **{HEAD: torch.full((7, 8), torch.nan)}), "head.weight is not finite"),
        (altered("model", **{HEAD: torch.full((7, 8), torch.inf)}), "head.weight is not finite"),
        (altered("model", **{SCALE: torch.zeros(7, dtype=torch.float16)}), "has 7 rows, its table 505"),
        (altered("model", **{TABLES: torch.zeros(505, 8, dtype=torch.int8)}), "is no tensor of float32 or float16"),
        (altered("config", n_expert=8), "n_expert"),
        (altered("config", parallel=2), "parallel"),
        (altered("config", n_embd="8"), "of another version"),
        (altered("config", n_embd=9), "n_embd must be a multiple"),
        (altered("config", n_embd=1 << 20), "GB of memory"),
        (altered("config", n_layer=900), "the file holds"),
        (altered("config", n_layer=10**9), "n_layer must be at most"),
        (altered("config", block_size=10**12), "block_size must be at most"),
        (altered("config", vocab_size=8), "7 tokens, its network 8"),
        (altered("config", ngram_rows=1 << 20), "the file holds"),
        (altered("tokenizer", characters="abcd"), "8 tokens, its network 7"),
        (altered("tokenizer", characters=5), "iterable"),
        (altered("tokenizer", special_tokens=["[PAD]"]), "special tokens"),
        (lambda state: state | {"tokenizer": {}}, "special_tokens"),
        (lambda state: state | {"base": {"path": 3}}, "adapters"),
    ],
)
def test_contents_that_do_not_fit_are_refused(forge, change, problem):
    path = forge(change)
    with pytest.raises(ValueError, match=problem) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    save_checkpoint(tmp_path / "last.pt", small())
    before, diverged = (tmp_path / "last.pt").read_bytes(), small()
    diverged.model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"last.pt: head.weight is not finite: .* --lr"):
        save_checkpoint(tmp_path / "last.pt", diverged)
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_named(tmp_path):
    save_checkpoint(tmp_path / "last.pt", small())
    for device in ("cuda", torch.device("cuda", 0), "quantum"):
        with pytest.raises(ValueError, match=f"device {device}: not available on this machine; use one of: .*cpu"):
            load_checkpoint(tmp_path / "last.pt", device)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", small())
    before = (tmp_path / "last.pt").read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "last.pt", small())
    assert (tmp_path / "last.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


def test_runs_are_found_by_model_and_without_one_the_pretrained_unless_a_folder_was_named(tmp_path, monkeypatch):
    """LLaDA by default, whichever was trained last: issue 24, point 7; a named folder without a model: point 6."""
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="train one"):
        newest_checkpoint()
    for path in (
        *(f"pretrained/{name}.pt" for name in MODELS),
        "runs/llada/last.pt",
        "runs/gpt/best.pt",
        "runs/gpt/last.pt",
    ):
        save_checkpoint(tmp_path / path, small())
    best, last = tmp_path / "runs/gpt/best.pt", tmp_path / "runs/llada/last.pt"
    assert find_checkpoints(tmp_path / "runs") == [last, best]
    assert (newest_checkpoint("runs"), newest_checkpoint("runs", "gpt")) == (
        last.relative_to(tmp_path),
        best.relative_to(tmp_path),
    )
    assert newest_checkpoint() == tmp_path / "pretrained/llada.pt"
    assert newest_checkpoint(name="gpt") == tmp_path / "pretrained/gpt.pt"
    with pytest.raises(ValueError, match=r"no checkpoint under nowhere/"):
        newest_checkpoint("nowhere")
    last.unlink()
    assert newest_checkpoint("runs") == best.relative_to(tmp_path)


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="in this folder"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "last.pt", small())
    assert load_checkpoint(tmp_path).path == tmp_path / "last.pt"
    save_checkpoint(tmp_path / "best.pt", small())
    assert load_checkpoint(str(tmp_path)).path == tmp_path / "best.pt"
    assert checkpoint_file(tmp_path, ("last.pt",)) == tmp_path / "last.pt"
    assert checkpoint_file(tmp_path / "any") == tmp_path / "any"
