"""Fine-tuning, the model's part: low-rank adapters, growing vocabularies, and what of them is trained."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import toy
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from checkpoint import continued, merged, new_model
from config import ModelConfig
from model import MODELS
from optim import build_optimizers
from utils.errors import ArgumentError

T, V, GROWN, RANK = 12, 20, 23, 2
ARCHITECTURES = ("rotary", "vanilla")
BOTH = pytest.mark.parametrize(("name", "arch"), [*product(MODELS, ARCHITECTURES)])


def random_model(name: str, arch: str = "rotary", **settings):
    """A small model with random weights, also where they start at zero, so that every weight matters."""
    return toy.random_model(name, arch=arch, vocab_size=V, std=0.3, **settings)


def changed(model, **settings):
    """`model` continued with other settings, on a generator of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return continued(model, replace(model.config, **settings)).eval()


def adapted_model(name: str, arch: str = "rotary"):
    """The same with adapters that change its outputs."""
    model, noise = changed(random_model(name, arch), lora_rank=RANK), torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3, generator=noise)
    return model


def tokens(rows: int = 2, high: int = V) -> torch.Tensor:
    return torch.randint(4, high, (rows, T), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------- adapters
@BOTH
def test_new_adapters_change_no_output_and_are_on_attention_and_mlp_alone(name, arch):
    model, x = random_model(name, arch, ngram_width=4), tokens()
    adapted = changed(model, lora_rank=RANK)
    assert torch.equal(adapted(x), model(x))
    assert adapted.config == replace(model.config, lora_rank=RANK, ngram_base=V)
    assert all(p.requires_grad for p in model.parameters())
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    found = {name.split(".parametrizations.")[0].split(".", 2)[-1] for name in names}
    layers = {
        "rotary": ("attention.qkv", "attention.proj", "mlp.fc", "mlp.proj"),
        "vanilla": ("self_attn", "self_attn.out_proj", "linear1", "linear2"),
    }
    prefix = "layers." if arch == "vanilla" else ""
    assert found == {f"{prefix}{i}.{layer}" for i in range(2) for layer in layers[arch]}


@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_adapters_add_a_matrix_of_low_rank(name, arch, training):
    """Also where nn.TransformerEncoder takes its fast path: in eval mode without gradients."""
    adapted, x = adapted_model(name, arch).train(training), tokens()
    plain = random_model(name, arch).train(training)
    for key, p in plain.named_parameters():
        path, _, weight = key.rpartition(".")
        module = adapted.get_submodule(path)
        if is_parametrized(module, weight):
            low_rank = module.parametrizations[weight][0]
            difference = 8 * low_rank.b @ low_rank.a  # alpha / r = 16 / 2
            assert torch.linalg.matrix_rank(difference) == RANK
            p.data += difference
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(adapted(x), plain(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(adapted(x), random_model(name, arch)(x), atol=0.1)


@BOTH
def test_merged_adapters_give_the_same_outputs(name, arch):
    adapted, x = adapted_model(name, arch), tokens()
    expected = adapted(x)
    plain = merged(adapted)
    assert plain is adapted
    assert plain.config == replace(random_model(name, arch).config, ngram_base=V)
    assert plain.state_dict().keys() == random_model(name, arch).state_dict().keys()
    assert all(p.requires_grad for p in plain.parameters())
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


def test_adapters_work_with_the_cache_and_compiled():
    """A single row, compiled, reads the weights itself (`layers.linear`)."""
    model, x = adapted_model("gpt"), tokens(1)
    torch.compiler.reset()  # what other tests compiled counts towards a limit
    with torch.inference_mode():
        expected, cache = model(x), model.new_cache(1, T)
        parts = [model(part, cache=cache) for part in x[:, :-1].split([T - 2, 1], dim=1)]
        model.compile(backend="aot_eager", fullgraph=True)
        parts.append(model(x[:, -1:], cache=cache))
    torch.compiler.reset()
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("arch", "share"), [("rotary", 0.002), ("vanilla", 0.1)])
def test_adapters_of_the_default_network_are_small(arch, share):
    """4 layers of 96, rank 8: 4 * 8 * ((96 + 288) + (96 + 96) + 2 * (96 + 384)) parameters."""
    adapted = new_model("gpt", ModelConfig(69, 256, n_embd=96, n_head=2, n_layer=4, arch=arch, lora_rank=8))
    assert adapted.num_parameters(trainable=True) == 49_152 < share * adapted.num_parameters()
    assert adapted.num_looked_up() == new_model("gpt", replace(adapted.config, lora_rank=0)).num_looked_up()


# ------------------------------------------------------------------------------------------------- vocabulary
@BOTH
@pytest.mark.parametrize("size", [V + 1, GROWN, 100])
def test_a_larger_vocabulary_keeps_the_old_rows_and_logits(name, arch, size):
    model, x = random_model(name, arch), tokens()
    grown = changed(model, vocab_size=size)
    assert (grown.config.vocab_size, grown.config.ngram_base) == (size, V)
    for key, p in model.state_dict().items():
        assert torch.equal(grown.state_dict()[key][: len(p)], p)
    assert grown(x).shape == (2, T, size)
    assert torch.equal(grown(x)[..., :V], model(x))
    again = changed(grown, vocab_size=size + 4)  # it grows again with the first base
    assert again.config.ngram_base == V
    assert torch.equal(again(x)[..., :V], model(x))


@BOTH
def test_new_tokens_are_neither_forbidden_nor_likely(name, arch):
    """Their logit is the mean of the old ones, so their probability is at most the mean of the old ones."""
    grown = changed(random_model(name, arch), vocab_size=GROWN)
    logits = grown(tokens())
    torch.testing.assert_close(logits[..., V:].amin(-1), logits[..., 3:V].mean(-1), rtol=1e-5, atol=1e-5)
    p = logits.softmax(-1)
    assert (p[..., V:].amax(-1) <= p[..., 3:V].mean(-1) + 1e-6).all()
    rows = grown.encoder.embedding.weight
    assert len(rows[V:].unique(dim=0)) == GROWN - V
    old = rows[3:V]
    assert ((rows[V:] - old.mean(0)).abs() < 0.5 * old.std(0)).all()


def test_impossible_settings_are_refused():
    for settings, problem in (
        ({"lora_rank": -1}, "lora_rank must be at least 0, got -1"),
        ({"lora_rank": 17}, "lora_rank must be at most 16, got 17"),
        ({"segments": "verse"}, "segments must be one of window, speech, paragraph, line, pairs, got 'verse'"),
        ({"ngram_base": 0}, "ngram_base must be at least 1, got 0"),
    ):
        with pytest.raises(ArgumentError, match=problem):
            changed(random_model("gpt"), **settings)


@BOTH
def test_adapters_are_merged_when_the_vocabulary_grows(name, arch):
    adapted, x = adapted_model(name, arch), tokens()
    expected = adapted(x)
    grown = changed(adapted, vocab_size=GROWN, lora_rank=0)
    torch.testing.assert_close(grown(x)[..., :V], expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- training
def train(model, steps: int = 3):
    """Some steps on a text that holds old and new tokens; returns which parameters they changed."""
    before = {key: p.clone() for key, p in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, nn.EmbeddingBag):
            module.sparse = True
    optimizers = build_optimizers(model.train(), tokens_per_step=2 * T)
    x = tokens(high=model.config.vocab_size)
    for _ in range(steps):
        model(x)[..., 3:].log_softmax(-1).gather(-1, x[..., None] - 3).mean().neg().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}, optimizers


@BOTH
@pytest.mark.parametrize("size", [V, GROWN])
def test_training_changes_the_adapters_and_the_rows_of_new_tokens_alone(name, arch, size):
    base, x = random_model(name, arch), tokens(high=size)
    grown, model = changed(base, vocab_size=size), changed(base, vocab_size=size, lora_rank=RANK)
    assert torch.equal(model(x), grown(x))
    names, optimizers = train(model)
    assert names == {key for key, p in model.named_parameters() if p.requires_grad}
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW]
    expected = model.eval()(x)
    state = merged(model).state_dict()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    for key in ("encoder.embedding.weight", "head.weight"):
        assert torch.equal(state[key][:V], grown.state_dict()[key][:V])
        assert size == V or not torch.equal(state[key][V:], grown.state_dict()[key][V:])


def test_everything_frozen_but_the_ngrams_needs_one_optimizer():
    model = random_model("gpt").requires_grad_(False)
    model.encoder.ngrams.requires_grad_(True)
    names, optimizers = train(model, steps=1)
    assert names == {"encoder.ngrams.tables.weight"}
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.SGD]
