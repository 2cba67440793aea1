"""Visibility, equal parameter counts, tokens that are never predicted, and the cache against recomputation."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from layers import NGRAMS
from model import ENCODERS, MODELS, ModelConfig
from utils.errors import ArgumentError

T, V = 12, 20


def random_model(name: str, arch: str, seed: int = 0):
    """A small model with random weights, also where they start at zero, so that every weight matters."""
    torch.manual_seed(seed)
    model = MODELS[name](ModelConfig(V, 16, n_embd=16, n_head=2, n_layer=2, arch=arch, ngram_rows=101)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(4, V, (rows, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_ngrams_are_looked_up_as_numbers_in_base_v(name):
    model, x = random_model(name, "rotary"), tokens(1)
    ngrams, padded = model.encoder.ngrams, [0] * 8 + x[0].tolist() + [0] * 8
    for position in range(T):
        expected = torch.zeros(16)
        for kind, offsets in enumerate(NGRAMS[model.causal]):
            number = 0
            for offset in offsets:
                number = number * V + padded[8 + position + offset]
            expected += ngrams.tables.weight[kind * 101 + number % 101]
        assert torch.allclose(ngrams(x)[0, position], expected, atol=1e-6)


@pytest.mark.parametrize("arch", ENCODERS)
@pytest.mark.parametrize("name", MODELS)
def test_positions_see_what_they_should(name, arch):
    model, x = random_model(name, arch), tokens(1)
    before = model(x)[..., 3:]
    for changed in range(T):
        y = x.clone()
        y[0, changed] = 3
        differs = (model(y)[..., 3:] != before).any(-1)[0]
        if name == "gpt":
            assert not differs[:changed].any(), "a position saw a later one"
            assert differs[changed:].all()
        else:
            assert differs.all(), "a position did not see another"


@pytest.mark.parametrize("arch", ENCODERS)
def test_equal_parameter_counts(arch):
    gpt, llada = (random_model(name, arch).num_parameters() for name in ("gpt", "llada"))
    assert gpt == llada


@pytest.mark.parametrize("arch", ENCODERS)
@pytest.mark.parametrize("name", MODELS)
def test_special_tokens_are_never_predicted(name, arch):
    logits = random_model(name, arch)(tokens())
    assert (logits[..., :3] == -torch.inf).all()
    assert logits[..., 3:].isfinite().all()
    assert torch.allclose(logits.softmax(-1).sum(-1), torch.ones(2, T))


@pytest.mark.parametrize("arch", ENCODERS)
@pytest.mark.parametrize("name", MODELS)
def test_left_padding_changes_nothing(name, arch):
    model, x = random_model(name, arch), tokens()
    pad = torch.tensor([3, 1])
    padded = torch.zeros(2, T + 3, dtype=torch.long)
    for row, p in enumerate(pad):
        padded[row, p : p + T] = x[row]
    logits, alone = model(padded[:, : T + 1], pad=torch.tensor([0, 1])), model(x)
    assert torch.allclose(logits[1, 1:, 3:], alone[1, :, 3:], atol=1e-5)
    logits = model(padded[:1], pad=pad[:1])
    assert torch.allclose(logits[0, 3:, 3:], alone[0, :, 3:], atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arch", ENCODERS)
@pytest.mark.parametrize("name", MODELS)
def test_what_stands_in_the_padding_changes_no_logit(name, arch, training):
    """Nor a gradient: no position of a text sees any of it, bit for bit."""
    model, pad = random_model(name, arch).train(training), torch.tensor([3, 0, 7])
    is_text = torch.arange(T) >= pad[:, None]
    results = []
    for garbage in (0, 1, 3, V - 1):
        x = tokens(3).masked_fill(~is_text, garbage)
        with torch.set_grad_enabled(training):
            logits = model(x, pad=pad)[is_text][:, 3:]
        results.append([logits.detach()])
        if training:
            loss = logits.logsumexp(-1).mean()
            results[-1] += torch.autograd.grad(loss, list(model.parameters()))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("arch", ENCODERS)
def test_padding_behind_a_text_changes_nothing_in_gpt(arch):
    """Segments and pairs are padded at the right, where causality hides it. LLaDA's rows hold no padding."""
    model, x = random_model("gpt", arch).train(), tokens()
    garbage = x.clone()
    garbage[:, 7:] = torch.tensor([0, 1, 2, 3, 4])
    assert torch.equal(model(garbage)[:, :7], model(x)[:, :7])
    torch.testing.assert_close(model(x[:, :7])[..., 3:], model(x)[:, :7, 3:], rtol=1e-5, atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing_with_a_cache():
    model, pad = random_model("gpt", "rotary"), torch.tensor([3, 0])
    x, is_text = tokens(), torch.arange(T) >= pad[:, None]
    with torch.inference_mode():
        expected = model(x, pad=pad)[..., 3:]
        cache = model.new_cache(2, T)
        parts = x.masked_fill(~is_text, 1).split([2, 5, 1, 1, T - 9], dim=1)
        cached = torch.cat([model(part, pad=pad, cache=cache)[..., 3:] for part in parts], dim=1)
    torch.testing.assert_close(cached[is_text], expected[is_text], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * T, [5, 1, 1, 5], [T]])
def test_cached_logits_equal_recomputed_ones(chunks):
    model, x = random_model("gpt", "rotary"), tokens()
    with torch.inference_mode():
        cache = model.new_cache(2, T)
        cached = torch.cat([model(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
        assert torch.allclose(cached[..., 3:], model(x)[..., 3:], atol=1e-5)
        assert torch.equal(cached.argmax(-1), model(x).argmax(-1))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_compiled_step_equals_the_eager_one(rows):
    """Compiled code computes products of one row, attention of one query and rotations in other ways."""
    model, x = random_model("gpt", "rotary"), tokens(rows)
    with torch.inference_mode():
        expected = model(x)
        model.compile(backend="aot_eager", fullgraph=True)
        cache = model.new_cache(rows, T)
        compiled = torch.cat([model(part, cache=cache) for part in x.split([5] + [1] * (T - 5), dim=1)], dim=1)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled.argmax(-1), expected.argmax(-1))


def test_logits_at_chosen_positions_equal_those_of_all_positions():
    model, x = random_model("llada", "rotary"), tokens()
    at = x % 3 == 0
    assert torch.allclose(model(x, at=at)[:, 3:], model(x)[at][:, 3:], atol=1e-6)


def test_vanilla_is_pytorchs_own_encoder():
    model = random_model("llada", "vanilla")
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    assert isinstance(model.encoder.encoder, nn.TransformerEncoder)
    assert len(layers) == 2
    assert all(layer.self_attn.batch_first for layer in layers)


@pytest.mark.parametrize(
    ("bad", "argument"),
    [({"n_head": 3}, "n_embd"), ({"n_layer": 0}, "n_layer"), ({"dropout": 1.0}, "dropout"), ({"arch": "x"}, "arch")],
)
def test_impossible_sizes_are_refused(bad, argument):
    with pytest.raises(ArgumentError) as error:
        ModelConfig(**({"vocab_size": V, "block_size": 16, "n_embd": 16, "n_head": 2} | bad))
    assert error.value.argument == argument


def test_config_is_frozen_and_rebuilds_itself_from_plain_values():
    config = ModelConfig(V, 16, n_embd=16, n_head=2, arch="vanilla")
    assert ModelConfig(**config.to_dict()) == config
    with pytest.raises(FrozenInstanceError):
        config.n_embd = 32


@pytest.mark.parametrize("name", MODELS)
def test_device_and_cache_are_those_of_the_parameters(name):
    model = random_model(name, "rotary").to("meta")
    cache = model.new_cache(3, 10)
    assert model.device.type == cache.keys[0].device.type == cache.tokens.device.type == "meta"
    assert [keys.shape for keys in cache.keys] == [(3, 2, 10, 8)] * 2


def test_too_long_input_is_refused():
    with pytest.raises(ValueError, match="17 positions do not fit"):
        random_model("gpt", "rotary")(torch.zeros(1, 17, dtype=torch.long))
