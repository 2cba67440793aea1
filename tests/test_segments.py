"""Segments between [START] and [END]: rows without a lost character, and both likelihoods by enumeration."""

import itertools
import re

import pytest
import torch
from conftest import ROOT
from toy import MASK, TablePredictor, all_masks, all_strings, cross_entropies

from autoregressive import CausalObjective
from checkpoint import new_model
from config import ModelConfig
from data import SEPARATORS, Rows, corpus_from_text, cut_segment, segment_rows, split_segments
from diffusion import DiffusionObjective, full_context
from likelihood import conditional_bound
from tokenizer import END_ID, MASK_ID, PAD_ID, START_ID, SimpleTokenizer

A, B = 4, 5  # the two characters of the toy
TEXTS = [
    "",
    "\n\n",
    "a\n\nb",
    "a\n\n\nb\n\n\n\n\nc\n",
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" + "long. " * 30,
    "x" * 100,
    "one two three\n" * 20,
    "a\n \nb\n\t\n\nc",  # blank lines may hold spaces
]


def random_model(name, block_size=5, arch="rotary", vocab_size=6):
    """A small model with random weights everywhere."""
    config = ModelConfig(vocab_size, block_size, 16, 2, 2, arch=arch, ngram_rows=101, segments="line")
    model, generator = new_model(name, config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.35, generator=generator)
    return model


# ------------------------------------------------------------------------------------------------- rows of a text
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", SEPARATORS)
def test_segments_hold_every_character_of_the_text_once(text, kind):
    separator = SEPARATORS[kind]
    segments = split_segments(text, separator)
    assert "".join(map("".join, segments)) == text
    tokenizer = SimpleTokenizer(text + "ab")
    dataset = segment_rows(text, tokenizer, 16, separator)
    assert "".join(map(tokenizer.decode, dataset.tokens)) == "".join(segment for segment, _ in segments)
    assert int(dataset.characters.sum()) == len(text), "an [END] counts as the separator that it replaces"
    for padded in dataset.tokens:
        row = padded[padded != PAD_ID]
        assert row[-1] == END_ID
        assert (row[:-1] >= A).all()
        assert (padded[len(row) :] == PAD_ID).all()
        assert len(padded) == 16


def test_long_segments_are_cut_at_lines_then_sentences_then_words_then_anywhere():
    def fits(piece):
        return len(piece) <= 20

    for segment, ends in (
        ("aaa bbb. ccc ddd\n" * 3, r"\n$"),
        ("Aaa bbb ccc. Ddd eee! Ggg hhh? ", r"[.!?]\s$"),
        ("word " * 12, r"\s$"),
        ("x" * 50, r"x$"),
    ):
        pieces = cut_segment(segment, fits)
        assert "".join(pieces) == segment
        assert all(map(fits, pieces))
        assert all(re.search(ends, piece) for piece in pieces)


def test_windows_do_not_change_and_hold_as_many_characters_as_tokens():
    text = "abcdefghij" * 5
    corpus = corpus_from_text("letters", text)
    first, rest = corpus.validation_rows(corpus.ids, 16)
    assert first.given is None
    assert first.characters.tolist() == [16] * 3
    assert rest.characters.tolist() == [2]
    assert first.counted.all()


@pytest.mark.parametrize("kind", ["window", *SEPARATORS])
def test_evenly_spaced_rows_when_there_are_too_many(kind):
    text = "".join(f"line {i}\n\n" for i in range(50))
    corpus = corpus_from_text("lines", text)
    (rows,) = corpus.validation_rows(corpus.ids, 12, kind, max_tokens=60)
    everything = corpus.dataset(corpus.ids, 12, kind, stride=12)
    assert len(rows.tokens) == 5
    assert torch.equal(rows.tokens[0], everything.rows(torch.tensor([0])).tokens[0])
    assert torch.equal(rows.tokens[-1], everything.rows(torch.tensor([len(everything) - 1])).tokens[0])


# ------------------------------------------------------------------------------------------------- what is learned
def segment(*ids: int, T: int = 4) -> Rows:
    """One segment of the toy."""
    tokens = torch.tensor([[*ids, END_ID, *[PAD_ID] * (T - 1 - len(ids))]])
    return Rows(tokens, torch.tensor([len(ids) + 1]), torch.tensor([0]))


def test_lladas_context_is_start_the_segment_and_ends():
    rows = Rows(torch.tensor([[A, START_ID, B, END_ID, PAD_ID]]), torch.tensor([1]), torch.tensor([2]))
    tokens, may_mask = full_context(rows)
    assert tokens.tolist() == [[START_ID, A, START_ID, B, END_ID, END_ID]]
    assert may_mask.tolist() == [[False, False, False, True, True, True]]
    for seed in range(20):
        batch = DiffusionObjective().make_batch(rows, torch.Generator().manual_seed(seed))
        assert torch.equal(batch.targets, tokens)
        assert not (batch.mask & ~may_mask).any()
        assert torch.equal(batch.inputs, tokens.masked_fill(batch.mask, MASK_ID))


def test_gpts_targets_are_neither_given_nor_padding():
    rows = Rows(torch.tensor([[A, START_ID, B, END_ID, PAD_ID]]), torch.tensor([1]), torch.tensor([2]))
    batch = CausalObjective().make_batch(rows, torch.Generator())
    assert batch.inputs.tolist() == [[START_ID, A, START_ID, B, END_ID]]
    assert batch.targets.tolist() == [[-100, -100, B, END_ID, -100]]


@pytest.mark.parametrize("arch", ["rotary", "vanilla"])
def test_what_stands_behind_gpts_padding_changes_nothing(arch):
    """Any ids in place of [PAD]: the same losses of the text, and no gradient from the padding."""
    model, objective = random_model("gpt", arch=arch), CausalObjective()
    rows = segment(A, B)
    batch = objective.make_batch(rows, torch.Generator())
    loss = objective.loss(objective.predict(model, batch), batch)
    for ids in itertools.product(range(6), repeat=1):
        other = batch._replace(inputs=batch.inputs.clone())
        other.inputs[0, 3:] = torch.tensor(ids)
        assert torch.equal(objective.loss(objective.predict(model, other), other), loss)
    exact = objective.likelihood(model, [rows])
    assert exact.token_nats[0, 3] == 0
    assert exact.nats_per_char == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("arch", ["rotary", "vanilla"])
def test_lladas_contexts_hold_no_padding_whatever_the_rows_hold_there(arch):
    """LLaDA never meets a [PAD]: its input is the same with any amount of padding behind the text."""
    model, objective = random_model("llada", arch=arch), DiffusionObjective()
    result = objective.likelihood(model, [segment(A, B)], pairs=50)
    assert not (full_context(segment(A))[0] == PAD_ID).any()
    ended = Rows(torch.tensor([[A, B, END_ID, END_ID]]), torch.tensor([3]), torch.tensor([0]))
    assert torch.equal(objective.likelihood(model, [ended], pairs=50).window_nats, result.window_nats)


def test_gpts_likelihoods_of_all_segments_sum_to_one():
    """Over all texts of at most 3 characters that end, and those of 4 tokens that do not."""
    model = random_model("gpt")
    total = 0.0
    for n in range(4):
        for ids in itertools.product((A, B), repeat=n):
            total += CausalObjective().likelihood(model, [segment(*ids)]).window_nats.neg().exp().item()
    for ids in itertools.product((A, B), repeat=4):
        rows = Rows(torch.tensor([ids]), torch.tensor([4]), torch.tensor([0]))
        total += CausalObjective().likelihood(model, [rows]).window_nats.neg().exp().item()
    assert total == pytest.approx(1, abs=1e-5)


def exact_bound(predict, tokens, free) -> float:
    """Sum over m of c(m) of one row, over all masks of the free positions, written out."""
    total, n = 0.0, int(free.sum())
    positions = free.nonzero()[:, 0].tolist()
    for m in range(1, n + 1):
        values = []
        for chosen in itertools.combinations(positions, m):
            mask = torch.zeros_like(free)
            mask[list(chosen)] = True
            log_p = predict(tokens.masked_fill(mask, MASK_ID)[None])[0].log_softmax(-1)
            values.append(-log_p[list(chosen), tokens[list(chosen)]].mean().item())
        total += sum(values) / len(values)
    return total


@pytest.mark.parametrize("given", [0, 2])
def test_lladas_likelihood_of_a_row_is_the_mean_over_all_masks(given):
    """Of a segment and of a pair: the estimate approaches the enumeration, and the loss has the same mean."""
    model, objective = random_model("llada"), DiffusionObjective()
    rows = Rows(torch.tensor([[A, START_ID if given else B, B, END_ID]]), torch.tensor([1]), torch.tensor([given]))
    tokens, free = (x[0] for x in full_context(rows))
    with torch.inference_mode():
        expected = exact_bound(model, tokens, free)
    results = [objective.likelihood(model, [rows], pairs=40, seed=seed) for seed in range(10)]
    estimates = torch.stack([result.window_nats[0] for result in results])
    error = estimates.std().item() / len(estimates) ** 0.5
    assert estimates.mean().item() == pytest.approx(expected, abs=5 * error + 1e-5)
    assert results[0].is_bound
    assert results[0].characters.tolist() == [1]

    generator, batch_of = torch.Generator().manual_seed(0), [x.expand(256, *x.shape[1:]) for x in rows]
    losses = []
    with torch.no_grad():
        for _ in range(60):
            batch = objective.make_batch(Rows(*batch_of), generator).on(torch.device("cpu"))
            losses.append(objective.loss(objective.predict(model, batch), batch).item())
    losses = torch.tensor(losses)
    assert losses.mean().item() == pytest.approx(expected, abs=5 * losses.std().item() / 60**0.5 + 5e-3)


def test_conditional_bound_is_exact_for_one_and_two_free_tokens_and_unbiased_for_more():
    predict, x = TablePredictor(), all_strings()[50]
    for free in all_masks():
        masks = all_masks()
        masks = masks[~(masks & ~free).any(1)]  # the masks of free positions
        nats = cross_entropies(predict, x, masks).sum(1) / masks.sum(1)
        expected = sum(float(nats[masks.sum(1) == m].mean()) for m in range(1, int(free.sum()) + 1))
        generator = torch.Generator().manual_seed(0)
        result = conditional_bound(predict, x[None].expand(400, -1), free.expand(400, -1), MASK, generator=generator)
        tolerance = 1e-9 if free.sum() <= 2 else 5 * result.window_nats.std().item() / 20
        assert result.window_nats.mean().item() == pytest.approx(expected, abs=tolerance)
        assert (result.token_nats[:, ~free] == 0).all()


def test_losses_are_per_character_of_the_whole_batch():
    """Parts of a batch weigh alike, whatever their rows hold: their mean loss is that of the whole batch."""
    model, objective = random_model("gpt"), CausalObjective()
    parts = [segment(A), segment(A, B, A)]
    rows = Rows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    batch = objective.make_batch(rows, torch.Generator())
    whole = objective.loss(objective.predict(model, batch), batch)
    halves = [type(batch)(*(x[i : i + 1] for x in batch)) for i in range(2)]
    losses = torch.stack([objective.loss(objective.predict(model, half), half) for half in halves])
    assert losses.mean().item() == pytest.approx(whole.item(), rel=1e-6)
    assert whole.item() == pytest.approx(objective.likelihood(model, [rows]).nats_per_char, rel=1e-6)


def test_the_corpus_splits_before_it_is_cut_into_segments():
    text = (ROOT / "README.md").read_text()
    corpus = corpus_from_text("README", text)
    parts = [corpus.dataset(part, 64, "paragraph") for part in corpus.split(0.2)]
    assert sum(int(part.characters.sum()) for part in parts) == len(text)
