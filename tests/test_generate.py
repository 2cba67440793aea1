"""generate.py and generation/: the real commands on tiny checkpoints, and the library."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import ROOT

import generate
from autoregressive import BeamConfig, DecodingConfig, exact_nll
from checkpoint import Checkpoint, save_checkpoint
from generation import GeneratorTransformer, generate_text, generate_texts, infill, stream_texts
from generation.flags import DEFAULTS, TEMPERATURE, opening
from generation.infilling import fill_masks, parse_template, text_sampling
from generation.live import PAUSE, PAUSES
from model import MODELS, ModelConfig
from sampler import REMASKERS
from tokenizer import END_ID, MASK_ID, START_ID, SimpleTokenizer
from unmasking import ORDERS, SCHEDULES
from utils.console import run_program
from utils.errors import ArgumentError

TOKENIZER = SimpleTokenizer("\n :abcdefghijklmnopqrstuvwxyzROMEO")
BLOCK_SIZE = 24


def tiny_model(name: str, seed: int = 0):
    """Random weights everywhere, so that the output depends on the input; [END] is nearly impossible."""
    config = ModelConfig(TOKENIZER.vocab_size, BLOCK_SIZE, n_embd=16, n_head=2, n_layer=2, ngram_rows=101)
    model = MODELS[name](config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.15, generator=generator)
        model.head.weight *= 2
        model.encoder.embedding.weight[:, 0] = 2.0  # a constant feature, which makes [END] unlikely
        model.head.weight[END_ID] = -100.0 * (torch.arange(16) == 0)
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with out/llada/last.pt and, newer, out/gpt/last.pt."""
    for name in ("llada", "gpt"):
        path = tmp_path / "out" / name / "last.pt"
        save_checkpoint(path, Checkpoint(tiny_model(name), TOKENIZER, {"name": "toy"}, step=7))
        os.utime(path, (1, {"llada": 1, "gpt": 2}[name]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """call("--top", "3") runs generate.py's main in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        code = 0
        try:
            run_program(generate.main)
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return call


# ------------------------------------------------------------------------------------------------- text
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_it_writes_the_same_text(folder, command):
    flags = ["--prompt", "ROMEO:", "--length", 60, "--slide", 8]
    plain, compiled = (command("generate.py", *flags, *more) for more in ([], ["--compile"]))
    assert compiled.stdout == plain.stdout
    assert "compiling" in compiled.stderr


@pytest.mark.parametrize("name", ["gpt", "llada"])
def test_the_command_writes_text_that_begins_with_the_prompt(folder, command, name):
    process = command("generate.py", "--model", name, "--prompt", "ROMEO:", "--length", 40)
    assert process.stdout.startswith("ROMEO:")
    assert len(process.stdout) == len("ROMEO:") + 40 + 1
    assert f"out/{name}/last.pt: {name}, step 7" in process.stderr
    settings = {"slide": BLOCK_SIZE // 2} if name == "gpt" else {}
    text = generate_text(tiny_model(name), TOKENIZER, "ROMEO:", max_out_tokens=40, temperature=TEMPERATURE, **settings)
    assert process.stdout == text + "\n"


@pytest.mark.parametrize("name", ["gpt", "llada"])
def test_same_seed_same_text(call, name):
    texts = [call("--model", name, "--prompt", "the ", "--length", 20, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_newest_checkpoint_is_the_default(call):
    assert call("--length", 3)[2].startswith("out/gpt/last.pt: gpt")
    assert call("--model", "llada", "--length", 3)[2].startswith("out/llada/last.pt: llada")


@pytest.mark.parametrize("name", ["gpt", "llada"])
@pytest.mark.parametrize("prompt", ["", "a", "o romeo romeo " * 10])
def test_prompts_may_be_empty_or_longer_than_the_context(call, name, prompt):
    code, text, _ = call("--model", name, "--prompt", prompt, "--length", 30)
    assert (code, len(text)) == (0, len(prompt) + 30 + 1)
    assert text.startswith(prompt)


def test_several_samples_have_a_line_before_each(folder, call):
    _, text, _ = call("--prompt", "ROMEO:", "--length", 9, "--num-samples", 3)
    writer = GeneratorTransformer.load_from_checkpoint(folder / "out/gpt/last.pt")
    samples = generate_texts(writer.model, TOKENIZER, ["ROMEO:"] * 3, max_out_tokens=9, temperature=TEMPERATURE)
    assert text == separated(samples)
    assert len(set(samples)) == 3


def separated(texts: list[str], name: str = "sample") -> str:
    """What the command prints for several texts."""
    return "".join(f"--- {name} {i} of {len(texts)} ---\n{text}\n" for i, text in enumerate(texts, 1))


def test_gpt_slides_by_half_of_the_context_unless_told_otherwise(call):
    def written(*flags) -> str:
        return call("--prompt", "ROMEO:", "--length", 60, *flags)[1]

    def expected(**settings) -> str:
        settings["temperature"] = TEMPERATURE
        return generate_text(tiny_model("gpt"), TOKENIZER, "ROMEO:", max_out_tokens=60, **settings) + "\n"

    assert written() == expected(slide=BLOCK_SIZE // 2) != expected()
    assert written("--slide", 1) == expected()
    assert written("--context-len", 10) == expected(context_len=10, slide=5)
    best = GeneratorTransformer(tiny_model("gpt"), TOKENIZER).beam_search("the ", 2, 40, slide=BLOCK_SIZE // 2)
    assert call("--prompt", "the ", "--beams", 2, "--length", 40)[1] == best[0][0] + "\n"


@pytest.mark.parametrize("name", ["gpt", "llada"])
def test_a_text_without_a_prompt_begins_after_a_newline_that_is_not_printed(call, name):
    settings = {"slide": BLOCK_SIZE // 2} if name == "gpt" else {}
    settings["temperature"] = TEMPERATURE
    expected = generate_texts(tiny_model(name), TOKENIZER, ["\n"] * 2, max_out_tokens=30, **settings)
    flags = ["--model", name, "--length", 30]
    assert call(*flags)[1] == expected[0][1:] + "\n"
    assert call(*flags, "--num-samples", 2)[1] == separated([text[1:] for text in expected])


def test_nothing_is_added_for_models_of_segments_or_without_newlines():
    model = tiny_model("gpt")
    assert opening("", model, TOKENIZER) == "\n"
    assert opening("a", model, TOKENIZER) == "a"
    assert opening("", model, SimpleTokenizer("abc")) == ""
    model.config = replace(model.config, segments="speech")
    assert opening("", model, TOKENIZER) == ""


def test_models_are_found_in_folders(folder, call):
    (folder / "elsewhere").mkdir()
    (folder / "out/llada").rename(folder / "elsewhere/llada")
    assert call("--checkpoint", "elsewhere/llada", "--length", 3)[2].startswith("elsewhere/llada/last.pt: llada")
    (folder / "elsewhere/llada/best.pt").hardlink_to(folder / "elsewhere/llada/last.pt")
    assert call("--checkpoint", "elsewhere/llada", "--length", 3)[2].startswith("elsewhere/llada/best.pt: llada")
    assert call("--out", "elsewhere", "--length", 3)[2].startswith("elsewhere/llada/best.pt: llada")
    assert "no checkpoint under elsewhere/" in call("--out", "elsewhere", "--model", "gpt")[2]


def test_every_text_of_a_batch_is_the_one_written_alone():
    model, prompts = tiny_model("gpt"), ["", "ROMEO:", "a much longer prompt than the window holds"]
    together = generate_texts(model, TOKENIZER, prompts, max_out_tokens=30, slide=5, seed=3)
    assert together == [generate_text(model, TOKENIZER, p, max_out_tokens=30, slide=5, seed=3) for p in prompts]


def test_a_text_ends_with_its_stop_string(call):
    whole = call("--prompt", "ROMEO:", "--length", 60)[1][len("ROMEO:") :]
    stop = whole[20:22]
    _, text, _ = call("--prompt", "ROMEO:", "--length", 60, "--stop", stop, "--stop", "no such text")
    assert text == "ROMEO:" + whole[: whole.index(stop) + 2] + "\n"


def test_the_stream_is_what_generate_writes():
    writer = GeneratorTransformer(tiny_model("gpt"), TOKENIZER)
    text = writer.generate("the", 8, 0.7, 25)
    pieces = list(writer.stream("the", context_len=8, temperature=0.7, max_out_tokens=25))
    assert "the" + "".join(pieces) == text
    assert len(pieces) == 25


def test_a_config_decides_about_the_temperature_unless_one_is_given():
    writer, greedy = GeneratorTransformer(tiny_model("gpt"), TOKENIZER), DecodingConfig(temperature=0.0)
    texts = {writer.generate("the", config=greedy, seed=seed, max_out_tokens=20) for seed in range(3)}
    assert texts == {"the" + "".join(writer.stream("the", config=greedy, max_out_tokens=20))}
    assert len({writer.generate("the", temperature=2.0, config=greedy, seed=seed) for seed in range(3)}) == 3
    with pytest.raises(TypeError, match="a llada model needs a SamplingConfig, got a DecodingConfig"):
        GeneratorTransformer(tiny_model("llada"), TOKENIZER).generate("the", config=greedy)


# ------------------------------------------------------------------------------------------------- beams and tables
def test_beams_print_the_best_texts_with_their_scores(call):
    code, text, notes = call("--prompt", "the ", "--beams", 4, "--num-samples", 2, "--length", 12)
    best = GeneratorTransformer(tiny_model("gpt"), TOKENIZER).beam_search("the ", 4, 12, num_return=2)
    assert text == separated([best[0][0], best[1][0]], "beam")
    ids = torch.from_numpy(TOKENIZER.encode(best[0][0]).astype("int64"))
    score = -exact_nll(tiny_model("gpt"), ids[None], START_ID)[0, 4:].mean().item()
    assert code == 0
    assert f"score {score:.4f}" in notes


def test_the_table_shows_ids_and_true_probabilities(call):
    _, text, _ = call("--prompt", "RO", "--top", 3)
    lines = text.splitlines()
    assert lines[0] == f"[START] 2   'R' {TOKENIZER.char_to_id['R']}   'O' {TOKENIZER.char_to_id['O']}"
    ids = torch.tensor([[START_ID, *TOKENIZER.encode("RO").tolist()]])
    best = tiny_model("gpt")(ids)[0, -1].softmax(-1).topk(3)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    expected = [f"{TOKENIZER.id_to_char[i]!r} {100 * p:.3f} %" for i, p in rows]
    assert [" ".join(line.split()) for line in lines[2:]] == expected


@pytest.mark.parametrize("width", [24, 80])
def test_the_tokens_of_a_prompt_fit_the_terminal(call, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    prompt = "the ROMEO:\n and so on, to the end".replace(",", "")
    lines = call("--prompt", prompt, "--top", 1)[1].split("\n\n")[0].splitlines()
    cells = [cell for line in lines for cell in line.split("   ") if cell]
    assert cells == ["[START] 2", *(f"{char!r} {TOKENIZER.char_to_id[char]}" for char in prompt)]
    assert max(map(len, lines)) <= width
    assert all(len(line) + 3 + len(after.split("   ")[0]) > width for line, after in pairwise(lines))


def test_the_mask_predictor_has_a_table_for_every_mask(call):
    _, text, _ = call("--model", "llada", "--prompt", "R[MASK]m[MASK*2]", "--top", 2)
    assert [int(line.split()[-1]) for line in text.splitlines() if line.startswith("[MASK] at")] == [1, 3, 4]
    table = GeneratorTransformer(tiny_model("llada"), TOKENIZER).next_tokens("the", k=100)
    assert sum(p for _, p in table) == pytest.approx(1)
    assert table == sorted(table, key=lambda row: -row[1])


# ------------------------------------------------------------------------------------------------- LLaDA's samplers
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--steps 3",
        "--order left --temperature 0.5 --top-k 5 --top-p 0.9 --repetition-penalty 1.2",
        "--order drawn_confidence --steps 5 --block-length 4 --temperature 0",
        "--order confidence --steps 4 --schedule cosine --block-length 5 --temperature 0",
        "--order random --schedule ancestral --steps 6 --remask rescale --eta 0.3",
        "--schedule 6,7 --cfg 0.5",
        "--threshold 0.5",
        "--factor 1",
        "--order entropy --entropy-bound 0.5",
    ],
)
def test_a_template_is_filled_by_every_sampler(call, flags):
    code, text, notes = call("--model", "llada", "--infill", "ROMEO:[MASK*4]love[MASK*9]", *flags.split())
    assert code == 0, notes
    assert len(text) == len("ROMEO:....love.........\n")
    assert (text[:6], text[10:14]) == ("ROMEO:", "love")
    assert "13 characters in" in notes


def test_infilling_chooses_the_newest_llada_model_and_is_the_same_from_python(call):
    template = "ROMEO:[MASK*4]love[MASK*35]"
    _, text, _ = call("--infill", template, "--seed", 5, "--steps", 4, "--num-samples", 2)
    together = infill(tiny_model("llada"), TOKENIZER, [template] * 2, seed=5, steps=4, temperature=TEMPERATURE)
    assert text == separated(together)


@pytest.mark.parametrize(("length", "cost"), [(1, "1 network evaluation"), (24, "16 network evaluations")])
def test_the_speed_line_counts_network_evaluations(call, length, cost):
    assert call("--infill", f"[MASK*{length}]")[2].endswith(f"characters/s, {cost}\n")


def test_blocks_get_16_evaluations_each(call):
    notes = call("--model", "llada", "--block-length", 16, "--length", 24)[2]
    assert notes.endswith("24 network evaluations\n")  # 16 for the first block, 8 for the half that is left


# ------------------------------------------------------------------------------------------------- views
def test_watching_shows_every_step_and_changes_nothing(call):
    arguments = ["--model", "llada", "--prompt", "RO", "--length", 16, "--steps", 4]
    _, text, _ = call(*arguments)
    _, watched, notes = call(*arguments, "--watch")
    steps = [line.split(maxsplit=1)[1] for line in notes.splitlines() if line[:4].strip().isdigit()]
    assert watched == text
    assert [step.count("·") for step in steps] == [12, 8, 4, 0]
    assert steps[-1].replace("⏎", "\n") == text.strip("\n")


@pytest.mark.parametrize("name", ["gpt", "llada"])
@pytest.mark.parametrize("flags", [["--prompt", "ROMEO:"], [], ["--num-samples", 2]], ids=str)
def test_views_do_not_change_the_texts_of_either_model(folder, call, name, flags):
    arguments = ["--model", name, "--length", 30, *flags]
    _, text, plain = call(*arguments)
    code, viewed, notes = call(*arguments, "--watch", "--pause", 0, "--html", "a.html", "--gif", "a.gif")
    assert (code, viewed) == (0, text)
    nfe = 30 if name == "gpt" else int(re.search(r"(\d+) network evaluations", plain)[1])
    assert len([line for line in notes.splitlines() if line[:4].strip().isdigit()]) == nfe
    assert f"{nfe} network evaluations" in notes
    assert "wrote a.html" in notes
    assert (folder / "a.gif").read_bytes().startswith(b"GIF8")
    page = (folder / "a.html").read_text("utf-8")
    title = {"gpt": "GPT", "llada": "LLaDA"}[name] + (": ROMEO:" if "--prompt" in flags else "")
    assert f'"title":"{title}"' in page


def test_a_watched_text_ends_with_its_stop_string(call):
    flags = ["--prompt", "ROMEO:", "--length", 60, "--stop"]
    stop = call("--prompt", "ROMEO:", "--length", 60)[1][20:22]
    assert call(*flags, stop, "--watch", "--pause", 0)[1] == call(*flags, stop)[1]


def test_a_race_is_the_texts_of_both_models_and_says_which(folder, call):
    flags = ["--prompt", "ROMEO:", "--length", 30, "--seed", 3]
    code, text, notes = call("--race", *flags, "--steps", 4, "--html", "race.html")
    texts = [call("--model", "llada", *flags, "--steps", 4)[1], call("--model", "gpt", *flags)[1]]
    assert (code, text) == (0, f"--- LLaDA ---\n{texts[0]}--- GPT ---\n{texts[1]}")
    assert "out/llada/last.pt: llada" in notes
    assert "out/gpt/last.pt: gpt" in notes
    assert '"title":"LLaDA and GPT: ROMEO:"' in (folder / "race.html").read_text("utf-8")
    assert call("--race", "--length", 30)[1].startswith("--- LLaDA ---\n")  # the hidden newline is not printed
    assert len(call("--race", "--length", 30)[1]) == len("--- LLaDA ------ GPT ---") + 2 * 31 + 2
    shutil.rmtree(folder / "out/gpt")
    assert "no checkpoint" in call("--race")[2]


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_generated(folder, call):
    for path in ("nowhere/a.html", "out"):
        for flag in ("--html", "--gif"):
            code, text, notes = call(flag, path)
            assert (code, text) == (2, "")
            assert [f"{flag} {path}: cannot be written" in line for line in notes.splitlines()] == [True]


# ------------------------------------------------------------------------------------------------- files, pipes
HOLES = b"\xef\xbb\xbfROMEO:\r\n\xc3\xa9 a [MASK*9] love\x00 [MASK]\r\n\tand \xe2\x82\xac so on [MASK*20]"


def matches(filled: bytes) -> bool:
    """Whether HOLES were filled and nothing else was changed."""
    parts = re.split(rb"\[MASK(?:\*(\d+))?\]", HOLES)
    for i, part in enumerate(parts):
        if i % 2:  # what was written is ASCII here
            filled = filled[int(part or 1) :]
        else:
            assert filled.startswith(part)
            filled = filled[len(part) :]
    return filled == b""


@pytest.fixture
def pipe(monkeypatch):
    """pipe(b"text") makes a pipe with this content standard input; pipe(None) one that never ends."""
    with ExitStack() as opened:

        def open_pipe(content: bytes | None) -> None:
            reading, writing = os.pipe()
            end = opened.enter_context(open(writing, "wb"))
            monkeypatch.setattr(sys, "stdin", opened.enter_context(open(reading, encoding="utf-8")))
            if content is not None:
                end.write(content)
                end.close()

        yield open_pipe


@pytest.mark.parametrize("flags", [[], ["--order", "left", "--steps", 5], ["--remask", "cap", "--steps", 9]], ids=str)
def test_a_file_is_filled_and_every_other_byte_stays(folder, call, pipe, flags):
    (folder / "holes.txt").write_bytes(HOLES)
    flags = [*flags, "--repetition-penalty", 1.2, "--infill-file"]
    code, filled, notes = call(*flags, "holes.txt")
    assert code == 0
    assert matches(filled.encode())
    assert notes.splitlines()[1] == "7 characters unknown to the model: left as they are, it reads [MASK] there"
    assert len(notes.splitlines()) == 3
    pipe(HOLES)
    assert call(*flags, "-")[1] == filled


def test_the_network_reads_masks_where_it_does_not_know_the_character():
    model, seen = tiny_model("llada"), []
    template = parse_template("ab\x00c[MASK*3]\u20acd", TOKENIZER, keep_unknown=True)
    assert (template == TOKENIZER.vocab_size).nonzero()[:, 0].tolist() == [2, 7]
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].tolist()))
    [*_, state] = fill_masks(model, [template], text_sampling(order="left", temperature=0.0))
    known = [i if i < TOKENIZER.vocab_size else MASK_ID for i in template.tolist()]
    assert [[tokens[i] for i in (0, 1, 2, 3, 7, 8)] for tokens in seen] == [[*known[:4], *known[7:]]] * 3
    assert (state.texts[0] == template).tolist() == [True] * 4 + [False] * 3 + [True] * 2
    best = model(torch.tensor([known]))[0, 4]  # the first of the three, by hand
    best[END_ID] = -torch.inf
    assert state.texts[0][4] == best.argmax()


def test_piped_input_is_the_prompt_if_asked_for_and_else_refused(call, pipe):
    pipe(b"ROMEO:\r\nthe\n")
    text = call("--prompt", "-", "--length", 8)[1]
    assert text.startswith("ROMEO:\nthe")
    assert len(text) == len("ROMEO:\nthe") + 8 + 1
    pipe(b"\xff")
    assert "--prompt standard input is not UTF-8 text (byte 0)" in call("--prompt", "-")[2]
    pipe(b"ROMEO:\n")
    code, text, notes = call("--length", 8)
    assert (code, text) == (2, "")
    assert "--prompt is not given, but standard input holds text: --prompt - reads it" in notes
    assert len(call("--length", 8, "--prompt", "")[1]) == 9


@pytest.mark.parametrize("content", [b"", None])
def test_an_empty_pipe_is_no_prompt_and_an_endless_one_is_not_waited_for(call, pipe, content):
    pipe(content)
    assert len(call("--length", 8)[1]) == 9


def test_a_prompt_in_another_encoding_is_one_line(folder):
    words = [sys.executable, ROOT / "generate.py", "--prompt", b"caf\xe9"]
    process = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert "--prompt: byte 0xE9 at position 3 is not valid utf-8" in process.stderr


# ------------------------------------------------------------------------------------------------- the library
def test_both_models_have_the_same_arguments():
    for name, settings in (("gpt", {"slide": 8}), ("llada", {"steps": 4})):
        writer = GeneratorTransformer(tiny_model(name), TOKENIZER)
        arguments = {"max_out_tokens": 30, "seed": 3, "temperature": 0.8, **settings}
        text = generate_text(writer.model, TOKENIZER, "ROMEO:", **arguments)
        assert len(text) == 36
        assert text == generate_texts(writer.model, TOKENIZER, ["the", "ROMEO:"], **arguments)[1]
        assert text == writer.generate("ROMEO:", **arguments)
        assert text == "ROMEO:" + "".join(writer.stream("ROMEO:", **arguments))


def test_the_class_infills_as_the_function_does():
    writer = GeneratorTransformer(tiny_model("llada"), TOKENIZER)
    template = "ROMEO:[MASK*4]love"
    assert writer.infill(template, seed=2, steps=2) == infill(writer.model, TOKENIZER, template, seed=2, steps=2)
    with pytest.raises(ValueError, match="infilling needs a LLaDA model"):
        GeneratorTransformer(tiny_model("gpt"), TOKENIZER).infill(template)


def test_stop_is_a_string_or_several():
    model = tiny_model("gpt")
    whole = generate_text(model, TOKENIZER, max_out_tokens=60)
    stop = whole[20]
    expected = whole[: whole.index(stop) + 1]
    for stops in (stop, [stop], ("no such text", stop)):
        assert generate_text(model, TOKENIZER, max_out_tokens=60, stop=stops) == expected
    for stops in ("", ["", "a"]):
        with pytest.raises(ArgumentError, match="stop must not be an empty string"):
            generate_text(model, TOKENIZER, stop=stops)
    with pytest.raises(ArgumentError, match="stop needs a GPT"):
        generate_text(tiny_model("llada"), TOKENIZER, stop=stop)


@pytest.mark.parametrize("name", ["gpt", "llada"])
def test_bad_arguments_are_named_at_the_call(name):
    model = tiny_model(name)
    with pytest.raises(ArgumentError, match="max_out_tokens must be at least 0, got -1"):
        stream_texts(model, TOKENIZER, [""], max_out_tokens=-1)
    with pytest.raises(TypeError, match=f"'temprature' is not a setting of a {name} model; its settings are .*top_k"):
        stream_texts(model, TOKENIZER, [""], temprature=1.0)
    other = {"gpt": "order", "llada": "context_len"}[name]
    with pytest.raises(TypeError, match=f"'{other}' is not a setting of a {name} model"):
        GeneratorTransformer(model, TOKENIZER).generate("a", **{other: 3})
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        generate_text(model, TOKENIZER, temperature=-1)


class OnMPS(torch.Tensor):
    """Numbers that say that they are on MPS: what is computed from them stays there, and float64 is refused."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        assert not isinstance(result, torch.Tensor) or result.dtype != torch.float64, "MPS has no float64"
        return result


@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "top_p": 0.8, "repetition_penalty": 1.3}, {"temperature": 0}])
@pytest.mark.parametrize("name", ["gpt", "llada"])
def test_tokens_are_drawn_without_float64_on_mps(name, settings):
    writer, other = (GeneratorTransformer(tiny_model(name), TOKENIZER) for _ in range(2))
    expected = writer.generate("the ", max_out_tokens=40, **settings), writer.next_tokens("the ", 5)
    other.model.register_forward_hook(lambda model, inputs, output: output.as_subclass(OnMPS))
    with pytest.raises(AssertionError, match="no float64"):
        other.model(torch.tensor([[4]])).double()
    assert (other.generate("the ", max_out_tokens=40, **settings), other.next_tokens("the ", 5)) == expected


def test_a_missing_device_is_one_line(folder):
    with pytest.raises(ValueError, match="cuda:99: not available on this machine"):
        GeneratorTransformer.load_from_checkpoint(folder / "out/gpt/last.pt", "cuda:99")


# ------------------------------------------------------------------------------------------------- the command line
def test_the_choices_are_those_of_the_registries():
    assert generate.MODELS == tuple(MODELS)
    assert generate.ORDERS == tuple(ORDERS)
    assert generate.SCHEDULES == tuple(SCHEDULES)
    assert generate.REMASKERS == tuple(REMASKERS)


def test_the_defaults_in_the_help_are_those_of_the_settings():
    shown = {action.dest: action.help for action in generate.make_parser()._actions}
    defaults = {name: value for name, value in vars(BeamConfig()).items() if name == "length_penalty"}
    for name in ("temperature", "repetition_penalty", "eta", "cfg_scale"):
        defaults[name] = TEMPERATURE if name == "temperature" else getattr(text_sampling(), name)
    for name, value in (defaults | DEFAULTS).items():
        assert f"(default: {value:g})" in shown[name]
    assert f"(default: {text_sampling().schedule})" in shown["schedule"]
    assert f"(default: {PAUSE:g}; all steps of a text at most {PAUSES} times as long)" in shown["pause"]


def test_help_needs_no_torch(folder, command):
    shown = command("generate.py", "--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert "--infill TEMPLATE" in shown.stdout
    assert "| torch" not in shown.stderr
    assert "| numpy" not in shown.stderr


# ------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context-len", 0], "--context-len: must be at least 1"),
        (["--context-len", 25], "--context-len must be in 1..24"),
        (["--slide", 25], "--slide must be in 1..24"),
        (["--beams", 0], "--beams: must be at least 1"),
        (["--beams", 2, "--num-samples", 3], "--num-samples must be at most 2, the number of --beams"),
        (["--beams", 2, "--temperature", 1], "--temperature has no effect with --beams"),
        (["--length-penalty", 2], "--length-penalty needs --beams"),
        (["--beams", 2, "--length-penalty", 1000], "--length-penalty: must be at most 10"),
        (["--stop", ""], "--stop must not be an empty string"),
        (["--chat", "--slide", 25], "--slide must be in 1..24"),
        (["--top-p", 1.5], "--top-p: must be at most 1"),
        (["--temperature", "nan"], "--temperature: must be"),
        (["--length", "many"], "--length: 'many' is not a whole number"),
        (["--prompt", "caf\xe9"], "unknown character 'é' (U+00E9) at position 3"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
        (["--checkpoint", "out/llada/last.pt", "--model", "gpt"], "out/llada/last.pt holds a llada model"),
        (["--model", "llada", "--beams", 3], "--beams has no effect on a llada model"),
        (["--top", 3, "--chat"], "not allowed with argument"),
        (["--order", "left"], "--order has no effect on a gpt model"),
        (["--threshold", 0.5, "--steps", 4], "--steps has no effect on a gpt model"),
        (["--model", "llada", "--stop", "x"], "--stop has no effect on a llada model"),
        (["--checkpoint", "out/gpt/last.pt", "--infill", "[MASK]"], "--infill has no effect on a gpt model"),
        (["--threshold", 0.5, "--factor", 1], "--factor: not allowed with argument --threshold"),
        (["--model", "llada", "--steps", 0], "--steps: must be at least 1"),
        (["--model", "llada", "--block-length", 0], "--block-length: must be at least 1"),
        (["--model", "llada", "--infill", "abc"], "--infill has nothing to write"),
        (["--model", "llada", "--infill", "[MASK]", "--length", 3], "--length has no effect with --infill"),
        (["--model", "llada", "--eta", 0.1], "--eta needs --remask"),
        (["--model", "llada", "--schedule", "8,8", "--length", 20], "--schedule reveals 16 positions, but 20"),
        # the first window fits (24 masks), the second does not (12)
        (["--infill", "[MASK*36]", "--schedule", "8,8,8"], "--schedule reveals 24 positions, but 12 are"),
        (["--model", "llada", "--steps", 2, "--block-length", 6, "--length", 24], "--steps must be at least 4"),
        (["--model", "llada", "--order", "sweep", "--schedule", "cosine"], "--schedule does not go with the sweep"),
        (["--model", "llada", "--order", "sweep", "--remask", "cap"], "--remask does not go with the sweep"),
        (["--device", "cuda:99"], "--device cuda:99: not available on this machine"),
        (["--model", "llada", "--schedule", "fast"], "'fast' is not uniform, cosine, ancestral or counts"),
        (["--model", "llada", "--chat", "--watch"], "--watch has no effect with --chat"),
        (["--top", 3, "--html", "a.html"], "--html has no effect with --top"),
        (["--beams", 3, "--gif", "a.gif"], "--gif has no effect with --beams"),
        (["--pause", 1], "--pause needs --watch"),
        (["--race", "--chat"], "not allowed with argument"),
        (["--race", "--model", "gpt"], "--model has no effect with --race, which takes the newest of each kind"),
        (["--race", "--checkpoint", "out/gpt"], "--checkpoint has no effect with --race"),
        (["--race", "--infill", "[MASK]"], "--infill has no effect with --race"),
        (["--race", "--num-samples", 2], "--num-samples has no effect with --race"),
        (["--race", "--watch"], "--watch has no effect with --race"),
        (["--infill-file", "plain.txt", "--html", "a.html"], "--html has no effect with --infill-file"),
        (["--top", 3, "--length", 4], "--length has no effect with --top"),
        (["--chat", "--prompt", "a"], "--prompt has no effect with --chat"),
        (["--prompt", "a [MASK*5]"], "--prompt is read literally, [MASK*5] too: give the whole text to --infill"),
        (["--checkpoint", "out"], "out: no best.pt or last.pt in this folder"),
        (["--checkpoint", "out/gpt", "--out", "out"], "--out has no effect with --checkpoint"),
        (["--infill", "[MASK]", "--infill-file", "-"], "not allowed with argument --infill"),
        (["--infill-file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--infill-file", "out/llada/last.pt"], "--infill-file out/llada/last.pt is not UTF-8 text (byte "),
        (["--infill-file", "plain.txt"], "--infill-file plain.txt has nothing to write: mark"),
        (["--infill-file", "plain.txt", "--num-samples", 2], "--num-samples has no effect with --infill-file"),
        (["--infill-file", "plain.txt", "--prompt", "a"], "--prompt has no effect with --infill-file"),
        (["--infill-file", "plain.txt", "--model", "gpt"], "--infill-file has no effect on a gpt model"),
        (["--infill-file", "plain.txt", "--top", 3], "--infill-file has no effect with --top"),
        (["--gen-length", 5], "unrecognized arguments: --gen-length 5; did you mean --length?"),
        (["--max_new_tokens", 5], "did you mean --length?"),
        (["--num_steps", 5], "did you mean --steps?"),
        (["--ckpt", "a.pt"], "did you mean --checkpoint?"),
        (["--tempature", 5], "did you mean --temperature?"),
        (["--model", "GTP"], "'GTP' is not one of llada, gpt; did you mean gpt?"),
        (["--order", "conf"], "did you mean confidence?"),
    ],
)
def test_bad_input_is_one_clear_line(folder, call, arguments, message):
    (folder / "plain.txt").write_text("no mask here")
    code, text, notes = call(*arguments)
    assert (code, text) == (2, "")
    assert message in notes.splitlines()[-1]


# ------------------------------------------------------------------------------------------------- chat
def test_chat_answers_piped_lines(folder, command):
    process = command("generate.py", "--chat", "--length", 8, stdin="ROMEO:\n\ncaf\xe9\nROMEO:\nquit\nnot read\n")
    first, second = process.stdout.strip("\n").split("\n\n")
    assert len(first) == len(second) == len("ROMEO:") + 8
    assert first[:6] == second[:6] == "ROMEO:"
    assert first != second
    assert "unknown character 'é'" in process.stderr
    assert "not read" not in process.stdout


class Terminal:
    """generate.py --chat at a real (pseudo) terminal."""

    def __init__(self, folder, *arguments):
        self.screen, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "generate.py"), "--chat", *arguments],
            stdin=slave, stdout=slave, stderr=slave, cwd=folder, start_new_session=True,
            env=os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def read_until(self, done, seconds: float = 60) -> str:
        """What the screen shows since the last call, up to where done(it) is true."""
        deadline, shown = time.monotonic() + seconds, ""
        while not done(shown):
            ready, _, _ = select.select([self.screen], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"waited in vain: {shown!r}"
            try:
                shown += os.read(self.screen, 1 << 16).decode()
            except OSError:  # the other end is closed
                break
        return shown

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def close(self) -> tuple[int, str]:
        rest = self.read_until(lambda shown: False)
        return self.process.wait(timeout=60), rest


def test_chat_at_a_terminal_has_history_and_ends_quietly_with_ctrl_d(folder):
    terminal = Terminal(folder, "--length", "8")
    terminal.read_until(lambda shown: "> " in shown)
    terminal.type("ROMEO:\n")
    answers = [terminal.read_until(lambda shown: shown.endswith("> "))]
    terminal.type("\x1b[A\n")  # arrow up
    answers.append(terminal.read_until(lambda shown: shown.endswith("> ")))
    assert all(answer.count("ROMEO:") == 2 for answer in answers)  # as typed or recalled, and before its answer
    terminal.type("\x04")
    code, rest = terminal.close()
    assert (code, rest.strip()) == (0, "")


def test_ctrl_c_ends_the_answer_and_at_the_prompt_the_chat(folder):
    terminal = Terminal(folder, "--length", "1000000")
    terminal.read_until(lambda shown: "> " in shown)
    for _ in range(2):
        terminal.type("ROMEO:\n")
        terminal.read_until(lambda shown: len(shown) > 40)
        os.killpg(terminal.process.pid, signal.SIGINT)
        terminal.read_until(lambda shown: shown.endswith("> "))
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.type("\n")  # readline sees a signal that comes before it waits for a key with the next key only
    code, rest = terminal.close()
    assert (code, rest.strip()) == (0, "")


def test_exit_leaves_the_chat_and_what_is_no_prompt_is_one_line(call, pipe):
    pipe(b"a [MASK*3]\ncaf\xe9\nthe\nexit\nnot read\n")
    _, text, notes = call("--chat", "--length", 8)
    assert text.startswith("the")
    assert len(text) == 3 + 8 + 2
    assert "[MASK*3] too: give the whole text to --infill" in notes
    assert "byte 0xE9 at position 3 is not valid" in notes


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_ctrl_c_during_the_imports_is_silent(folder, library):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", ROOT / "generate.py", "--length", "10000000"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:  # a line for each module, when it has been imported
        if f" {library}." in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert process.stdout.read() == ""
    assert all(line.startswith("import time:") for line in rest.splitlines())
