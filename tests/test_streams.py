"""GPT with several streams: its likelihood by enumeration, its cache against recomputation, who may see whom."""

import itertools
import json

import pytest
import torch
from conftest import TINY

from autoregressive import CausalObjective, DecodingConfig, causal_inputs, decode, equal_streams, exact_nll
from checkpoint import load_checkpoint
from data import Rows
from generation import generate_texts, stream_texts
from generation.history import record_filling
from generation.infilling import completed_pieces
from generation.streams import next_window, write_streams
from layers import BORDER, RIGHT, Streams
from model import GPT, LLaDAModel, ModelConfig, adapt
from tokenizer import END_ID, MASK_ID, START_ID, SimpleTokenizer
from trainer import objective_for
from utils.errors import ArgumentError

TOKENIZER = SimpleTokenizer("abcdefgh")


def random_gpt(block_size=24, parallel=3, vocab_size=12, seed=0, **sizes) -> GPT:
    """Random weights everywhere: every position that it may see changes the output."""
    config = ModelConfig(vocab_size, block_size, 16, 2, 2, ngram_rows=101, parallel=parallel, **sizes)
    model, generator = GPT(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.35, generator=generator)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 12, shape, generator=torch.Generator().manual_seed(seed))


def template(prompt: list[int], masks: int) -> torch.Tensor:
    return torch.tensor([*prompt, *[MASK_ID] * masks])


def written(model: GPT, templates: list[torch.Tensor], seed: int = 0, **settings) -> tuple[list[torch.Tensor], list]:
    """The finished texts, and the steps."""
    generator, steps = torch.Generator().manual_seed(seed), []
    for state in write_streams(model, templates, DecodingConfig(**settings), generator=generator):
        steps.append(state.step)
    return state.texts, steps


# ------------------------------------------------------------------------------------------------- likelihood
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_likelihood_of_streams_is_the_frequency_of_their_texts(prefix):
    """All 16 continuations of two characters: their probabilities sum to 1, and they are drawn as often."""
    model, prompt = random_gpt(block_size=8, parallel=2, vocab_size=6, seed=3), [4, 5][:prefix]
    streams = Streams(prefix, 2)
    texts = [[*prompt, *text] for text in itertools.product((4, 5), repeat=4)]
    nll = exact_nll(model, torch.tensor(texts), START_ID, streams=streams)[:, prefix:].sum(1)
    expected = (-nll.double()).exp()
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)
    n = 4000
    found = [tuple(text.tolist()) for text in written(model, [template(prompt, 4)] * n)[0]]
    for text, p in zip(texts, expected.tolist(), strict=True):
        assert found.count(tuple(text)) / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5 + 1e-3)


@pytest.mark.parametrize("parallel", [2, 3])
@pytest.mark.parametrize("prefix", [0, 1, 6, 12])
def test_the_cache_gives_what_recomputation_gives(prefix, parallel):
    """The probabilities of the drawn tokens, step by step with the cache, and of the whole window at once."""
    model = random_gpt(block_size=48, parallel=parallel)
    prompt = random_tokens(prefix).tolist()
    masks = 48 - prefix - (48 - prefix) % parallel
    texts, steps = written(model, [template(prompt, masks)] * 2)
    streams, n = next_window(prefix, masks, 48, parallel)
    assert n == parallel
    assert RIGHT < streams.length == len(steps)
    confidence = sum(step.confidence * step.revealed for step in steps)[:, prefix:]
    nll = exact_nll(model, torch.stack(texts), START_ID, streams=streams)[:, prefix:]
    torch.testing.assert_close(confidence.float(), (-nll).exp(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("streams", [Streams(0, 12), Streams(4, 10), Streams(3, 3), Streams(0, 1)])
def test_a_token_changes_exactly_what_may_see_it(streams):
    """Token j is read at a later step than it is written: positions with a later step may depend on it, no others."""
    T = streams.prefix + 2 * streams.length
    model, tokens, steps = random_gpt(parallel=2), random_tokens(1, T), streams.steps(T)
    logits = model(causal_inputs(tokens, START_ID, streams), streams=streams)
    for j in range(T):
        changed = tokens.clone()
        changed[0, j] = 4 + (tokens[0, j] - 3) % 8
        new = model(causal_inputs(changed, START_ID, streams), streams=streams)
        difference = (new - logits)[0, :, 4:].abs().amax(1)
        assert (difference[steps <= steps[j]] == 0).all()
        assert (difference[steps > steps[j]] > 0).all()


def test_the_border_ngrams_act_at_the_last_positions_of_all_streams_but_the_last():
    streams, tokens = Streams(2, 11), random_tokens(1, 24)
    e = random_gpt(parallel=2).encoder.border(tokens, streams)[0].abs().sum(-1)  # (T,)
    at = e.nonzero()[:, 0].tolist()
    assert at == list(range(2 + max(RIGHT, 11 - BORDER), 13))


def test_one_stream_is_the_causal_model():
    """Without streams in a call, the weights of a model with streams are those of a plain GPT."""
    model, tokens = random_gpt(), random_tokens(2, 24)
    plain = adapt(model, ModelConfig(12, 24, 16, 2, 2, ngram_rows=101))
    assert plain.config.parallel == 1
    assert plain.encoder.border is None
    assert {*model.state_dict()} - {*plain.state_dict()} == {"encoder.border.tables.weight"}
    plain.never[END_ID] = True
    torch.testing.assert_close(plain(tokens), model(tokens), rtol=0, atol=0)
    with_streams = adapt(plain, model.config)
    torch.testing.assert_close(with_streams(tokens), model(tokens), rtol=0, atol=0)
    assert not with_streams.encoder.border.tables.weight.any()


def test_training_scores_every_token_and_draws_prefixes():
    model, tokens = random_gpt(block_size=24, parallel=3), random_tokens(6, 24)
    rows, objective = Rows(tokens, torch.full((6,), 24)), objective_for(model)
    assert objective == CausalObjective(3)
    batch = objective.make_batch(rows)
    loss = objective.loss(objective.predict(model, batch), batch).item()
    assert loss == pytest.approx(exact_nll(model, tokens, START_ID, streams=Streams(0, 8)).mean().item(), abs=1e-5)
    assert objective.likelihood(model, [rows]).nats_per_char == pytest.approx(loss, abs=1e-5)
    generator, prefixes = torch.Generator().manual_seed(0), []
    for _ in range(60):
        batch = objective.make_batch(rows, generator, is_training=True)
        prefixes.append(int(batch.prefix[0]))
        streams = Streams(prefixes[-1], (24 - prefixes[-1]) // 3)
        loss = objective.loss(objective.predict(model, batch), batch).item()
        assert loss == pytest.approx(exact_nll(model, tokens, START_ID, streams=streams).mean().item(), abs=1e-5)
    assert set(prefixes) == {0, 3, 6, 9, 12}
    assert 15 < prefixes.count(0) < 45


@pytest.mark.parametrize("T", [1, 2, 3, 4, 7])
def test_short_rows_are_scored_too(T):
    """A last window that does not divide has a prefix of what is left; one shorter than the streams is causal."""
    streams = equal_streams(T, 3)
    assert (streams is None) if T < 3 else (streams == Streams(T % 3, T // 3))
    rows = Rows(random_tokens(2, T), torch.full((2,), T))
    assert CausalObjective(3).likelihood(random_gpt(), [rows]).token_nats.shape == (2, T)


# ------------------------------------------------------------------------------------------------- writing
def test_a_text_does_not_depend_on_its_batch():
    model = random_gpt()
    templates = [template([4, 5], 30), template([6], 9), template([4, 5], 30), template([], 50), template([7, 8], 30)]
    together, _ = written(model, templates)
    for text, alone in zip(together, templates, strict=True):
        assert len(text) == len(alone)
        assert not (text <= END_ID).any()
        assert (text == alone)[alone != MASK_ID].all()
    assert (together[0] != together[2]).any()  # equal prompts, other numbers
    for i in (0, 1, 3, 4):
        assert torch.equal(written(model, [templates[i]])[0][0], together[i])


def test_long_texts_slide_and_cost_a_step_for_each_position_of_a_stream():
    model = random_gpt()  # a context of 24: 12 of prefix, and then streams of 4
    (text,), steps = written(model, [template([4], 7 * 3 + 5 * 12)])
    assert len(text) == 82
    assert not (text <= END_ID).any()
    assert [step.nfe for step in steps] == [*range(2, 9), *[2, 3, 4, 5] * 5]  # of each window; a prefix costs one more
    assert sum(int(step.revealed.sum()) for step in steps) == 81


def test_settings_act_on_streams():
    model, start = random_gpt(), template([4, 5], 40)
    (greedy,), _ = written(model, [start], temperature=0.0)
    assert torch.equal(greedy, written(model, [start], top_k=1, seed=5)[0][0])
    assert not torch.equal(greedy, written(model, [start])[0][0])
    (varied,), _ = written(model, [start], temperature=0.0, repetition_penalty=1e4)
    assert varied.bincount().max() < greedy.bincount().max()


def test_views_and_streaming_follow_streams():
    model, start = random_gpt(), template([4, 5], 40)
    states = write_streams(model, [start], generator=torch.Generator().manual_seed(1))
    *_, history = record_filling(states, start, TOKENIZER)
    text = "".join(cell.token for cell in history.cells)
    states = write_streams(model, [start], generator=torch.Generator().manual_seed(1))
    pieces = [piece for [piece] in completed_pieces(states, TOKENIZER, [0], at_end=False)]
    assert "".join(pieces) == text == generate_texts(model, TOKENIZER, ["ab"], max_out_tokens=40, seed=1)[0]
    assert all(cell.candidates and 0 < cell.confidence <= 1 for cell in history.cells[2:])


def test_such_a_model_writes_in_any_number_of_streams():
    model, tokens = random_gpt(), random_tokens(2, 24)
    losses = {}
    for n in (1, 2, 4, 6):
        model.set_streams(n)
        losses[n] = objective_for(model).likelihood(model, [Rows(tokens, torch.full((2,), 24))]).nats_per_char
        streams = None if n == 1 else Streams(0, 24 // n)
        assert losses[n] == pytest.approx(exact_nll(model, tokens, START_ID, streams=streams).mean().item(), abs=1e-5)
    assert len(set(losses.values())) == 4
    _, steps = written(model, [template([], 24)])
    assert len(steps) == 4
    model.set_streams(1)
    columns = decode(model, [torch.tensor([START_ID, 4, 5])], max_out_tokens=30, temperature=0.0)
    text = torch.stack(list(columns), 1)[0].tolist()
    expected = generate_texts(model, TOKENIZER, ["ab"], max_out_tokens=30, temperature=0.0)
    assert ["ab" + TOKENIZER.decode(text)] == expected
    with pytest.raises(ArgumentError, match="streams must be at most 12"):
        model.set_streams(13)
    with pytest.raises(ArgumentError, match="streams needs a GPT that was trained with --parallel"):
        random_gpt(parallel=1).set_streams(2)


def test_what_streams_cannot_do_is_refused():
    model = random_gpt()
    for bad in ({"slide": 2}, {"context_len": 5}, {"use_cache": False}):
        with pytest.raises(ArgumentError, match="has no effect on a model with 3 streams"):
            write_streams(model, [template([4], 3)], DecodingConfig(**bad))
    for text in (template([4], 0), torch.tensor([4, MASK_ID, 5])):
        with pytest.raises(ValueError, match="a prompt followed by"):
            write_streams(model, [text])
    with pytest.raises(ArgumentError, match=r"stop.*needs a GPT with one stream"):
        next(stream_texts(model, TOKENIZER, ["a"], stop="b"))
    with pytest.raises(ArgumentError, match=r"parallel.*rotary"):
        random_gpt(arch="vanilla")
    with pytest.raises(ArgumentError, match=r"parallel.*one stream"):
        random_gpt(segments="line")
    with pytest.raises(ArgumentError, match="parallel must be at most 12"):
        random_gpt(parallel=13)
    with pytest.raises(ArgumentError, match=r"parallel.*is for GPT"):
        LLaDAModel(ModelConfig(12, 24, 16, 2, 2, parallel=2))


# ------------------------------------------------------------------------------------------------- command lines
def test_train_and_generate(tmp_path, corpus_file, run_script):
    flags = ["--model", "gpt", "--data", str(corpus_file), "--parallel", "4", *TINY]
    run_script("train.py", *flags, "--steps", "6", "--out", str(tmp_path / "whole"))
    run_script("train.py", "--model", "gpt", "--resume", "--steps", "8", "--out", str(tmp_path / "whole"))
    assert load_checkpoint(tmp_path / "whole" / "gpt" / "last.pt").model.config.parallel == 4
    out = ["--out", str(tmp_path / "whole")]
    text, messages = run_script("generate.py", *out, "--prompt", "1: the king", "--length", "50")
    assert len(text) == 11 + 50 + 1
    assert "characters/s, 21 network evaluations" in messages
    watched, messages = run_script("generate.py", *out, "--prompt", "1: the king", "--length", "50", "--watch")
    assert watched == text
    for flag in (("--stop", "x"), ("--slide", "4"), ("--context-len", "4"), ("--compile",)):
        assert flag[0] in run_script("generate.py", *out, *flag, check=2)[1]
    assert "--streams" in run_script("generate.py", *out, "--streams", "9", check=2)[1]
    for mode in (("--top", "3"), ("--beams", "2"), ("--streams", "1", "--stop", "k"), ("--streams", "2")):
        assert run_script("generate.py", *out, "--prompt", "1: the", *mode)[0]


def test_the_evaluation_scores_streams_as_they_write(tmp_path, corpus_file, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "gpt", "--data", str(corpus_file), "--parallel", "4", *TINY, "--steps", "8"]
    run_script("train.py", *flags)
    summary = json.loads((tmp_path / "out/gpt/summary.json").read_text())
    run_script("evaluate.py", "--quick", "--data", str(corpus_file))
    metrics = json.loads((tmp_path / "out/report/metrics.json").read_text())
    assert metrics["models"]["gpt"]["nats_per_char"] == pytest.approx(summary["nats_per_char"], abs=1e-6)
    assert not metrics["models"]["gpt"]["is_bound"]
    [nfe] = {row["nfe"] for row in metrics["samples"] if row["model"] == "gpt"}
    assert nfe < len(metrics["samples"][0]["text"])


def test_streams_can_be_added_by_fine_tuning(tmp_path, corpus_file, run_script):
    run_script("train.py", "--model", "gpt", "--data", str(corpus_file), *TINY, "--steps", "3", "--out", str(tmp_path))
    base = str(tmp_path / "gpt" / "last.pt")
    flags = ["--model", "gpt", "--data", str(corpus_file), "--init-from", base, "--steps", "2", "--batch-size", "4"]
    run_script("train.py", *flags, "--parallel", "4", "--out", str(tmp_path / "tuned"))
    tuned = tmp_path / "tuned" / "gpt" / "last.pt"
    assert load_checkpoint(tuned).model.config.parallel == 4
    flags[5] = str(tuned)
    run_script("train.py", *flags, "--lora-rank", "2", "--out", str(tmp_path / "adapted"))
    assert load_checkpoint(tmp_path / "adapted" / "gpt" / "last.pt").model.config.parallel == 4
