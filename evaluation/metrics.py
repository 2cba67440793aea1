"""Sample metrics that need no model: n-grams, entropy, distinct spans, known words, copied spans.

No single one is enough. A text that repeats itself is likely under any model, but has a low entropy and few distinct
spans. Noise has a high entropy and few words. A copy of the training text has one long copied span. Compare samples
with the same figures of real text.
"""

import re

import numpy as np

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")  # letters, apostrophes inside: "o'er"


class NGramModel:
    """Interpolated character n-grams of a training text with Witten-Bell smoothing.

        p_n(c | h) = (count(h c) + kinds(h) p_{n-1}(c | h')) / (count(h) + kinds(h))

    h: the n - 1 characters before; h': all of those but the first; kinds(h): how many different characters followed h;
    p_0 is uniform (Chen & Goodman 1998, section 2.4). For an unseen context p_n = p_{n-1}.
    """

    def __init__(self, ids: np.ndarray, vocab_size: int, order: int = 6):
        self.vocab_size = vocab_size
        while vocab_size**order >= 2**62:  # an n-gram is one int64
            order -= 1
        self.order = order
        self.tables = []  # for n = 1..order: n-grams and their counts; contexts, their counts and kinds
        for n in range(1, order + 1):
            grams, counts = np.unique(self.codes(ids, n), return_counts=True)
            contexts, first = np.unique(grams // vocab_size, return_index=True)
            totals = np.add.reduceat(counts, first) if len(first) else counts
            kinds = np.diff(np.append(first, len(grams)))
            self.tables.append((grams, counts, contexts, totals, kinds))

    def codes(self, ids: np.ndarray, n: int) -> np.ndarray:
        """(len(ids) - n + 1,) each n-gram as one number, its last character the lowest digit in base V."""
        count = max(len(ids) - n + 1, 0)
        codes = np.zeros(count, dtype=np.int64)
        for i in range(n):
            codes = codes * self.vocab_size + ids[i : i + count].astype(np.int64)
        return codes

    def bits(self, ids: np.ndarray) -> np.ndarray:
        """(len(ids),) -log2 p of each character given those before it: exact, bits/char."""
        p = np.full(len(ids), 1 / self.vocab_size)
        for n, (grams, counts, contexts, totals, kinds) in enumerate(self.tables, 1):
            codes = self.codes(ids, n)  # of the characters n - 1, n, ...: the first have no longer context
            if not len(codes) or not len(grams):
                continue
            count, _ = look_up(codes, grams, counts)
            total, found = look_up(codes // self.vocab_size, contexts, totals)
            kind, _ = look_up(codes // self.vocab_size, contexts, kinds)
            shorter = p[n - 1 :]
            p[n - 1 :] = np.where(found, (count + kind * shorter) / np.maximum(total + kind, 1), shorter)
        return -np.log2(p)


def look_up(keys: np.ndarray, known: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values[i] where known[i] == key (known is sorted), else 0; and whether it was found."""
    index = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    found = known[index] == keys
    return np.where(found, values[index], 0), found


def character_entropy(ids: np.ndarray) -> float:
    """Entropy of the character frequencies, bits/char."""
    _, counts = np.unique(ids, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def distinct_share(texts: list[np.ndarray], n: int = 8) -> float:
    """Distinct n-grams over all n-grams of all texts. It falls with the amount of text: compare equal amounts only."""
    grams = np.concatenate([np.lib.stride_tricks.sliding_window_view(ids, n) for ids in texts if len(ids) >= n])
    return len(np.unique(grams, axis=0)) / len(grams)


def words(text: str) -> list[str]:
    """The words of a text, lower case, without those at its edges: a window may have cut them.

    >>> words("ello, o'er the wor")
    ["o'er", 'the']
    """
    return [m.group().lower() for m in WORD.finditer(text) if m.start() > 0 and m.end() < len(text)]


def real_word_share(texts: list[str], vocabulary: set[str]) -> float | None:
    """Share of the texts' words that are in the vocabulary; None if there are no words."""
    found = [word in vocabulary for text in texts for word in words(text)]
    return sum(found) / len(found) if found else None


def longest_copied_span(texts: list[np.ndarray], source: np.ndarray, block: int = 1 << 20) -> int:
    """Length of the longest span of any of the texts that also occurs in the source.

    If a span of L characters is copied then so is one of L - 1: binary search over L. The hashes of all spans of L come
    from one running sum (a polynomial in an odd number modulo 2^64, each character a random 64-bit digit). The source
    is hashed in blocks: time O(source log L), memory O(texts + block).
    """
    largest = max(int(ids.max(initial=0)) for ids in [source, *texts])
    digits = np.random.default_rng(0).integers(1 << 63, size=largest + 1, dtype=np.uint64)
    low, high = 0, max(map(len, texts), default=0)
    while low < high:
        L = (low + high + 1) // 2
        wanted = np.unique(np.concatenate([span_hashes(digits[ids], L) for ids in texts]))
        starts = range(0, max(len(source) - L + 1, 0), block)
        spans = (span_hashes(digits[source[i : i + block + L - 1]], L) for i in starts)
        copied = any(look_up(span, wanted, wanted)[1].any() for span in spans)
        low, high = (L, high) if copied else (low, L - 1)
    return low


def span_hashes(digits: np.ndarray, L: int) -> np.ndarray:
    """(n,) -> (n - L + 1,) uint64: sum of digit[i + j] * base^j over j < L, modulo 2^64, for every i."""
    if len(digits) < L:
        return np.zeros(0, dtype=np.uint64)
    base = np.uint64(0x9E3779B97F4A7C15)  # odd, hence invertible modulo 2^64
    inverse = np.uint64(pow(int(base), -1, 1 << 64))
    powers = np.cumprod(np.full(len(digits), base))  # base^1, base^2, ...
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(digits * powers, dtype=np.uint64)])
    return (sums[L:] - sums[:-L]) * np.cumprod(np.full(len(digits) - L + 1, inverse))
