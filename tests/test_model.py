"""Who sees whom, equal sizes, tokens never predicted, and the cache against recomputation."""

import pytest
import torch
from torch import nn

from model import CONFIGS, ENCODERS, MODELS, NGRAMS, KeyValueCache

T, V = 12, 20


def random_model(name: str, arch: str, seed: int = 0):
    """A small model in which every weight matters: those that start at zero are drawn as well."""
    torch.manual_seed(seed)
    model = MODELS[name](CONFIGS[name](V, 16, n_embd=16, n_head=2, n_layer=2, arch=arch, ngram_rows=101)).eval()
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
def test_which_positions_see_which(name, arch):
    model, x = random_model(name, arch), tokens(1)
    before = model(x)[..., 3:]
    for changed in range(T):
        y = x.clone()
        y[0, changed] = 3
        differs = (model(y)[..., 3:] != before).any(-1)[0]
        if name == "gpt":
            assert not differs[:changed].any(), "the past saw the future"
            assert differs[changed:].all()
        else:
            assert differs.all(), "the mask predictor sees everything"


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


@pytest.mark.parametrize("chunks", [[1] * T, [5, 1, 1, 5], [T]])
def test_cached_logits_are_the_recomputed_ones(chunks):
    model, x = random_model("gpt", "rotary"), tokens()
    with torch.inference_mode():
        cache = KeyValueCache(model.config, 2, T)
        cached = torch.cat([model(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
        assert torch.allclose(cached[..., 3:], model(x)[..., 3:], atol=1e-5)
        assert torch.equal(cached.argmax(-1), model(x).argmax(-1))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_compiled_step_is_the_plain_one(rows):
    """Compiled, products of one row, attention of one query and rotations are written out: same numbers."""
    model, x = random_model("gpt", "rotary"), tokens(rows)
    with torch.inference_mode():
        expected = model(x)
        model.compile(backend="aot_eager", fullgraph=True)
        cache = KeyValueCache(model.config, rows, T)
        compiled = torch.cat([model(part, cache=cache) for part in x.split([5] + [1] * (T - 5), dim=1)], dim=1)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled.argmax(-1), expected.argmax(-1))


def test_head_at_chosen_positions():
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
    ("bad", "message"),
    [({"n_head": 3}, "multiple"), ({"n_layer": 0}, "n_layer"), ({"dropout": 1.0}, "dropout"), ({"arch": "x"}, "arch")],
)
def test_impossible_sizes_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        CONFIGS["gpt"](**({"vocab_size": V, "block_size": 16, "n_embd": 16, "n_head": 2} | bad))


def test_too_long_input_is_refused():
    with pytest.raises(ValueError, match="17 positions do not fit"):
        random_model("gpt", "rotary")(torch.zeros(1, 17, dtype=torch.long))
