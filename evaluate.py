"""Evaluate LLaDA and GPT on the text they were not trained on: `python evaluate.py --help`.

Tables on standard output; a report with pictures, and metrics.json, from which it is made, in --report.
"""

from pathlib import Path

from config import EvaluateRun, add_flags, given, refuse_without_effect
from utils.console import Parser, immediate_interrupt, number, run_program
from utils.errors import ArgumentError

EXAMPLES = """
python evaluate.py
python evaluate.py out/gpt --quick --report gpt_report
python evaluate.py --text letter.txt
python evaluate.py --pairs heldout.jsonl
"""


def main() -> None:
    """Load, measure, print and write."""
    parser = Parser(description="Evaluate LLaDA and GPT on the text they were not trained on.", examples=EXAMPLES)
    help = "at most one of each model, or a run's folder (default: those under --out)"
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help=help)
    add_flags(parser, EvaluateRun, number)
    args = parser.parse_args()
    with parser.naming_flags():
        if args.pairs and args.text:
            raise ArgumentError("pairs", "does not go with --text: drop one of them")
        mode = "pairs" if args.pairs else "text" if args.text else "report"
        models = "named" if args.checkpoints else "under --out"
        refuse_without_effect(args, {"mode": mode, "models": models}, EvaluateRun)
        run = EvaluateRun(**given(args, EvaluateRun))
    with immediate_interrupt():  # torch is imported here, so that --help does not wait for it
        from checkpoint import check_writable, find_checkpoints
        from data import load_same_corpus
        from evaluation.report import print_report, write_report
        from evaluation.suite import evaluate, select_checkpoints
        from evaluation.texts import print_text
        from utils.devices import pick_device

    with parser.naming_flags():
        paths = args.checkpoints or find_checkpoints(run.out)
        paths = paths or ([] if args.out else find_checkpoints())
        if not paths:
            raise ValueError(f"no checkpoint under {run.out}/: train one with `python train.py`, or name its file")
        checkpoints = select_checkpoints(paths, pick_device(run.device))
        if run.pairs:
            from extras.pairs import print_scores, score_pairs

            return print_scores(score_pairs(checkpoints, run.pairs, run.quick, run.seed))
        if run.text:
            return print_text(checkpoints, run.text, run.seed)
        first = next(iter(checkpoints.values()))
        if first.model.config.segments == "pairs":
            raise ArgumentError("pairs", f"is needed: {first.path} answers prompts, and is scored on a file of pairs")
        corpus = load_same_corpus(first.corpus, first.model.config.segments, first.tokenizer, run.data)
        folder = run.report or run.out / "report"
        check_writable("report", folder)
    metrics = evaluate(checkpoints, corpus, run.quick, run.seed)
    print_report(metrics)
    write_report(metrics, folder)


if __name__ == "__main__":
    run_program(main)
