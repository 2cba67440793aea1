"""Write text with a trained model: `python generate.py --help`. This file is the command line; generation/ does it.

A flag's destination is the name of the setting that it sets, for example SamplingConfig.top_k; generation/modes.py
makes the settings from the flags that were given.
"""

import argparse
from pathlib import Path

from utils.console import POSITIVE_INT, SEED, Parser, number, run_program

# Written out, as importing the registries would import torch and make --help slow. A test compares them.
MODELS = ("llada", "gpt")
ORDERS = ("random", "drawn_confidence", "confidence", "margin", "entropy", "left", "strided", "sweep")
SCHEDULES = ("uniform", "cosine", "ancestral")
REMASKERS = ("random", "cap", "rescale", "conf", "loop")

EXAMPLES = """examples:
  python generate.py --prompt "ROMEO:" --length 500
  python generate.py --infill "ROMEO: [MASK*12] love [MASK*20]" --watch
  python generate.py --model llada --order confidence --threshold 0.9
  python generate.py --model gpt --prompt "ROMEO:" --stop "JULIET:" --temperature 0.8
  python generate.py --model gpt --prompt "ROMEO:" --beams 5
  python generate.py --chat
"""


def make_parser() -> Parser:
    """All flags. One that is not given is None, so that flags without effect can be refused (generation/modes.py)."""
    parser = Parser(
        description="Write text with a trained model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="the model (default: the newest under out/)")
    add("--model", choices=MODELS, help="the newest of this kind (default with --infill: llada)")
    add("--device", help="cpu, cuda (default: the best available)")
    add = parser.add_argument_group("text").add_argument
    add("--prompt", help="the beginning of the text (default: empty)")
    length = number(int, low=1, high=10**7)
    add("--length", dest="max_out_tokens", type=length, metavar="N", help="characters to write (default: 200)")
    add("--num-samples", type=POSITIVE_INT, metavar="N", help="texts to write (default: 1)")
    add("--seed", type=SEED, help="the same seed gives the same text (default: 0)")
    add = parser.add_argument_group("other modes").add_mutually_exclusive_group().add_argument
    add("--chat", action="store_true", default=None, help="read prompts line by line, answer each; `quit` ends")
    add("--top", type=POSITIVE_INT, metavar="K", help="show the K likeliest next tokens with their probabilities")
    add("--beams", dest="num_beams", type=POSITIVE_INT, metavar="N", help="GPT: beam search with N beams")
    add_token_flags(parser)
    add_llada_flags(parser)
    add_gpt_flags(parser)
    return parser


def add_token_flags(parser: Parser) -> None:
    """How both models draw tokens."""
    add = parser.add_argument_group("drawing tokens").add_argument
    add("--temperature", type=number(float, low=0), help="0 takes the likeliest token (default: 1)")
    add("--top-k", type=POSITIVE_INT, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=number(float, above=0, high=1), metavar="P", help="... the likeliest with total probability P")
    add("--repetition-penalty", type=number(float, above=0), metavar="R", help="above 1: repeat fewer characters")
    slide = "in texts longer than the context, move the window N characters at a time (default: GPT 1, LLaDA half)"
    add("--slide", type=POSITIVE_INT, metavar="N", help=slide)


def add_llada_flags(parser: Parser) -> None:
    """What only LLaDA uses."""
    group = parser.add_argument_group("LLaDA")
    add, adaptive = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--infill", metavar="TEMPLATE", help='fill the masks of a text: "ROMEO: [MASK*12] love [MASK*20]"')
    steps = "network evaluations a window, at most (default: sweep and strided 16 a block, others 1 a character)"
    add("--steps", type=number(int, low=1, high=10**6), metavar="K", help=steps)
    order = (
        "which positions are revealed first (default: sweep; confidence with --schedule, --remask or an adaptive rule; "
        "drawn_confidence is LLaDA's published rule)"
    )
    add("--order", choices=ORDERS, help=order)
    add("--schedule", type=schedule, metavar="S", help=f"how many at each step: {', '.join(SCHEDULES)}, or 8,8,16")
    adaptive("--threshold", type=number(float, low=0, high=1), metavar="P", help="reveal all with confidence >= P")
    adaptive("--factor", type=number(float, low=0), metavar="F", help="... all that Fast-dLLM's factor rule allows")
    adaptive("--entropy-bound", type=number(float, low=0), metavar="H", help="... while entropies sum to H nats")
    add("--block-length", type=POSITIVE_INT, metavar="N", help="fill blocks of N characters from left to right")
    add("--remask", choices=REMASKERS, help="mask written characters again (ReMDM)")
    add("--eta", type=number(float, low=0, high=1), metavar="E", help="strength of --remask cap, rescale and loop")
    add("--cfg", "--cfg-scale", dest="cfg_scale", type=number(float, low=0), metavar="S", help="guidance by the prompt")
    add("--watch", action="store_true", default=None, help="show the text filling in, on standard error")


def add_gpt_flags(parser: Parser) -> None:
    """What only GPT uses."""
    add = parser.add_argument_group("GPT").add_argument
    add("--context-len", type=POSITIVE_INT, metavar="T", help="characters it sees (default: the model's block_size)")
    add("--stop", action="append", metavar="TEXT", help="end after this text; may be given several times")
    add("--compile", action="store_true", default=None, help="two to four times as fast, after half a minute")
    add("--length-penalty", type=number(float, low=-10, high=10), metavar="A", help="--beams: log p / length^A")
    early = "--beams: end as soon as N texts are found (default: no)"
    add("--early-stopping", choices=("no", "yes", "never"), help=early)


def schedule(text: str) -> str | tuple[int, ...]:
    """An argparse type: the name of a schedule, or its counts with commas between."""
    if text in SCHEDULES:
        return text
    try:
        return tuple(int(count) for count in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {', '.join(SCHEDULES)} or counts like 8,8,16") from None


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    from generation.modes import write_as_asked  # imports torch

    with parser.naming_flags():
        write_as_asked(args)


if __name__ == "__main__":
    run_program(main)
