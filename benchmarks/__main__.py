"""The command line of the benchmarks: `python -m benchmarks NAME`, from the root of the repository."""

import argparse
from pathlib import Path

from utils.console import POSITIVE_INT, SEED, Parser, number, run_program, say

BENCHMARKS = {  # name -> what it measures: shown by --help, and as the caption of its table
    "training": "Pairs of trainings that differ in one flag, at equal time, each in a process of its own. "
    "ratio: median tokens/s over that of the row below, and in brackets the smallest and the largest of one pair.",
    "budget": "Validation loss after 40 s, 165 s and 15 minutes of a machine that makes 100 GFLOP/s on a float32 "
    "linear layer: median over seeds. The time is scaled by the speed of this machine.",
    "decoding": "GPT with random weights: recomputed, cached, compiled, with a sliding context, with beams. "
    "A / B: median times, and in brackets the smallest and the largest ratio of one pair.",
    "sampling": "Samplers of the newest LLaDA under OUT at temperature 1, and GPTs. "
    "nats/char of held-out windows, with 95 % intervals over windows. An exact figure is the likelihood of the sampler "
    "that is timed. Random order has only an upper bound: the mean of -log p(text | order) over drawn orders (Jensen). "
    "drawn_confidence, LLaDA's published rule, has no likelihood. Differences are paired over the same windows. A "
    "sampler with an exact figure above the bound is worse than random order; one below it need not be better. "
    "NFE: network evaluations for each text. Times are of one run.",
    "pairs": "Two small tasks with a held-out part: reversing made-up words, and facts asked in the direction that was "
    "not trained. Both models have equal parameters and equal steps. An answer is right if it is equal to the wanted "
    "one; all are greedy. Intervals are at 95 %: the wider of Student's t over seeds, each with data of its own, and "
    "Wilson's over all questions. ranks: GPT's exact likelihood of the whole line with each name; it needs a list of "
    "the names and one evaluation for each. infills: LLaDA writes the name between [START] and the rest of the line, "
    "and is told how many letters it has. "
    "--write FOLDER writes the data of one seed and trains nothing: train.jsonl and heldout.jsonl for train.py --pairs "
    "and evaluate.py --pairs, facts.txt for train.py --segments line --val-fraction 0.5.",
    "tokens": "Characters against byte-level BPE at equal parameters and equal time, in bits/char of the whole "
    "validation part. The n-gram tables of BPE models have fewer rows, to pay for the larger vocabulary. All contexts "
    "are of 256 tokens, so those of BPE hold more characters. Intervals are by Student's t over seeds. "
    "Losses of BPE are upper bounds for both models: a text has other segmentations too.",
    "finetuning": "All weights against low-rank adapters: losses on a new text and on the old one, before and after. "
    "The new text is the documentation that ships with Python. Equal steps; one seed, no intervals. With adapters, "
    "the parameters trained include the embeddings of characters that the base did not know.",
    "repeated_data": "Repeated data: both models on 100,000 characters of the text, for more and more epochs, three "
    "seeds. They have equal parameters and equal FLOPs an epoch. Losses are in nats/char: GPT's are exact, LLaDA's are "
    "upper bounds. The learning rate of each run is annealed over its own length, so GPT stopped early is a shorter "
    "run. sample: on 16,384 characters of the validation part; before calibration the best of the run (at which epoch) "
    "and the last, then calibrated. whole: the calibrated model on the whole validation part, mean over seeds. "
    "Intervals are at 95 %, by Student's t over seeds. A difference whose interval includes 0 is not distinguishable. "
    "The best GPT is the length with the smallest mean, chosen on the validation part itself.",
}


SECONDS = number(float, low=1, high=10**6)


def parse_args() -> argparse.Namespace:
    """NAME and its flags."""
    parser = Parser(prog="python -m benchmarks", description="Measure training, decoding and sampling.")
    subparsers = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, caption in BENCHMARKS.items():
        add = subparsers.add_parser(name, help=caption.split(". ")[0], description=caption).add_argument
        add("--quick", action="store_true", help="fewer repetitions")
        if name in ("training", "budget", "tokens", "finetuning", "repeated_data"):
            add("--data", metavar="NAME|FILE", help="as for train.py")
        if name == "budget":
            add("--seconds", type=SECONDS, nargs="+", help="default: 40 165 900, quick: 40")
            add("--model", choices=("llada", "gpt"), nargs="+", help="default: both")
        if name == "tokens":
            add("--seconds", type=SECONDS, help="of each training (default: 165, quick: 30)")
        if name == "pairs":
            add("--write", type=Path, metavar="FOLDER", help="only write train.jsonl, heldout.jsonl, facts.txt there")
            add("--seed", type=SEED, metavar="N", help="of the data that --write writes (default: 0)")
        if name == "repeated_data":
            results = "keep the result of each training there, and do not repeat those that are there"
            add("--out", type=Path, metavar="FOLDER", help=results)
            add("--picture", type=Path, metavar="FILE", help="draw the losses to this .png file")
        if name == "sampling":
            add("--out", default="out", help="folder of the trained models (default: out)")
            add("--windows", type=POSITIVE_INT, help="held-out windows to score (default: 64, quick: 16)")
            add("--lengths", type=POSITIVE_INT, nargs="+", help="characters of a text (default: 128 256, quick: 128)")
            add("--also", nargs="+", default=(), metavar="OUT", help="folders of further GPTs, perhaps with streams")
            add("--picture", type=Path, metavar="FILE", help="draw loss against speed and network evaluations there")
    return parser.parse_args()


def main() -> None:
    """Parse the arguments, then import torch and measure."""
    args = parse_args()
    from benchmarks import decoding, finetuning, pairs, repeated_data, sampling, timing, tokens, training

    match args.name:
        case "training":
            rows = training.compare_trainings(args.quick, args.data)
        case "budget":
            rows = training.loss_by_budget(args.quick, args.data, args.seconds, args.model)
        case "decoding":
            rows = decoding.compare_decoders(args.quick)
        case "sampling":
            windows, lengths = args.windows or (16 if args.quick else 64), args.lengths or (128, 256)[: 2 - args.quick]
            rows = sampling.compare_samplers(args.out, windows, lengths, args.also, args.picture)
        case "pairs" if args.write:
            pairs.write_data(args.write, pairs.QUICK if args.quick else pairs.FULL, args.seed or 0)
            return say(f"wrote {', '.join(pairs.FILES)} to {args.write}")
        case "pairs":
            if args.seed is not None:
                raise ValueError("--seed needs --write")
            rows = pairs.compare_tasks(args.quick)
        case "tokens":
            rows = tokens.compare_tokenizers(args.quick, args.data, args.seconds)
        case "finetuning":
            rows = finetuning.compare_fine_tuning(args.quick, args.data)
        case "repeated_data":
            rows = repeated_data.compare_epochs(args.quick, args.data, args.out, args.picture)
    timing.print_benchmark(BENCHMARKS[args.name], rows)


if __name__ == "__main__":
    run_program(main)
