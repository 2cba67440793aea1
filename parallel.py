"""Several processes, one training run: what torchrun started, who writes, and how the processes agree.

gloo on CPU, nccl on GPU. With one process everything here does nothing.
"""

import os
import signal
import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from console import say


class Processes:
    """This process among the `world` that torchrun started; `device` is its own."""

    def __init__(self, device: str):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        if self.world > 1 and device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        self.device = torch.device(device)

    def __str__(self) -> str:
        return f"{self.device.type}" + (f", {self.world} processes" if self.world > 1 else "")

    @contextmanager
    def joined(self):
        """Connect the processes for the time of the block; a lost one ends the program with a word, not a hang."""
        if self.world == 1:
            yield
            return
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(self.lost()))  # torchrun ends the survivors this way
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        try:
            yield
        except RuntimeError as error:
            if "peer" not in str(error) and "gloo" not in str(error).lower() and "NCCL" not in str(error):
                raise
            sys.exit(self.lost())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def lost(self) -> int:
        """Say that the run is over because another process is gone; the exit code for it."""
        if self.is_main:
            say("train.py: error: another training process died; the last checkpoint is intact: go on with --resume")
        return 1

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model as it trains here: gradients are averaged over the processes."""
        if self.world == 1:
            return model
        return nn.parallel.DistributedDataParallel(model)

    def share(self, batch: tuple[Tensor, ...], part: int, parts: int) -> tuple[Tensor, ...]:
        """This process's rows of micro-batch `part` of `parts` of a global batch, on its device."""
        first, stride = self.rank + part * self.world, self.world * parts
        return tuple(x[first::stride].to(self.device, non_blocking=True) for x in batch)

    def local(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Within it gradients stay local: only the last micro-batch of a step is worth talking about."""
        return nullcontext() if last or self.world == 1 else model.no_sync()

    def agree(self, value: float) -> float:
        """Process 0's value: clocks differ, and all must stop at the same step."""
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
