"""Files: written whole or not at all, read as text in chunks, and computed once from another file."""

import codecs
import hashlib
import json
import mmap
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 1 << 24
SEAL = b"\nSHA-256 %b\n"  # what `seal` appends to a file: the hex digest of all bytes before
SEAL_BYTES = len(SEAL % (64 * b"0"))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` to write to; afterwards the file is fsynced and renamed to `path`.

    `path` always holds the whole old content or the whole new one. If the block raises, `path` stays as it was and the
    temporary file is deleted. An OSError without a file's name, such as that of a full disk, gets that of `path`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary), temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


class LockedError(Exception):
    """A lock that another process holds: the message says which."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file as a lock inside the block. Raises LockedError if another process does, and OSError.

    The system releases the lock when its process ends, however it ends; the file stays. Windows has no such lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LockedError(file.read().strip() or "another process") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> None:
    """Append the hash of a file's content to it, for `check_seal`. Readers of zip files, like torch, ignore it."""
    digest = sha256_of(path)
    with open(path, "ab") as file:
        file.write(SEAL % digest.encode())


def check_seal(path: Path) -> None:
    """Raise ValueError unless every byte of a file is what it was when it was sealed, with nothing cut or added."""
    content, left = hashlib.sha256(), path.stat().st_size - SEAL_BYTES
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, CHUNK_BYTES))):
            content.update(chunk)
            left -= len(chunk)
        if file.read() != SEAL % content.hexdigest().encode():
            raise ValueError(f"{path}: its content does not match its SHA-256: damaged, cut off or of another version")


@dataclass
class FileText:
    """The text of a UTF-8 file in chunks; it can be iterated over again and again.

    Raises ValueError with the file and the position if it is not UTF-8.
    """

    path: Path

    def __iter__(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open(self.path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                try:
                    yield decoder.decode(chunk)
                except UnicodeDecodeError as error:
                    position = file.tell() - len(chunk) + error.start
                    raise ValueError(f"{self.path}: not UTF-8 text (near byte {position}): convert it first") from None
        if decoder.getstate()[0]:
            raise ValueError(f"{self.path}: not UTF-8 text (it ends inside a character): convert it first")


def mapped_cache(source: Path, path: Path, build: Callable[[Path], dict]) -> tuple[mmap.mmap, str, dict]:
    """Memory-map the file at `path`, which is computed from the file `source` on first use and when that has changed.

    build(temporary) writes the content to a temporary file and returns plain values. PATH.json keeps these, the hash of
    the source, its size and its modification time, so that an unchanged source need not be read again, and a hash of
    all this: a damaged cache is built again. Both files are written atomically, PATH.json last.
    Returns the mapping, the source's SHA-256 and the values.
    """
    note_path = path.with_name(path.name + ".json")
    stat = source.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    note = read_note(note_path, path)
    if note is None or (note["stamp"] != stamp and note["sha256"] != sha256_of(source)):
        with atomic_write(path) as temporary:
            values = build(temporary)
        note = {"sha256": sha256_of(source), "values": values}
        note["check"] = check_of(path, note)
    if note.get("stamp") != stamp:
        note["stamp"] = stamp
        with atomic_write(note_path) as temporary:
            temporary.write_text(json.dumps(note))
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy-on-write: torch wants a writable array
    return mapping, note["sha256"], note["values"]


def read_note(note_path: Path, path: Path) -> dict | None:
    """What `mapped_cache` has noted about the file at `path`; None if there is nothing, or either file is damaged."""
    try:
        note = json.loads(note_path.read_text())
        return note if note["check"] == check_of(path, note) and "stamp" in note else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def check_of(path: Path, note: dict) -> str:
    """A hash of a cached file and of what is noted about it."""
    return hashlib.sha256(json.dumps([sha256_of(path), note["sha256"], note["values"]]).encode()).hexdigest()
