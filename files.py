"""Files that are whole at every moment, whatever stops the program."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file beside `path`, fsync it, rename it: `path` holds the old content or the new, never a part of it.

    Yields the name to write to. If the block raises, nothing is left behind and `path` stays what it was.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
