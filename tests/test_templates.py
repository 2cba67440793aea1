"""Templates, and texts longer than the model's context."""

import pytest
import torch

from model import LLaDAConfig, LLaDAModel
from templates import infill, parse_template, prompt_template, stream_prompts, window_starts, write
from tokenizer import MASK_ID, SimpleTokenizer

TOKENIZER = SimpleTokenizer("abcdefgh [MASK*]")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LLaDAConfig(vocab_size=TOKENIZER.vocab_size, block_size=16, n_embd=16, n_head=2, n_layer=1, ngram_rows=101)
    model = LLaDAModel(config).eval()
    for parameter in model.parameters():  # some start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_a_template_is_text_with_counted_holes():
    a, b = TOKENIZER.char_to_id["a"], TOKENIZER.char_to_id["b"]
    assert parse_template("ab[MASK*3]b[MASK]", TOKENIZER).tolist() == [a, b, 1, 1, 1, b, 1]
    assert prompt_template("[MASK]a", 2, TOKENIZER).tolist()[6:] == [a, 1, 1]  # a prompt is taken literally
    assert TOKENIZER.decode(prompt_template("[MASK]a", 2, TOKENIZER)) == "[MASK]a"
    with pytest.raises(ValueError, match="unknown character 'z'"):
        parse_template("a[MASK]z", TOKENIZER)


def test_what_is_given_stands_and_what_is_hidden_is_written(model):
    for template, pattern in [("ab[MASK*6] gh", "ab...... gh"), ("a[MASK*50]b", f"a{'.' * 50}b"), ("[MASK]", ".")]:
        text = infill(model, TOKENIZER, template)
        assert len(text) == len(pattern)  # no [END], though this model likes it as well as any other token
        assert all(p in (".", c) for c, p in zip(text, pattern, strict=True))
    assert infill(model, TOKENIZER, "abc") == "abc"


def test_windows_cover_a_text_and_overlap(model):
    assert window_starts(16, 16, 8) == [0]
    assert window_starts(41, 16, 8) == [0, 8, 16, 24, 25]
    seen = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    [*_, draft] = write(model, [torch.full((400,), MASK_ID)], steps=4)
    hook.remove()
    assert set(seen) == {16}  # so a character costs the same, however long the text
    assert len(seen) == draft.nfe == 4 * len(window_starts(400, 16, 8))
    assert draft.evaluations.tolist() == [draft.nfe]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"order": "left", "temperature": 0.5, "slide": 3},
        {"threshold": 0.2, "block_length": 4},
        {"order": "random", "schedule": "ancestral", "steps": 5, "remask": "cap", "eta": 0.3},
        {"cfg_scale": 1.0, "order": "margin", "steps": 6},
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
    pieces = list(stream_prompts(model, TOKENIZER, prompts, 30, **settings))
    texts = [prompt + "".join(parts) for prompt, parts in zip(prompts, zip(*pieces, strict=True), strict=True)]
    assert texts == infill(model, TOKENIZER, [prompt + "[MASK*30]" for prompt in prompts], **settings)
    if settings.get("order") == "left":
        assert pieces[0] == [texts[0][2], texts[1][0], ""]  # the third prompt goes on beyond the first window


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        ("", {}, "nothing to write"),
        ("a[MASK]", {"slide": 0}, r"slide must be in 1\.\.16"),
        ("a[MASK]", {"steps": 0}, "steps must be at least 1"),
        ("a[MASK]", {"threshold": 0.5, "factor": 1.0}, "decide the same thing"),
    ],
)
def test_bad_values_are_refused_at_once(model, template, settings, message):
    with pytest.raises(ValueError, match=message):
        write(model, [parse_template(template, TOKENIZER)], **settings)
