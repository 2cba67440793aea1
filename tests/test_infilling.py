"""generation/infilling.py: templates, and texts longer than the model's context."""

import pytest
import torch

from generation import infill, stream_texts
from generation.infilling import fill_masks, parse_template, prompt_template, text_sampling, window_starts
from model import GPT, LLaDAModel, ModelConfig
from sampler import SamplingConfig
from tokenizer import MASK_ID, SimpleTokenizer
from utils.errors import ArgumentError

TOKENIZER = SimpleTokenizer("abcdefgh [MASK*]")
SIZES = {"vocab_size": TOKENIZER.vocab_size, "n_embd": 16, "n_head": 2, "n_layer": 1, "ngram_rows": 101}


def random_model(block_size: int) -> LLaDAModel:
    torch.manual_seed(0)
    model = LLaDAModel(ModelConfig(block_size=block_size, **SIZES)).eval()
    for parameter in model.parameters():  # some start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model(16)


def masks(n: int) -> torch.Tensor:
    return torch.full((n,), MASK_ID)


def test_a_template_is_text_with_counted_masks(model):
    a, b = TOKENIZER.char_to_id["a"], TOKENIZER.char_to_id["b"]
    assert parse_template("ab[MASK*3]b[MASK]", TOKENIZER).tolist() == [a, b, 1, 1, 1, b, 1]
    assert prompt_template("[MASK]a", 2, model, TOKENIZER)[0].tolist()[6:] == [a, 1, 1]  # a prompt is taken literally
    assert TOKENIZER.decode(prompt_template("[MASK]a", 2, model, TOKENIZER)[0]) == "[MASK]a"
    with pytest.raises(ValueError, match="unknown character 'z'"):
        parse_template("a[MASK]z", TOKENIZER)


def test_given_characters_stay_and_every_mask_becomes_one_character(model):
    for template, pattern in [("ab[MASK*6] gh", "ab...... gh"), ("a[MASK*50]b", f"a{'.' * 50}b"), ("[MASK]", ".")]:
        text = infill(model, TOKENIZER, template)
        assert len(text) == len(pattern)  # no [END], which this model predicts as often as any other token
        assert all(p in (".", c) for c, p in zip(text, pattern, strict=True))
    assert infill(model, TOKENIZER, "abc") == "abc"


# ------------------------------------------------------------------------------------------------- windows
def test_windows_cover_a_text_and_overlap(model):
    assert window_starts(16, 16, 8) == [0]
    assert window_starts(41, 16, 8) == [0, 8, 16, 24, 25]
    seen = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    [*_, state] = fill_masks(model, [masks(400)], text_sampling(steps=4))
    hook.remove()
    assert set(seen) == {16}  # the cost of a character does not depend on the length of the text
    assert len(seen) == state.nfe == 4 * len(window_starts(400, 16, 8))
    assert state.evaluations.tolist() == [state.nfe]


def test_the_sweep_costs_16_evaluations_a_window():
    model = random_model(block_size=32)
    for length, windows in ((20, 1), (32, 1), (48, 2), (64, 3), (80, 4)):
        [*_, state] = fill_masks(model, [masks(length)])
        assert state.nfe == 16 * windows


def test_the_sweep_costs_16_evaluations_a_block():
    """It once shared the 16 evaluations of a window among its blocks, and so wrote 16 neighbours at once."""
    model = random_model(block_size=256)
    states = list(fill_masks(model, [masks(240)], text_sampling(block_length=16)))
    assert states[-1].nfe == len(states) == 240
    assert all(int(state.step.revealed.sum()) == 1 for state in states)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"order": "left", "temperature": 0.5, "slide": 3},
        {"threshold": 0.2, "block_length": 4},
        {"order": "random", "schedule": "ancestral", "steps": 5, "remask": "cap", "eta": 0.3},
        {"cfg_scale": 1.0, "order": "margin", "steps": 6},
        {"order": "drawn_confidence", "steps": 6},
    ],
    ids=str,
)
def test_a_text_does_not_depend_on_its_batch(model, settings):
    templates = ["ab[MASK*9]", "[MASK*3]", "c[MASK*40]hh[MASK]", "[MASK*21]"]
    together = infill(model, TOKENIZER, templates, **settings)
    assert together == [infill(model, TOKENIZER, template, **settings) for template in templates]


@pytest.mark.parametrize("settings", [{}, {"order": "left"}, {"remask": "random", "steps": 6}], ids=str)
def test_the_pieces_of_a_stream_make_up_the_text(model, settings):
    prompts = ["ab", "", "abc abc abc abc abc abc"]
    pieces = list(stream_texts(model, TOKENIZER, prompts, max_out_tokens=30, **settings))
    texts = [prompt + "".join(parts) for prompt, parts in zip(prompts, zip(*pieces, strict=True), strict=True)]
    assert texts == infill(model, TOKENIZER, [prompt + "[MASK*30]" for prompt in prompts], **settings)
    if settings.get("order") == "left":
        assert pieces[0] == [texts[0][2], texts[1][0], ""]  # the third prompt is longer than the first window


# ------------------------------------------------------------------------------------------------- settings
def test_the_defaults_for_text_are_the_sweep_or_confidence_where_the_sweep_cannot_be_used():
    assert text_sampling() == SamplingConfig(temperature=1.0, order="sweep")
    assert text_sampling(temperature=0.5, schedule=None).order == "sweep"
    for setting in ({"schedule": "cosine"}, {"threshold": 0.9}, {"factor": 1}, {"entropy_bound": 1}, {"remask": "cap"}):
        assert text_sampling(**setting).order == "confidence"
        assert text_sampling(order="left", **setting).order == "left"


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        ("", {}, "nothing to write"),
        ("a[MASK]", {"slide": 0}, "slide must be at least 1"),
        ("a[MASK]", {"slide": 17}, r"slide must be in 1\.\.16"),
        ("a[MASK]", {"steps": 0}, "steps must be at least 1"),
        ("a[MASK]", {"threshold": 0.5, "factor": 1.0}, "threshold does not go with factor"),
        ("a[MASK*14]c[MASK*8]", {"schedule": (7, 7)}, "schedule reveals 14 positions, but 8 are masked"),
        ("a[MASK*15]" * 9, {"steps": 3, "block_length": 5, "slide": 16}, None),
        ("a[MASK*15]" * 9, {"steps": 2, "block_length": 5}, "steps must be at least 3"),
        ("[MASK*16]abcd[MASK]ef[MASK]gh", {"steps": 1, "block_length": 4}, "steps must be at least 4"),
        ("[MASK]bcdefghabcdefgh[MASK]bcdefg[MASK]", {"steps": 1, "block_length": 4}, "steps must be at least 2"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(model, template, settings, message):
    """Also settings that fit the first window of a text and not a later one."""
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        if message is None:
            fill_masks(model, [parse_template(template, TOKENIZER)], text_sampling(**settings))
        else:
            with pytest.raises(ValueError, match=message):
                fill_masks(model, [parse_template(template, TOKENIZER)], text_sampling(**settings))
    finally:
        hook.remove()
    assert not calls


def test_every_window_is_checked_with_the_masks_it_will_have(model):
    """What is accepted can be written to the end: no later window meets an error."""
    generator = torch.Generator().manual_seed(0)
    accepted, refused = 0, []
    for _ in range(60):
        template = torch.where(torch.rand(40, generator=generator) < 0.3, MASK_ID, 5)
        config = text_sampling(steps=int(torch.randint(1, 5, (), generator=generator)), block_length=4, order="left")
        try:
            states = fill_masks(model, [template], config)
        except ArgumentError as error:
            refused.append(error.argument)
            continue
        accepted += 1
        [*_, state] = states
        assert not (state.texts[0] == MASK_ID).any()
    assert accepted
    assert set(refused) == {"steps"}


def test_a_causal_model_is_refused():
    gpt = GPT(ModelConfig(block_size=16, **SIZES))
    with pytest.raises(ValueError, match="infilling needs a LLaDA model"):
        infill(gpt, TOKENIZER, "a[MASK]", steps=3)
    with pytest.raises(ValueError, match="needs a LLaDA model"):
        fill_masks(gpt, [masks(3)])
