"""Errors that name the argument they are about."""

import math


class ArgumentError(ValueError):
    """A setting that cannot be used. `argument` is its Python name, which a command line shows as its flag.

    >>> str(ArgumentError("top_k", "must be at least 1, got 0"))
    'top_k must be at least 1, got 0'
    """

    def __init__(self, argument: str, problem: str):
        super().__init__(f"{argument} {problem}")
        self.argument, self.problem = argument, problem


def check_number(argument: str, value: float, *, low=None, high=None, above=None, below=None) -> None:
    """Raise ArgumentError unless value is finite, low <= value <= high and above < value < below.

    >>> check_number("dropout", 1.0, low=0, below=1)
    Traceback (most recent call last):
    utils.errors.ArgumentError: dropout must be less than 1, got 1.0
    """
    if value != value or value in (math.inf, -math.inf):
        raise ArgumentError(argument, f"must be finite, got {value}")
    if low is not None and value < low:
        raise ArgumentError(argument, f"must be at least {low}, got {value}")
    if high is not None and value > high:
        raise ArgumentError(argument, f"must be at most {high}, got {value}")
    if above is not None and value <= above:
        raise ArgumentError(argument, f"must be greater than {above}, got {value}")
    if below is not None and value >= below:
        raise ArgumentError(argument, f"must be less than {below}, got {value}")
