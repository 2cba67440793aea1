"""Measures of texts: by hand, and against brute force."""

import itertools
import random

import pytest

from evaluation.metrics import longest_copied_span, text_metrics


def test_real_words_and_variety_by_hand():
    found = text_metrics([" xyz the ", "e cat the d"], {"the", "cat"}, "in the sea")  # cut words do not count
    assert found["real_words"] == pytest.approx(3 / 4)
    assert found["variety"] == pytest.approx(3 / 4)  # xyz, the, cat of four words
    assert found["longest_copy"] == 5  # " the "
    assert text_metrics(["--"], {"the"}, "") == {"real_words": None, "variety": None, "longest_copy": 0}


def brute_force(texts: list[str], source: str) -> int:
    edges = [(text, i, j) for text in texts for i, j in itertools.combinations(range(len(text) + 1), 2)]
    return max((j - i for text, i, j in edges if text[i:j] in source), default=0)


@pytest.mark.parametrize("seed", range(6))
def test_longest_copied_span_is_that_of_brute_force(seed):
    """Texts shorter than the span, and a source shorter than the texts."""
    generator = random.Random(seed)
    source, *texts = ("".join(generator.choices("abc", k=n)) for n in (60, 30, 4, 90))
    assert longest_copied_span(texts, source) == brute_force(texts, source)
    start = generator.randrange(30)
    assert longest_copied_span([*texts, f"z{source[start : start + 25]}z"], source) == 25
