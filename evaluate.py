"""Evaluate LLaDA and GPT on the text they were not trained on: `python evaluate.py --help`.

One table on standard output; a report with tables and pictures, and metrics.json, from which it is made, in --out.
"""

from pathlib import Path

from utils.console import SEED, Parser, run_program


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description="Evaluate LLaDA and GPT on the text they were not trained on.")
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="at most one of each model (default: those under out/)")
    add("--out", type=Path, default=Path("out/report"), help="for report.md, metrics.json, pictures (out/report)")
    add("--quick", action="store_true", help="fewer windows, policies and samples: wider intervals")
    add("--data", metavar="NAME|FILE", help="where the text they were trained on is now (default: where it was)")
    add("--seed", type=SEED, default=0)
    add("--device", help="cpu, cuda (default: the best there is)")
    add("--compare-estimators", action="store_true", help="only compare the bound's estimator with plain Monte Carlo")
    return parser


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

    # Imported here so that --help does not wait for torch.
    from evaluation.likelihoods import compare_estimators
    from evaluation.report import prepare_folder, write_report
    from evaluation.settings import FULL, QUICK
    from evaluation.suite import Evaluation, load_same_corpus, select_checkpoints
    from utils.devices import pick_device

    with parser.naming_flags():
        checkpoints = select_checkpoints(args.checkpoints, pick_device(args.device, float64=True))
        corpus = load_same_corpus(next(iter(checkpoints.values())), args.data)
    evaluation = Evaluation(checkpoints, corpus, QUICK if args.quick else FULL, args.seed)
    if args.compare_estimators:
        if evaluation.llada is None:
            raise ValueError("--compare-estimators needs a LLaDA checkpoint")
        windows = evaluation.windows[0][:64]
        return print_estimators(compare_estimators(evaluation.llada, windows, args.seed), *windows.shape)
    prepare_folder(args.out)
    metrics = evaluation.run()
    print_table(metrics)
    write_report(metrics, args.out)


if __name__ == "__main__":
    run_program(main)
