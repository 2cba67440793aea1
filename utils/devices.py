"""Devices: which one to compute on, and CPU settings."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from utils.errors import ArgumentError


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
    """Bytes that can be allocated on a device, about: of a GPU's memory, or of this machine's, or of this container's.

    Where the system does not say what is free it is all memory.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else [sys.maxsize]
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # ValueError: "max"
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(free)


def memory_problem(needed: float, device: str | torch.device = "cpu") -> str | None:
    """What is wrong with a need of so many bytes, else None. The system would end the process without a word."""
    free = free_memory(device)
    if needed <= free:
        return None
    return f"needs at least {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free"


def tune_cpu() -> None:
    """Make training on CPUs faster: flush denormals and, on glibc, keep freed memory for the next step.

    Otherwise glibc returns every large activation to the system and faults it in again, a sixth of a step's time.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
