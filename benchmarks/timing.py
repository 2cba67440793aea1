"""Timing helpers shared by all benchmarks: pairs measured in turns, the machine's speed, and the printed table."""

import os
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from utils.console import say
from utils.errors import ArgumentError

Row = tuple[str, ...]  # one line of a table; the first row that a benchmark yields is the heading


@dataclass(frozen=True)
class Pairs:
    """Measurements of A and B taken in turns, A B A B ...: one of each in a pair.

    >>> print(Pairs([4.0, 6.0, 5.0], [2.0, 2.0, 2.0]))
    2.50x (2.00..3.00)
    """

    a: list[float]
    b: list[float]

    @property
    def ratio(self) -> float:
        """Median of A over median of B. If they are times: how many times faster B is."""
        return statistics.median(self.a) / statistics.median(self.b)

    def __str__(self) -> str:
        """The ratio, and in brackets the smallest and the largest ratio of a single pair."""
        ratios = [a / b for a, b in zip(self.a, self.b, strict=True)]
        return f"{self.ratio:.2f}x ({min(ratios):.2f}..{max(ratios):.2f})"


def timed(function: Callable, *arguments) -> tuple[float, object]:
    """Call function(*arguments): its wall time in seconds, and its result."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def alternate(a: Callable[[], object], b: Callable[[], object], pairs: int) -> Pairs:
    """Seconds of a() and b(), called in turns `pairs` times, after one call of each that is not counted."""
    a()
    b()
    seconds = [(timed(a)[0], timed(b)[0]) for _ in range(pairs)]
    return Pairs([first for first, _ in seconds], [second for _, second in seconds])


def gigaflops() -> float:
    """GFLOP/s of the linear layer that dominates a training step: float32, (4096, 128) by (512, 128); median of 400."""
    x, weight = torch.randn(4096, 128), torch.randn(512, 128)
    return 2e-9 * 4096 * 128 * 512 / statistics.median(timed(F.linear, x, weight)[0] for _ in range(400))


def is_steady(before: float, after: float) -> bool:
    """Whether two speeds of the machine differ by at most 20 %."""
    return max(before, after) <= 1.2 * min(before, after)


def check_picture(path: Path | None) -> None:
    """Raise ArgumentError, before hours of measuring, for a picture that could not be written."""
    if path and (path.suffix != ".png" or not path.parent.is_dir()):
        raise ArgumentError("picture", f"{path}: name a .png file in a folder that exists")


def print_table(rows: Iterator[Row]) -> None:
    """Print rows as aligned columns. Each row is said on stderr once it is measured; Ctrl-C prints those measured."""
    table = []
    try:
        for row in rows:
            if table:
                say("  ".join(row))
            table.append(row)
    finally:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_benchmark(caption: str, rows: Iterator[Row]) -> None:
    """Print the table, the caption, and the machine's speed before and after; warn if it changed."""
    before = gigaflops()
    print_table(rows)
    after = gigaflops()
    print(textwrap.fill(caption, 120))
    print(
        f"machine: {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{before:.0f} GFLOP/s before and {after:.0f} after (float32 linear layer)"
    )
    if not is_steady(before, after):
        say("warning: the machine's speed changed by more than 20 % during the benchmark: repeat it on a quiet machine")
