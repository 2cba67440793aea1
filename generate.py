"""Write text with a trained model: `python generate.py --help`. The command line; generation/modes.py does the work."""

import os
import sys
from argparse import Namespace
from dataclasses import fields

from config import BeamConfig, DecodingConfig, LogitsConfig, SamplingConfig, WriteRun, add_flags
from utils.console import Parser, immediate_interrupt, number, run_program, say, valid_text
from utils.errors import ArgumentError

EXAMPLES = """
python generate.py --prompt "ROMEO:" --length 500
python generate.py --infill "ROMEO: [MASK*12] love [MASK*3-12]!" --watch
python generate.py --race --prompt "ROMEO:" --html race.html
python generate.py --infill-file letter.txt > filled.txt
python generate.py --prompt "ROMEO:" --beams 5
python generate.py --page model.html
"""
NEXT = """next: python generate.py --prompt "ROMEO:" --watch            write on, and see how
      python generate.py --infill "O [MASK*12] love!" --watch  fill a gap
      python train.py                                          train your own model in three minutes"""
SETTINGS = {  # by the titles under which --help shows their flags
    "text": WriteRun,
    "drawing tokens": LogitsConfig,
    "LLaDA": SamplingConfig,
    "GPT": DecodingConfig,
    "GPT: beam search": BeamConfig,
}
MODES = ("chat", "race", "top", "beams", "page", "infill", "infill_file")  # flags; without them a prompt is continued


def make_parser() -> Parser:
    """All flags. One that is not given is None, so that flags without effect can be refused."""
    parser = Parser(description="Write text with a trained model.", examples=EXAMPLES)
    for title, config_class in SETTINGS.items():
        add_flags(parser.add_argument_group(title), config_class, number)
    for action in parser._actions:
        action.type = valid_text if action.type is str else action.type
    return parser


def mode_of(args: Namespace) -> str:
    """What is asked for. Raises ArgumentError for two modes at once, and for a file that could not be written."""
    asked = [mode for mode in MODES if getattr(args, mode) is not None] or ["text"]
    if len(asked) > 1 and asked != ["top", "infill"]:
        raise ArgumentError(asked[1], f"does not go with --{asked[0].replace('_', '-')}: drop one of them")
    for name in ("html", "gif", "page"):
        path = getattr(args, name)
        if path and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
            raise ArgumentError(name, f"{path}: cannot be written")
    return "file" if asked[0] == "infill_file" else asked[0]


def needed_model(args: Namespace) -> str | None:
    """The model that was named, or that a given flag needs: what only one model has is asked of that model."""
    for f in (f for config_class in SETTINGS.values() for f in fields(config_class)):
        only = f.metadata.get("only", {}).get("model", ())
        if args.model is None and len(only) == 1 and getattr(args, f.name, None) is not None:
            return only[0]
    return args.model


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with parser.naming_flags():
        mode = mode_of(args)
        with immediate_interrupt():  # torch is imported here, so that --help does not wait for it
            from generation.modes import write_as_asked
        try:
            write_as_asked(args, mode, needed_model(args), tuple(SETTINGS.values()))
        finally:
            if len(sys.argv) == 1:
                say(NEXT)


if __name__ == "__main__":
    run_program(main)
