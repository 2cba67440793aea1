"""How fast GPT writes: with and without its cache, compiled, with a sliding window, with beams, in int8.

`python bench.py generate` prints what is measured here.
"""

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator

import torch

from autoregressive import beam_search, decode, exact_nll
from checkpoint import load_checkpoint, newest_checkpoint
from console import say, track
from data import load_corpus, validation_windows
from model import GPT, GPTConfig
from tokenizer import END_ID, START_ID

CONTEXT = 256
INSIDE = 200  # characters written after a prompt of 56, so that the window never moves
BEYOND = 2000
SLIDE = 64
BEAMS = 5
SIZES = {
    "laptop, 4 layers x 128": {"n_layer": 4, "n_head": 4, "n_embd": 128},
    "6 layers x 384": {"n_layer": 6, "n_head": 6, "n_embd": 384},
}


def endless_gpt(size: dict) -> GPT:
    """A GPT with random weights (they cost what trained ones do) that never writes [END]."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=69, block_size=CONTEXT, **size)).eval()
    model.never[END_ID] = True
    return model


def compiled_copy(model: GPT) -> GPT:
    """The same network, compiled; code compiled for others before is forgotten.

    Else their sizes and its own would become variables of one slower code.
    """
    torch.compiler.reset()
    compiled = copy.deepcopy(model)
    compiled.compile()
    return compiled


def writer(model: GPT, length: int, **settings) -> Callable[[], object]:
    """A call that writes `length` characters after a prompt of CONTEXT - INSIDE tokens."""
    ids = torch.randint(END_ID + 1, 69, (CONTEXT - INSIDE,), generator=torch.Generator().manual_seed(0))
    ids[0] = START_ID
    if "num_beams" in settings:
        return lambda: beam_search(model, ids, max_out_tokens=length, **settings)
    return lambda: [None for _ in decode(model, [ids], max_out_tokens=length, **settings)]


def compare(alternate: Callable, pairs: int, quick: bool) -> Iterator[tuple[str, ...]]:
    """The rows of the table. `alternate` is bench.py's. quick: no 2,000 characters with the large model (minutes)."""
    yield "characters", "A", "B", "time A / B", "characters/s of B"
    for name, size in SIZES.items():
        model = endless_gpt(size)
        int8, compiled = quantized(model), compiled_copy(model)
        recomputed, slide, few = {"use_cache": False}, {"slide": SLIDE}, 1 if quick else 3
        contests = [
            (INSIDE, "recomputed", recomputed, "cached", model, {}, pairs),
            (INSIDE, "recomputed", recomputed, "cached, compiled", compiled, {}, pairs),
            (BEYOND, "slide 1", {}, f"slide {SLIDE}", model, slide, few),
            (BEYOND, "slide 1", {}, f"slide {SLIDE}, compiled", compiled, slide, few),
            (INSIDE, f"{BEAMS} beams", {"num_beams": BEAMS}, "greedy", model, {"temperature": 0.0}, pairs),
            (INSIDE, "float32", {}, "int8", int8, {}, pairs),
        ]
        for length, a, settings_a, b, model_b, settings_b, n in contests:
            if quick and length == BEYOND and size["n_embd"] > 128:
                continue
            times = alternate(writer(model, length, **settings_a), writer(model_b, length, **settings_b), n)
            speed = length / sorted(times.b)[len(times.b) // 2]
            yield f"{length}, {name}", a, b, str(times), f"{speed:.0f}"
        yield name, f"{megabytes(model):.1f} MB", f"{megabytes(int8):.1f} MB in int8", "", ""
    yield from loss_in_int8()


# ------------------------------------------------------------------------------------------------- int8
def quantized(model: GPT) -> GPT:
    """A copy whose linear layers hold int8 weights and quantize their inputs on the fly (dynamic quantization)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its move to torchao at every call
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


def megabytes(model: GPT) -> float:
    """Size of the weights as saved."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


def loss_in_int8(windows: int = 128) -> Iterator[tuple[str, ...]]:
    """Exact bits/char of the newest trained GPT on held-out text, in float32 and in int8; nothing if there is none."""
    try:
        checkpoint = load_checkpoint(newest_checkpoint("out", "gpt"))
    except ValueError as error:
        say(f"no loss in int8: {error}")
        return
    corpus = load_corpus(checkpoint.corpus["name"])
    _, val_ids = corpus.split(checkpoint.corpus["val_fraction"])
    held_out = validation_windows(val_ids, checkpoint.model.config.block_size, checkpoint.tokenizer)[0][:windows]
    bits = [
        exact_nll(model, held_out, START_ID).mean().item() / math.log(2)
        for model in track([checkpoint.model, quantized(checkpoint.model)], "held-out text")
    ]
    yield f"{checkpoint.path}", f"{bits[0]:.4f} bits/char", f"{bits[1]:.4f} bits/char in int8", "", ""
