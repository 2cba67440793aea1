"""Properties that hold for all input: samplers end and change only masks (hypothesis), odd texts, determinism."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive import BeamConfig, CausalObjective, beam_search
from data import load_corpus, window_rows
from diffusion import DiffusionObjective
from generation.text import generate_texts, prompt_ids
from model import GPT, LLaDAModel, ModelConfig
from sampler import REMASKERS, SamplingConfig, reverse_process
from tokenizer import SPECIAL_TOKENS, SimpleTokenizer
from unmasking import ORDERS
from utils.errors import ArgumentError

V, MASK, NEVER = 6, 1, (0, 2)


def predictor(kind: str, seed: int):
    """predict(tokens): random logits, equal ones, -inf for all tokens but one, or -inf for all."""

    def predict(tokens: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + int(tokens.sum()))
        logits = torch.randn(*tokens.shape, V, generator=generator)
        if kind == "equal":
            return torch.zeros_like(logits)
        if kind in ("one", "none"):
            logits[:] = -torch.inf
        if kind == "one":
            logits[..., 4] = 0.0
        return logits

    return predict


@st.composite
def samplings(draw) -> SamplingConfig:
    """Settings that go together."""
    rule = draw(st.sampled_from(["threshold", "factor", "entropy_bound", None]))
    values = {
        "order": draw(st.sampled_from(sorted(ORDERS))),
        "steps": draw(st.none() | st.integers(1, 20)),
        "temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 5.0])),
        "top_k": draw(st.none() | st.integers(1, V)),
        "top_p": draw(st.none() | st.floats(0.01, 1.0)),
        "repetition_penalty": draw(st.sampled_from([0.5, 1.0, 2.0])),
        "remask": draw(st.none() | st.sampled_from(sorted(REMASKERS))),
        "cfg_scale": draw(st.sampled_from([0.0, 1.5])),
        "block_length": draw(st.none() | st.integers(1, 9)),
        "schedule": draw(st.sampled_from(["uniform", "cosine", "ancestral"])),
    } | ({rule: draw(st.floats(0, 1))} if rule else {})
    try:
        return SamplingConfig(**values)
    except ValueError:  # some exclude each other
        return SamplingConfig(**{name: values[name] for name in ("order", "temperature", "top_k", "top_p")})


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 9), samplings(), st.sampled_from(["random", "equal", "one", "none"]),
    st.integers(0, 10**6),
)  # fmt: skip
def test_sampling_ends_without_masks_and_keeps_the_template(B, T, config, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    template = torch.randint(3, V, (B, T), generator=generator)
    template[torch.rand(B, T, generator=generator) < 0.6] = MASK
    given_tokens = template != MASK
    try:
        steps = list(reverse_process(predictor(kind, seed), template, MASK, config, never=NEVER, generator=generator))
    except ArgumentError as error:  # settings that do not fit this template are refused, and nothing else
        if error.argument not in ("steps", "schedule", "block_length"):
            raise
        return
    for step in steps:
        assert torch.equal(step.tokens[given_tokens], template[given_tokens])
        assert not (step.revealed & given_tokens).any()
        assert not (step.remasked & given_tokens).any()
    last = steps[-1].tokens
    assert ((last >= 3) & (last < V)).all()
    assert [step.nfe for step in steps] == sorted(step.nfe for step in steps)


ODD_TEXTS = {
    "one character": "a",
    "no newline": "abc" * 50,
    "CRLF": "to be\r\nor not\r\n" * 20,
    "BOM": "\ufeffto be or not\n" * 20,
    "NUL and escapes": "a\x00b\x1b[2J\x07c\n" * 20,
    "combining marks and four bytes": "e\u0301🎭\U0001d11e\n" * 20,
    "every character the same": "x" * 500,
    "the names of special tokens": "[MASK] [PAD] [START] [END]\n" * 20,
    "more than 255 characters": "".join(map(chr, range(0x100, 0x300))),
    "more than 65,535 characters": "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x13000)])),
    "two megabytes without a newline": "la " * 700_000,
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_texts_are_read_and_written_back_as_they_are(tmp_path, name):
    text = ODD_TEXTS[name]
    (tmp_path / "text.txt").write_bytes(text.encode())
    corpus = load_corpus(str(tmp_path / "text.txt"))
    assert corpus.tokenizer.decode(corpus.ids.numpy()) == text
    assert int(corpus.ids.long().min()) >= len(SPECIAL_TOKENS)  # text is never a special token
    config = ModelConfig(corpus.tokenizer.vocab_size, 8, 4, 1, 1, ngram_rows=11)
    for objective, model in ((DiffusionObjective(), LLaDAModel(config)), (CausalObjective(), GPT(config))):
        rows = [window_rows(corpus.ids[None, :8].long(), corpus.tokenizer)]
        nats = objective.likelihood(model.eval(), rows).nats_per_char  # an untrained model knows nothing
        assert nats == pytest.approx(math.log(corpus.tokenizer.vocab_size - 3), abs=1e-4)


@pytest.mark.parametrize("model_class", [GPT, LLaDAModel])
def test_likelihoods_depend_neither_on_the_batch_size_nor_on_the_number_of_threads(model_class):
    torch.manual_seed(0)
    model = model_class(ModelConfig(9, 16, 16, 2, 2, ngram_rows=101)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    objective = CausalObjective() if model.causal else DiffusionObjective()
    rows = [window_rows(torch.randint(4, 9, (40, 16)), SimpleTokenizer("abcde"))]
    results = []
    for threads, batch_size in ((1, 1), (1, 7), (2, 128), (1, 128)):
        torch.set_num_threads(threads)
        results.append(objective.likelihood(model, rows, batch_size=batch_size).window_nats)
    for result in results[1:]:
        assert torch.allclose(result, results[0], atol=1e-5 * 16, rtol=0)  # 1e-5 nats a character


PROMPTS = ["the king", "a", "is dead", "long live the king and", "alive"]
SAMPLERS = [
    (LLaDAModel, {}),
    (LLaDAModel, {"order": "confidence", "steps": 8}),
    (GPT, {}),
    (GPT, {"slide": 8, "top_k": 5}),
]


@pytest.fixture(scope="module")
def models():
    """A model of each kind with random weights, wide enough that two threads share its work; and their tokenizer."""
    tokenizer, found = SimpleTokenizer("abcdefghijklmnopqrstuvwxyz \n"), {}
    for model_class in (LLaDAModel, GPT):
        torch.manual_seed(0)
        found[model_class] = model_class(ModelConfig(tokenizer.vocab_size, 32, 64, 2, 1, ngram_rows=101)).eval()
        for p in found[model_class].parameters():
            torch.nn.init.normal_(p, std=0.1)
    return found, tokenizer


@pytest.mark.parametrize(("model_class", "flags"), SAMPLERS, ids=str)
def test_samples_depend_neither_on_the_batch_size_nor_on_the_number_of_threads(models, model_class, flags):
    """Texts longer than the context, one, three and all at a time."""
    model, tokenizer = models[0][model_class], models[1]
    results = []
    for threads, batch_size in ((1, 1), (1, 3), (1, 5), (2, 5)):
        torch.set_num_threads(threads)
        batches = [PROMPTS[i : i + batch_size] for i in range(0, len(PROMPTS), batch_size)]
        settings = {"max_out_tokens": 40, "seed": 3, "temperature": 0.9} | flags
        results.append([text for batch in batches for text in generate_texts(model, tokenizer, batch, **settings)])
    assert all(result == results[0] for result in results)
    assert len({text[-20:] for text in results[0]}) == len(PROMPTS)  # the texts are not all alike


def test_beams_do_not_depend_on_the_number_of_threads(models):
    model, tokenizer = models[0][GPT], models[1]
    config, results = BeamConfig(num_beams=4, num_return=4), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = [beam_search(model, prompt_ids(model, tokenizer, p), config, max_out_tokens=40) for p in PROMPTS[:2]]
        results.append([(ids.tolist(), score) for beams in found for ids, score in beams])
    assert [ids for ids, _ in results[0]] == [ids for ids, _ in results[1]]
    assert [score for _, score in results[0]] == pytest.approx([score for _, score in results[1]], abs=1e-5)
