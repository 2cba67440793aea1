"""What texts are like, without a model: real words, variety, the longest span copied from the training text.

No single figure is enough. Text at a low temperature has real words and little variety, noise has variety and few real
words, and a copy of the training text has both. Compare with as much real text.
"""

import re

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")  # letters, apostrophes inside: "o'er"


def words(text: str) -> list[str]:
    """The words of a text, lower case, without those at its edges: a window may have cut them.

    >>> words("ello, o'er the wor")
    ["o'er", 'the']
    """
    return [m.group().lower() for m in WORD.finditer(text) if m.start() > 0 and m.end() < len(text)]


def text_metrics(texts: list[str], vocabulary: set[str], source: str) -> dict[str, float | None]:
    """Share of the texts' words that are in the vocabulary, distinct words over words (None without words), and the
    longest span copied from the source. The second falls with the amount of text."""
    found = [word for text in texts for word in words(text)]
    return {
        "real_words": sum(word in vocabulary for word in found) / len(found) if found else None,
        "variety": len(set(found)) / len(found) if found else None,
        "longest_copy": longest_copied_span(texts, source),
    }


def longest_copied_span(texts: list[str], source: str) -> int:
    """How many characters the longest span has that is in one of the texts and in the source.

    >>> longest_copied_span(["xabcx", "bc"], "zabcd")
    3
    """
    longest = 0
    for text in texts:
        for start in range(len(text)):
            while start + longest < len(text) and text[start : start + longest + 1] in source:
                longest += 1
    return longest
