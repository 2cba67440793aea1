"""Visibility, equal parameter counts, tokens that are never predicted, and the cache against recomputation."""

from contextlib import suppress

import pytest
import torch
from torch import nn
from toy import random_model, seeded

from layers import NGRAMS
from model import ENCODERS, MODELS, least_bytes

with suppress(ImportError):  # an extra: its encoder is one more here
    import extras.vanilla  # noqa: F401

T, V = 12, 12
ARCHS = pytest.mark.parametrize("arch", sorted(ENCODERS))
NAMES = pytest.mark.parametrize("name", MODELS)


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(4, V, (rows, T), generator=seeded(1))


@pytest.mark.parametrize("width", [0, 4])
@NAMES
def test_ngrams_are_looked_up_as_numbers_in_base_v(name, width):
    model, x = random_model(name, ngram_width=width), tokens(1)
    ngrams, padded = model.encoder.ngrams, [0] * 8 + x[0].tolist() + [0] * 8
    found = ngrams(x, model.encoder.make_context(T))
    assert ngrams.tables.weight.shape == (5 * 101, width or 16)
    for position in range(T):
        expected = torch.zeros(width or 16)
        for kind, offsets in enumerate(NGRAMS[model.causal]):
            number = 0
            for offset in offsets:
                number = number * V + padded[8 + position + offset]
            expected += ngrams.tables.weight[kind * 101 + number % 101]
        assert torch.allclose(found[0, position], ngrams.up(expected), atol=1e-6)


@NAMES
@ARCHS
def test_positions_see_what_they_should(name, arch):
    model, x = random_model(name, arch=arch), tokens(1)
    before = model(x)[..., 3:]
    for changed in range(T):
        y = x.clone()
        y[0, changed] = changed % 4  # special tokens, padding too, are read like all others
        differs = (model(y)[..., 3:] != before).any(-1)[0]
        if name == "gpt":
            assert not differs[:changed].any(), "a position saw a later one"
            assert differs[changed:].all()
        else:
            assert differs.all(), "a position did not see another"


@NAMES
@ARCHS
def test_logits_exclude_special_tokens_and_may_be_those_of_chosen_positions(name, arch):
    model, x = random_model(name, arch=arch), tokens()
    logits = model(x)
    assert (logits[..., :3] == -torch.inf).all()
    assert logits[..., 3:].isfinite().all()
    at = (x % 3 == 0).flatten().nonzero()[:, 0]
    torch.testing.assert_close(model(x, at=at), logits.flatten(0, 1)[at], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="17 positions do not fit"):
        model(torch.zeros(1, 17, dtype=torch.long))


@ARCHS
def test_equal_parameter_counts(arch):
    gpt, llada = (random_model(name, arch=arch) for name in ("gpt", "llada"))
    assert gpt.num_parameters() == gpt.num_parameters(trainable=True) == llada.num_parameters()
    assert gpt.num_looked_up() == llada.num_looked_up()
    for model in (gpt, llada):
        assert 0.8 * 4 * model.num_parameters() < least_bytes(model.name, model.config) < 4.5 * model.num_parameters()


@pytest.mark.parametrize("chunks", [[1] * T, [5, 1, 1, 5], [2, 5, 1, 1, 3], [T]])
def test_cached_logits_equal_recomputed_ones(chunks):
    """Of attention, convolution and n-grams, which all look to the left."""
    model, x = random_model("gpt"), tokens()
    with torch.inference_mode():
        expected, cache = model(x), model.new_cache(2, T)
        cached = torch.cat([model(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
    assert cache.length == T
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_compiled_step_equals_the_eager_one(rows):
    """Compiled code computes products of one row, attention of one query and rotations in other ways."""
    model, x = random_model("gpt", n_layer=1), tokens(rows)
    with torch.inference_mode():
        expected = model(x)
        model.compile(backend="aot_eager", fullgraph=True)
        cache = model.new_cache(rows, T)
        compiled = torch.cat([model(part, cache=cache) for part in x.split([5] + [1] * (T - 5), dim=1)], dim=1)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)


def test_vanilla_is_pytorchs_own_encoder():
    pytest.importorskip("extras.vanilla")
    model = random_model("llada", arch="vanilla")
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    assert isinstance(model.encoder.encoder, nn.TransformerEncoder)
    assert [layer.self_attn.batch_first for layer in layers] == [True, True]
    assert model.new_cache(1, 10) is None


@NAMES
def test_device_and_cache_are_those_of_the_parameters(name):
    model = random_model(name).to("meta")
    cache = model.new_cache(3, 10)
    assert model.device.type == cache.keys[0].device.type == cache.tokens.device.type == "meta"
    assert [keys.shape for keys in cache.keys] == [(3, 2, 10, 8)] * 2
