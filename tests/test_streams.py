"""GPT with several streams: its likelihood by enumeration, its cache against recomputation, who may see whom."""

import itertools

import pytest
import torch
from conftest import TINY
from toy import random_model, seeded

from autoregressive import exact_nll
from config import DecodingConfig, ModelConfig
from data import Rows
from extras.streams import Layout, layout, window_context
from generation.write import State, write
from tokenizer import END_ID, MASK_ID, START_ID
from trainer import objective_of
from utils.errors import ArgumentError


def random_gpt(parallel: int = 3, **sizes):
    return random_model("gpt", **{"block_size": 24, "parallel": parallel} | sizes)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(4, 12, shape, generator=seeded())


def start_of(prompt: list[int], masks: int) -> torch.Tensor:
    return torch.tensor([*prompt, *[MASK_ID] * masks])


def written(model, starts: list[torch.Tensor], seed: int = 0, **settings) -> tuple[list, list[State]]:
    """The finished texts, and the states."""
    states = list(write(model, starts, DecodingConfig(**{"temperature": 1.0} | settings), seeded(seed)))
    return states[-1].texts, states


def nll_of(model, tokens: torch.Tensor, at: Layout) -> torch.Tensor:
    """(B, T) nats of tokens (B, T) in a layout, all at once."""
    padded = torch.nn.functional.pad(tokens, (0, at.end - tokens.shape[1]))
    with torch.no_grad():
        logits = model(at.inputs(padded), context=window_context(model, at))[:, : tokens.shape[1]]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


# ------------------------------------------------------------------------------------------------- likelihood
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_likelihood_of_streams_is_the_frequency_of_their_texts(prefix):
    """All 16 continuations of two characters: their probabilities sum to 1, and they are drawn as often."""
    model, prompt = random_gpt(parallel=2, block_size=8, vocab_size=6), [4, 5][:prefix]
    texts = [[*prompt, *text] for text in itertools.product((4, 5), repeat=4)]
    expected = (-nll_of(model, torch.tensor(texts), Layout(prefix, 2, 2))[:, prefix:].sum(1).double()).exp()
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)
    n = 4000
    found = [tuple(text.tolist()) for text in written(model, [start_of(prompt, 4)] * n)[0]]
    for text, p in zip(texts, expected.tolist(), strict=True):
        assert found.count(tuple(text)) / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5 + 1e-3)


@pytest.mark.parametrize("parallel", [2, 3])
@pytest.mark.parametrize(("prefix", "masks"), [(0, 48), (1, 47), (6, 40), (12, 9), (30, 24), (0, 1), (0, 7), (5, 20)])
def test_what_is_written_is_scored_as_it_was_written(prefix, masks, parallel):
    """Whatever the length: with the cache, step by step, as the whole window at once, and as the objective scores."""
    model, prompt = random_gpt(parallel, block_size=48), random_tokens(prefix).tolist()
    texts, states = written(model, [start_of(prompt, masks)] * 2)
    drawn = torch.zeros(2, prefix + masks, dtype=torch.float64)
    for state in states:
        for b, (positions, p) in enumerate(zip(state.written, state.probabilities, strict=True)):
            drawn[b, positions] = -p.gather(1, texts[b][positions, None]).log()[:, 0]
    at = layout(prefix, masks, 48, parallel)
    end = min(at.end - at.prefix, masks)  # of the first window
    nll = nll_of(model, torch.stack(texts)[:, prefix - at.prefix : prefix + end], at)[:, at.prefix :]
    torch.testing.assert_close(drawn[:, prefix : prefix + end].float(), nll, rtol=1e-3, atol=1e-4)
    if prefix == 0:
        scored = objective_of(model).likelihood(model, [Rows(torch.stack(texts), torch.full((2,), masks))])
        assert not scored.is_bound
        torch.testing.assert_close(scored.token_nats, drawn, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("at", [Layout(0, 12, 2), Layout(4, 10, 2), Layout(3, 3, 2), Layout(0, 1, 2), Layout(2, 5, 3)])
def test_a_token_changes_exactly_what_may_see_it(at):
    """Token j is read at a later step than it is written: positions with a later step may depend on it, no others.

    So neither convolution nor n-grams reach from one stream into another.
    """
    model, tokens = random_gpt(), random_tokens(1, at.end)
    place = torch.arange(at.end) - at.prefix
    steps = torch.where(place < 0, place, place % at.length)
    before = model(at.inputs(tokens), context=window_context(model, at))
    for j in range(at.end):
        changed = tokens.clone()
        changed[0, j] = 4 + (tokens[0, j] - 3) % 8
        new = model(at.inputs(changed), context=window_context(model, at))
        difference = (new - before)[0, :, 4:].abs().amax(1)
        assert (difference[steps <= steps[j]] == 0).all()
        assert (difference[steps > steps[j]] > 0).all()


def test_one_stream_is_the_causal_model():
    model, plain, tokens = random_gpt(), random_gpt(parallel=1), random_tokens(2, 24)
    assert model.num_parameters() == plain.num_parameters()
    plain.never[END_ID] = True
    torch.testing.assert_close(plain(tokens), model(tokens), rtol=0, atol=0)
    model.set_streams(1)
    scored = objective_of(model).nll(model, tokens, 2)
    torch.testing.assert_close(scored, exact_nll(plain, tokens, START_ID), rtol=1e-5, atol=1e-5)
    greedy = [written(m, [start_of([4, 5], 22)], temperature=0.0)[0][0].tolist() for m in (model, plain)]
    assert greedy[0] == greedy[1]


def test_training_scores_every_token_and_draws_prefixes():
    model, tokens = random_gpt(), random_tokens(6, 24)
    rows, objective = Rows(tokens, torch.full((6,), 24)), objective_of(model)
    generator, prefixes = seeded(), []
    for purpose in ["val_loss"] + ["train_loss"] * 60:
        batch = objective.make_batch(rows, generator, purpose).on(torch.device("cpu"))
        at = Layout(*batch.layout[0].tolist())
        loss = objective.loss(objective.predict(model, batch), batch).item()
        assert loss == pytest.approx(nll_of(model, tokens[:, : at.end], at).mean().item(), abs=1e-5)
        if purpose == "val_loss":
            assert at == Layout(0, 8, 3)
            assert objective.likelihood(model, [rows]).nats_per_char == pytest.approx(loss, abs=1e-5)
        else:
            prefixes.append(at.prefix)
    assert {0, 12} <= set(prefixes) <= set(range(13))
    assert 15 < prefixes.count(0) < 45


# ------------------------------------------------------------------------------------------------- writing
def test_a_text_does_not_depend_on_its_batch():
    starts = [start_of([4, 5], 30), start_of([6], 9), start_of([4, 5], 30), start_of([], 50), start_of([7, 8], 30)]
    model = random_gpt()
    together, _ = written(model, starts)
    for text, start in zip(together, starts, strict=True):
        assert not (text <= END_ID).any()
        assert torch.equal(torch.where(start == MASK_ID, MASK_ID, text), start)
    assert (together[0] != together[2]).any()  # equal prompts, other numbers
    for i in (0, 1, 3, 4):
        assert torch.equal(written(model, [starts[i]])[0][0], together[i])


def test_long_texts_slide_and_cost_a_step_for_each_position_of_a_stream():
    """A context of 24 holds a prefix of 12 and 3 streams of 4 positions; the first window, 1 and 3 streams of 7."""
    (text,), states = written(random_gpt(), [start_of([4], 7 * 3 + 5 * 12)])
    assert len(text) == 82
    assert not (text <= END_ID).any()
    assert len(states) == 7 + 5 * 4
    assert states[-1].nfe == len(states) + 6  # each prefix is read at once
    assert sum(len(state.written[0]) for state in states) == 81


def test_settings_act_on_streams_in_any_number_or_are_refused():
    model, start = random_gpt(), start_of([4, 5], 40)
    (greedy,), _ = written(model, [start], temperature=0.0)
    assert torch.equal(greedy, written(model, [start], top_k=1, seed=5)[0][0])
    assert not torch.equal(greedy, written(model, [start])[0][0])
    for bad in ({"slide": 2}, {"context_len": 5}, {"repetition_penalty": 1.1}):
        with pytest.raises(ArgumentError, match="has no effect on a model with 3 streams"):
            written(model, [start], **bad)
    with pytest.raises(ValueError, match="no token may stand behind"):
        written(model, [torch.tensor([4, MASK_ID, 5])])
    steps = []
    for n in (1, 2, 4, 6):
        model.set_streams(n)
        steps.append(len(written(model, [start_of([], 24)])[1]))
    assert steps == [24, 12, 6, 4]
    with pytest.raises(ArgumentError, match="streams must be at most 12"):
        model.set_streams(13)
    with pytest.raises(ArgumentError, match="parallel must be at most 12"):
        random_gpt(parallel=13)
    with pytest.raises(ArgumentError, match=r"parallel.*one stream"):
        ModelConfig(12, 24, 16, 2, 2, parallel=2, segments="line")


# ------------------------------------------------------------------------------------------------- command lines
def test_train_tune_and_generate(tmp_path, corpus_file, run_script):
    """Streams from the beginning, and added to a plain GPT by fine-tuning."""
    flags, whole = ["--model", "gpt", "--data", str(corpus_file)], ["--out", str(tmp_path / "whole")]
    run_script("train.py", *flags, "--parallel", "4", *TINY, "--steps", "6", *whole)
    run_script("train.py", "--model", "gpt", "--resume", "--steps", "8", *whole)
    run_script("train.py", *flags, *TINY, "--steps", "3", "--out", str(tmp_path))
    tuning = ["--init-from", str(tmp_path / "gpt" / "last.pt"), "--steps", "2", "--batch-size", "4", "--parallel", "4"]
    run_script("train.py", *flags, *tuning, "--out", str(tmp_path / "tuned"))
    for out in (whole, ["--out", str(tmp_path / "tuned")]):
        written, messages = run_script("generate.py", *out, "--prompt", "1: the king", "--length", "50")
        assert len(written) == 11 + 50 + 1
        assert "21 network evaluations" in messages
    for flag in (("--slide", "4"), ("--context-len", "4"), ("--streams", "9")):
        assert flag[0] in run_script("generate.py", *whole, *flag, check=2)[1]
    for mode in (("--top", "3"), ("--beams", "2"), ("--streams", "2")):
        assert run_script("generate.py", *whole, "--prompt", "1: the", *mode)[0]
