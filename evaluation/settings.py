"""Evaluation settings: how much is measured."""

from dataclasses import dataclass, fields

from unmasking import STRIDE, UnmaskingPolicy
from utils.errors import check_number


@dataclass(frozen=True)
class EvaluationSettings:
    """Counts of windows, policies and samples. A window has T characters. Raises ArgumentError for counts below 1."""

    windows: int = 8192  # of the validation text; evenly spaced if it has more
    pairs: int = 8  # of complementary masks for each of them
    train_windows: int = 512  # of the training text, to see overfitting
    policy_windows: int = 64
    policy_steps: tuple[int, ...] = (8, 16, 32)  # network evaluations of the sweep, strided and random orders
    one_at_a_time: tuple[str, ...] = ("left", "confidence")  # orders that reveal one character at each step
    threshold: float = 0.9  # of the adaptive policy
    samples: int = 32  # texts of each kind
    temperatures: tuple[float, ...] = (1.0, 0.6)
    infillings: int = 256  # windows for each length of span

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, str):
                    check_number(field.name, number, above=0)

    def policies(self, T: int) -> list[UnmaskingPolicy]:
        """The unmasking policies to compare. The first is the reference: the default sweep."""
        orders = ("sweep", "strided", "random")
        policies = [UnmaskingPolicy(steps=min(STRIDE, T), order="sweep")]
        policies += [UnmaskingPolicy(steps=K, order=order) for order in orders for K in self.policy_steps if K < T]
        policies += [UnmaskingPolicy(steps=T, order=order) for order in self.one_at_a_time]
        policies += [UnmaskingPolicy(steps=T, order="confidence", threshold=self.threshold)]
        return list(dict.fromkeys(policies))

    def sample_kinds(self, T: int) -> list[dict]:
        """Settings of LLaDA's samples: three orders at the default number of steps, then more steps."""
        few, more = min(STRIDE, T), min(4 * STRIDE, T)
        kinds = [("sweep", few), ("random", few), ("drawn_confidence", few)]
        kinds += [("sweep", more), ("random", T), ("confidence", T)]
        return [{"order": order, "steps": steps} for order, steps in dict.fromkeys(kinds)]


FULL = EvaluationSettings()
QUICK = EvaluationSettings(
    windows=512, pairs=2, train_windows=128, policy_windows=16, policy_steps=(16, 32), one_at_a_time=("confidence",),
    samples=8, temperatures=(1.0,), infillings=32,
)  # fmt: skip
