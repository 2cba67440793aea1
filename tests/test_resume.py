"""A run that is interrupted at any step and resumed from its file is bit for bit the run that was not: every tensor."""

import json
from pathlib import Path

import pytest
from kill_training import differences

from checkpoint import load_checkpoint, save_checkpoint
from config import TrainConfig
from train import load_training_corpus
from trainer import Trainer
from utils.processes import Processes

STEPS = 6
SETTINGS = {
    "plain": {},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "vanilla": {"arch": "vanilla", "dropout": 0.2},
    "dropout": {"dropout": 0.2, "ngram_dropout": 0.3},
    "accumulated": {"accumulate": 2},
    "short windows, calibrated": {"short_share": 0.6, "calibration": 0.1},
    "lines": {"segments": "line", "block_size": 40},
    "pairs": {"segments": "pairs", "pairs": "pairs.jsonl", "data": None, "block_size": 24, "val_fraction": 0.4},
    "subwords": {"tokenizer": "bpe", "bpe_size": 280},
    "sweeps": {"sweep_share": 0.5},
    "adapters": {"lora_rank": 2, "init_from": "base.pt"},
}


def new_trainer(model: str, corpus_file, base=None, **settings) -> Trainer:
    values = {"data": str(corpus_file), "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "ngram_rows": 101}
    config = TrainConfig(model=model, **(values | {"steps": STEPS, "eval_every": 2, "batch_size": 4} | settings))
    return Trainer(config, load_training_corpus(config, base), Processes("cpu"), base=base)


@pytest.fixture
def make(corpus_file, monkeypatch):
    """make(model, settings) -> a new run, each time the same."""
    monkeypatch.chdir(corpus_file.parent)
    lines = [json.dumps({"prompt": f"{i}+{i}", "completion": str(2 * i)}) for i in range(30)]
    (corpus_file.parent / "pairs.jsonl").write_text("\n".join(lines))

    def make(model: str, settings: dict) -> Trainer:
        base = None
        if "init_from" in settings:
            if not Path("base.pt").exists():
                trained = new_trainer(model, corpus_file)
                trained.train()
                save_checkpoint("base.pt", trained.checkpoint())
            base = load_checkpoint("base.pt")
        return new_trainer(model, corpus_file, base, **settings)

    return make


@pytest.mark.parametrize("model", ["llada", "gpt"])
@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_at_any_step_it_is_the_same_run(make, tmp_path, model, name):
    if (name, model) == ("sweeps", "gpt"):
        pytest.skip("sweeps are the other model's")
    whole = make(model, SETTINGS[name])
    whole.train()
    expected = (whole.model.state_dict(), vars(whole.checkpoint())["training"], whole.history)
    for stop in range(1, STEPS):
        run = make(model, SETTINGS[name])
        run.train(stopping=lambda run=run, stop=stop: run.step >= stop)
        assert run.step == stop
        save_checkpoint(tmp_path / "last.pt", run.checkpoint())
        resumed = Trainer.resume(load_checkpoint(tmp_path / "last.pt", resuming=True), Processes("cpu"))
        resumed.train()
        found = (resumed.model.state_dict(), vars(resumed.checkpoint())["training"], resumed.history)
        assert differences(list(expected), list(found)) == []
