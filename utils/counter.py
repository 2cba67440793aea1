"""Counting what a network computes."""

from collections.abc import Callable

from torch import nn


class EvaluationCounter:
    """Counts a network's evaluations inside a `with` block: `nfe` calls, `positions` read by them (B * T each).

    `update(positions)`, if given, is called after each of them: for a progress bar.
    """

    def __init__(self, *models: nn.Module, update: Callable[[int], None] = lambda positions: None):
        self.models, self.update = models, update
        self.nfe = self.positions = 0

    def __enter__(self) -> "EvaluationCounter":
        self.hooks = [model.register_forward_hook(self.count) for model in self.models]
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()

    def count(self, model: nn.Module, inputs: tuple, output) -> None:
        """The forward hook: inputs[0] are tokens (B, T)."""
        self.nfe += 1
        self.positions += inputs[0].numel()
        self.update(self.positions)
