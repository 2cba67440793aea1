"""Sample metrics, against brute force and by hand."""

import itertools

import numpy as np
import pytest

from evaluation.metrics import (
    NGramModel,
    character_entropy,
    distinct_share,
    longest_copied_span,
    real_word_share,
    words,
)


def test_ngram_model_is_a_distribution_in_every_context():
    """Seen and unseen contexts alike: the probabilities of all V next characters sum to 1."""
    ids = np.random.default_rng(0).integers(0, 3, 40)
    model = NGramModel(ids, vocab_size=4, order=3)
    for context in itertools.product(range(4), repeat=3):
        p = [2 ** -model.bits(np.array([*context, c]))[-1] for c in range(4)]
        assert sum(p) == pytest.approx(1, rel=1e-12)


def test_ngram_model_by_hand():
    """"abab": unigrams a 2, b 2 of two kinds over a uniform 1/2; after a always b, one kind, twice."""
    model = NGramModel(np.array([0, 1, 0, 1]), vocab_size=2, order=2)
    p1 = (2 + 2 * 0.5) / (4 + 2)
    assert 2 ** -model.bits(np.array([0]))[0] == pytest.approx(p1)
    assert 2 ** -model.bits(np.array([0, 1]))[1] == pytest.approx((2 + p1) / (2 + 1))
    assert 2 ** -model.bits(np.array([1, 1]))[1] == pytest.approx(p1 / (1 + 1))


def test_ngram_model_prefers_its_training_text_and_large_vocabularies_reduce_its_order():
    ids = np.frombuffer(b"the cat sat on the mat and the rat sat on the cat " * 20, dtype=np.uint8)
    model = NGramModel(ids, vocab_size=256)
    assert model.bits(ids[:200]).mean() < model.bits(np.random.default_rng(0).permutation(ids[:200])).mean() - 2
    assert NGramModel(np.array([7, 40_000, 7]), vocab_size=50_000).order == 3


def test_entropy_and_distinct_share_by_hand():
    assert character_entropy(np.array([5, 5, 5])) == 0
    assert character_entropy(np.array([1, 2, 3, 4])) == pytest.approx(2)
    assert distinct_share([np.array([1, 2, 1, 2]), np.array([1, 2]), np.array([9])], n=2) == pytest.approx(2 / 4)


def test_words_cut_at_the_edges_do_not_count():
    assert words("the cat's tail") == ["cat's"]
    assert words(" the cat's tail.") == ["the", "cat's", "tail"]
    assert real_word_share([" xyz the ", "e cat d"], {"the", "cat"}) == pytest.approx(2 / 3)
    assert real_word_share(["--"], {"the"}) is None


def brute_force(texts, source) -> int:
    spans = {tuple(source[i:j]) for i, j in itertools.combinations(range(len(source) + 1), 2)}
    edges = [(text, i, j) for text in texts for i, j in itertools.combinations(range(len(text) + 1), 2)]
    return max(j - i for text, i, j in edges if tuple(text[i:j]) in spans)


@pytest.mark.parametrize("seed", range(6))
def test_longest_copied_span_is_that_of_brute_force(seed):
    """Across the edges of blocks, too; texts shorter than the span, and a source shorter than the texts."""
    random = np.random.default_rng(seed)
    source = random.integers(0, 3, 60)
    texts = [random.integers(0, 3, n) for n in (30, 4, 90)]
    assert longest_copied_span(texts, source, block=7) == brute_force(texts, source)
    start = int(random.integers(0, 30))
    texts.append(np.concatenate([np.array([9]), source[start : start + 25], np.array([9])]))
    assert longest_copied_span(texts, source, block=7) == 25 == brute_force(texts, source)


def test_longest_copied_span_without_common_characters_is_zero():
    assert longest_copied_span([np.array([5, 6])], np.array([1, 2, 3])) == 0
    assert longest_copied_span([], np.array([1, 2, 3])) == 0
    assert longest_copied_span([np.array([1, 2, 3, 4])], np.array([1, 2, 3])) == 3
