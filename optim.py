"""Optimizers and the learning-rate schedule: Muon for the blocks' matrices, SGD for n-gram tables, AdamW for the rest.

Letters: N matrices of R rows and C columns.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

# Polar Express (arXiv 2505.16932): the best odd quintic for each Newton-Schulz step, given the steps before it.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
)
LR_RATIO = 10 / 3  # peak learning rate of Muon and of the token embeddings over that of AdamW


def orthogonalize(matrices: Tensor) -> Tensor:
    """(N, R, C) matrices -> approximations of their nearest (semi-)orthogonal matrices: singular values in 0.4..1.6.

    Newton-Schulz iteration x <- a x + b (x x^T) x + c (x x^T)^2 x in float32. Only the powers of x x^T are iterated,
    so a rectangular matrix costs little more than a square one. torch.optim.Muon iterates in bfloat16 and one matrix at
    a time, which is very slow on CPUs without bfloat16.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT.contiguous()).mT
    x = matrices / (1.01 * torch.linalg.matrix_norm(matrices)[:, None, None] + 1e-7)
    gram = x @ x.mT  # (N, R, R)
    product = torch.eye(x.shape[-2], device=x.device).expand_as(gram)
    for a, b, c in POLAR_EXPRESS:
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product, gram = polynomial @ product, polynomial @ gram @ polynomial
    return product @ x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: each matrix moves by lr * sqrt(max(1, rows / columns)) in spectral norm.

    Keller Jordan, https://kellerjordan.github.io/posts/muon/. `params` are 2-D weights. A group's `parts` is the number
    of matrices that each weight holds along its rows: 3 for a fused query-key-value weight. Weight decay is decoupled.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0, parts: int = 1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": parts})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self._step_equal_shapes(params, group)

    def _step_equal_shapes(self, params: list[Tensor], group: dict) -> None:
        lr, parts, (rows, columns) = group["lr"], group["parts"], params[0].shape
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        averages, gradients = [self.state[p]["momentum"] for p in params], [p.grad for p in params]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, averages, group["momentum"])
        rows //= parts
        updates = orthogonalize(torch.stack(nesterov).view(-1, rows, columns)).reshape(len(params), -1, columns)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, list(updates.unbind()), alpha=-lr * max(1.0, rows / columns) ** 0.5)


def build_optimizers(
    model: nn.Module,
    tokens_per_step: int,
    lr: float = 0.006,
    ngram_lr: float = 0.15,
    weight_decay: float = 0.0,
    matrices: str = "muon",
) -> list[torch.optim.Optimizer]:
    """[Muon over the blocks' matrices, SGD over the n-gram tables, fused AdamW over the rest].

    matrices="adamw", or a model with arch="vanilla", leaves the matrices to AdamW, as are low-rank adapters. `lr` is
    AdamW's peak rate; Muon and the token embeddings take LR_RATIO times as much. `weight_decay` is for the matrices.
    Every group stores its `initial_lr`, which `set_learning_rate` scales. Frozen parameters have no optimizer.

    N-grams are many and most are rare. With plain gradient steps each row moves in proportion to its use, where AdamW
    would move a row that was used once as far as the most frequent one, and overfit. `ngram_lr` is per token: a row
    moves by ngram_lr times the gradient of each token's loss. A step's loss is the mean over `tokens_per_step` tokens,
    so SGD's rate is their product.
    """
    blocks = getattr(model.encoder, "blocks", nn.ModuleList())
    linear = trainable_weights(blocks, nn.Linear)
    fused = [weight for name, weight in linear.items() if name.endswith("qkv")]
    single = [weight for name, weight in linear.items() if not name.endswith("qkv")]
    embeddings = list(trainable_weights(model, nn.Embedding).values()) if len(blocks) else []
    tables = list(trainable_weights(model, nn.EmbeddingBag).values())  # n-grams
    chosen = {id(p) for p in [*fused, *single, *embeddings, *tables]}
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]},
        {"params": embeddings, "lr": LR_RATIO * lr},
    ]
    optimizers = []
    if linear and matrices == "muon":
        muon = [{"params": fused, "parts": 3}, {"params": single}]
        optimizers.append(Muon(muon, lr=LR_RATIO * lr, weight_decay=weight_decay))
    else:
        groups.append({"params": [*fused, *single], "weight_decay": weight_decay})
    if tables:
        optimizers.append(torch.optim.SGD(tables, lr=ngram_lr * tokens_per_step))
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def trainable_weights(module: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Parameter]:
    """{name of a submodule of this kind: its weight}, but for frozen weights and those that adapters compute."""
    weights = {name: submodule.weight for name, submodule in module.named_modules() if isinstance(submodule, kind)}
    return {name: w for name, w in weights.items() if isinstance(w, nn.Parameter) and w.requires_grad}


def learning_rate_factor(progress: float, warmup: float = 0.02, cooldown: float = 0.6) -> float:
    """Learning rate over its peak at progress 0..1 of the run: linear warm-up, constant, then linear to zero.

    >>> [learning_rate_factor(progress) for progress in (0, 0.2, 1)]
    [0.001, 1.0, 0.0]
    """
    return max(0.0, min(1.0, progress / warmup + 1e-3, (1 - progress) / cooldown))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]
