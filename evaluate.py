"""Evaluate LLaDA and GPT on the text they were not trained on: `python evaluate.py --help`.

One table on standard output; a report with tables and pictures, and metrics.json, from which it is made, in --report.
"""

import argparse
import tempfile
from pathlib import Path

from utils.console import SEED, Parser, immediate_interrupt, number, run_program
from utils.errors import ArgumentError

EXAMPLES = """
python evaluate.py
python evaluate.py out/gpt --quick --report gpt_report
python evaluate.py --out /elsewhere --device cuda
python evaluate.py --pairs heldout.jsonl
"""


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description="Evaluate LLaDA and GPT on the text they were not trained on.", examples=EXAMPLES)
    add = parser.add_argument_group("models and text").add_argument
    checkpoints = "at most one of each model, or a run's folder (default: those under --out)"
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help=checkpoints)
    out = "the folder of runs, as of train.py (default: out)"
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help=out)
    add("--data", metavar="NAME|FILE", help="where the text they were trained on is now (default: where it was)")
    add("--device", help="cpu, cuda, mps (default: the best one available)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--report", type=Path, metavar="FOLDER", help="for report.md, metrics.json, pictures (default: OUT/report)")
    add("--quick", action="store_true", help="fewer windows, policies and samples: wider intervals")
    add("--seed", type=SEED, default=0, metavar="N", help="of masks and samples (default: 0)")
    add("--compare-estimators", action="store_true", help="only compare the bound's estimator with plain Monte Carlo")
    add = parser.add_argument_group("models of pairs").add_argument
    add("--pairs", metavar="FILE", help="only score what they write after the prompts of FILE, and its completions")
    add("--temperature", type=number(float, low=0), help="of these texts (default: 0, the likeliest tokens)")
    return parser


def check_folder(folder: Path) -> None:
    """Raise ArgumentError if the report could not be written to a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ArgumentError("report", f"{folder}: cannot write there ({existing}: {error.strerror})") from None


def check_flags(args: argparse.Namespace) -> None:
    """Raise ArgumentError for a flag without effect, and for a report that could not be written."""
    if args.pairs is None and args.temperature is not None:
        raise ArgumentError("temperature", "needs --pairs")
    if args.pairs is not None and args.data is not None:
        raise ArgumentError("data", "has no effect with --pairs")
    if args.pairs is not None and args.compare_estimators:
        raise ArgumentError("compare_estimators", "has no effect with --pairs")
    if args.report or not (args.pairs or args.compare_estimators):
        check_folder(args.report or args.out / "report")


def print_table(metrics: dict) -> None:
    """One line a model on standard output."""
    print("model   parameters nats/char     95 % interval bits/char perplexity  kind")
    for name, m in metrics["models"].items():
        interval = "{:.4f}..{:.4f}".format(*m["ci95"]) if m["ci95"] else "-"
        kind = "upper bound" if m["is_bound"] else "exact"
        print(
            f"{name:6} {m['params']:11,} {m['nats_per_char']:9.4f} {interval:>17} {m['bits_per_char']:9.4f} "
            f"{m['perplexity']:10.4f}  {kind}"
        )


def print_estimators(results: dict[str, dict], windows: int, T: int) -> None:
    """The result of `compare_estimators` on standard output."""
    plain, paired = results["plain"], results["paired"]
    print(f"{windows} windows of {T} characters; variance x evaluations a window, (nats/char)^2")
    print(f"plain uniform-t Monte Carlo  mean {plain['nats_per_char']:.4f}  {plain['variance']:.3g}")
    print(f"stratified complementary     mean {paired['nats_per_char']:.4f}  {paired['variance']:.3g}")
    print(f"ratio {plain['variance'] / paired['variance']:.1f}")


def main() -> None:
    """Load, measure, print and write."""
    parser = make_parser()
    args = parser.parse_args()
    folder = args.report or args.out / "report"
    with parser.naming_flags():
        check_flags(args)
    with immediate_interrupt():  # torch is imported here, so that --help does not wait for it
        from checkpoint import find_checkpoints, pretrained_checkpoints
        from evaluation.likelihoods import compare_estimators
        from evaluation.pairs import print_pairs, score_pairs
        from evaluation.report import write_json, write_report
        from evaluation.settings import FULL, QUICK
        from evaluation.suite import Evaluation, load_same_corpus, select_checkpoints
        from utils.devices import pick_device

    with parser.naming_flags():
        paths = args.checkpoints or find_checkpoints(args.out)
        paths = paths or pretrained_checkpoints()
        if not paths:
            raise ValueError(f"no checkpoint under {args.out}/: train one with `python train.py`, or name its file")
        checkpoints = select_checkpoints(paths, pick_device(args.device))
        if args.pairs:
            settings = QUICK if args.quick else FULL
            results = score_pairs(checkpoints, args.pairs, settings, args.temperature or 0.0, args.seed)
            print_pairs(results)
            return write_json(results, args.report / "pairs.json") if args.report else None
        corpus = load_same_corpus(next(iter(checkpoints.values())), args.data)
    evaluation = Evaluation(checkpoints, corpus, QUICK if args.quick else FULL, args.seed)
    if args.compare_estimators:
        if evaluation.llada is None or evaluation.left_out():
            raise ValueError("--compare-estimators needs a LLaDA checkpoint of windows of characters")
        windows = evaluation.rows[0].tokens[:64]
        return print_estimators(compare_estimators(evaluation.llada, windows, args.seed), *windows.shape)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = evaluation.run()
    print_table(metrics)
    write_report(metrics, folder)


if __name__ == "__main__":
    run_program(main)
