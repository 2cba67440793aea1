"""Devices: which one to compute on, and CPU settings."""

import ctypes
import sys

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
