"""Round trips, files that are not checkpoints, atomic writing, devices that are missing."""

import os
import random

import pytest
import torch

import checkpoint
from checkpoint import (
    Checkpoint,
    checkpoint_file,
    export_weights,
    find_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_adapters,
    save_checkpoint,
)
from model import MODELS, ModelConfig, add_lora
from tokenizer import SimpleTokenizer, train_bpe
from utils.files import seal, sha256_of


def small(name: str = "gpt", arch: str = "rotary", tokenizer=SimpleTokenizer("abc")) -> Checkpoint:  # noqa: B008
    config = ModelConfig(tokenizer.vocab_size, 8, n_embd=8, n_head=2, n_layer=1, arch=arch, ngram_rows=101)
    model = MODELS[name](config)
    corpus = {"name": "x", "sha256": "0", "val_fraction": 0.1}
    return Checkpoint(model, tokenizer, corpus, 3, [{"step": 3, "val_loss": 1.5}], {"generator": torch.arange(3)})


@pytest.mark.parametrize("arch", ["rotary", "vanilla"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name, arch):
    saved = small(name, arch)
    save_checkpoint(tmp_path / "a" / "last.pt", saved)
    loaded = load_checkpoint(tmp_path / "a" / "last.pt")
    assert type(loaded.model) is type(saved.model)
    assert not loaded.model.training
    tokens = torch.tensor([[4, 5, 6]])
    assert torch.equal(loaded.model(tokens), saved.model.eval()(tokens))
    assert loaded.tokenizer.to_dict() == saved.tokenizer.to_dict()
    assert (loaded.corpus, loaded.step, loaded.history) == (saved.corpus, saved.step, saved.history)
    assert torch.equal(loaded.training["generator"], saved.training["generator"])
    assert os.listdir(tmp_path / "a") == ["last.pt"]


@pytest.mark.parametrize("name", MODELS)
def test_a_subword_tokenizer_is_in_the_file(tmp_path, name):
    saved = small(name, tokenizer=train_bpe(["the theme, the thesis"], 300))
    save_checkpoint(tmp_path / "last.pt", saved)
    assert load_checkpoint(tmp_path / "last.pt").tokenizer.to_dict() == saved.tokenizer.to_dict()


@pytest.mark.parametrize("rank", [0, 2])
def test_exported_weights_are_those_of_the_model_in_half_precision(tmp_path, rank):
    saved = small()
    saved.model = add_lora(randomized(saved.model), rank) if rank else randomized(saved.model)
    for p in saved.model.parameters():
        p.data += 0.1 if p.requires_grad else 0.0
    export_weights(tmp_path / "x.pt", saved)
    loaded, tokens = load_checkpoint(tmp_path / "x.pt"), torch.tensor([[4, 5, 6]])
    assert loaded.model.config.lora_rank == 0
    assert loaded.training == {}
    assert torch.allclose(loaded.model(tokens), saved.model.eval()(tokens), rtol=2e-2, atol=2e-2)
    stored = torch.load(tmp_path / "x.pt")["model"].values()
    assert {tensor.dtype for tensor in stored} == {torch.float16}


def test_adapters_alone_need_the_model_that_they_change(tmp_path):
    base = small()
    base.model = randomized(base.model)
    save_checkpoint(tmp_path / "base.pt", base)
    adapted = small()
    adapted.model = add_lora(base.model, 2)
    for p in adapted.model.parameters():
        p.data += 0.1 if p.requires_grad else 0.0
    note = {"path": str(tmp_path / "base.pt"), "sha256": sha256_of(tmp_path / "base.pt")}
    save_adapters(tmp_path / "adapters.pt", adapted, note)
    loaded, tokens = load_checkpoint(tmp_path / "adapters.pt"), torch.tensor([[4, 5, 6]])
    assert torch.equal(loaded.model(tokens), adapted.model.eval()(tokens))
    save_checkpoint(tmp_path / "base.pt", small())
    with pytest.raises(ValueError, match=r"adapters.pt: holds adapters of .*base.pt, which is missing or has changed"):
        load_checkpoint(tmp_path / "adapters.pt")


def randomized(model):
    """The model with random weights where it starts at zero."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(generator=generator)
    return model


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
        (altered("config", n_expert=8), "n_expert"),
        (altered("config", n_embd="8"), "n_embd|not supported"),
        (altered("config", n_embd=9), "n_embd must be a multiple"),
        (altered("config", n_embd=1 << 20), "GB of memory"),
        (altered("config", n_layer=900), "the file holds"),
        (altered("config", n_layer=10**9), "n_layer must be at most"),
        (altered("config", block_size=10**12), "block_size must be at most"),
        (altered("config", vocab_size=8), "7 tokens, its network 8"),
        (altered("config", ngram_rows=1 << 20), "the file holds"),
        (altered("tokenizer", characters="abcd"), "8 tokens, its network 7"),
        (altered("tokenizer", characters=5), "not iterable"),
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


def test_the_newest_run_is_found_by_model(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "pretrained")
    with pytest.raises(ValueError, match="train one"):
        newest_checkpoint(tmp_path)
    for age, path in enumerate(["llada/last.pt", "gpt/best.pt", "gpt/last.pt"]):
        save_checkpoint(tmp_path / path, small())
        os.utime(tmp_path / path, (age, age))
    assert newest_checkpoint(tmp_path) == tmp_path / "gpt/best.pt"
    assert newest_checkpoint(tmp_path, "llada") == tmp_path / "llada/last.pt"
    assert find_checkpoints(tmp_path) == [tmp_path / "gpt/best.pt", tmp_path / "llada/last.pt"]


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="in this folder"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "last.pt", small())
    assert load_checkpoint(tmp_path).path == tmp_path / "last.pt"
    save_checkpoint(tmp_path / "best.pt", small())
    assert load_checkpoint(str(tmp_path)).path == tmp_path / "best.pt"
    assert checkpoint_file(tmp_path, ("last.pt",)) == tmp_path / "last.pt"
    assert checkpoint_file(tmp_path / "any") == tmp_path / "any"


def test_without_a_run_of_a_model_its_pretrained_one_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "pretrained")
    for path in ("pretrained/llada.pt", "pretrained/gpt.pt"):
        save_checkpoint(tmp_path / path, small())
    assert newest_checkpoint(tmp_path) == tmp_path / "pretrained/llada.pt"
    assert newest_checkpoint(tmp_path, "gpt") == tmp_path / "pretrained/gpt.pt"
    save_checkpoint(tmp_path / "gpt/best.pt", small())
    assert newest_checkpoint(tmp_path) == tmp_path / "gpt/best.pt"
    assert newest_checkpoint(tmp_path, "llada") == tmp_path / "pretrained/llada.pt"
    assert find_checkpoints(tmp_path) == [tmp_path / "gpt/best.pt"]
