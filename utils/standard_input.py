"""Standard input as a whole, and whether there is any."""

import os
import select
import stat
import sys
from contextlib import suppress

from utils.console import say


def read_input() -> bytes:
    """All of standard input, to its end."""
    if sys.stdin.isatty():
        say("reading standard input; Ctrl-D ends it")
    return sys.stdin.buffer.read()


def input_waits() -> bool:
    """Whether standard input is a file or a pipe with something to read. Reads nothing, and never blocks."""
    with suppress(AttributeError, OSError, ValueError):  # no standard input, or a system that cannot tell
        descriptor = sys.stdin.fileno()
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            return os.lseek(descriptor, 0, os.SEEK_CUR) < status.st_size
        if stat.S_ISFIFO(status.st_mode):
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            return any(events & select.POLLIN for _, events in poll.poll(0))
    return False
