"""The models in pretrained/: their size, their text, their losses on an excerpt of the validation part."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT

from autoregressive import exact_nll
from checkpoint import Checkpoint, load_checkpoint
from config import SamplingConfig
from generation import GeneratorTransformer
from generation.write import mask_predictor
from likelihood import policy_likelihood
from sampler import policy_of
from tokenizer import MASK_ID, START_ID

PATHS = {name: ROOT / "pretrained" / f"{name}.pt" for name in ("llada", "gpt")}
EXCERPT = (Path(__file__).parent / "validation_excerpt.txt").read_text()  # the last 4,096 characters of the corpus


@pytest.fixture(scope="module")
def models() -> dict[str, Checkpoint]:
    return {name: load_checkpoint(path) for name, path in PATHS.items()}


def windows(checkpoint: Checkpoint) -> torch.Tensor:
    return torch.from_numpy(checkpoint.tokenizer.encode(EXCERPT)).long().view(-1, checkpoint.model.config.block_size)


def test_they_are_small_and_of_the_same_text(models):
    llada, gpt = models["llada"], models["gpt"]
    assert max(path.stat().st_size for path in PATHS.values()) <= 12_000_000
    assert llada.corpus == gpt.corpus
    assert llada.corpus["name"] == "tinyshakespeare"
    assert llada.training == gpt.training == {}


def test_their_losses_on_the_excerpt(models):
    """Exact losses, nats/char: of GPT, and of LLaDA with its default order at temperature 1."""
    gpt, llada = models["gpt"], models["llada"]
    assert exact_nll(gpt.model, windows(gpt), START_ID).mean().item() == pytest.approx(1.6817, abs=2e-3)
    predict, policy = mask_predictor(llada.model), policy_of(SamplingConfig(correct=0))
    result, nfe = policy_likelihood(predict, windows(llada), policy, MASK_ID)
    assert result.nats_per_char == pytest.approx(1.9203, abs=2e-3)
    assert set(nfe.tolist()) == {32}


@pytest.mark.parametrize("name", PATHS)
def test_they_write(name):
    writer = GeneratorTransformer.load_from_checkpoint(PATHS[name])
    text = writer.generate("ROMEO:\n", temperature=0.7, max_out_tokens=100)
    assert len(text) == len("ROMEO:\n") + 100
    assert len(text.split()) > 10
