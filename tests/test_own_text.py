"""train.py on utterances, subwords, pairs and from another model, with the real commands; what they leave is used."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from checkpoint import load_checkpoint
from extras.bpe import BPETokenizer
from generation.text import GeneratorTransformer

SIZES = shlex.split("--n-layer 1 --n-embd 16 --n-head 2 --block-size 32 --ngram-rows 101 --batch-size 4")
SPEECHES = "".join(f"KING {i}:\nThe {w} is {i}.\nSo be it.\n\n" for i in range(60) for w in ("rose", "crown"))
FOREIGN = "".join(f"Der König {i} hört: „Ja, süß!“\n" for i in range(60))


@pytest.fixture
def train(run_script, tmp_path, monkeypatch):
    """train(*flags) runs train.py in a folder with some texts, for a few steps; returns its messages."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plays.txt").write_text(SPEECHES)
    (tmp_path / "book.txt").write_text(FOREIGN)
    words = ["rose", "crown", "king", "fool", "queen", "ring", "sword", "horse"]
    pairs = [{"prompt": word * n, "completion": (word * n)[::-1]} for word in words for n in (1, 2)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return lambda *flags: run_script("train.py", *flags, "--steps", "3")[1]


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_utterances_of_subwords(train, run_script, model):
    train("--model", model, "--data", "plays.txt", "--segments", "speech", "--tokenizer", "bpe", "--vocab-size", "280",
          *SIZES)  # fmt: skip
    checkpoint = load_checkpoint(f"out/{model}/best.pt")
    assert isinstance(checkpoint.tokenizer, BPETokenizer)
    assert checkpoint.tokenizer.vocab_size == 280
    assert checkpoint.model.config.segments == "speech"
    for flags in (["--num-samples", "3"], ["--watch"], ["--prompt", "KING 3:\né", "--length", "9"], ["--top", "3"]):
        assert run_script("generate.py", "--model", model, *flags)[0].strip()


def test_the_tokenizer_of_subwords_is_trained_on_the_training_part_alone(train, tmp_path):
    text = SPEECHES + "zyzzyva " * 200
    (tmp_path / "plays.txt").write_text(text)
    share = str(1600 / len(text))
    train("--data", "plays.txt", "--tokenizer", "bpe", "--vocab-size", "300", "--val-fraction", share, *SIZES)
    tokens = load_checkpoint("out/llada/best.pt").tokenizer.id_to_char.values()
    assert not any("yz" in token for token in tokens)


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_pairs_and_a_conversation(train, run_script, model):
    train("--model", model, "--pairs", "pairs.jsonl", *SIZES)
    assert load_checkpoint(f"out/{model}/best.pt").model.config.segments == "pairs"
    text, _ = run_script("generate.py", "--model", model, "--prompt", "rose", "--length", "5")
    assert len(text.rstrip("\n")) <= 5
    answers, _ = run_script("generate.py", "--model", model, "--chat", "--length", "5", stdin="rose\nking\nexit\n")
    assert "rose" not in answers or len(answers) <= 2 * 7


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_fine_tuning_keeps_old_characters_and_learns_new_ones(train, model):
    train("--model", model, "--data", "plays.txt", *SIZES)
    base = load_checkpoint(f"out/{model}/best.pt")
    messages = train("--model", model, "--data", "book.txt", "--init-from", f"out/{model}/best.pt", "--out", "tuned")
    tuned = load_checkpoint(f"tuned/{model}/best.pt")
    old, new = base.tokenizer, tuned.tokenizer
    assert new.characters.startswith(old.characters)
    assert set(new.characters) - set(old.characters) == set(FOREIGN) - set(SPEECHES)
    assert tuned.model.config.vocab_size == new.vocab_size
    assert "the new text was" in messages
    summary = json.loads(Path(f"tuned/{model}/summary.json").read_text())
    assert summary["params_trainable"] == summary["params"]
    assert summary["nats_per_char"] < summary["fine_tuning"]["new_before"]
    assert GeneratorTransformer(tuned.model, new).generate("Der König", max_out_tokens=3).startswith("Der König")
    train("--data", "plays.txt", "--init-from", f"tuned/{model}", "--out", "again")
    last = [load_checkpoint(f"{out}/{model}/last.pt") for out in ("out", "tuned", "again")]
    assert [checkpoint.step for checkpoint in last] == [3, 6, 9], "of all runs: issue 24, point 9"
    assert last[-1].history[-1]["step"] == 3


@pytest.mark.parametrize("model", ["llada", "gpt"])
def test_adapters_are_trained_alone_and_exported_merged(train, model):
    train("--model", model, "--data", "plays.txt", *SIZES)
    flags = shlex.split("--data plays.txt --lora-rank 2 --out tuned --export merged.pt --segments line")
    messages = train("--model", model, "--init-from", f"out/{model}/best.pt", *flags)
    base = load_checkpoint(f"out/{model}/best.pt").model.state_dict()
    tuned = load_checkpoint(f"tuned/{model}/best.pt", resuming=True)
    assert f"fine-tuning trained {tuned.model.num_parameters(trainable=True):,} of" in messages
    for name, tensor in tuned.model.named_parameters():
        if not tensor.requires_grad and name != "head.weight":  # which calibration scales
            assert torch.equal(tensor, base[name.replace("parametrizations.weight.original", "weight")])
    exported, tokens = load_checkpoint("merged.pt").model, torch.tensor([[4, 5, 6]])
    assert exported.config.lora_rank == 0
    assert torch.allclose(exported(tokens), tuned.model(tokens), atol=1e-2)


@pytest.mark.parametrize("data", ["plays.txt", "book.txt"])  # without and with new characters
def test_adapters_keep_their_calibration(train, data):
    """Issue 22, point 1: the head is scaled, in best.pt and in the export."""
    train("--model", "gpt", "--data", "plays.txt", *SIZES)
    base = load_checkpoint("out/gpt/best.pt").model.head.weight
    flags = shlex.split("--lora-rank 2 --out tuned --calibration 0.1 --export x.pt")
    train("--init-from", "out/gpt", "--data", data, *flags)
    best = load_checkpoint("tuned/gpt/best.pt")
    temperature = best.history[-1]["temperature"]
    assert temperature != pytest.approx(1, abs=1e-4)
    for tuned, rounding in ((best, 1e-4), (load_checkpoint("x.pt"), 1e-2)):
        assert torch.allclose(tuned.model.head.weight[: len(base)], base / temperature, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "x.jsonl, line 2: not"),
        ('{"prompt": "a", "completion": "b"}', "there is no pair to train on"),
        (f'{{"prompt": "{"a" * 40}", "completion": "b"}}\n' * 3, "takes 44 tokens, more than the context of 32"),
        ("", "x.jsonl: holds no pairs"),
    ],
)
def test_bad_pairs(train, run_script, tmp_path, lines, problem):
    (tmp_path / "x.jsonl").write_text(lines)
    _, messages = run_script("train.py", "--pairs", "x.jsonl", "--steps", "1", *SIZES, check=2)
    assert problem in messages
