"""Files: written whole or not at all, locked, sealed, and read as text."""

import gzip
import hashlib
import io
import os
import platform
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = CHUNK_CHARS = 1 << 24
SEAL = b"\nSHA-256 %b\n"  # what `seal` appends to a file: the hex digest of all bytes before
SEAL_BYTES = len(SEAL % (64 * b"0"))
PACKED = {b"PK\3\4": "a zip (or .docx)", b"BZh": "packed by bzip2", b"\xfd7zX": "packed by xz", b"%PDF": "a PDF"}


# ------------------------------------------------------------------------------------------------- writing
@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` to write to; afterwards the file is fsynced and renamed to `path`.

    Its folder is made unless it is there. `path` always holds the whole old content or the whole new one. If the block
    raises, `path` stays as it was and the temporary file is deleted. An OSError without a file's name, such as that of
    a full disk, gets that of `path`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file as a lock inside the block. Raises ValueError if another process does, and OSError.

    The system releases the lock when its process ends, however it ends; the file stays. Windows has no such lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            advice = "wait for it, or choose another folder"
            raise ValueError(f"{path} is held by {path.read_text() or 'another process'}: {advice}") from None
        path.write_text(f"process {os.getpid()} on {platform.node()}")
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


# ------------------------------------------------------------------------------------------------- text
def plain_text(content: bytes, source: str) -> str:
    r"""The text of UTF-8 bytes without byte order mark, every line end a "\n": all text that is read goes through here.

    >>> plain_text(b"\xef\xbb\xbfone\r\ntwo\rthree\n", "x.txt")
    'one\ntwo\nthree\n'

    Raises ValueError that names the source, the first byte that is not UTF-8, and what converts it.
    """
    return "".join(text_chunks(io.BytesIO(content), source))


def text_chunks(file: BinaryIO, source: str) -> Iterator[str]:
    """`plain_text` of what is in a file, in chunks."""
    try:
        start = file.read(4)
        file.seek(0)
        if b"\0" in start[:2]:
            raise ValueError(f"{source}: UTF-16 text without a byte order mark, or no text: convert it to UTF-8")
        text = io.TextIOWrapper(file, "utf-8-sig")
        while chunk := text.read(CHUNK_CHARS):
            yield chunk
    except UnicodeDecodeError as error:
        byte = file.tell() - len(error.object) + error.start
        encoding = "UTF-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
        advice = f"if it is {encoding}, convert it with iconv -f {encoding} -t UTF-8 FILE > text.txt"
        for packed in filter(start.startswith, PACKED):
            advice = f"it is {PACKED[packed]}: give the text that it holds"
        raise ValueError(f"{source}: not UTF-8 text (byte {byte}): {advice}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{source}: damaged: {error}") from None


class FileText:
    """The `plain_text` of files, `separator` between them, in chunks; it can be iterated over again and again.

    Line ends that a file already ends with count as part of the separator. Files may be compressed by gzip. Raises
    ValueError as `plain_text` does, and OSError.
    """

    def __init__(self, *paths: Path, separator: str = ""):
        self.paths, self.separator = paths, separator

    def __iter__(self) -> Iterator[str]:
        end = self.separator  # of the text before
        for path in self.paths:
            yield self.separator[len(end) - len(end.rstrip("\n")) :]
            with open(path, "rb") as file:
                is_packed = file.peek(2)[:2] == b"\x1f\x8b"
                for chunk in text_chunks(gzip.GzipFile(fileobj=file) if is_packed else file, str(path)):
                    end = (end + chunk)[-2:]
                    yield chunk
