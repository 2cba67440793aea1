"""Fine-tuning, the model's part: low-rank adapters, growing vocabularies, and what of them is trained."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from model import ENCODERS, MODELS, ModelConfig, add_lora, extend_vocabulary, lora_state, merge_lora
from optim import build_optimizers
from utils.errors import ArgumentError

T, V, GROWN = 12, 20, 23
BOTH = pytest.mark.parametrize(("name", "arch"), [(name, arch) for name in MODELS for arch in ENCODERS])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(name: str, arch: str = "rotary", **settings):
    """A small model with random weights, also where they start at zero, so that every weight matters."""
    model = MODELS[name](ModelConfig(V, 16, n_embd=16, n_head=2, n_layer=2, arch=arch, ngram_rows=101, **settings))
    noise = generator()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=noise)
    return model.eval()


def adapted_model(name: str, arch: str = "rotary", rank: int = 2):
    """The same with adapters that change its outputs."""
    model, noise = add_lora(random_model(name, arch), rank, generator()), generator(1)
    for weight in lora_state(model).values():
        nn.init.normal_(weight, std=0.3, generator=noise)
    return model


def tokens(rows: int = 2, high: int = V) -> torch.Tensor:
    return torch.randint(4, high, (rows, T), generator=generator(1))


# ------------------------------------------------------------------------------------------------- adapters
@BOTH
def test_new_adapters_change_no_output(name, arch):
    model, x = random_model(name, arch), tokens()
    before = {key: p.clone() for key, p in model.state_dict().items()}
    adapted = add_lora(model, 2, generator())
    assert torch.equal(adapted(x), model(x))
    assert adapted.config == replace(model.config, lora_rank=2)
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@BOTH
def test_adapters_are_on_the_weights_of_attention_and_mlp_alone(name, arch):
    adapted = add_lora(random_model(name, arch), 2, generator())
    found = {key.removesuffix(".parametrizations.weight") for key in lora_state(adapted)}
    found = {key.split(".parametrizations.")[0].split(".", 2)[-1] for key in found}
    expected = {
        "rotary": {
            f"{i}.{layer}" for i in range(2) for layer in ("attention.qkv", "attention.proj", "mlp.fc", "mlp.proj")
        },
        "vanilla": {
            f"layers.{i}.{layer}"
            for i in range(2)
            for layer in ("self_attn", "self_attn.out_proj", "linear1", "linear2")
        },
    }
    assert found == expected[arch]


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
            assert torch.linalg.matrix_rank(difference) == 2
            p.data += difference
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(adapted(x), plain(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(adapted(x), random_model(name, arch)(x), atol=0.1)


@BOTH
def test_merged_adapters_give_the_same_outputs(name, arch):
    adapted, x = adapted_model(name, arch), tokens()
    expected = adapted(x)
    merged = merge_lora(adapted)
    assert merged.config == random_model(name, arch).config
    assert list(merged.state_dict()) == list(random_model(name, arch).state_dict())
    assert all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(adapted(x), expected), "merging changed the model it was given"


@BOTH
def test_adapters_go_alone_through_their_state(name, arch):
    adapted, x = adapted_model(name, arch), tokens()
    other = add_lora(random_model(name, arch), 2, generator(5))
    assert not torch.equal(other(x), adapted(x))
    other.load_state_dict(other.state_dict() | lora_state(adapted))
    assert torch.equal(other(x), adapted(x))
    assert sum(p.numel() for p in lora_state(adapted).values()) == adapted.num_trainable()


@BOTH
def test_a_configuration_rebuilds_a_model_with_adapters(name, arch):
    adapted, x = adapted_model(name, arch), tokens()
    rebuilt = MODELS[name](ModelConfig(**adapted.config.to_dict())).eval()
    rebuilt.load_state_dict(adapted.state_dict())
    assert torch.equal(rebuilt(x), adapted(x))
    assert lora_state(rebuilt).keys() == lora_state(adapted).keys()


def test_adapters_are_drawn_from_their_generator():
    first, second, third = (add_lora(random_model("gpt"), 2, generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(p, lora_state(second)[key]) for key, p in lora_state(first).items())
    assert not all(torch.equal(p, lora_state(third)[key]) for key, p in lora_state(first).items())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    merge_lora(add_lora(random_model("gpt"), 2, generator()))
    random_state = torch.get_rng_state()
    torch.set_rng_state(state)
    random_model("gpt")
    assert torch.equal(torch.get_rng_state(), random_state), "the default generator was used"


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
    adapted = MODELS["gpt"](ModelConfig(69, 256, n_embd=96, n_head=2, n_layer=4, arch=arch, lora_rank=8))
    assert adapted.num_trainable() == 49_152
    assert adapted.num_trainable() < share * adapted.num_parameters()


@BOTH
def test_adapters_do_not_count_as_looked_up_or_as_flops(name, arch):
    plain = random_model(name, arch)
    adapted = add_lora(plain, 2, generator())
    assert adapted.num_parameters() == plain.num_parameters() + adapted.num_trainable()
    assert adapted.num_looked_up() == plain.num_looked_up()
    assert adapted.flops_per_token(T) == plain.flops_per_token(T)


# ------------------------------------------------------------------------------------------------- vocabulary
@BOTH
@pytest.mark.parametrize("size", [V + 1, GROWN, 100])
def test_a_larger_vocabulary_keeps_the_old_rows_and_logits(name, arch, size):
    model, x = random_model(name, arch), tokens()
    grown = extend_vocabulary(model, size, generator())
    assert (grown.config.vocab_size, grown.config.ngram_base) == (size, V)
    for key, p in model.state_dict().items():
        assert torch.equal(grown.state_dict()[key][: len(p)], p)
    assert grown(x).shape == (2, T, size)
    assert torch.equal(grown(x)[..., :V], model(x))


@BOTH
def test_the_vocabulary_grows_again_with_the_first_base(name, arch):
    model, x = random_model(name, arch), tokens()
    again = extend_vocabulary(extend_vocabulary(model, GROWN, generator()), GROWN + 4, generator(1))
    assert again.config.ngram_base == V
    assert torch.equal(again(x)[..., :V], model(x))
    assert extend_vocabulary(again, GROWN + 4, generator()) is again


@BOTH
def test_new_tokens_are_neither_forbidden_nor_likely(name, arch):
    """Their logit is the mean of the old ones, so their probability is at most the mean of the old ones."""
    grown = extend_vocabulary(random_model(name, arch), GROWN, generator())
    logits = grown(tokens())
    torch.testing.assert_close(logits[..., V:].amin(-1), logits[..., 3:V].mean(-1), rtol=1e-5, atol=1e-5)
    p = logits.softmax(-1)
    assert (p[..., V:].amax(-1) <= p[..., 3:V].mean(-1) + 1e-6).all()
    rows = grown.encoder.embedding.weight
    assert len(rows[V:].unique(dim=0)) == GROWN - V
    old = rows[3:V]
    assert ((rows[V:] - old.mean(0)).abs() < 0.5 * old.std(0)).all()


def test_a_smaller_vocabulary_is_refused():
    with pytest.raises(ArgumentError, match="vocab_size must be at least 20, got 19"):
        extend_vocabulary(random_model("gpt"), 19, generator())


@BOTH
def test_adapters_are_merged_when_the_vocabulary_grows(name, arch):
    adapted, x = adapted_model(name, arch), tokens()
    grown = extend_vocabulary(adapted, GROWN, generator())
    assert grown.config.lora_rank == 0
    torch.testing.assert_close(grown(x)[..., :V], adapted(x), rtol=1e-5, atol=1e-5)
    assert extend_vocabulary(adapted, V, generator()) is adapted


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
def test_training_changes_the_adapters_alone(name, arch):
    model = add_lora(random_model(name, arch), 2, generator())
    changed, optimizers = train(model)
    assert changed == set(lora_state(model))
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW]


@BOTH
def test_adapters_are_trained_with_the_rows_of_new_tokens(name, arch):
    grown = extend_vocabulary(random_model(name, arch), GROWN, generator())
    model, x = add_lora(grown, 2, generator()), tokens(high=GROWN)
    assert torch.equal(model(x), grown(x))
    assert model.num_parameters() == grown.num_parameters() + sum(
        p.numel() for key, p in lora_state(model).items() if key.endswith((".a", ".b"))
    )
    assert model.num_looked_up() == grown.num_looked_up()
    assert model.flops_per_token(T) == grown.flops_per_token(T)
    changed, _ = train(model)
    assert changed == set(lora_state(model))
    rows = {key: p.shape for key, p in lora_state(model).items() if key.endswith("original1")}
    assert list(rows.values()) == [(GROWN - V, 16)] * 2
    merged = merge_lora(model.eval())
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)
    for key in ("encoder.embedding.weight", "head.weight"):
        assert torch.equal(merged.state_dict()[key][:V], grown.state_dict()[key][:V])
        assert not torch.equal(merged.state_dict()[key][V:], grown.state_dict()[key][V:])


def test_everything_frozen_but_the_ngrams_needs_one_optimizer():
    model = random_model("gpt").requires_grad_(False)
    model.encoder.ngrams.requires_grad_(True)
    changed, optimizers = train(model, steps=1)
    assert changed == {"encoder.ngrams.tables.weight"}
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.SGD]


# ------------------------------------------------------------------------------------------------- configuration
@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"segments": "verse"}, "segments must be one of window, speech, paragraph, line, pairs, got 'verse'"),
        ({"ngram_base": 0}, "ngram_base must be at least 1, got 0"),
        ({"lora_rank": -1}, "lora_rank must be at least 0, got -1"),
        ({"lora_rank": 17}, "lora_rank must be at most 16, got 17"),
    ],
)
def test_impossible_settings_are_refused(bad, problem):
    with pytest.raises(ArgumentError, match=problem):
        ModelConfig(V, 16, n_embd=16, n_head=2, **bad)


@pytest.mark.parametrize("rank", [0, 17])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(ArgumentError, match="lora_rank must be at"):
        add_lora(random_model("gpt"), rank)


def test_segmented_models_say_so():
    assert not random_model("gpt").is_segmented
    assert all(random_model("gpt", segments=segments).is_segmented for segments in ("speech", "line", "pairs"))
