"""autoregressive.py: the chain rule by enumeration, decoding against recomputation, beams against transformers."""

import itertools
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from conftest import ROOT
from toy import random_model, seeded

from autoregressive import CausalObjective, beam_search, causal_inputs, compute_gpt_loss, decode, exact_nll
from config import BeamConfig
from data import Rows
from model import ENCODERS
from tokenizer import END_ID, PAD_ID, START_ID

with suppress(ImportError):  # an extra: its encoder is one more here
    import extras.vanilla  # noqa: F401

START = torch.tensor([START_ID])
ARCHS = pytest.mark.parametrize("arch", sorted(ENCODERS))


def random_gpt(ends: bool = True, **sizes):
    """Without `ends`, [END] is impossible, so that texts run to max_out_tokens."""
    model = random_model("gpt", **{"block_size": 10} | sizes)
    model.never[END_ID] = not ends
    return model


def rows(windows: torch.Tensor) -> Rows:
    """Running text of which every token is a character."""
    return Rows(windows, torch.full((len(windows),), windows.shape[1]))


def prompt(length: int, seed: int = 1) -> torch.Tensor:
    return torch.cat([START, torch.randint(4, 12, (length - 1,), generator=seeded(seed))])


def to_the_end(row: list[int]) -> list[int]:
    """A row up to its first [END]."""
    return row[: row.index(END_ID) + 1] if END_ID in row else row


def texts(model, prompts, **kwargs) -> list[list[int]]:
    """What decode writes after each prompt, up to the first [END]; by default drawn from the network's own p."""
    steps = list(decode(model, torch.stack(prompts), **{"temperature": 1.0} | kwargs))
    written = torch.stack([tokens for tokens, _ in steps], dim=1).tolist()
    for row in written:  # what has ended holds [END]
        assert set(row[len(to_the_end(row)) :]) <= {END_ID}
    return list(map(to_the_end, written))


# ------------------------------------------------------------------------------------------------- likelihood
def test_probabilities_of_all_texts_sum_to_one():
    model = random_gpt(vocab_size=6)  # [END] and two characters can be predicted
    everything = torch.tensor(list(itertools.product((3, 4, 5), repeat=4)))  # (81, 4)
    nll = exact_nll(model, everything, START_ID)
    assert (-nll.sum(1)).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_scoring_many_windows_takes_the_memory_of_a_few():
    """Issue 24, point 21: as train.py sets up the allocator, small results left holes between the logits."""
    code = """if True:
        import resource, torch
        from autoregressive import exact_nll
        from utils.devices import tune_cpu

        head = torch.randn(8, 2000)

        def predict(tokens):
            return ((torch.zeros(*tokens.shape, 8) + 1) @ head).masked_fill(torch.arange(2000) < 3, -9.0)

        def peak(windows):
            exact_nll(predict, torch.zeros(windows, 64, dtype=torch.long), 3, 16)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        tune_cpu()
        few = peak(32)
        print(peak(1000) - few)
    """
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 100_000  # kB: logits of all windows are 512 MB


def test_the_objective_is_the_causal_loss_and_its_exact_likelihood():
    model, objective = random_gpt(), CausalObjective()
    windows = torch.randint(4, 12, (7, 9), generator=seeded())
    nll = exact_nll(model, windows, START_ID, batch_size=3)
    torch.testing.assert_close(nll, exact_nll(model, windows, START_ID), rtol=1e-5, atol=1e-6)
    loss = compute_gpt_loss(model(causal_inputs(windows, START_ID)), windows)
    assert nll.mean().item() == pytest.approx(loss.item(), abs=1e-5)
    batch = objective.make_batch(rows(windows), torch.Generator(), "train_loss")
    logits = objective.predict(model, batch)
    assert torch.equal(batch.targets, windows)
    assert objective.loss(logits, batch).item() == pytest.approx(loss.item(), abs=1e-5)
    targets, weights = objective.weighted_targets(batch)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    assert (losses * weights).sum().item() == pytest.approx(loss.item(), abs=1e-5)
    likelihood = objective.likelihood(model, [rows(windows[:5]), rows(windows[5:, :4])])
    assert likelihood.characters.tolist() == [9] * 5 + [4] * 2
    short = exact_nll(model, windows[5:, :4], START_ID).sum(1).double()
    torch.testing.assert_close(likelihood.window_nats[5:], short, rtol=1e-5, atol=1e-5)
    assert not likelihood.is_bound
    assert not objective.is_bound
    with pytest.raises(ValueError, match="no text"):
        objective.likelihood(model, [])


# ------------------------------------------------------------------------------------------------- sliding context
@ARCHS
@pytest.mark.parametrize("context_len", [1, 4, 10])
@pytest.mark.parametrize("length", [1, 6, 15])
def test_each_token_sees_exactly_the_last_context_len_tokens(arch, context_len, length):
    model, ids = random_gpt(ends=False, arch=arch), prompt(length)[None]
    settings = {"max_out_tokens": 14, "context_len": context_len, "slide": 1, "temperature": 0}
    [written] = texts(model, [ids[0]], **settings)
    with torch.no_grad():
        for _ in range(14):
            ids = torch.cat([ids, model(ids[:, -context_len:])[:, -1:].argmax(-1)], dim=1)
    assert written == ids[0, length:].tolist()


def test_the_window_slides_in_steps():
    model, read = random_gpt(ends=False), []
    model.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    texts(model, [prompt(8)], max_out_tokens=10, slide=4)
    assert read == [8, 1, 1, 7, 1, 1, 1, 7, 1, 1]  # 8, 9, 10 tokens fit; with 11 the first 4 go


@ARCHS
@pytest.mark.parametrize("slide", [1, 4])
@pytest.mark.parametrize("length", [3, 14])
def test_each_row_of_a_batch_equals_its_own_run_alone(arch, slide, length):
    model = random_gpt(arch=arch)
    prompts = [prompt(length, seed=seed) for seed in (3, 14, 1, 9)]

    def sample(prompts, seed=5):
        return texts(model, prompts, top_p=0.9, slide=slide, max_out_tokens=16, generator=seeded(seed))

    together = sample(prompts)
    assert together == [sample([alone])[0] for alone in prompts] != sample(prompts, seed=6)
    assert len({len(row) for row in together}) > 1  # some met [END] earlier than others
    assert len(set(map(tuple, sample(prompts[1:2] * 9)))) > 3  # equal prompts are different samples


def test_each_token_comes_with_the_networks_probabilities_and_the_last_row_ends_the_text():
    model = random_gpt()
    with torch.no_grad():
        model.head.weight[END_ID] = 100 * model.head.weight[5]
    prompts = torch.stack([prompt(4, seed) for seed in range(4)])
    steps = list(decode(model, prompts, max_out_tokens=6, temperature=0.7, top_k=1))
    written = torch.stack([tokens for tokens, _ in steps], dim=1)
    assert (written == END_ID).any(1).all() or len(steps) == 6
    ids = torch.cat([prompts, written], dim=1)
    with torch.no_grad():
        expected = model(ids[:, :-1])[:, 3:].double().softmax(-1)
    for k, (tokens, p) in enumerate(steps):
        running = ~(written[:, :k] == END_ID).any(1)
        torch.testing.assert_close(p[running], expected[running, k], rtol=1e-4, atol=1e-7)
        assert torch.equal(tokens[running], p[running].argmax(1))
    assert not list(decode(model, prompts, max_out_tokens=0))


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
    return list(map(to_the_end, result.sequences.tolist())), result.get("sequences_scores", torch.empty(0)).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_repetition_penalty_is_that_of_transformers(seed):
    model, ids = random_gpt(ends=False, block_size=20, seed=seed, std=0.2), prompt(6)
    [theirs], _ = transformers_generate(model, ids, max_new_tokens=14, repetition_penalty=20.0)
    plain, ours = (texts(model, [ids], repetition_penalty=x, max_out_tokens=14, temperature=0) for x in (1.0, 20.0))
    assert plain != ours == [theirs[6:]]


@pytest.mark.parametrize("early_stopping", ["no", "yes", "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3])
def test_beams_are_those_of_transformers(early_stopping, length_penalty, repetition_penalty):
    for seed, num_beams, max_new_tokens in ((0, 2, 12), (1, 5, 12), (2, 4, 1), (3, 1, 12)):
        model, ids = random_gpt(block_size=20, seed=seed), prompt(6, seed)
        settings = {"num_beams": num_beams, "length_penalty": length_penalty, "repetition_penalty": repetition_penalty}
        config = BeamConfig(num_return=num_beams, early_stopping=early_stopping, **settings)
        settings |= {"num_return_sequences": num_beams, "max_new_tokens": max_new_tokens}
        stopping = {"no": False, "yes": True}.get(early_stopping, early_stopping)
        expected, scores = transformers_generate(model, ids, early_stopping=stopping, **settings)
        ours = beam_search(model, ids, config, max_out_tokens=max_new_tokens)
        assert [row.tolist() for row, _ in ours] == expected
        assert num_beams == 1 or [score for _, score in ours] == pytest.approx(scores, abs=1e-4)  # one is greedy


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


@pytest.mark.parametrize("slide", [1, 4, 10])
def test_beams_slide_over_a_long_prompt_and_their_cache_gives_the_recomputed_scores(slide, monkeypatch):
    model, ids = random_gpt(ends=False), prompt(17)
    cached = beam_search(model, ids, num_beams=3, max_out_tokens=8, num_return=3, slide=slide)
    monkeypatch.setattr(model, "new_cache", lambda *sizes: None)
    recomputed = beam_search(model, ids, num_beams=3, max_out_tokens=8, num_return=3, slide=slide)
    assert [found.tolist() for found, _ in cached] == [found.tolist() for found, _ in recomputed]
    assert [score for _, score in cached] == pytest.approx([score for _, score in recomputed], abs=1e-5)


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        (decode, {"context_len": 3, "slide": 4}, "slide must be in 1..3"),
        (decode, {"max_out_tokens": -1}, "max_out_tokens must be at least 0"),
        (decode, {"prompts": START[None, :0]}, "begin a text with \\[START\\]"),
        (decode, {"prompts": torch.tensor([[12]])}, "in 0..11"),
        (beam_search, {"num_beams": 2, "num_return": 3}, "num_return must be in 1..2"),
        (beam_search, {"early_stopping": "maybe"}, "early_stopping must be"),
        (beam_search, {"max_out_tokens": -1}, "max_out_tokens must be at least 0"),
    ],
)
def test_bad_values_are_named_before_the_first_token(function, settings, message):
    usual = {"prompts": START[None]} if function is decode else {"prompt": START}
    with pytest.raises(ValueError, match=message):
        list(function(random_gpt(), **usual | {"max_out_tokens": 3} | settings))
