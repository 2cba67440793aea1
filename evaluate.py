"""Evaluate LLaDA and GPT on the text they were not trained on: `python evaluate.py --help`.

Tables on standard output; a report with pictures, and metrics.json, from which it is made, in --report.
"""

import argparse
import tempfile
from pathlib import Path

from config import EvaluateRun, add_flags, refuse_without_effect
from utils.console import Parser, immediate_interrupt, number, run_program
from utils.errors import ArgumentError

EXAMPLES = """
python evaluate.py
python evaluate.py out/gpt --quick --report gpt_report
python evaluate.py --text letter.txt
python evaluate.py --pairs heldout.jsonl
"""


def settings_of(args: argparse.Namespace) -> EvaluateRun:
    """The settings. Raises ArgumentError for a flag without effect, or a report that could not be written."""
    given = {name: value for name, value in vars(args).items() if name != "checkpoints" and value is not None}
    if args.pairs and args.text:
        raise ArgumentError("pairs", "does not go with --text: drop one of them")
    state = {"mode": "pairs" if args.pairs else "text" if args.text else "report"}
    refuse_without_effect(args, state | {"models": "named" if args.checkpoints else "under --out"}, EvaluateRun)
    run = EvaluateRun(**given)
    if state["mode"] == "report":
        folder = run.report or run.out / "report"
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        try:
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            problem = f"{folder}: cannot write there ({existing}: {error.strerror})"
            raise ArgumentError("report", problem) from None
    return run


def main() -> None:
    """Load, measure, print and write."""
    parser = Parser(description="Evaluate LLaDA and GPT on the text they were not trained on.", examples=EXAMPLES)
    checkpoints = "at most one of each model, or a run's folder (default: those under --out)"
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help=checkpoints)
    add_flags(parser, EvaluateRun, number)
    args = parser.parse_args()
    with parser.naming_flags():
        run = settings_of(args)
    with immediate_interrupt():  # torch is imported here, so that --help does not wait for it
        from checkpoint import find_checkpoints
        from data import load_same_corpus
        from evaluation.report import print_report, write_report
        from evaluation.suite import Evaluation, select_checkpoints
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
    metrics = Evaluation(checkpoints, corpus, run.quick, run.seed).run()
    print_report(metrics)
    write_report(metrics, run.report or run.out / "report")


if __name__ == "__main__":
    run_program(main)
