"""Text: download, corpora, the split by position, windows and batches.

The characters of a corpus are turned into ids once. Small corpora stay in memory. Large ones are memory-mapped from a
file of ids beside the text, so that memory does not grow with the corpus.
"""

import codecs
import hashlib
import json
import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenizer import SimpleTokenizer
from utils.console import run_program, say
from utils.errors import ArgumentError
from utils.files import atomic_write

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CACHE = Path(__file__).parent / "corpora"
IN_MEMORY_BYTES = 64 << 20  # larger texts are memory-mapped
CHUNK_BYTES = 1 << 24


# ------------------------------------------------------------------------------------------------- download
def download_tinyshakespeare(
    path: str | Path,
    url: str = TINYSHAKESPEARE_URL,
    sha256: str = TINYSHAKESPEARE_SHA256,
    attempts: int = 3,
    timeout: float = 10.0,
) -> Path:
    """Download the corpus to `path`, streamed, checked by status and hash, and written atomically.

    Raises OSError with the reason after `attempts` tries. Then nothing is left behind, and a file that was at `path`
    before is unchanged.
    """
    import requests

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    problem = "no attempt made"
    for attempt in range(attempts):
        if attempt:
            time.sleep(min(2 ** (attempt - 1), 5))
        try:
            with atomic_write(path) as temporary:
                with requests.get(url, stream=True, timeout=timeout) as response, open(temporary, "wb") as file:
                    response.raise_for_status()
                    for chunk in response.iter_content(1 << 16):
                        file.write(chunk)
                if (received := sha256_of(temporary)) != sha256:
                    raise ValueError(f"its SHA-256 is {received[:16]}..., expected {sha256[:16]}...")
            return path
        except (requests.RequestException, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
    raise OSError(f"could not download {url}: {problem}")


# ------------------------------------------------------------------------------------------------- corpora
@dataclass
class Corpus:
    """A text as ids."""

    name: str  # "tinyshakespeare", "pydoc" or an absolute path: what `load_corpus` takes
    sha256: str  # of the UTF-8 text
    tokenizer: SimpleTokenizer
    ids: Tensor  # (characters,), unsigned integers
    mapping: mmap.mmap | None = None  # where `ids` are, if they are memory-mapped

    def forget_pages(self) -> None:
        """Drop the pages of a memory-mapped text from resident memory, where every window read leaves some."""
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)

    def split(self, val_fraction: float) -> tuple[Tensor, Tensor]:
        """(training ids, validation ids): the last `val_fraction` of the text is for validation."""
        cut = int(len(self.ids) * (1 - val_fraction) + 1e-6)
        return self.ids[:cut], self.ids[cut:]

    def check_windows(self, val_fraction: float, seq_length: int) -> None:
        """Raise ValueError if either part is shorter than one window."""
        for part, ids in zip(("train", "validate"), self.split(val_fraction), strict=True):
            if len(ids) < seq_length:
                raise ValueError(
                    f"{len(ids)} characters to {part} on are too few for one window of {seq_length}: use a longer "
                    "text (--data), a smaller --block-size or another --val-fraction"
                )


def load_corpus(name: str | None = None) -> Corpus:
    """A corpus by name ("tinyshakespeare", "pydoc") or path of a UTF-8 file.

    None is TinyShakespeare, or pydoc with a warning if that cannot be downloaded. Raises OSError if a named corpus
    cannot be downloaded or read, ArgumentError for a missing file, ValueError for one that is not UTF-8 text.
    """
    if name is None:
        try:
            return load_corpus("tinyshakespeare")
        except OSError as error:
            bar = "!" * 100
            say(f"{bar}\nWARNING: no TinyShakespeare: {error}")
            say("Training instead on the documentation that ships with Python (pydoc_data.topics).")
            say(f"To train on another text, pass --data FILE.\n{bar}")
            return load_corpus("pydoc")
    if name == "pydoc":
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[key] for key in sorted(topics))
        return corpus_from_text("pydoc", text)
    if name == "tinyshakespeare":
        path = CACHE / "tinyshakespeare.txt"
        if not path.exists() or sha256_of(path) != TINYSHAKESPEARE_SHA256:
            say("downloading TinyShakespeare ...")
            download_tinyshakespeare(path)
        return load_file(path, name)
    if not Path(name).is_file():
        raise ArgumentError("data", f"{name}: no such file; give a UTF-8 text file, tinyshakespeare or pydoc")
    return load_file(Path(name), str(Path(name).resolve()))


def corpus_from_text(name: str, text: str) -> Corpus:
    """A corpus held in memory. Raises ValueError for an empty text."""
    if not text:
        raise ValueError(f"{name}: the text is empty")
    tokenizer = SimpleTokenizer(text)
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Corpus(name, sha256, tokenizer, torch.from_numpy(tokenizer.encode(text)))


def load_file(path: Path, name: str) -> Corpus:
    """A UTF-8 file as a corpus, memory-mapped if it is larger than IN_MEMORY_BYTES. Raises ValueError, OSError."""
    if path.stat().st_size > IN_MEMORY_BYTES:
        return map_file(path, name)
    return corpus_from_text(name, "".join(read_text(path)))


def read_text(path: Path) -> Iterator[str]:
    """The file's text in chunks. Raises ValueError with the file and the position if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            try:
                yield decoder.decode(chunk)
            except UnicodeDecodeError as error:
                position = file.tell() - len(chunk) + error.start
                raise ValueError(f"{path}: not UTF-8 text (near byte {position}): convert it first") from None
    if decoder.getstate()[0]:
        raise ValueError(f"{path}: not UTF-8 text (it ends inside a character): convert it first")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_file(path: Path, name: str) -> Corpus:
    """Memory-map the ids of a text file from PATH.ids, which is built on first use and when the text has changed.

    PATH.ids.json holds the hash of the text, and its size and modification time, so that an unchanged text need not be
    read again. Both files are written atomically, PATH.ids.json last.
    """
    ids_path, note_path = path.with_name(path.name + ".ids"), path.with_name(path.name + ".ids.json")
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    note = json.loads(note_path.read_text()) if note_path.exists() and ids_path.exists() else None
    if note is None or (note["stamp"] != stamp and note["sha256"] != sha256_of(path)):
        note = build_ids(path, ids_path)
    if note.get("stamp") != stamp:
        note["stamp"] = stamp
        with atomic_write(note_path) as temporary:
            temporary.write_text(json.dumps(note))
    tokenizer = SimpleTokenizer.from_dict(note["tokenizer"])
    with open(ids_path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy-on-write: torch wants a writable array
    ids = np.frombuffer(mapping, dtype=tokenizer.dtype)
    if len(ids) != note["length"]:
        raise ValueError(f"{ids_path}: {len(ids)} ids, expected {note['length']}: delete it to have it rebuilt")
    return Corpus(name, note["sha256"], tokenizer, torch.from_numpy(ids), mapping)


def build_ids(path: Path, ids_path: Path) -> dict:
    """Encode a text file in two streaming passes (characters, then ids); returns the content of PATH.ids.json."""
    say(f"{path}: encoding once into {ids_path} ...")
    characters: set[str] = set()
    for text in read_text(path):
        characters.update(text)
    tokenizer = SimpleTokenizer("".join(characters))
    length = 0
    with atomic_write(ids_path) as temporary, open(temporary, "wb") as file:
        for text in read_text(path):
            file.write(tokenizer.encode(text))
            length += len(text)
    return {"sha256": sha256_of(path), "length": length, "tokenizer": tokenizer.to_dict()}


# ------------------------------------------------------------------------------------------------- windows and batches
class ShakespeareDataset(torch.utils.data.Dataset):
    """Windows of seq_length ids, `stride` apart: item i is the LongTensor (seq_length,) that starts at i * stride.

    `text` is a string, or ids that are already encoded. Raises ValueError if it is shorter than one window.
    """

    def __init__(self, text: str | Tensor, tokenizer: SimpleTokenizer, seq_length: int, stride: int = 1):
        if seq_length < 1 or stride < 1:
            raise ValueError(f"seq_length and stride must be at least 1, got {seq_length} and {stride}")
        self.ids = torch.from_numpy(tokenizer.encode(text)) if isinstance(text, str) else text
        self.seq_length, self.stride = seq_length, stride
        if len(self.ids) < seq_length:
            raise ValueError(f"{len(self.ids)} characters are too few for one window of {seq_length}")

    def __len__(self) -> int:
        return (len(self.ids) - self.seq_length) // self.stride + 1

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return self.gather(torch.tensor([index % len(self)]))[0]

    def gather(self, indices: Tensor) -> Tensor:
        """The windows of the given indices (B,) as one LongTensor (B, seq_length)."""
        positions = indices[:, None] * self.stride + torch.arange(self.seq_length)  # (B, T)
        return self.ids[positions].long()

    def sample(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """(B, seq_length) windows, drawn uniformly with replacement."""
        return self.gather(torch.randint(len(self), (batch_size,), generator=generator))


def validation_windows(
    ids: Tensor, seq_length: int, tokenizer: SimpleTokenizer, max_chars: int | None = None
) -> list[Tensor]:
    """Windows that cover every id exactly once: a LongTensor (N, seq_length) and, if ids are left over, a (1, rest).

    If there are more than max_chars ids: (N, seq_length) evenly spaced windows with about max_chars ids in all.
    """
    groups = []
    if len(ids) >= seq_length:
        dataset = ShakespeareDataset(ids, tokenizer, seq_length, stride=seq_length)
        if max_chars is not None and len(ids) > max_chars:
            return [dataset.gather(torch.linspace(0, len(dataset) - 1, max(1, max_chars // seq_length)).long())]
        groups.append(dataset.gather(torch.arange(len(dataset))))
    rest = len(ids) % seq_length
    if rest:
        groups.append(ids[-rest:].long()[None])
    return groups


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
