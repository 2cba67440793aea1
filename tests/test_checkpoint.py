"""Round trips, files that are not checkpoints, atomic writing, devices that are missing."""

import os

import pytest
import torch

import checkpoint
from checkpoint import (
    Checkpoint,
    export_weights,
    find_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_adapters,
    save_checkpoint,
)
from model import MODELS, ModelConfig, add_lora
from tokenizer import SimpleTokenizer, train_bpe
from utils.files import sha256_of


def small(name: str = "gpt", arch: str = "rotary") -> Checkpoint:
    tokenizer = SimpleTokenizer("abc")
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
    saved = small(name)
    saved.tokenizer = train_bpe(["the theme, the thesis"], 300)
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


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    good = tmp_path / "good.pt"
    save_checkpoint(good, small())
    (tmp_path / "half.pt").write_bytes(good.read_bytes()[:-2000])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"model": {}}, tmp_path / "other.pt")
    torch.save(SimpleTokenizer("code"), tmp_path / "pickle.pt")  # unpickling it would run code
    state = torch.load(good)
    torch.save(state | {"model": {k: v for k, v in state["model"].items() if "qkv" not in k}}, tmp_path / "older.pt")
    torch.save(state | {"config": state["config"] | {"n_expert": 8}}, tmp_path / "newer.pt")
    for name in ("half.pt", "text.pt", "other.pt", "pickle.pt", "older.pt", "newer.pt", "missing.pt", ""):
        with pytest.raises(ValueError, match=name or "no such checkpoint"):
            load_checkpoint(tmp_path / name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_named(tmp_path):
    save_checkpoint(tmp_path / "last.pt", small())
    for device in ("cuda", torch.device("cuda", 0), "quantum"):
        with pytest.raises(ValueError, match=f"device {device}: not available on this machine; use one of: .*cpu"):
            load_checkpoint(tmp_path / "last.pt", device)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", small())
    before = (tmp_path / "last.pt").read_bytes()

    def full_disk(state, path):
        path.write_bytes(b"half")
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
