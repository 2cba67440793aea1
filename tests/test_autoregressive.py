"""autoregressive.py: the chain rule by enumeration, decoding against recomputation, beams against transformers."""

import itertools

import pytest
import torch

from autoregressive import (
    BeamConfig,
    CausalObjective,
    DecodingConfig,
    SlidingContext,
    beam_search,
    causal_inputs,
    compute_gpt_loss,
    decode,
    exact_nll,
)
from data import Rows
from model import GPT, LLaDAModel, ModelConfig
from tokenizer import END_ID, PAD_ID, START_ID
from utils.errors import ArgumentError

START = torch.tensor([START_ID])


def random_gpt(vocab_size=12, block_size=10, arch="rotary", seed=0, scale=0.35) -> GPT:
    """A small GPT with random weights everywhere (a new one ignores its input: its last layer starts at zero)."""
    model = GPT(ModelConfig(vocab_size, block_size, n_embd=16, n_head=2, n_layer=2, arch=arch, ngram_rows=101)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, scale, generator=generator)
    return model


def rows(windows: torch.Tensor) -> Rows:
    """Running text of which every token is a character."""
    return Rows(windows, torch.full((len(windows),), windows.shape[1]))


def prompt(length: int, seed: int = 1, vocab_size: int = 12) -> torch.Tensor:
    ids = torch.randint(4, vocab_size, (length - 1,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([START, ids])


def texts(model, prompts, **kwargs) -> list[list[int]]:
    """What decode writes after each prompt, [PAD] left out."""
    columns = torch.stack(list(decode(model, prompts, **kwargs)), dim=1)
    return [[i for i in row if i != PAD_ID] for row in columns.tolist()]


# ------------------------------------------------------------------------------------------------- likelihood
def test_probabilities_of_all_texts_sum_to_one():
    model = random_gpt(vocab_size=6)  # [END] and two characters can be predicted
    everything = torch.tensor(list(itertools.product((3, 4, 5), repeat=4)))  # (81, 4)
    nll = exact_nll(model, everything, START_ID)
    assert (-nll.sum(1)).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_exact_nll_is_the_training_loss_whatever_the_batch_size():
    model = random_gpt()
    windows = torch.randint(4, 12, (7, 9), generator=torch.Generator().manual_seed(0))
    nll = exact_nll(model, windows, START_ID, batch_size=3)
    torch.testing.assert_close(nll, exact_nll(model, windows, START_ID), rtol=1e-5, atol=1e-6)
    loss = compute_gpt_loss(model(causal_inputs(windows, START_ID)), windows)
    assert nll.mean().item() == pytest.approx(loss.item(), abs=1e-5)


def test_the_objective_is_the_causal_loss_and_its_exact_likelihood():
    model, objective = random_gpt(), CausalObjective()
    windows = torch.randint(4, 12, (7, 9), generator=torch.Generator().manual_seed(0))
    batch = objective.make_batch(rows(windows), torch.Generator())
    loss = objective.loss(objective.predict(model, batch), batch)
    parts = [rows(windows[:5]), rows(windows[5:, :4]), rows(windows[:0])]
    likelihood = objective.likelihood(model, parts, batch_size=2)
    assert torch.equal(batch.targets, windows)
    assert loss.item() == pytest.approx(exact_nll(model, windows, START_ID).mean().item(), abs=1e-5)
    assert likelihood.characters.tolist() == [9] * 5 + [4] * 2
    short = exact_nll(model, windows[5:, :4], START_ID).sum(1).double()
    torch.testing.assert_close(likelihood.window_nats[5:], short, rtol=1e-5, atol=1e-5)
    assert not likelihood.is_bound
    assert not objective.is_bound
    with pytest.raises(ValueError, match="no text"):
        objective.likelihood(model, [rows(windows[:0])])


# ------------------------------------------------------------------------------------------------- sliding context
@pytest.mark.parametrize("arch", ["rotary", "vanilla"])
@pytest.mark.parametrize("context_len", [1, 4, 10])
@pytest.mark.parametrize("length", [1, 6, 15])
def test_each_token_sees_exactly_the_last_context_len_tokens(arch, context_len, length):
    model = random_gpt(arch=arch)
    generated = prompt(length)[None]
    with torch.no_grad():
        for _ in range(14):
            logits = model(generated[:, -context_len:])[:, -1].index_fill(1, torch.tensor([END_ID]), -torch.inf)
            generated = torch.cat([generated, logits.argmax(-1, keepdim=True)], dim=1)
    written = texts(without_end(model), [prompt(length)], max_out_tokens=14, context_len=context_len, temperature=0)
    assert written == [generated[0, length:].tolist()]


def without_end(model):
    """The same model with [END] impossible, so that texts run to max_out_tokens."""
    model.never[END_ID] = True
    return model


@pytest.mark.parametrize("slide", [1, 3, 10])
def test_cached_and_recomputed_logits_agree(slide):
    model, ids = random_gpt(), prompt(30)
    with torch.no_grad():
        cached, recomputed = (SlidingContext(model, [ids[:2]], 28, slide=slide, use_cache=c) for c in (True, False))
        for token in ids[2:, None]:
            torch.testing.assert_close(cached.next_logits(), recomputed.next_logits(), rtol=1e-5, atol=1e-5)
            cached.append(token), recomputed.append(token)


def test_the_window_slides_in_steps():
    model, read = random_gpt(), []
    model.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    list(decode(without_end(model), [prompt(8)], max_out_tokens=10, slide=4))
    assert read == [8, 1, 1, 7, 1, 1, 1, 7, 1, 1]  # 8, 9, 10 tokens fit; with 11 the first 4 go


@pytest.mark.parametrize("arch", ["rotary", "vanilla"])
@pytest.mark.parametrize("slide", [1, 4])
def test_each_row_of_a_batch_equals_its_own_run_alone(arch, slide):
    model = random_gpt(arch=arch)
    prompts = [prompt(length, seed=length) for length in (3, 14, 1, 9)]

    def sample(prompts):
        generator = torch.Generator().manual_seed(5)
        config = DecodingConfig(top_p=0.9, slide=slide)
        return texts(model, prompts, config=config, max_out_tokens=16, generator=generator)

    together = sample(prompts)
    assert together == [sample([alone])[0] for alone in prompts]
    assert len({len(row) for row in together}) > 1  # some met [END] earlier than others


def test_samples_of_one_prompt_differ_and_repeat_with_the_seed():
    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return texts(random_gpt(), [prompt(3)] * 3, max_out_tokens=12, generator=generator)

    assert sample(1) == sample(1) != sample(2)
    assert len(set(map(tuple, sample(1)))) == 3


def test_rows_stop_at_end_and_where_they_are_told_to():
    model = random_gpt()
    endless = texts(without_end(random_gpt()), [prompt(3), prompt(5)], max_out_tokens=12)
    stopped = texts(without_end(model), [prompt(3), prompt(5)], max_out_tokens=12, stop=lambda ids: len(ids) == 4)
    assert stopped == [row[:4] for row in endless]
    with torch.no_grad():
        model.head.weight[END_ID] = 100 * model.head.weight[5]
    model.never[END_ID] = False
    ended = texts(model, [prompt(length) for length in range(1, 9)], max_out_tokens=12)
    assert all(END_ID not in row[:-1] for row in ended)
    assert any(row[-1] == END_ID and len(row) < 12 for row in ended)


# ------------------------------------------------------------------------------------------------- beam search
def transformers_generate(model, ids, **kwargs):
    """transformers' own generate on our weights: sequences without padding, and the beams' scores."""
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Wrapped(PreTrainedModel, GenerationMixin):
        config_class = PretrainedConfig
        main_input_name = "input_ids"

        def __init__(self):
            super().__init__(PretrainedConfig(vocab_size=model.config.vocab_size, num_hidden_layers=2))
            self.inner = model
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, input_ids, **kwargs):
            return CausalLMOutput(logits=model(input_ids))

    result = Wrapped().generate(
        ids[None], attention_mask=torch.ones_like(ids[None]), do_sample=False, use_cache=False, eos_token_id=END_ID,
        pad_token_id=PAD_ID, return_dict_in_generate=True, output_scores=True, **kwargs,
    )  # fmt: skip
    rows = [row[: row.index(END_ID) + 1] if END_ID in row else row for row in result.sequences.tolist()]
    return rows, result.get("sequences_scores", torch.empty(0)).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_repetition_penalty_is_that_of_transformers(seed):
    model, ids = without_end(random_gpt(block_size=20, seed=seed, scale=0.2)), prompt(6)
    [theirs], _ = transformers_generate(model, ids, max_new_tokens=14, repetition_penalty=20.0)
    settings = {"max_out_tokens": 14, "temperature": 0}
    [ours] = texts(model, [ids], repetition_penalty=20.0, **settings)
    assert ours == theirs[6:]
    assert [ours] != texts(model, [ids], **settings)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3])
def test_beams_are_those_of_transformers(early_stopping, length_penalty, repetition_penalty):
    for seed, num_beams, max_new_tokens in ((0, 2, 12), (1, 5, 12), (2, 4, 1)):
        model, ids = random_gpt(block_size=20, seed=seed), prompt(6, seed)
        settings = {
            "num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping,
            "repetition_penalty": repetition_penalty,
        }  # fmt: skip
        rows, scores = transformers_generate(
            model, ids, max_new_tokens=max_new_tokens, num_return_sequences=num_beams, **settings
        )
        config = BeamConfig(num_return=num_beams, **settings)
        ours = beam_search(model, ids, config, max_out_tokens=max_new_tokens)
        assert [row.tolist() for row, _ in ours] == rows
        assert [score for _, score in ours] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("length", [3, 25])
def test_one_beam_is_greedy(length):
    model = random_gpt()
    [(ids, score)] = beam_search(model, prompt(length), num_beams=1, max_out_tokens=12)
    greedy = texts(model, [prompt(length)], max_out_tokens=12, temperature=0)
    assert [ids[length:].tolist()] == greedy
    if length + 12 <= 10:
        nll = exact_nll(model, ids[None, 1:], START_ID)[0, length - 1 :]
        assert score == pytest.approx(-nll.mean().item(), abs=1e-5)


def test_as_many_beams_as_texts_find_the_best_ones():
    model, length = random_gpt(vocab_size=6, seed=3), 4
    scores = {}
    for text in itertools.product((END_ID, 4, 5), repeat=length):
        text = text[: text.index(END_ID) + 1] if END_ID in text else text
        scores[text] = -exact_nll(model, torch.tensor([text]), START_ID).mean().item()
    best = sorted(scores.items(), key=lambda item: -item[1])
    found = beam_search(model, START, num_beams=3**length, max_out_tokens=length, num_return=3**length)
    assert [tuple(ids[1:].tolist()) for ids, _ in found] == [text for text, _ in best]
    assert [score for _, score in found] == pytest.approx([score for _, score in best], abs=1e-5)


@pytest.mark.parametrize("slide", [1, 4])
def test_beams_slide_over_a_long_prompt(slide):
    model, ids = without_end(random_gpt()), prompt(17)
    for found, score in beam_search(model, ids, num_beams=3, max_out_tokens=8, num_return=3, slide=slide):
        context, log_prob = SlidingContext(model, [ids], 8, slide=slide, use_cache=False), 0.0
        with torch.no_grad():
            for token in found[17:, None]:
                log_prob += context.next_logits().log_softmax(-1)[0, token].item()
                context.append(token)
        assert score == pytest.approx(log_prob / 8, abs=1e-5)


# ------------------------------------------------------------------------------------------------- bad values
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_len": 0}, "context_len must be in 1..10"),
        ({"context_len": 11}, "context_len must be in 1..10"),
        ({"slide": 0}, "slide must be in 1..10"),
        ({"slide": 11}, "slide must be in 1..10"),
        ({"context_len": 3, "slide": 4}, "slide must be in 1..3"),
        ({"max_out_tokens": -1}, "max_out_tokens must be at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than 0"),
        ({"prompts": [START, START[:0]]}, "begin a text with \\[START\\]"),
        ({"prompts": []}, "a prompt needs at least one id"),
        ({"prompts": [torch.tensor([12])]}, "in 0..11"),
    ],
)
def test_bad_values_are_named_before_the_first_token(settings, message):
    settings = {"prompts": [START], "max_out_tokens": 3, **settings}
    with pytest.raises(ValueError, match=message):
        decode(random_gpt(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"num_return": 3}, "num_return must be in 1..2"),
        ({"early_stopping": "maybe"}, "early_stopping must be"),
        ({"length_penalty": 1000}, "length_penalty must be at most 10"),
        ({"max_out_tokens": -1}, "max_out_tokens must be at least 0"),
    ],
)
def test_bad_beam_values_are_named(settings, message):
    with pytest.raises(ArgumentError, match=message):
        beam_search(random_gpt(), START, **{"num_beams": 2, "max_out_tokens": 3, **settings})


def test_a_mask_predictor_is_refused():
    model = LLaDAModel(ModelConfig(12, 10, n_embd=16, n_head=2, n_layer=1, ngram_rows=101))
    with pytest.raises(ValueError, match="needs a causal model"):
        decode(model, [START], max_out_tokens=3)
