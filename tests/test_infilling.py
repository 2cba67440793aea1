"""Templates, texts longer than the model's context, and texts that end: `write` with LLaDA and GPT."""

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from toy import random_model, seeded

from autoregressive import exact_nll
from config import DecodingConfig, SamplingConfig
from extras.bpe import train_bpe
from generation import GeneratorTransformer
from generation.text import parse_template, pieces_of
from generation.write import known_before_masks, mask_predictor, window_starts, write
from tokenizer import END_ID, MASK_ID, PAD_ID, START_ID, SimpleTokenizer
from utils.errors import ArgumentError

TOKENIZER = SimpleTokenizer("abcdefgh [MASK*]")
AB = SimpleTokenizer("ab")
A, B = 4, 5
BOTH = pytest.mark.parametrize("name", ["gpt", "llada"])


def writer_of(name: str = "llada", block_size: int = 16, tokenizer=TOKENIZER, segments: str = "window"):
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": block_size, "n_layer": 1}
    return GeneratorTransformer(random_model(name, segments=segments, **sizes), tokenizer)


def segment_writer(name: str, block_size: int = 5, segments: str = "line") -> GeneratorTransformer:
    return writer_of(name, block_size, AB, segments)


@pytest.fixture(scope="module")
def writer():
    return writer_of()


def masks(n: int) -> torch.Tensor:
    return torch.full((n,), MASK_ID)


def written(model, starts, **settings):
    """The last state."""
    *_, state = write(model, starts, SamplingConfig(**settings), seeded())
    return state


def texts_of(writer, prompts: list[str], length: int, **settings) -> list[str]:
    pieces = writer.stream(prompts, writer.settings(**settings), max_out_tokens=length)
    return ["".join(text) for text in zip(*pieces, strict=True)]


# ------------------------------------------------------------------------------------------------- templates
def test_a_template_is_text_with_counted_masks_and_every_mask_becomes_one_character(writer):
    a, b = TOKENIZER.char_to_id["a"], TOKENIZER.char_to_id["b"]
    assert parse_template("ab[MASK*3]b[MASK]", TOKENIZER).tolist() == [a, b, 1, 1, 1, b, 1]
    start, known = writer.prompt_start("[MASK]a", 2)  # a prompt is taken literally
    assert start.tolist()[6:] == [a, 1, 1]
    assert (TOKENIZER.decode(start), known) == ("[MASK]a", 7)
    for template, pattern in [("ab[MASK*6] gh", "ab...... gh"), ("a[MASK*50]b", f"a{'.' * 50}b"), ("abc", "abc")]:
        text = writer.infill(template)
        assert len(text) == len(pattern)  # no [END], which this model predicts as often as any other token
        assert all(p in (".", c) for c, p in zip(text, pattern, strict=True))


def test_windows_cover_a_text_and_the_sweep_costs_32_evaluations_each(writer):
    assert window_starts(41, 16, 8) == [0, 8, 16, 24, 25]
    with mock.patch.object(writer.model, "forward", wraps=writer.model.forward) as forward:
        state = written(writer.model, [masks(400)], steps=4, correct=0)
    seen = [call.args[0].shape[1] for call in forward.call_args_list]
    assert set(seen) == {16}  # the cost of a character does not depend on the length of the text
    assert len(seen) == state.nfe == 4 * len(window_starts(400, 16, 8))
    larger = writer_of(block_size=64).model
    for length, nfe in ((20, 20), (64, 32), (96, 64), (160, 128)):  # each further window writes 32 characters
        assert written(larger, [masks(length)], correct=0).nfe == nfe
    states = write(writer_of(block_size=256).model, [masks(240)], SamplingConfig(block_length=16, correct=0))
    costs = [(state.nfe, len(state.written[0])) for state in states]
    assert costs == [(k + 1, 1) for k in range(240)]  # 16 a block, and not 16 for all blocks


SETTINGS = [
    {},
    {"order": "left", "temperature": 0.5, "slide": 3, "correct": 0},
    {"threshold": 0.2, "block_length": 4, "correct": 0},
    {"order": "random", "steps": 5, "correct": 2},
    {"cfg_scale": 1.0, "order": "confidence", "steps": 6, "correct": 0},
    {"order": "drawn_confidence", "steps": 6, "correct": 0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_text_does_not_depend_on_its_batch_and_its_pieces_make_it_up(writer, settings):
    templates = ["ab[MASK*9]", "[MASK*3]", "c[MASK*40]hh[MASK]", "[MASK*21]"]
    together = writer.infill(templates, **settings)
    assert together == [writer.infill(template, **settings) for template in templates]
    prompts = ["ab", "", "abc abc abc abc abc abc"]
    pieces = list(writer.stream(prompts, writer.settings(**settings), max_out_tokens=30))
    texts = [prompt + "".join(parts) for prompt, parts in zip(prompts, zip(*pieces, strict=True), strict=True)]
    assert texts == writer.infill([prompt + "[MASK*30]" for prompt in prompts], **settings)
    assert len(pieces) == 1 if settings.get("correct", 4) else len(pieces) > 1  # what may change is not shown yet


def test_the_pieces_of_a_long_text_are_found_in_linear_time():
    """Each look at the text begins where the one before ended."""

    class Counted(list):
        looks = 0

        def __getitem__(self, index):
            Counted.looks += 1
            return super().__getitem__(index)

    states = (SimpleNamespace(texts=[Counted([A] * n + [MASK_ID] * (600 - n))]) for n in range(1, 601))
    assert "".join(piece for [piece] in pieces_of(states, AB, [0], DecodingConfig())) == "a" * 600
    assert Counted.looks < 5 * 600


def test_pieces_never_end_inside_a_character_but_at_the_end_of_the_text():
    tokenizer = train_bpe(["ab"], 261)
    ids = torch.from_numpy(tokenizer.encode("a\u00e9\u00e9").astype("int64"))  # é is two bytes, each a token
    states = (SimpleNamespace(texts=[torch.cat([ids[:n], masks(4 - n)])]) for n in range(1, 5))
    assert list(pieces_of(states, tokenizer, [0], DecodingConfig())) == [["a"], [""], ["\u00e9"], [""], ["\ufffd"]]


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        ("", {}, "nothing to write"),
        ("a[MASK]", {"slide": 17}, r"slide must be in 1\.\.16"),
        ("a[MASK*14]c[MASK*8]", {"order": "left", "schedule": (7, 7)}, "reveals 14 positions, but 8 are masked"),
        ("a[MASK*15]" * 9, {"steps": 3, "block_length": 5, "slide": 16}, None),
        ("a[MASK*15]" * 9, {"steps": 2, "block_length": 5}, "steps must be at least 3"),
        ("[MASK*16]abcd[MASK]ef[MASK]gh", {"steps": 1, "block_length": 4}, "steps must be at least 4"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(writer, template, settings, message):
    """Also settings that fit the first window of a text and not a later one."""
    expected = nullcontext() if message is None else pytest.raises(ValueError, match=message)
    with mock.patch.object(writer.model, "forward", wraps=writer.model.forward) as forward, expected:
        writer.infill(template, **settings)
    assert bool(forward.called) == (message is None)


def test_gpt_fills_no_gaps():
    gpt = writer_of("gpt")
    assert gpt.infill("a[MASK*3]").startswith("a")
    with pytest.raises(ValueError, match=r"no token may stand behind a \[MASK\]"):
        gpt.infill("a[MASK]b")
    assert [known_before_masks(parse_template(t, TOKENIZER)) for t in ("ab", "a[MASK]", "[MASK]a")] == [2, 1, None]


# ------------------------------------------------------------------------------------------------- texts that end
@pytest.mark.parametrize(("name", "settings"), [("gpt", {}), ("llada", {"order": "left", "correct": 0})])
def test_segments_are_written_with_their_likelihood(name, settings):
    """LLaDA from left to right, so that what stands behind the [END] plays no part."""
    writer, expected = segment_writer(name, 4), {}
    for text in ("".join(text) for n in range(4) for text in itertools.product("ab", repeat=n)):
        row = torch.tensor([*AB.encode(text).tolist(), END_ID][:3])  # three tokens need no [END]
        if name == "gpt":
            expected[text] = math.exp(-float(exact_nll(writer.model, row[None], START_ID).sum()))
        else:
            seen = torch.stack([torch.cat([row[:i], masks(3 - i)]) for i in range(len(row))])
            p = mask_predictor(writer.model, may_end=True)(seen).softmax(-1)
            expected[text] = math.prod(p[i, i, token].item() for i, token in enumerate(row))
    assert sum(expected.values()) == pytest.approx(1)
    found = texts_of(writer, [""] * 3000, 3, temperature=1.0, **settings)
    assert all(found.count(text) / 3000 == pytest.approx(p, abs=0.035) for text, p in expected.items())


def test_llada_reads_a_segment_as_it_learned_it():
    """[START], the text and [END]s."""
    model, seen = segment_writer("llada", 6).model, []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    rows = torch.tensor([[A, MASK_ID, B, A], [A, B, MASK_ID, B]])
    logits = mask_predictor(model, may_end=True)(rows)
    contexts = [[START_ID, A, MASK_ID, B, A, END_ID], [START_ID, A, B, MASK_ID, B, END_ID]]
    assert seen[0].tolist() == contexts
    assert torch.equal(logits, model(torch.tensor(contexts))[:, 1:5])
    assert (mask_predictor(model)(rows)[..., END_ID] == -torch.inf).all()  # templates are exact


@pytest.mark.parametrize("settings", [{}, {"order": "confidence", "steps": 3}, {"correct": 2}], ids=str)
def test_texts_are_cut_at_the_first_end(settings):
    writer, start = segment_writer("llada", 12), torch.tensor([A] + [MASK_ID] * 8)
    ended = 0
    for text in written(writer.model, [start] * 40, temperature=1.0, **settings).texts:
        ids = text.tolist()
        end = ids.index(END_ID) if END_ID in ids else len(ids)
        assert set(ids[end:]) <= {END_ID}
        ended += end < len(ids) - 1
    assert ended  # else this test shows nothing
    assert len(writer.infill("a[MASK*8]", **settings)) == 9  # a template ends where it ends


@pytest.mark.parametrize("order", ["confidence", "drawn_confidence"])
@pytest.mark.parametrize("steps", [None, 4])
def test_orders_of_confidence_do_not_begin_with_the_ends_at_the_far_end(order, steps):
    model = segment_writer("llada", 65).model
    logits = torch.zeros(1, 65, AB.vocab_size)
    logits[..., [PAD_ID, MASK_ID, START_ID]] = -torch.inf
    logits[..., END_ID] = torch.linspace(-3, 3, 65)  # surest of all at the far end, as trained models are
    model.forward = lambda tokens: logits.clone()
    states = write(model, [masks(64)], SamplingConfig(order=order, steps=steps, correct=0))
    first, last = (max(state.written[0].tolist()) for state in (next(states), list(states)[-1]))
    assert first < 16 < last


# ------------------------------------------------------------------------------------------------- pairs
@BOTH
def test_the_prompt_of_a_pair_ends_with_start_and_its_completion_is_written_alone(name):
    writer = segment_writer(name, 16, "pairs")
    start, known = writer.prompt_start("b", 20)
    assert start.tolist() == [B, START_ID, *masks(13)]  # [START] and the text fill the context
    assert known == 2
    texts = texts_of(writer, ["ab"] * 30, 6, temperature=1.0)
    assert max(map(len, texts)) <= 6
    assert set("".join(texts)) <= set("ab")
    assert any(not text.startswith("ab") for text in texts)
    assert len(writer.generate("a" * 10, max_out_tokens=3)) <= 3


@BOTH
def test_a_prompt_without_room_is_refused(name):
    writer = segment_writer(name, 16)
    with pytest.raises(ArgumentError, match="prompt takes 15 tokens, which leaves no room to write in a context of 16"):
        writer.generate("a" * 15)
    assert len(writer.generate("a" * 14, max_out_tokens=1)) <= 15
    writer.model.config = replace(writer.model.config, segments="window")
    assert len(writer.generate("a" * 15, max_out_tokens=1)) >= 15
