"""Write text with a trained model: `python generate.py --help`. This file is the command line; generation/ does it.

A flag's destination is the name of the setting that it sets, for example SamplingConfig.top_k; generation/flags.py
makes the settings from the flags that were given.
"""

import argparse
from pathlib import Path

from utils.console import POSITIVE_INT, SEED, Parser, immediate_interrupt, number, run_program, valid_text

# Written out, as importing the registries would import torch and make --help slow. A test compares them.
MODELS = ("llada", "gpt")
ORDERS = ("random", "drawn_confidence", "confidence", "margin", "entropy", "left", "strided", "sweep")
SCHEDULES = ("uniform", "cosine", "ancestral")
REMASKERS = ("random", "cap", "rescale", "conf", "loop")

EXAMPLES = """
python generate.py --prompt "ROMEO:" --length 500
python generate.py --infill "ROMEO: [MASK*12] love [MASK*20]" --watch
python generate.py --race --prompt "ROMEO:" --html race.html
python generate.py --infill-file letter.txt > filled.txt
python generate.py --model llada --order confidence --threshold 0.9
python generate.py --model gpt --prompt "ROMEO:" --stop "JULIET:" --temperature 0.8
python generate.py --model gpt --prompt "ROMEO:" --beams 5
python generate.py --chat
"""


def make_parser() -> Parser:
    """All flags. One that is not given is None, so that flags without effect can be refused (generation/flags.py)."""
    parser = Parser(description="Write text with a trained model.", examples=EXAMPLES)
    add = parser.add_argument_group("model").add_argument
    checkpoint = "the model, or the folder of its run (default: the newest under --out)"
    add("--checkpoint", type=Path, metavar="FILE", help=checkpoint)
    add("--out", type=Path, metavar="FOLDER", help="the folder of runs, as of train.py (default: out)")
    add("--model", choices=MODELS, help="the newest of this kind (default: of either, to fill masks llada)")
    add("--device", help="cpu, cuda, mps (default: the best one available)")
    add = parser.add_argument_group("text").add_argument
    prompt = "the beginning of the text; - reads standard input, which is read only then (default: empty)"
    add("--prompt", type=valid_text, metavar="TEXT", help=prompt)
    length = number(int, low=1, high=10**7)
    add("--length", dest="max_out_tokens", type=length, metavar="N", help="characters to write (default: 200)")
    add("--num-samples", type=POSITIVE_INT, metavar="N", help="texts to write (default: 1)")
    add("--seed", type=SEED, metavar="N", help="the same seed gives the same text (default: 0)")
    add = parser.add_argument_group("views").add_argument
    add("--watch", action="store_true", default=None, help="show the text while it is written, on standard error")
    pause = "how long --watch shows a step, at least (default: 0.12; all steps of a text at most 50 times as long)"
    add("--pause", type=number(float, low=0, high=60), metavar="SECONDS", help=pause)
    html = "write a page that plays how the text (or the race) came about, for any browser"
    add("--html", type=Path, metavar="FILE", help=html)
    add("--gif", type=Path, metavar="FILE", help="... an animation of it")
    add = parser.add_argument_group("other modes").add_mutually_exclusive_group().add_argument
    add("--chat", action="store_true", default=None, help="read prompts line by line and answer each; `exit` leaves")
    race = "LLaDA and GPT write from one prompt, side by side: the newest of each under --out"
    add("--race", action="store_true", default=None, help=race)
    add("--top", type=POSITIVE_INT, metavar="K", help="show the K likeliest next tokens with their probabilities")
    add("--beams", dest="num_beams", type=POSITIVE_INT, metavar="N", help="GPT: beam search with N beams")
    add_token_flags(parser)
    add_llada_flags(parser)
    add_gpt_flags(parser)
    return parser


def add_token_flags(parser: Parser) -> None:
    """How both models draw tokens."""
    add = parser.add_argument_group("drawing tokens").add_argument
    temperature = "0 takes the likeliest token, 1 draws as likelihoods are measured; answers to pairs: 0 (default: 0.7)"
    add("--temperature", type=number(float, low=0), metavar="T", help=temperature)
    add("--top-k", type=POSITIVE_INT, metavar="K", help="draw from the K likeliest tokens (default: all)")
    top_p = "... from the likeliest with total probability P (default: 1)"
    add("--top-p", type=number(float, above=0, high=1), metavar="P", help=top_p)
    penalty = "above 1: repeat fewer characters (default: 1)"
    add("--repetition-penalty", type=number(float, above=0), metavar="R", help=penalty)
    slide = (
        "in texts longer than the context, move the window N characters at a time (default: half of the context; "
        "1 lets GPT see all of it for every character, and is much slower)"
    )
    add("--slide", type=POSITIVE_INT, metavar="N", help=slide)


def add_llada_flags(parser: Parser) -> None:
    """What only LLaDA uses."""
    group = parser.add_argument_group("LLaDA")
    add, adaptive = group.add_argument, group.add_mutually_exclusive_group().add_argument
    template = group.add_mutually_exclusive_group().add_argument
    infill = 'fill the masks of a text: "ROMEO: [MASK*12] love [MASK*20]"'
    template("--infill", type=valid_text, metavar="TEMPLATE", help=infill)
    infill_file = "... of a UTF-8 file, or of standard input (-); every other byte stays as it is"
    template("--infill-file", type=Path, metavar="FILE", help=infill_file)
    steps = "network evaluations a window, at most (default: sweep and strided 16 a block, others 1 a character)"
    add("--steps", type=number(int, low=1, high=10**6), metavar="K", help=steps)
    order = (
        "which positions are revealed first (default: sweep; confidence with --schedule, --remask or an adaptive rule; "
        "drawn_confidence is LLaDA's published rule)"
    )
    add("--order", choices=ORDERS, help=order)
    counts = f"how many at each step: {', '.join(SCHEDULES)}, or 8,8,16 (default: uniform)"
    add("--schedule", type=schedule, metavar="S", help=counts)
    threshold = "adaptive rule: reveal all with confidence >= P (default: none)"
    adaptive("--threshold", type=number(float, low=0, high=1), metavar="P", help=threshold)
    adaptive("--factor", type=number(float, low=0), metavar="F", help="... all that Fast-dLLM's factor rule allows")
    adaptive("--entropy-bound", type=number(float, low=0), metavar="H", help="... while entropies sum to H nats")
    blocks = "fill blocks of N characters from left to right (default: the window is one block)"
    add("--block-length", type=POSITIVE_INT, metavar="N", help=blocks)
    add("--remask", choices=REMASKERS, help="mask written characters again, as ReMDM does (default: no)")
    eta = "strength of --remask cap, rescale and loop (default: 0.02)"
    add("--eta", type=number(float, low=0, high=1), metavar="E", help=eta)
    guidance = "strength of guidance by the prompt (default: 0)"
    add("--cfg", "--cfg-scale", dest="cfg_scale", type=number(float, low=0), metavar="S", help=guidance)


def add_gpt_flags(parser: Parser) -> None:
    """What only GPT uses."""
    add = parser.add_argument_group("GPT").add_argument
    add("--context-len", type=POSITIVE_INT, metavar="T", help="characters it sees (default: the model's block_size)")
    streams = "write in N places at once; 1: from left to right (default: as trained, see train.py --parallel)"
    add("--streams", type=POSITIVE_INT, metavar="N", help=streams)
    stop = "end after this text, which may be given several times (default: none)"
    add("--stop", action="append", type=valid_text, metavar="TEXT", help=stop)
    add("--compile", action="store_true", default=None, help="two to four times as fast, after half a minute")
    penalty = "--beams: log p / length^A (default: 1)"
    add("--length-penalty", type=number(float, low=-10, high=10), metavar="A", help=penalty)
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
    with immediate_interrupt():
        from generation.modes import write_as_asked  # imports torch

    with parser.naming_flags():
        write_as_asked(args)


if __name__ == "__main__":
    run_program(main)
