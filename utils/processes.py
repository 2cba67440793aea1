"""Data-parallel training in several processes that torchrun started: gloo on CPUs, nccl on GPUs.

With one process every function here does nothing or returns its argument.
"""

import os
import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.console import say


class Processes:
    """This process, number `rank` of `world`; `device` is its own device, `is_main` is true for rank 0."""

    def __init__(self, device: str):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        if self.world > 1 and device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        self.device = torch.device(device)

    def __str__(self) -> str:
        return self.device.type + (f", {self.world} processes" if self.world > 1 else "")

    @contextmanager
    def joined(self):
        """Connect the processes for the time of the block. If one is lost, the others exit with a message."""
        if self.world == 1:
            yield
            return
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        try:
            yield
        except RuntimeError as error:
            if not any(word in str(error).lower() for word in ("peer", "gloo", "nccl")):
                raise
            if self.is_main:
                problem = "another training process died; the last checkpoint is intact: continue with --resume"
                say(f"train.py: error: {problem}")
            sys.exit(1)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model wrapped so that gradients are averaged over the processes."""
        return model if self.world == 1 else nn.parallel.DistributedDataParallel(model)

    def share(self, batch: NamedTuple, part: int, parts: int) -> NamedTuple:
        """This process's rows of micro-batch `part` of `parts` of a global batch of tensors (B, ...), on its device."""
        first, stride = self.rank + part * self.world, self.world * parts
        return type(batch)(*(x[first::stride].to(self.device, non_blocking=True) for x in batch))

    def local(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """A context in which gradients stay local; they are averaged only in the last micro-batch of a step."""
        return nullcontext() if last or self.world == 1 else model.no_sync()

    def agree(self, value: float) -> float:
        """Process 0's value. Clocks differ between processes, and all must stop at the same step."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value
