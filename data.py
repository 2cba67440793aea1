"""Text: corpora, the split by position, and the rows of tokens that the models learn from and are scored on.

A corpus is turned into ids once. Small corpora stay in memory. Large ones are memory-mapped from a file of ids beside
the text, so that memory does not grow with the corpus. There are three kinds of rows:

    window    running text                       First Citizen:\\nBefore we proceed any further, hear me ...
    segments  utterance [END] [PAD] ...  one speech, paragraph or line in each row
    pairs     prompt [START] completion [END] [PAD] ...

The first [START] is put in front by `diffusion.full_context` and `autoregressive.causal_inputs`.

Letters: N rows, B rows of a batch, T tokens of a row.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenizer import END_ID, PAD_ID, START_ID, SimpleTokenizer, Tokenizer, tokenizer_from_dict
from utils.console import run_program, say
from utils.download import download
from utils.errors import ArgumentError
from utils.files import FileText, mapped_cache, sha256_of

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CACHE = Path(__file__).parent / "corpora"
IN_MEMORY_BYTES = 64 << 20  # larger texts are memory-mapped
SEPARATORS = {"speech": "\n\n", "paragraph": "\n\n", "line": "\n"}  # what stands between the segments of a text
PAIRS = "pairs"
CUTS = (r"\n", r"[.!?]\s", r"\s")  # where segments longer than a row are cut: ends of lines, of sentences, of words

MakeTokenizer = Callable[[Iterable[str]], Tokenizer]  # from the parts of a text, which can be read more than once


# ------------------------------------------------------------------------------------------------- corpora
class Pair(NamedTuple):
    """A prompt and what is to be written after it."""

    prompt: str
    completion: str


@dataclass
class Corpus:
    """A text as ids, or pairs."""

    name: str  # "tinyshakespeare", "pydoc" or an absolute path: what `load_corpus` takes
    sha256: str  # of the UTF-8 text
    tokenizer: Tokenizer
    ids: Tensor  # (tokens,), unsigned integers; empty for pairs
    mapping: mmap.mmap | None = None  # where `ids` are, if they are memory-mapped
    pairs: list[Pair] | None = None

    @property
    def characters(self) -> int:
        """Characters of the text; of pairs, of all prompts and completions."""
        if self.pairs is not None:
            return sum(len(pair.prompt) + len(pair.completion) for pair in self.pairs)
        if isinstance(self.tokenizer, SimpleTokenizer):
            return len(self.ids)
        return int(self.tokenizer.characters_per_token[self.ids.numpy()].sum())

    def forget_pages(self) -> None:
        """Drop the pages of a memory-mapped text from resident memory, where every window read leaves some."""
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)

    def split(self, val_fraction: float) -> tuple[Tensor, Tensor] | tuple[list[Pair], list[Pair]]:
        """(training part, validation part): ids, or pairs. The last `val_fraction` of the text is for validation."""
        if self.pairs is not None:
            cut = training_length(len(self.pairs), val_fraction)
            return self.pairs[:cut], self.pairs[cut:]
        cut = training_length(len(self.ids), val_fraction)
        if not isinstance(self.tokenizer, SimpleTokenizer):  # the split is by characters, whatever the tokens are
            ends = np.cumsum(self.tokenizer.characters_per_token[self.ids.numpy()])
            cut = int(np.searchsorted(ends, training_length(int(ends[-1]), val_fraction), side="left")) + 1
        return self.ids[:cut], self.ids[cut:]

    def check_part(self, part: Tensor | list, purpose: str, block_size: int, segments: str) -> None:
        """Raise ValueError if a part of the text is shorter than one row."""
        if segments == PAIRS and not part:
            raise ValueError(f"there is no pair to {purpose} on: use more pairs or another --val-fraction")
        if len(part) < (block_size if segments == "window" else 1):
            raise ValueError(
                f"{len(part)} tokens to {purpose} on are too few for one window of {block_size}: use a longer "
                "text (--data), a smaller --block-size or another --val-fraction"
            )


def training_length(length: int, val_fraction: float) -> int:
    """How many of `length` characters or pairs are to train on.

    >>> training_length(1000, val_fraction=0.1)
    900
    """
    return int(length * (1 - val_fraction) + 1e-6)


def training_texts(texts: Iterable[str], val_fraction: float) -> Iterator[str]:
    """The training part of a text that is given in parts."""
    left = training_length(sum(map(len, texts)), val_fraction)
    for text in texts:
        yield text[:left]
        left = max(0, left - len(text))


def load_corpus(name: str | None = None, make_tokenizer: MakeTokenizer | None = None) -> Corpus:
    """A corpus by name ("tinyshakespeare", "pydoc") or path of a UTF-8 file.

    None is TinyShakespeare, or pydoc with a warning if that cannot be downloaded. make_tokenizer: by default the
    tokenizer knows the characters of the text. Raises OSError if a named corpus cannot be downloaded or read,
    ArgumentError for a missing file, ValueError for one that is not UTF-8 text.
    """
    if name is None:
        try:
            return load_corpus("tinyshakespeare", make_tokenizer)
        except OSError as error:
            bar = "!" * 100
            say(f"{bar}\nWARNING: no TinyShakespeare: {error}")
            say("Training instead on the documentation that ships with Python (pydoc_data.topics).")
            say(f"To train on another text, pass --data FILE.\n{bar}")
            return load_corpus("pydoc", make_tokenizer)
    if name == "pydoc":
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[key] for key in sorted(topics))
        return corpus_from_text("pydoc", text, make_tokenizer)
    if name == "tinyshakespeare":
        path = CACHE / "tinyshakespeare.txt"
        if not path.exists() or sha256_of(path) != TINYSHAKESPEARE_SHA256:
            say("downloading TinyShakespeare ...")
            download(path, TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256)
        return load_file(path, name, make_tokenizer)
    if not Path(name).is_file():
        raise ArgumentError("data", f"{name}: no such file; give a UTF-8 text file, tinyshakespeare or pydoc")
    return load_file(Path(name), str(Path(name).resolve()), make_tokenizer)


def corpus_from_text(name: str, text: str, make_tokenizer: MakeTokenizer | None = None) -> Corpus:
    """A corpus held in memory. Raises ValueError for an empty text."""
    if not text:
        raise ValueError(f"{name}: the text is empty")
    tokenizer = make_tokenizer([text]) if make_tokenizer else SimpleTokenizer(text)
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Corpus(name, sha256, tokenizer, torch.from_numpy(tokenizer.encode(text)))


def load_file(path: Path, name: str, make_tokenizer: MakeTokenizer | None = None) -> Corpus:
    """A UTF-8 file as a corpus, memory-mapped if it is larger than IN_MEMORY_BYTES. Raises ValueError, OSError."""
    if path.stat().st_size > IN_MEMORY_BYTES:
        return map_file(path, name, make_tokenizer)
    return corpus_from_text(name, "".join(FileText(path)), make_tokenizer)


def map_file(path: Path, name: str, make_tokenizer: MakeTokenizer | None = None) -> Corpus:
    """Memory-map the ids of a text file from PATH.ids, which is built on first use and when the text has changed.

    A tokenizer other than that of the text's own characters has a file of its own.
    """
    tokenizer = make_tokenizer(FileText(path)) if make_tokenizer else None
    label = f".{hashlib.sha256(json.dumps(tokenizer.to_dict()).encode()).hexdigest()[:8]}" if tokenizer else ""

    def build(target: Path) -> dict:
        say(f"{path}: encoding once into {path}{label}.ids ...")
        chosen = tokenizer or SimpleTokenizer("".join(set().union(*FileText(path))))
        with open(target, "wb") as file:
            for text in FileText(path):
                file.write(chosen.encode(text))
        return chosen.to_dict()

    mapping, sha256, state = mapped_cache(path, path.with_name(f"{path.name}{label}.ids"), build)
    tokenizer = tokenizer or tokenizer_from_dict(state)
    ids = torch.from_numpy(np.frombuffer(mapping, dtype=tokenizer.dtype))
    return Corpus(name, sha256, tokenizer, ids, mapping)


def load_pairs(path: str, make_tokenizer: MakeTokenizer | None = None) -> Corpus:
    """Pairs from a file of JSON lines, {"prompt": ..., "completion": ...}. Raises ValueError naming the first bad line,
    and ArgumentError for a missing file."""
    if not Path(path).is_file():
        raise ArgumentError("pairs", f'{path}: no such file; give lines of {{"prompt": ..., "completion": ...}}')
    text = "".join(FileText(Path(path)))
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            pair = Pair(entry["prompt"], entry["completion"])
        except (ValueError, KeyError, TypeError):
            pair = None
        if pair is None or not all(isinstance(part, str) for part in pair):
            raise ValueError(f'{path}, line {number}: not {{"prompt": "...", "completion": "..."}}')
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: holds no pairs")
    texts = [part for pair in pairs for part in pair]
    tokenizer = make_tokenizer(texts) if make_tokenizer else SimpleTokenizer("".join(set().union(*texts)))
    empty = torch.from_numpy(tokenizer.encode(""))
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Corpus(str(Path(path).resolve()), sha256, tokenizer, empty, pairs=pairs)


def load_same_corpus(known: dict, segments: str, tokenizer: Tokenizer, name: str | None = None) -> Corpus:
    """The text of a checkpoint again, with its tokenizer. known: its {"name", "sha256", ...}; name: where it is now.

    Raises ValueError if the text found is a different one.
    """
    load = load_pairs if segments == PAIRS else load_corpus
    corpus = load(name or known["name"])
    if corpus.sha256 != known["sha256"]:
        raise ValueError(
            f"{corpus.name} is not the text the model was trained on (SHA-256 {corpus.sha256[:8]}, not "
            f"{known['sha256'][:8]}): restore it, or name the file that holds it with --data"
        )
    if corpus.tokenizer.to_dict() == tokenizer.to_dict():
        return corpus
    return load(name or known["name"], lambda texts: tokenizer)


# ------------------------------------------------------------------------------------------------- rows
class Rows(NamedTuple):
    """B rows of T tokens: a batch to learn from, or to score. [START] is not in them, the objectives put it in front.

    Running text has no `given`. Of a segment or a pair, the first given[b] tokens of row b are visible from the
    beginning and count nowhere; [PAD] follows its [END] and counts nowhere either.
    """

    tokens: Tensor  # (B, T) int64
    characters: Tensor  # (B,) int64: characters of text that the counted tokens stand for
    given: Tensor | None = None  # (B,) int64

    @property
    def counted(self) -> Tensor:
        """(B, T) bool: the tokens that are predicted and counted."""
        counted = self.tokens != PAD_ID
        if self.given is not None:
            counted &= torch.arange(self.tokens.shape[1], device=self.tokens.device) >= self.given[:, None]
        return counted

    def to(self, device: torch.device) -> "Rows":
        """The same on a device."""
        return Rows(*(None if x is None else x.to(device) for x in self))


def window_rows(tokens: Tensor, tokenizer: Tokenizer) -> Rows:
    """Windows of running text, (B, T), as rows."""
    return Rows(tokens, torch.from_numpy(tokenizer.characters_per_token)[tokens].sum(1))


class ShakespeareDataset(torch.utils.data.Dataset):
    """Windows of seq_length ids, `stride` apart: item i is the LongTensor (seq_length,) that starts at i * stride.

    `text` is a string, or ids that are already encoded. Raises ValueError if it is shorter than one window.
    """

    def __init__(self, text: str | Tensor, tokenizer: Tokenizer, seq_length: int, stride: int = 1):
        if seq_length < 1 or stride < 1:
            raise ValueError(f"seq_length and stride must be at least 1, got {seq_length} and {stride}")
        self.ids = torch.from_numpy(tokenizer.encode(text)) if isinstance(text, str) else text
        self.tokenizer, self.seq_length, self.stride = tokenizer, seq_length, stride
        if len(self.ids) < seq_length:
            raise ValueError(f"a text of {len(self.ids)} tokens is too short for one window of {seq_length}")

    def __len__(self) -> int:
        return (len(self.ids) - self.seq_length) // self.stride + 1

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return self.gather(torch.tensor([index % len(self)]))[0]

    @property
    def rows_per_epoch(self) -> float:
        """How many rows hold as many tokens as the text."""
        return len(self.ids) / self.seq_length

    @property
    def characters_per_row(self) -> float:
        """The mean number of characters in a row."""
        if isinstance(self.tokenizer, SimpleTokenizer):
            return float(self.seq_length)
        return self.seq_length * float(self.tokenizer.characters_per_token[self.ids.numpy()].mean())

    def gather(self, indices: Tensor) -> Tensor:
        """The windows of the given indices (B,) as one LongTensor (B, seq_length)."""
        positions = indices[:, None] * self.stride + torch.arange(self.seq_length)  # (B, T)
        return self.ids[positions].long()

    def rows(self, indices: Tensor) -> Rows:
        """The windows of the given indices (B,)."""
        return window_rows(self.gather(indices), self.tokenizer)

    def sample(self, batch_size: int, generator: torch.Generator) -> Rows:
        """`batch_size` windows, drawn uniformly with replacement."""
        return self.rows(torch.randint(len(self), (batch_size,), generator=generator))


class RowDataset(torch.utils.data.Dataset):
    """N rows that end with [END]: segments or pairs. Item i is row i without its padding, (length,)."""

    def __init__(self, rows: list[list[int]], characters: list[int], given: list[int], seq_length: int):
        """rows: ids of each row, at most seq_length; characters, given: see `Rows`."""
        self.tokens = torch.full((len(rows), seq_length), PAD_ID, dtype=torch.int32)  # (N, T)
        for padded, ids in zip(self.tokens, rows, strict=True):
            padded[: len(ids)] = torch.tensor(ids)
        self.characters, self.given = torch.tensor(characters), torch.tensor(given)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        row = self.tokens[index].long()
        return row[row != PAD_ID]

    @property
    def rows_per_epoch(self) -> float:
        """All of them."""
        return len(self)

    @property
    def characters_per_row(self) -> float:
        """The mean number of counted characters in a row."""
        return float(self.characters.double().mean())

    def rows(self, indices: Tensor) -> Rows:
        """The rows of the given indices (B,)."""
        return Rows(self.tokens[indices].long(), self.characters[indices], self.given[indices])

    def sample(self, batch_size: int, generator: torch.Generator) -> Rows:
        """`batch_size` rows, drawn uniformly with replacement."""
        return self.rows(torch.randint(len(self), (batch_size,), generator=generator))


def make_dataset(
    part: Tensor | list[Pair], tokenizer: Tokenizer, block_size: int, segments: str = "window", stride: int = 1
) -> ShakespeareDataset | RowDataset:
    """The rows of a part of a corpus (ids or pairs) for a model with a context of block_size tokens.

    Raises ValueError for a part without a single row, and for a pair that does not fit.
    """
    if segments == "window":
        return ShakespeareDataset(part, tokenizer, block_size, stride)
    if segments == PAIRS:
        return pair_rows(part, tokenizer, block_size - 1)
    return segment_rows(tokenizer.decode(part.numpy()), tokenizer, block_size - 1, SEPARATORS[segments])


def validation_rows(
    part: Tensor | list[Pair],
    tokenizer: Tokenizer,
    block_size: int,
    segments: str = "window",
    max_tokens: int | None = None,
) -> list[Rows]:
    """Rows that cover a part of a corpus once: one batch, and of running text a second with the short last window.

    If they hold more than max_tokens: evenly spaced rows with about so many.
    """
    batches = []
    if segments != "window" or len(part) >= block_size:
        dataset = make_dataset(part, tokenizer, block_size, segments, stride=block_size)
        if max_tokens is not None and len(dataset) * block_size > max_tokens:
            return [dataset.rows(torch.linspace(0, len(dataset) - 1, max(1, max_tokens // block_size)).long())]
        batches.append(dataset.rows(torch.arange(len(dataset))))
    rest = len(part) % block_size if segments == "window" else 0
    if rest:
        batches.append(window_rows(part[-rest:].long()[None], tokenizer))
    return batches


# ------------------------------------------------------------------------------------------------- segments and pairs
def split_segments(text: str, separator: str) -> list[str]:
    """The segments of a text: separator.join(segments) is the text again.

    >>> split_segments("ROMEO:\\nAy me!\\n\\n\\nJULIET:\\nAy me!\\n", "\\n\\n")
    ['ROMEO:\\nAy me!\\n', 'JULIET:\\nAy me!\\n']
    """
    return re.split(re.escape(separator) + r"(?!\n)", text)  # of a longer run of newlines, the last are the separator


def cut_segment(segment: str, fits: Callable[[str], bool]) -> list[str]:
    """A segment in pieces that fit: cut at ends of lines, else of sentences, else of words, else anywhere, as near to
    its middle as possible. "".join(pieces) is the segment again. A single character is taken to fit."""
    if len(segment) < 2 or fits(segment):
        return [segment]
    middle = len(segment) // 2
    for pattern in CUTS:
        ends = [match.end() for match in re.finditer(pattern, segment) if match.end() < len(segment)]
        if ends:
            middle = min(ends, key=lambda end: abs(end - len(segment) / 2))
            break
    return cut_segment(segment[:middle], fits) + cut_segment(segment[middle:], fits)


def segment_rows(text: str, tokenizer: Tokenizer, seq_length: int, separator: str) -> RowDataset:
    """The segments of a text, each followed by [END], in rows of seq_length tokens.

    A segment that does not fit becomes several rows. The [END] of a segment counts as the characters of the separator
    that it replaces, so that the characters of all rows are those of the text.
    """
    rows, characters = [], []
    segments = split_segments(text, separator)
    for number, segment in enumerate(segments, 1):
        pieces = cut_segment(segment, lambda piece: len(tokenizer.encode(piece)) < seq_length)
        for piece in pieces:
            rows.append([*tokenizer.encode(piece).tolist(), END_ID])
            characters.append(len(piece))
        characters[-1] += len(separator) if number < len(segments) else 0
    return RowDataset(rows, characters, [0] * len(rows), seq_length)


def pair_rows(pairs: list[Pair], tokenizer: Tokenizer, seq_length: int) -> RowDataset:
    """Pairs as rows `prompt [START] completion [END]`, of which prompt and [START] are given.

    Raises ValueError for a pair that is longer than seq_length.
    """
    rows = [
        [*tokenizer.encode(pair.prompt).tolist(), START_ID, *tokenizer.encode(pair.completion).tolist(), END_ID]
        for pair in pairs
    ]
    for row, pair in zip(rows, pairs, strict=True):
        if len(row) > seq_length:
            raise ValueError(
                f"the pair {pair.prompt[:40]!r} takes {len(row) + 1} tokens, more than the context of "
                f"{seq_length + 1}: shorten it or use a larger --block-size"
            )
    given = [row.index(START_ID) + 1 for row in rows]
    return RowDataset(rows, [len(pair.completion) for pair in pairs], given, seq_length)


def main() -> None:
    """Print the default corpus: vocabulary, a line encoded and decoded, the sizes of both parts."""
    corpus = load_corpus()
    tokenizer = corpus.tokenizer
    ids = corpus.ids[:40].numpy()
    train, val = corpus.split(0.2)
    print(f"corpus      {corpus.name}: {len(corpus.ids):,} characters, SHA-256 {corpus.sha256[:16]}...")
    print(f"vocabulary  {tokenizer.vocab_size} ids, {tokenizer.dtype}: 4 special tokens and {tokenizer.characters!r}")
    print(f"encoded     {ids.tolist()}\ndecoded     {tokenizer.decode(ids)!r}")
    print(f"split       {len(train):,} to train, {len(val):,} to validate")


if __name__ == "__main__":
    run_program(main)
