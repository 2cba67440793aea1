"""Text: corpora, the split by position, and the rows of tokens that the models learn from and are scored on.

A corpus is turned into ids once. Small corpora stay in memory. Large ones are memory-mapped from a file of ids, so that
memory does not grow with the corpus. There are two kinds of rows, windows of running text and segments (one speech,
paragraph or line, [END], [PAD] ...); extras/pairs.py adds a third. The first [START] is put in front by the objectives.

Letters: N rows, B rows of a batch, T tokens of a row.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenizer import END_ID, PAD_ID, SimpleTokenizer, Tokenizer
from utils.console import counted, say
from utils.download import download
from utils.errors import ArgumentError
from utils.files import SEAL_BYTES, FileText, atomic_write, check_seal, seal, sha256_of

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CACHE = Path(__file__).parent / "corpora"
IN_MEMORY_BYTES = 64 << 20  # larger texts are memory-mapped
SEPARATORS = {"speech": "\n\n", "paragraph": "\n\n", "line": "\n"}  # what stands between the segments of a text
CUTS = (r"\n", r"[.!?]\s", r"\s")  # where segments longer than a row are cut: ends of lines, of sentences, of words

MakeTokenizer = Callable[[Iterable[str]], Tokenizer]  # from the parts of a text, which can be read more than once
LOADERS: dict[str, Callable] = {}  # of other kinds of corpora, by their `segments`: extras/pairs.py adds one


# ------------------------------------------------------------------------------------------------- corpora
@dataclass
class Corpus:
    """A text as ids. Other kinds of corpora override `characters`, `split`, `check_part` and `dataset`."""

    name: str  # what `load_corpus` takes: "tinyshakespeare", "pydoc", or absolute paths, joined as in PATH
    sha256: str  # of the UTF-8 text
    tokenizer: Tokenizer
    ids: Tensor  # (tokens,), unsigned integers

    @property
    def characters(self) -> int:
        """Characters of the text."""
        return len(self.ids) if self.tokenizer.is_exact else int(self.ends[-1])

    @property
    def ends(self) -> np.ndarray:
        """The position in the text at which each token ends, (tokens,)."""
        return np.cumsum(self.tokenizer.characters_per_token[self.ids.numpy()])

    def split(self, val_fraction: float) -> tuple[Tensor, Tensor]:
        """(training part, validation part) of the ids. The last `val_fraction` of the text is for validation."""
        cut = training_length(self.characters, val_fraction)
        if not self.tokenizer.is_exact:  # the split is by characters, whatever the tokens are
            cut = int(np.searchsorted(self.ends, cut)) + 1
        return self.ids[:cut], self.ids[cut:]

    def check_part(self, part: Tensor, purpose: str, block_size: int, segments: str) -> None:
        """Raise ValueError if a part of the text is shorter than one row."""
        if len(part) < (block_size if segments == "window" else 1):
            problem = f"{len(part)} tokens to {purpose} on are too few for one window of {block_size}"
            flags = "--block-size, --val-fraction or --calibration"
            raise ValueError(f"{problem}: use a longer text (--data), or change {flags}")

    def dataset(self, part: Tensor, block_size: int, segments: str = "window", stride: int = 1) -> "RowSource":
        """The rows of a part for a model with a context of block_size tokens. Raises ValueError if there is none."""
        if segments == "window":
            return ShakespeareDataset(part, self.tokenizer, block_size, stride)
        return segment_rows(self.tokenizer.decode(part.numpy()), self.tokenizer, block_size - 1, SEPARATORS[segments])

    def validation_rows(
        self, part: Tensor, block_size: int, segments: str = "window", max_tokens: int | None = None
    ) -> list["Rows"]:
        """Rows that cover a part once: one batch, and of running text a second with the short last window.

        If they hold more than max_tokens: evenly spaced rows with about so many.
        """
        batches = []
        if segments != "window" or len(part) >= block_size:
            dataset = self.dataset(part, block_size, segments, stride=block_size)
            if max_tokens is not None and len(dataset) * block_size > max_tokens:
                return [dataset.rows(torch.linspace(0, len(dataset) - 1, max(1, max_tokens // block_size)).long())]
            batches.append(dataset.rows(torch.arange(len(dataset))))
        rest = len(part) % block_size if segments == "window" else 0
        if rest:
            batches.append(window_rows(part[-rest:].long()[None], self.tokenizer))
        return batches


def training_length(length: int, val_fraction: float) -> int:
    """How many of `length` characters are to train on.

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


def load_corpus(
    name: str | Sequence[str] | None = None, make_tokenizer: MakeTokenizer | None = None, segments: str = "window"
) -> Corpus:
    """A corpus by name ("tinyshakespeare", "pydoc"), or from text files, folders of .txt files and pipes, joined.

    None is TinyShakespeare, or pydoc with a warning if that cannot be downloaded. make_tokenizer: by default the
    tokenizer knows the characters of the text. segments: what the files are joined for, see SEPARATORS. Raises OSError
    for what cannot be downloaded or read, ArgumentError for a missing file, ValueError for one that is not UTF-8 text.
    """
    if segments in LOADERS:
        return LOADERS[segments](name, make_tokenizer)
    if name is None:
        try:
            return load_corpus("tinyshakespeare", make_tokenizer)
        except OSError as error:
            say(f"WARNING: no TinyShakespeare ({error}): this is pydoc, Python's documentation (or name a --data FILE)")
            return load_corpus("pydoc", make_tokenizer)
    names = [name] if isinstance(name, str) else list(name)
    if names == ["pydoc"]:
        from pydoc_data.topics import topics

        return corpus_from_text("pydoc", "\n\n".join(topics[key] for key in sorted(topics)), make_tokenizer)
    if names == ["tinyshakespeare"]:
        path = CACHE / "tinyshakespeare.txt"
        if not path.exists() or sha256_of(path) != TINYSHAKESPEARE_SHA256:
            say("downloading TinyShakespeare ...")
            download(path, TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256)
        return load_files(FileText(path), "tinyshakespeare", make_tokenizer)
    if len(names) == 1 and not os.path.exists(names[0]):
        names = names[0].split(os.pathsep)  # the name of a corpus of several files
    places, files = [lasting_path(name) for name in names], []
    for place in places:
        files += sorted(place.glob("[!.]*.[tT][xX][tT]")) if place.is_dir() else [place]
    if not files:
        raise ArgumentError("data", f"{places[0]}: no .txt files in this folder")
    if len(files) > 1:
        say(f"reading {counted(len(files), 'file')}: {', '.join(file.name for file in files)}")
    text = FileText(*files, separator=SEPARATORS.get(segments, "\n\n"))
    return load_files(text, os.pathsep.join(map(str, places)), make_tokenizer)


def lasting_path(name: str) -> Path:
    """The absolute path of a file or a folder; what a pipe holds can be read only once and is copied to CACHE."""
    if not os.path.exists(name):
        known = "a UTF-8 text file, a folder of .txt files, tinyshakespeare or pydoc"
        raise ArgumentError("data", f"{name}: no such file; give {known}")
    path = Path(name)
    if path.is_file() or path.is_dir():
        return path.resolve()
    content = path.read_bytes()
    copy = CACHE / f"piped-{hashlib.sha256(content).hexdigest()[:16]}.txt"
    with atomic_write(copy) as temporary:
        temporary.write_bytes(content)
    say(f"{path} can be read only once: kept as {copy}")
    return copy


def corpus_from_text(name: str, text: str, make_tokenizer: MakeTokenizer | None = None) -> Corpus:
    """A corpus held in memory. Raises ValueError for an empty text."""
    if not text:
        raise ValueError(f"{name}: the text is empty")
    tokenizer = make_tokenizer([text]) if make_tokenizer else SimpleTokenizer(text)
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Corpus(name, sha256, tokenizer, torch.from_numpy(tokenizer.encode(text)))


def load_files(texts: FileText, name: str, make_tokenizer: MakeTokenizer | None = None) -> Corpus:
    """Files as a corpus. Raises ValueError, OSError.

    Ids of more than IN_MEMORY_BYTES are memory-mapped from a file in CACHE, which is named by the hash of the text and
    its tokenizer, and built if it is missing or damaged.
    """
    if sum(path.stat().st_size for path in texts.paths) <= IN_MEMORY_BYTES:
        return corpus_from_text(name, "".join(texts), make_tokenizer)
    characters, sha256 = set(), hashlib.sha256()
    for text in texts:
        characters.update(text)
        sha256.update(text.encode())
    tokenizer = make_tokenizer(texts) if make_tokenizer else SimpleTokenizer("".join(characters))
    key = hashlib.sha256(f"{sha256.hexdigest()} {tokenizer.to_dict()}".encode()).hexdigest()[:16]
    path = CACHE / f"{texts.paths[0].name}.{key}.ids"
    try:
        check_seal(path)
    except (OSError, ValueError):
        say(f"{name}: encoding once into {path} ...")
        with atomic_write(path) as temporary:
            with open(temporary, "wb") as file:
                file.writelines(tokenizer.encode(text) for text in texts)
            seal(temporary)
    length = (path.stat().st_size - SEAL_BYTES) // tokenizer.dtype.itemsize
    ids = np.memmap(path, tokenizer.dtype, "c", shape=length)  # copy-on-write: torch wants a writable array
    return Corpus(name, sha256.hexdigest(), tokenizer, torch.from_numpy(ids))


def load_same_corpus(known: dict, segments: str, tokenizer: Tokenizer, name: str | None = None) -> Corpus:
    """The text of a checkpoint again, with its tokenizer. known: its {"name", "sha256", ...}; name: where it is now.

    Raises ValueError if the text found is a different one.
    """
    corpus = load_corpus(name or known["name"], segments=segments)
    if corpus.sha256 != known["sha256"]:
        hashes = f"(SHA-256 {corpus.sha256[:8]}, not {known['sha256'][:8]})"
        problem = f"{corpus.name} is not the text the model was trained on {hashes}"
        raise ValueError(f"{problem}: restore it, or name the file that holds it with --data")
    if corpus.tokenizer.to_dict() == tokenizer.to_dict():
        return corpus
    return load_corpus(corpus.name, lambda texts: tokenizer, segments)


# ------------------------------------------------------------------------------------------------- rows
class Rows(NamedTuple):
    """B rows of T tokens: a batch to learn from, or to score. [START] is not in them, the objectives put it in front.

    Running text has no `given`. Of other rows, the first given[b] tokens of row b are visible from the beginning and
    count nowhere; [PAD] follows their [END] and counts nowhere either.
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


class RowSource:
    """Where rows come from. Each has `rows(indices)`, `rows_per_epoch` and `characters_per_row` (a mean)."""

    def sample(self, batch_size: int, generator: torch.Generator) -> Rows:
        """`batch_size` rows, drawn uniformly with replacement."""
        return self.rows(torch.randint(len(self), (batch_size,), generator=generator))


class ShakespeareDataset(RowSource, torch.utils.data.Dataset):
    """Windows of seq_length ids, `stride` apart: item i is the LongTensor (seq_length,) that starts at i * stride.

    `text` is a string, or ids that are already encoded. Raises ValueError if it is shorter than one window.
    """

    def __init__(self, text: str | Tensor, tokenizer: Tokenizer, seq_length: int, stride: int = 1):
        self.ids = ids = torch.from_numpy(tokenizer.encode(text)) if isinstance(text, str) else text
        if len(ids) < seq_length:
            raise ValueError(f"a text of {len(ids)} tokens is too short for one window of {seq_length}")
        self.windows, self.tokenizer = ids.unfold(0, seq_length, stride), tokenizer  # (N, T): a view of the ids
        self.rows_per_epoch = len(ids) / seq_length  # how many rows hold as many tokens as the text
        lengths = 1.0 if tokenizer.is_exact else tokenizer.characters_per_token[ids.numpy()].mean()
        self.characters_per_row = seq_length * float(lengths)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index].long()

    def rows(self, indices: Tensor) -> Rows:
        """The windows of the given indices (B,)."""
        return window_rows(self.windows[indices].long(), self.tokenizer)


class RowDataset(RowSource):
    """N rows that end with [END], then [PAD]."""

    def __init__(self, rows: list[list[int]], characters: list[int], given: list[int], seq_length: int):
        """rows: ids of each row, at most seq_length; characters, given: see `Rows`."""
        self.tokens = torch.full((len(rows), seq_length), PAD_ID, dtype=torch.int32)  # (N, T)
        for padded, ids in zip(self.tokens, rows, strict=True):
            padded[: len(ids)] = torch.tensor(ids)
        self.characters, self.given = torch.tensor(characters), torch.tensor(given)
        self.rows_per_epoch, self.characters_per_row = len(rows), float(self.characters.double().mean())

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: Tensor) -> Rows:
        """The rows of the given indices (B,)."""
        return Rows(self.tokens[indices].long(), self.characters[indices], self.given[indices])


# ------------------------------------------------------------------------------------------------- segments
def split_segments(text: str, separator: str) -> list[tuple[str, str]]:
    """The segments of a text, each with the separator after it: all of them joined are the text again.

    Blank lines may hold spaces. Of a longer run of blank lines the last are the separator.

    >>> split_segments("ROMEO:\\nAy me!\\n\\n \\nJULIET:\\nAy me!\\n", "\\n\\n")
    [('ROMEO:\\nAy me!\\n', '\\n \\n'), ('JULIET:\\nAy me!\\n', '')]
    """
    blank = r"[^\S\n]*"
    parts = re.split(f"({blank.join(separator)})(?!{blank}\n)", text)
    return list(zip(parts[::2], [*parts[1::2], ""], strict=True))


def cut_segment(segment: str, fits: Callable[[str], bool]) -> list[str]:
    """A segment in pieces that fit or are one character: cut near the middle, where CUTS has something, if it has."""
    if len(segment) < 2 or fits(segment):
        return [segment]
    middle = len(segment) // 2
    for pattern in CUTS:
        if ends := [match.end() for match in re.finditer(pattern, segment) if match.end() < len(segment)]:
            middle = min(ends, key=lambda end: abs(end - len(segment) / 2))
            break
    return cut_segment(segment[:middle], fits) + cut_segment(segment[middle:], fits)


def segment_rows(text: str, tokenizer: Tokenizer, seq_length: int, separator: str) -> RowDataset:
    """The segments of a text, each followed by [END], in rows of seq_length tokens.

    A segment that does not fit becomes several rows. The [END] of a segment counts as the characters of the separator
    that it replaces, so that the characters of all rows are those of the text.
    """
    rows, characters = [], []
    for segment, end in split_segments(text, separator):
        for piece in cut_segment(segment, lambda piece: len(tokenizer.encode(piece)) < seq_length):
            rows.append([*tokenizer.encode(piece).tolist(), END_ID])
            characters.append(len(piece))
        characters[-1] += len(end)
    return RowDataset(rows, characters, [0] * len(rows), seq_length)
