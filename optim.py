"""Optimizers and the learning-rate schedule: Muon for the matrices of the blocks, AdamW for everything else."""

from collections import defaultdict

import torch
from torch import Tensor, nn

# The five-step quintic of Keller Jordan's Muon: fast growth of small singular values, not exact convergence to 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """(N, R, C) matrices -> their nearest (semi-)orthogonal ones, about: every singular value ends in 0.7..1.2.

    Newton-Schulz iteration in float32, batched over equal shapes. torch.optim.Muon iterates in bfloat16 and one matrix
    at a time, which is unusable on CPUs without it: see `python bench.py train` for the measured ratio.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: each matrix moves by lr * sqrt(max(1, rows / columns)) in spectral norm.

    Keller Jordan, https://kellerjordan.github.io/posts/muon/. `params` are 2-D weights. Weight decay is decoupled.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self._step_equal_shapes(params, **{k: group[k] for k in ("lr", "momentum", "weight_decay")})

    def _step_equal_shapes(self, params: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in params]
        gradients = [p.grad for p in params]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, buffers, momentum)
        rows, columns = params[0].shape
        updates = orthogonalize(torch.stack(nesterov))
        if weight_decay:
            torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, list(updates.unbind()), alpha=-lr * max(1.0, rows / columns) ** 0.5)


def build_optimizers(
    model: nn.Module, lr: float, muon_lr: float, weight_decay: float = 0.0
) -> list[torch.optim.Optimizer]:
    """[Muon over the blocks' 2-D weights, fused AdamW over the rest]; `arch="vanilla"` gets the classic, AdamW alone.

    Every group remembers its `initial_lr`, which `set_learning_rate` scales.
    """
    blocks = getattr(model.encoder, "blocks", nn.ModuleList())
    matrices = [m.weight for m in blocks.modules() if isinstance(m, nn.Linear)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    ]
    if matrices:
        optimizers.insert(0, Muon(matrices, lr=muon_lr, weight_decay=weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def learning_rate_factor(progress: float, warmup: float = 0.02) -> float:
    """Share of the peak learning rate at progress 0..1 of the run: linear warm-up, then linear decay to zero."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return max(0.0, (1 - progress) / (1 - warmup))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Every group's rate becomes `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]
