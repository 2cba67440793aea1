"""Text in: download, corpora, the split by position, windows and batches.

A corpus is characters turned into ids once. Small ones stay in memory; large ones are memory-mapped from a file of ids
beside the text, so that the cost of training grows with the steps, not with the corpus.
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

from console import run, say
from files import replacing
from tokenizer import SimpleTokenizer

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
    """Fetch the corpus to `path`: streamed, checked by status and hash, complete or not there at all.

    Raises OSError that says what went wrong after `attempts` tries; nothing is left behind then, and a file that was
    already at `path` is only ever replaced by a good one.
    """
    import requests

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    problem = "no attempt made"
    for attempt in range(attempts):
        if attempt:
            time.sleep(min(2 ** (attempt - 1), 5))
        try:
            with replacing(path) as temporary:
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
    """A text as ids: a 1-D unsigned tensor, in memory or in a `mapping`. `sha256` is that of the UTF-8 text."""

    name: str  # as the user would say it again: "tinyshakespeare", "pydoc" or a path
    sha256: str
    tokenizer: SimpleTokenizer
    ids: Tensor
    mapping: mmap.mmap | None = None

    def forget_pages(self) -> None:
        """Give back what was read of a memory-mapped text: else each window leaves some pages in resident memory."""
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)

    def split(self, val_fraction: float) -> tuple[Tensor, Tensor]:
        """By position: the first part trains, the last `val_fraction` validates; together they are the corpus."""
        cut = int(len(self.ids) * (1 - val_fraction) + 1e-6)
        return self.ids[:cut], self.ids[cut:]

    def check_windows(self, val_fraction: float, seq_length: int) -> None:
        """Raise ValueError, before anything large is built, if either part is shorter than one window."""
        for part, ids in zip(("train", "validate"), self.split(val_fraction), strict=True):
            if len(ids) < seq_length:
                raise ValueError(
                    f"{len(ids)} characters to {part} on are too few for one window of {seq_length}: use a longer "
                    "text (--data), a smaller --block-size or another --val-fraction"
                )


def load_corpus(name: str | None = None) -> Corpus:
    """A corpus by name ("tinyshakespeare", "pydoc") or path of a UTF-8 file; None is TinyShakespeare, or else pydoc.

    Only the default falls back, and loudly. Raises OSError or ValueError that names what is wrong with a named one.
    """
    if name is None:
        try:
            return load_corpus("tinyshakespeare")
        except OSError as error:
            bar = "!" * 100
            say(f"{bar}\nWARNING: no TinyShakespeare: {error}")
            say("Training instead on the documentation that ships with Python (pydoc_data.topics).")
            say(f"To use another text, pass --data FILE.\n{bar}")
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
        raise ValueError(f"--data {name}: no such file; give a UTF-8 text file, tinyshakespeare or pydoc")
    return load_file(Path(name), str(Path(name).resolve()))


def corpus_from_text(name: str, text: str) -> Corpus:
    """A corpus held in memory. Raises ValueError for an empty text."""
    if not text:
        raise ValueError(f"{name}: the text is empty")
    tokenizer = SimpleTokenizer(text)
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Corpus(name, sha256, tokenizer, torch.from_numpy(tokenizer.encode(text)))


def load_file(path: Path, name: str) -> Corpus:
    """A UTF-8 file as a corpus; beyond IN_MEMORY_BYTES its ids are memory-mapped. Raises ValueError, OSError."""
    if path.stat().st_size > IN_MEMORY_BYTES:
        return map_file(path, name)
    return corpus_from_text(name, "".join(read_text(path)))


def read_text(path: Path) -> Iterator[str]:
    """The file's text, a chunk at a time. Raises ValueError that names the file where it is not UTF-8."""
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
    """Memory-map the ids of a text file from PATH.ids, built on first use and rebuilt when the text has changed.

    PATH.ids.json says which text the ids belong to: its hash, and its size and time of change, which spare reading it
    again. Both are written whole or not at all, the description last.
    """
    ids_path, note_path = path.with_name(path.name + ".ids"), path.with_name(path.name + ".ids.json")
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    note = json.loads(note_path.read_text()) if note_path.exists() and ids_path.exists() else None
    if note is None or (note["stamp"] != stamp and note["sha256"] != sha256_of(path)):
        note = build_ids(path, ids_path)
    if note.get("stamp") != stamp:
        note["stamp"] = stamp
        with replacing(note_path) as temporary:
            temporary.write_text(json.dumps(note))
    tokenizer = SimpleTokenizer.from_dict(note["tokenizer"])
    with open(ids_path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy-on-write: torch wants a writable array
    ids = np.frombuffer(mapping, dtype=tokenizer.dtype)
    if len(ids) != note["length"]:
        raise ValueError(f"{ids_path}: {len(ids)} ids, expected {note['length']}: delete it, it will be made again")
    return Corpus(name, note["sha256"], tokenizer, torch.from_numpy(ids), mapping)


def build_ids(path: Path, ids_path: Path) -> dict:
    """Encode a text file in two streaming passes (characters, then ids); returns the note that describes the result."""
    say(f"{path}: encoding once into {ids_path} ...")
    characters: set[str] = set()
    for text in read_text(path):
        characters.update(text)
    tokenizer = SimpleTokenizer("".join(characters))
    length = 0
    with replacing(ids_path) as temporary, open(temporary, "wb") as file:
        for text in read_text(path):
            file.write(tokenizer.encode(text))
            length += len(text)
    return {"sha256": sha256_of(path), "length": length, "tokenizer": tokenizer.to_dict()}


# ------------------------------------------------------------------------------------------------- windows and batches
class ShakespeareDataset(torch.utils.data.Dataset):
    """Windows of seq_length ids, `stride` apart: item i is the LongTensor (seq_length,) that starts at i * stride.

    `text` is a string, or ids already encoded. Raises ValueError if it is shorter than one window.
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
    """Windows that cover every id exactly once: a LongTensor (N, seq_length) and, if anything is left, a (1, rest).

    Of more than max_chars ids, only evenly spaced windows with about that many.
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
    """Show the default corpus: vocabulary, a line encoded and decoded, the sizes of both parts."""
    corpus = load_corpus()
    tokenizer = corpus.tokenizer
    ids = corpus.ids[:40].numpy()
    train, val = corpus.split(0.2)
    print(f"corpus      {corpus.name}: {len(corpus.ids):,} characters, SHA-256 {corpus.sha256[:16]}...")
    print(f"vocabulary  {tokenizer.vocab_size} ids, {tokenizer.dtype}: 4 special tokens and {tokenizer.characters!r}")
    print(f"encoded     {ids.tolist()}\ndecoded     {tokenizer.decode(ids)!r}")
    print(f"split       {len(train):,} to train, {len(val):,} to validate")


if __name__ == "__main__":
    run(main)
