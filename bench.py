"""Speed, measured in pairs: A B A B ... in one run, so that a busy moment of the machine meets both.

    python bench.py train|budget|muon|generate|sample|blocks|crossing [--quick]

Each line gives the ratio of the medians and, in brackets, the smallest and largest ratio of a single pair. The machine
is timed before and after: a bench during which its speed changed by more than a fifth says so.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import race
import throughput
from console import Parser, number, run, say
from frontier import blocks, crossing, frontier
from model import MODELS

Row = tuple[str, ...]  # one line of a bench's table; the first row a bench yields is the heading


# ------------------------------------------------------------------------------------------------- the frame
@dataclass
class Pairs:
    """Seconds that A and B took, one of each a pair."""

    a: list[float]
    b: list[float]

    @property
    def ratio(self) -> float:
        """Median of A over median of B: how many times faster B is."""
        return statistics.median(self.a) / statistics.median(self.b)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest ratio of a single pair."""
        ratios = [a / b for a, b in zip(self.a, self.b, strict=True)]
        return min(ratios), max(ratios)

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x ({self.spread[0]:.2f}..{self.spread[1]:.2f})"


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(a: Callable[[], object], b: Callable[[], object], pairs: int) -> Pairs:
    """Time a and b in turns, `pairs` times each, after one call of each that does not count."""
    a(), b()
    times = [(seconds(a), seconds(b)) for _ in range(pairs)]
    return Pairs(*map(list, zip(*times, strict=True)))


def gigaflops() -> float:
    """GFLOP/s of the linear layer that dominates a training step: float32, (4096, 128) by (512, 128); median of 400."""
    x, weight = torch.randn(4096, 128), torch.randn(512, 128)
    return 2e-9 * 4096 * 128 * 512 / statistics.median(seconds(lambda: F.linear(x, weight)) for _ in range(400))


def print_table(rows: Iterator[Row]) -> None:
    """Print rows as aligned columns, after Ctrl-C those there are; say each on stderr as soon as it is measured."""
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


# ------------------------------------------------------------------------------------------------- command line
def bench_sample(args: argparse.Namespace) -> Iterator[Row]:
    """LLaDA's policies: network evaluations, exact likelihood, wall time. Needs a trained model under out/."""
    return frontier(seconds, 16, 1, lengths=(128,)) if args.quick else frontier(seconds, 64, 1, lengths=(128, 256))


def bench_blocks(args: argparse.Namespace) -> Iterator[Row]:
    """Blocks from left to right: what they buy, and what it costs not to read the masks that come after the block."""
    return blocks(seconds, 8 if args.quick else 64)


def bench_crossing(args: argparse.Namespace) -> Iterator[Row]:
    """Characters/s of LLaDA and of GPT with its cache, by length, batch and size of the network."""
    return crossing(seconds, rounds=3 if args.quick else 7)


def bench_generate(args: argparse.Namespace) -> Iterator[Row]:
    """GPT's characters/s: cached, compiled, sliding in steps, beams, int8 (loss: the trained GPT in out/)."""
    return throughput.compare(alternate, 3 if args.quick else 9, args.quick)


def bench_train(args: argparse.Namespace) -> Iterator[Row]:
    """Trainings in pairs: rotary against vanilla, Muon against AdamW, compiled against eager."""
    yield from race.compare(args)


def bench_muon(args: argparse.Namespace) -> Iterator[Row]:
    """One optimizer step over the laptop model's matrices: torch.optim.Muon (bfloat16) against ours (float32)."""
    theirs, ours = race.muon_steps()
    yield "torch.optim.Muon / ours", "seconds of ours"
    pairs = alternate(theirs, ours, 3 if args.quick else 15)
    yield str(pairs), f"{statistics.median(pairs.b):.4f}"


def bench_budget(args: argparse.Namespace) -> Iterator[Row]:
    """Loss after 40 s, 165 s and 15 minutes of a machine of 100 GFLOP/s."""
    yield from race.budgets(args, gigaflops)


BENCHES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "train": bench_train,
    "budget": bench_budget,
    "muon": bench_muon,
    "generate": bench_generate,
    "sample": bench_sample,
    "blocks": bench_blocks,
    "crossing": bench_crossing,
}


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Speed, measured in pairs that alternate in one run.")
    subparsers = parser.add_subparsers(dest="bench", required=True, metavar="|".join(BENCHES))
    for name, bench in BENCHES.items():
        subparser = subparsers.add_parser(name, help=bench.__doc__.splitlines()[0], description=bench.__doc__)
        subparser.add_argument("--quick", action="store_true", help="fewer pairs: about two minutes")
        if name in ("train", "budget"):
            subparser.add_argument("--data", metavar="NAME|FILE", help="as for train.py")
        if name == "budget":
            subparser.add_argument("--seconds", type=number(float, above=0), nargs="+", help="default: 40 165 900")
            subparser.add_argument("--model", choices=MODELS, nargs="+")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    before = gigaflops()
    print_table(BENCHES[args.bench](args))
    after = gigaflops()
    print(
        f"machine: {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{before:.0f} GFLOP/s before and {after:.0f} after (float32 linear)"
    )
    if max(before, after) > 1.2 * min(before, after):
        say("warning: the machine's speed changed by more than 20 % during the bench; run it again on a quiet machine")


if __name__ == "__main__":
    run(main)
