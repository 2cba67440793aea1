"""Devices: which one to compute on, its free memory, and CPU settings."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from utils.errors import ArgumentError

CGROUPS = [  # files of a container's memory in bytes: the limit, what is used, details (of versions 2 and 1)
    [Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current", "memory.stat")],
    [Path("/sys/fs/cgroup/memory") / f"memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")],
]


def pick_device(name: str | None) -> str:
    """`name` if this machine has that device; for None the best device: cuda, mps or cpu. Raises ArgumentError."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name is None:
        return next(device for device, count in counts.items() if count)
    kind, _, index = name.partition(":")
    if (index and not index.isdecimal()) or int(index or 0) >= counts.get(kind, 0):
        available = ", ".join(device for device, count in counts.items() if count)
        raise ArgumentError("device", f"{name}: not available on this machine; use one of: {available}")
    return name


def free_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that can be allocated on a device, about: of a GPU's memory, or of this machine's or its container's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else [sys.maxsize]
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for limit, used, details in CGROUPS:
        with suppress(OSError, ValueError, KeyError):  # ValueError: the limit is "max"
            cached = dict(line.split() for line in details.read_text().splitlines())["inactive_file"]
            free.append(int(limit.read_text()) - int(used.read_text()) + int(cached))  # caches make room
    return max(0, min(free))


def memory_problem(needed: float, device: str | torch.device = "cpu") -> str | None:
    """What is wrong with a need of so many bytes, else None. The system would end the process without a word."""
    free = free_memory(device)
    if needed <= free:
        return None
    return f"needs at least {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free"


def compile_problem(device: str | torch.device = "cpu") -> str | None:
    """Why torch.compile does not work on this machine, in one line, else None: it often lacks a C++ compiler."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many types
        return f"torch.compile does not work here ({' '.join(str(error).split())[:100]}): install a C++ compiler"
    return None


def tune_cpu() -> None:
    """Make training on CPUs faster: flush denormals and, on glibc, keep freed memory for the next step.

    Otherwise glibc returns every large activation to the system and faults it in again, a sixth of a step's time.
    """
    torch.set_flush_denormal(True)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
