"""Segments between [START] and [END]: rows without a lost character, and both likelihoods by enumeration."""

import itertools
import re

import pytest
import torch
from conftest import ROOT
from toy import MASK, TablePredictor, all_masks, all_strings, cross_entropies, random_model, seeded

from autoregressive import CausalObjective
from data import SEPARATORS, Rows, corpus_from_text, cut_segment, segment_rows, split_segments
from diffusion import DiffusionObjective, full_context
from likelihood import conditional_bound
from tokenizer import END_ID, MASK_ID, PAD_ID, START_ID, SimpleTokenizer

A, B = 4, 5  # the two characters of the toy
SIZES = {"vocab_size": 6, "block_size": 5, "segments": "line"}
ARCHS = pytest.mark.parametrize("arch", ["rotary", "vanilla"])
TEXTS = [
    *("", "\n\n", "a\n\nb", "a\n\n\nb\n\n\n\n\nc\n", "x" * 100, "one two three\n" * 20),
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" + "long. " * 30,
    "a\n \nb\n\t\n\nc",  # blank lines may hold spaces
]


# ------------------------------------------------------------------------------------------------- rows of a text
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", SEPARATORS)
def test_segments_hold_every_character_of_the_text_once(text, kind):
    segments = split_segments(text, SEPARATORS[kind])
    assert "".join(map("".join, segments)) == text
    tokenizer = SimpleTokenizer(text + "ab")
    dataset = segment_rows(text, tokenizer, 16, SEPARATORS[kind])
    assert "".join(map(tokenizer.decode, dataset.tokens)) == "".join(segment for segment, _ in segments)
    assert int(dataset.characters.sum()) == len(text), "an [END] counts as the separator that it replaces"
    for padded in dataset.tokens:
        row = padded[padded != PAD_ID]
        assert row[-1] == END_ID
        assert (row[:-1] >= A).all()
        assert (padded[len(row) :] == PAD_ID).all()
        assert len(padded) == 16


def test_long_segments_are_cut_at_lines_then_sentences_then_words_then_anywhere():
    ends = {"aaa bbb. ccc ddd\n": r"\n$", "Aaa bbb ccc. Ddd eee! Ggg hhh? ": r"[.!?]\s$", "word ": r"\s$", "x": r"x$"}
    for part, end in ends.items():
        pieces = cut_segment(part * 12, lambda piece: len(piece) <= 20)
        assert "".join(pieces) == part * 12
        assert max(map(len, pieces)) <= 20
        assert all(re.search(end, piece) for piece in pieces)


@pytest.mark.parametrize("kind", ["window", *SEPARATORS])
def test_evenly_spaced_rows_when_there_are_too_many(kind):
    text = "".join(f"line {i}\n\n" for i in range(50))
    corpus = corpus_from_text("lines", text)
    (rows,) = corpus.validation_rows(corpus.ids, 12, kind, max_tokens=60)
    everything = corpus.dataset(corpus.ids, 12, kind, stride=12)
    assert len(rows.tokens) == 5
    for i, row in ((0, 0), (-1, len(everything) - 1)):
        assert torch.equal(rows.tokens[i], everything.rows(torch.tensor([row])).tokens[0])


def test_the_corpus_splits_before_it_is_cut_into_segments_and_windows_hold_as_many_characters_as_tokens():
    text = (ROOT / "README.md").read_text()
    corpus = corpus_from_text("README", text)
    parts = [corpus.dataset(part, 64, "paragraph") for part in corpus.split(0.2)]
    assert sum(int(part.characters.sum()) for part in parts) == len(text)
    first, rest = corpus.validation_rows(corpus.ids[:50], 16)
    assert first.given is None
    assert (first.characters.tolist(), rest.characters.tolist()) == ([16] * 3, [2])
    assert first.counted.all()


# ------------------------------------------------------------------------------------------------- what is learned
def row_of(*ids: int, characters: int | None = None, given: int = 0, T: int = 4) -> Rows:
    """One row of the toy, with [PAD]s up to T; every token is a character unless said otherwise."""
    tokens = torch.tensor([[*ids, *[PAD_ID] * (T - len(ids))]])
    return Rows(tokens, torch.tensor([len(ids) if characters is None else characters]), torch.tensor([given]))


def test_the_context_is_start_the_segment_and_for_llada_ends_and_what_is_given_or_padding_is_not_learned():
    rows = row_of(A, START_ID, B, END_ID, given=2, T=5)
    tokens, may_mask = full_context(rows)
    assert tokens.tolist() == [[START_ID, A, START_ID, B, END_ID, END_ID]]
    assert may_mask.tolist() == [[False, False, False, True, True, True]]
    for seed in range(20):
        batch = DiffusionObjective().make_batch(rows, seeded(seed))
        assert torch.equal(batch.targets, tokens)
        assert not (batch.mask & ~may_mask).any()
        assert torch.equal(batch.inputs, tokens.masked_fill(batch.mask, MASK_ID))
    batch = CausalObjective().make_batch(rows, seeded())
    assert batch.inputs.tolist() == [[START_ID, A, START_ID, B, END_ID]]
    assert batch.targets.tolist() == [[-100, -100, B, END_ID, -100]]


@ARCHS
def test_what_stands_behind_gpts_padding_changes_nothing(arch):
    """Any id in place of [PAD]: the same losses of the text, and no gradient from the padding."""
    model, objective, rows = random_model("gpt", arch=arch, **SIZES), CausalObjective(), row_of(A, B, END_ID)
    batch = objective.make_batch(rows, seeded())
    loss = objective.loss(objective.predict(model, batch), batch)
    for token in range(6):
        other = batch._replace(inputs=batch.inputs.clone())
        other.inputs[0, 3:] = token
        assert torch.equal(objective.loss(objective.predict(model, other), other), loss)
    exact = objective.likelihood(model, [rows])
    assert exact.token_nats[0, 3] == 0
    assert exact.nats_per_char == pytest.approx(loss.item(), rel=1e-5)


@ARCHS
def test_lladas_contexts_hold_no_padding_whatever_the_rows_hold_there(arch):
    """LLaDA never meets a [PAD]: its input is the same with any amount of padding behind the text."""
    model, objective = random_model("llada", arch=arch, **SIZES), DiffusionObjective()
    assert not (full_context(row_of(A, END_ID))[0] == PAD_ID).any()
    padded, ended = row_of(A, B, END_ID), row_of(A, B, END_ID, END_ID, characters=3)
    nats = [objective.likelihood(model, [rows], pairs=50).window_nats for rows in (padded, ended)]
    assert torch.equal(*nats)


def test_gpts_likelihoods_of_all_segments_sum_to_one():
    """Over all texts of at most 3 characters that end, and those of 4 tokens that do not."""
    model, rows = random_model("gpt", **SIZES), [row_of(*ids) for ids in itertools.product((A, B), repeat=4)]
    rows += [row_of(*ids, END_ID) for n in range(4) for ids in itertools.product((A, B), repeat=n)]
    nats = torch.cat([CausalObjective().likelihood(model, [row]).window_nats for row in rows])
    assert nats.neg().exp().sum().item() == pytest.approx(1, abs=1e-5)


def exact_bound(predict, tokens, free) -> float:
    """Sum over m of c(m) of one row, over all masks of the free positions, written out."""
    total, positions = 0.0, free.nonzero()[:, 0].tolist()
    for m in range(1, len(positions) + 1):
        values = []
        for chosen in map(list, itertools.combinations(positions, m)):
            log_p = predict(tokens.index_fill(0, torch.tensor(chosen), MASK_ID)[None])[0].log_softmax(-1)
            values.append(-log_p[chosen, tokens[chosen]].mean().item())
        total += sum(values) / len(values)
    return total


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 2])
def test_lladas_likelihood_of_a_row_is_the_mean_over_all_masks(given):
    """Of a segment and of a pair: the estimate approaches the enumeration, and the loss has the same mean."""
    model, objective = random_model("llada", **SIZES), DiffusionObjective()
    rows = row_of(A, START_ID if given else B, B, END_ID, characters=1, given=given)
    tokens, free = (x[0] for x in full_context(rows))
    expected = exact_bound(model, tokens, free)
    results = [objective.likelihood(model, [rows], pairs=40, seed=seed) for seed in range(10)]
    estimates = torch.cat([result.window_nats for result in results])
    assert estimates.mean().item() == pytest.approx(expected, abs=5 * estimates.std().item() / 10**0.5 + 1e-5)
    assert results[0].is_bound
    assert results[0].characters.tolist() == [1]
    generator, many = seeded(), Rows(*(x.expand(256, *x.shape[1:]) for x in rows))
    batches = [objective.make_batch(many, generator).on(torch.device("cpu")) for _ in range(60)]
    losses = torch.stack([objective.loss(objective.predict(model, batch), batch) for batch in batches])
    assert losses.mean().item() == pytest.approx(expected, abs=5 * losses.std().item() / 60**0.5 + 5e-3)


def test_conditional_bound_is_exact_for_one_and_two_free_tokens_and_unbiased_for_more():
    predict, x = TablePredictor(), all_strings()[50]
    for free in all_masks():
        masks = all_masks()
        masks = masks[~(masks & ~free).any(1)]  # the masks of free positions
        nats = cross_entropies(predict, x, masks).sum(1) / masks.sum(1)
        expected = sum(float(nats[masks.sum(1) == m].mean()) for m in range(1, int(free.sum()) + 1))
        many = x[None].expand(400, -1), free.expand(400, -1)
        result = conditional_bound(predict, *many, MASK, generator=seeded())
        tolerance = 1e-9 if free.sum() <= 2 else 5 * result.window_nats.std().item() / 20
        assert result.window_nats.mean().item() == pytest.approx(expected, abs=tolerance)
        assert (result.token_nats[:, ~free] == 0).all()


def test_losses_are_per_character_of_the_whole_batch():
    """Parts of a batch weigh alike, whatever their rows hold: their mean loss is that of the whole batch."""
    model, objective = random_model("gpt", **SIZES), CausalObjective()
    rows = Rows(*map(torch.cat, zip(row_of(A, END_ID), row_of(A, B, A, END_ID), strict=True)))
    batch = objective.make_batch(rows, seeded())
    whole, *halves = batch, *(type(batch)(*(x[i : i + 1] for x in batch)) for i in range(2))
    whole, *losses = (objective.loss(objective.predict(model, part), part).item() for part in (whole, *halves))
    assert sum(losses) / 2 == pytest.approx(whole, rel=1e-6)
    assert whole == pytest.approx(objective.likelihood(model, [rows]).nats_per_char, rel=1e-6)
