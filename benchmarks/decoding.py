"""Benchmark of GPT's decoding: recomputed, cached, compiled, in streams, with a sliding context, with beams.

Weights are random.
"""

import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from autoregressive import BeamConfig, DecodingConfig, beam_search, decode
from benchmarks.timing import Row, alternate
from generation.streams import write_streams
from model import GPT, ModelConfig
from tokenizer import END_ID, MASK_ID, START_ID

CONTEXT = 256
VOCAB_SIZE = 69  # TinyShakespeare's
PROMPT = 56
SHORT, LONG = 200, 2000  # characters written after the prompt: the short ones fit in the context
STREAMS = (4, 8, 16)  # of models that write a whole context, without a prompt
NETWORKS = {
    "4 layers x 128": {"n_layer": 4, "n_head": 4, "n_embd": 128},
    "6 layers x 384": {"n_layer": 6, "n_head": 6, "n_embd": 384},
}


@dataclass(frozen=True)
class Decoder:
    """One way to write with GPT: its label in the table, the network and the settings."""

    label: str
    model: GPT
    config: DecodingConfig | BeamConfig

    def write(self, length: int) -> None:
        """Write `length` characters after a prompt of PROMPT tokens, or a whole context after [START]."""
        prompt = torch.cat([torch.tensor([START_ID]), torch.arange(END_ID + 1, END_ID + PROMPT)])
        if length == CONTEXT:
            prompt = prompt[:1]
        if self.model.fills_masks:
            for _ in write_streams(self.model, [torch.full((length,), MASK_ID)], self.config):
                pass
        elif isinstance(self.config, BeamConfig):
            beam_search(self.model, prompt, self.config, max_out_tokens=length)
        else:
            for _ in decode(self.model, [prompt], self.config, max_out_tokens=length):
                pass


def random_gpt(sizes: dict, parallel: int = 1) -> GPT:
    """A GPT with random weights, which take as long as trained ones. It never writes [END]."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(VOCAB_SIZE, CONTEXT, **sizes, parallel=parallel)).eval()
    model.never[END_ID] = True
    return model


def compiled_copy(model: GPT) -> GPT:
    """The same network, compiled. What was compiled before is dropped: torch would make it general, and slower."""
    torch.compiler.reset()
    compiled = copy.deepcopy(model)
    compiled.compile()
    return compiled


def comparisons(sizes: dict) -> list[tuple[int, Decoder, Decoder]]:
    """(characters to write, A, B) for each row of the table."""
    model = random_gpt(sizes)
    compiled = compiled_copy(model)
    cached, slide_64 = DecodingConfig(), DecodingConfig(slide=64)
    recomputed = Decoder("recomputed", model, DecodingConfig(use_cache=False))
    slide_1 = Decoder("slide 1", model, cached)
    beams = Decoder("5 beams", model, BeamConfig(num_beams=5))
    return [
        (SHORT, recomputed, Decoder("cached", model, cached)),
        (SHORT, recomputed, Decoder("cached, compiled", compiled, cached)),
        *(
            (CONTEXT, Decoder("cached", model, cached), Decoder(f"{P} streams", random_gpt(sizes, P), cached))
            for P in STREAMS
        ),
        (LONG, slide_1, Decoder("slide 64", model, slide_64)),
        (LONG, slide_1, Decoder("slide 64, compiled", compiled, slide_64)),
        (SHORT, beams, Decoder("greedy", model, DecodingConfig(temperature=0.0))),
    ]


def compare_decoders(quick: bool) -> Iterator[Row]:
    """Table of pairs of decoders. quick: fewer pairs, and no long text with the larger network (minutes)."""
    yield "network", "characters", "A", "B", "time A / B", "characters/s of B"
    for name, sizes in NETWORKS.items():
        for length, a, b in comparisons(sizes):
            if quick and length == LONG and sizes["n_embd"] > 128:
                continue
            pairs = (1 if quick else 3) if length == LONG else (3 if quick else 9)
            times = alternate(partial(a.write, length), partial(b.write, length), pairs)
            yield name, str(length), a.label, b.label, str(times), f"{length / statistics.median(times.b):.0f}"
