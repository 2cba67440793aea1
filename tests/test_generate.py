"""generate.py and generation/: the real commands on tiny checkpoints, and the library."""

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from toy import random_model

import checkpoint
import generate
from autoregressive import exact_nll
from checkpoint import Checkpoint, save_checkpoint
from config import SamplingConfig, given
from extras.bpe import train_bpe
from generation import GeneratorTransformer, modes
from generation.holes import choose_lengths
from generation.text import parse_template
from generation.write import write
from tokenizer import END_ID, MASK_ID, START_ID, SimpleTokenizer
from utils.errors import ArgumentError

TOKENIZER = SimpleTokenizer("\n :abcdefghijklmnopqrstuvwxyzROMEO")
BOTH = pytest.mark.parametrize("name", ["gpt", "llada"])


def tiny_model(name: str, tokenizer=TOKENIZER):
    """Random weights everywhere, so that the output depends on the input; [END] is nearly impossible."""
    model = random_model(name, vocab_size=tokenizer.vocab_size, block_size=24, std=0.15)
    with torch.no_grad():
        model.head.weight *= 2
        model.encoder.embedding.weight[:, 0] = 2.0  # a constant feature, which makes [END] unlikely
        model.head.weight[END_ID] = -100.0 * (torch.arange(16) == 0)
    return model


def writer_of(name: str, tokenizer=TOKENIZER) -> GeneratorTransformer:
    return GeneratorTransformer(tiny_model(name, tokenizer), tokenizer)


def save(path, name: str, val_loss: float | None = None, tokenizer=TOKENIZER) -> None:
    history = [] if val_loss is None else [{"step": 7, "val_loss": val_loss}]
    save_checkpoint(path, Checkpoint(tiny_model(name, tokenizer), tokenizer, {"name": "toy"}, 7, history))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with out/llada/last.pt and, newer, out/gpt/last.pt."""
    for name, seconds in {"llada": 1, "gpt": 2}.items():
        save(tmp_path / "out" / name / "last.pt", name)
        os.utime(tmp_path / "out" / name / "last.pt", (1, seconds))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(folder, run_main):
    """call("--top", "3") runs generate.py: (exit code, stdout, stderr)."""
    return lambda *arguments: run_main(generate.main, *arguments)


@pytest.fixture
def pipe(monkeypatch):
    """pipe(b"text") makes it standard input."""
    return lambda content: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))


def separated(texts: list[str], name: str = "sample") -> str:
    """What the command prints for several texts."""
    return "".join(f"--- {name} {i} of {len(texts)} ---\n{text}\n" for i, text in enumerate(texts, 1))


# ------------------------------------------------------------------------------------------------- text
@pytest.mark.parametrize("env", [{}, {"CXX": "/bin/false"}], ids=str)
def test_compiled_it_writes_the_same_text_and_without_a_compiler_a_line_says_so(folder, command, tmp_path, env):
    if not env and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    flags = ["--model", "gpt", "--prompt", "ROMEO:", "--length", 40, "--slide", 8, "--compile"]
    process = command("generate.py", *flags, env=env and env | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert process.stdout == writer_of("gpt").generate("ROMEO:", max_out_tokens=40, slide=8) + "\n"
    said = [line for line in process.stderr.splitlines() if "ompil" in line]
    assert len(said) == 1
    assert re.match("not compiled: .*ompiler" if env else "compiling", said[0])


@BOTH
@pytest.mark.parametrize("prompt", ["", "a", "o romeo romeo " * 10])  # also longer than the context
def test_the_command_writes_text_that_begins_with_the_prompt(call, name, prompt):
    code, text, notes = call("--model", name, "--prompt", prompt, "--length", 30)
    assert (code, len(text)) == (0, len(prompt) + 30 + 1)
    writer = writer_of(name)
    written = writer.generate(prompt or "\n", max_out_tokens=30)
    assert text == (written if prompt else written[1:]) + "\n"  # the newline before a text without prompt is not shown
    assert f"out/{name}/last.pt: {name}, step 7" in notes
    writer.tokenizer = SimpleTokenizer("abc")
    assert writer.opening(prompt) == prompt  # it knows no newline
    writer = writer_of(name)
    writer.model.config = replace(writer.model.config, segments="speech")
    assert writer.opening(prompt) == prompt  # the text begins with [START]


@BOTH
def test_samples_depend_on_the_seed_and_not_on_the_batch_and_have_a_line_before_each(call, name):
    flags = ["--model", name, "--length", 30, "--prompt", "ROMEO:", "--slide", 5]
    _, text, _ = call(*flags, "--seed", 3, "--num-samples", 3)
    samples = re.findall(r"--- sample \d of 3 ---\n((?:(?!---)[\s\S])*)\n", text)
    assert text == separated(samples)
    first, again, other = (call(*flags, "--seed", seed)[1][:-1] for seed in (3, 3, 4))
    assert samples[0] == first == again
    assert len({*samples, other}) == 4


@BOTH
def test_every_mode_works_with_subwords_and_length_counts_characters(call, folder, pipe, name):
    tokenizer = train_bpe(["the king is dead, long live the king\n" * 50], vocab_size=290)
    save(folder / f"out/{name}/last.pt", name, tokenizer=tokenizer)
    model, prompt = ["--model", name], ["--prompt", "the king is \u00e9", "--length", 61]
    for flags in ([], ["--watch", "--pause", 0, "--html", "a.html", "--gif", "a.gif"]):
        code, text, notes = call(*model, *prompt, *flags)
        assert (code, len(text)) == (0, len(prompt[1]) + 61 + 1), notes
        assert "61 characters in" in notes
    pipe("the \u00e9\n".encode())
    modes = [["--chat", "--length", 5], ["--top", 2, "--prompt", "dead"]]
    modes += [["--beams", 2, *prompt]] if name == "gpt" else [["--infill", "the [MASK*2-3] is", "--html", "b.html"]]
    for flags in modes:
        code, text, notes = call(*model, *flags)
        assert (code, text.strip() != "") == (0, True), notes
    if name == "llada":
        Path("holes.txt").write_text("\u00e9 [MASK*20] live\r\n")
        code, text, notes = call("--infill-file", "holes.txt")
        assert re.fullmatch("\u00e9 .+ live\r\n", text, re.DOTALL)
        assert f"\n{len(text) - len('_  live__')} characters in" in notes  # what was written


# ------------------------------------------------------------------------------------------------- which model
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        *(("", "llada"), ("--order left", "llada"), ("--infill-file holes", "llada"), ("--context-len 5", "gpt")),
        *(("--beams 2", "gpt"), ("--model gpt", "gpt")),
    ],
)
def test_the_default_is_llada_unless_a_flag_needs_gpt(folder, call, flags, name):
    """Even if GPT was trained last."""
    (folder / "holes").write_text("a[MASK]")
    length = [] if "infill" in flags else ["--length", 3]
    assert call(*length, *flags.split())[2].startswith(f"out/{name}/last.pt: {name}, step 7\n")


def test_which_model_is_found_where_and_whether_a_better_one_comes_with_the_project(folder, call, monkeypatch):
    for module in (checkpoint, modes):
        monkeypatch.setattr(module, "PRETRAINED", folder / "pretrained")

    def found(*flags) -> str:
        return call(*flags, "--length", 3)[2].splitlines()[0]

    save(folder / "pretrained/llada.pt", "llada", 1.756)
    save(folder / "out/llada/last.pt", "llada", 2.04)
    assert found() == "out/llada/last.pt: llada, step 7, 2.04 nats/character; pretrained/llada.pt: 1.76"
    save(folder / "out/llada/best.pt", "llada", 1.5)
    assert found() == "out/llada/best.pt: llada, step 7, 1.50 nats/character"
    (folder / "out").rename(folder / "elsewhere")
    assert found() == "pretrained/llada.pt: llada, step 7, 1.76 nats/character"
    assert found("--checkpoint", "elsewhere/llada").startswith("elsewhere/llada/best.pt: llada")
    assert found("--out", "elsewhere", "--model", "gpt").startswith("elsewhere/gpt/last.pt: gpt")
    assert "no checkpoint under nowhere/" in found("--out", "nowhere", "--watch")
    with pytest.raises(ValueError, match="cuda:99: not available on this machine"):
        GeneratorTransformer.load_from_checkpoint("elsewhere/gpt/last.pt", "cuda:99")


@pytest.mark.parametrize("trained", [True, False])
def test_without_any_flag_three_lines_say_what_can_be_done_next(folder, call, trained):
    if not trained:
        shutil.rmtree(folder / "out")
    code, text, notes = call()
    assert (code, len(text)) == ((0, 201) if trained else (2, 0))
    assert (notes.count(generate.NEXT), len(generate.NEXT.splitlines())) == (1, 3)
    assert generate.NEXT not in call("--length", 3)[2]


# ------------------------------------------------------------------------------------------------- beams and tables
def test_beams_print_the_best_texts_with_their_scores(call):
    code, text, notes = call("--prompt", "the ", "--beams", 4, "--num-samples", 2, "--length", 12)
    best = writer_of("gpt").beam_search("the ", 4, 12, num_return=2)
    assert (code, text) == (0, separated([best[0][0], best[1][0]], "beam"))
    ids = torch.from_numpy(TOKENIZER.encode(best[0][0]).astype("int64"))
    score = -exact_nll(tiny_model("gpt"), ids[None], START_ID)[0, 4:].mean().item()
    assert f"score {score:.4f}" in notes


def test_the_table_shows_ids_and_true_probabilities_of_every_mask(call):
    _, text, _ = call("--model", "gpt", "--prompt", "RO", "--top", 3)
    lines = text.splitlines()
    assert lines[0] == f"'R' {TOKENIZER.char_to_id['R']}   'O' {TOKENIZER.char_to_id['O']}   [MASK] 1"
    ids = torch.tensor([[START_ID, *TOKENIZER.encode("RO").tolist()]])
    best = tiny_model("gpt")(ids)[0, -1].softmax(-1).topk(3)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    expected = [f"{TOKENIZER.id_to_char[i]!r} {100 * p:.3f} %" for i, p in rows]
    assert [" ".join(line.split()) for line in lines[3:]] == expected
    _, text, _ = call("--infill", "R[MASK]m[MASK*2]", "--top", 2)
    assert re.findall(r"\[MASK\] at position (\d)", text) == ["1", "3", "4"]
    start = parse_template("long live the king is dead the[MASK]", TOKENIZER)  # beyond the context
    [(position, table)] = writer_of("llada").likeliest(start, k=100)
    logits = tiny_model("llada")(start[None, -24:])[0, -1].index_fill(0, torch.tensor(END_ID), -torch.inf)
    assert position == len(start) - 1
    assert {TOKENIZER.char_to_id[c]: p for c, p in table} == pytest.approx(
        {i: p for i, p in enumerate(logits.softmax(-1).tolist()) if p > 0}, rel=1e-4
    )


# ------------------------------------------------------------------------------------------------- LLaDA's samplers
@pytest.mark.parametrize(
    ("flags", "evaluations"),
    [
        ("--steps 3 --correct 1", 11),
        ("--order left --temperature 0.5 --top-k 5 --top-p 0.9 --repetition-penalty 1.2", 29),
        ("--order confidence --steps 4 --schedule cosine --block-length 5 --temperature 0 --correct 0", 4),
        ("--order random --schedule 6,7 --cfg-scale 0.5 --correct 0", 4),
        ("--threshold 0.5 --correct 0", 13),
    ],
)
def test_a_template_is_filled_as_from_python_and_the_speed_line_counts_evaluations(call, flags, evaluations):
    template, args = "ROMEO:[MASK*4]love[MASK*9]", generate.make_parser().parse_args(flags.split())
    settings = given(args, SamplingConfig)
    _, text, notes = call("--infill", template, *flags.split(), "--seed", 5, "--num-samples", 2)
    assert text == separated(writer_of("llada").infill([template] * 2, seed=5, **settings))
    assert re.search(r"^ROMEO:....love.........$", text, re.MULTILINE | re.DOTALL)
    assert re.search(rf"26 characters in .* characters/s, {evaluations} network evaluations\n$", notes)


def test_a_hole_of_unknown_length_takes_the_likeliest(call, capsys):
    template = choose_lengths("RO[MASK*2-5]the [MASK*1-3]", writer_of("llada"), SamplingConfig(), seed=1)
    assert re.fullmatch(r"RO\[MASK\*[2-5]\]the \[MASK\*[1-3]\]", template)
    lines = capsys.readouterr().err.splitlines()
    scores = [float(re.search(r"tokens, (\S+) nats", line)[1]) for line in lines]
    assert [line.partition(":")[0] for line in lines] == ["[MASK*2-5]"] * 3 + ["[MASK*1-3]"] * 3
    assert scores[:3] == sorted(scores[:3], reverse=True)
    assert f": {re.search(r'[0-9]', template)[0]} tokens" in lines[0]
    code, text, _ = call("--infill", "RO[MASK*2-5]the", "--num-samples", 2)
    assert (code, len(set(map(len, text.split("\n")[1::2])))) == (0, 1)


# ------------------------------------------------------------------------------------------------- views
@BOTH
@pytest.mark.parametrize("flags", [["--prompt", "ROMEO:"], ["--num-samples", 2]], ids=str)
def test_views_do_not_change_the_texts_of_either_model(folder, call, name, flags):
    arguments = ["--model", name, "--length", 30, *flags]
    _, text, plain = call(*arguments)
    code, viewed, notes = call(*arguments, "--watch", "--pause", 0, "--html", "a.html", "--gif", "a.gif")
    assert (code, viewed) == (0, text)
    nfe = int(re.search(r"(\d+) network evaluations", plain)[1])
    assert len([line for line in notes.splitlines() if line[:4].strip().isdigit()]) == nfe
    assert f"{nfe} network evaluations\nwrote a.html: open it in a browser\nwrote a.gif" in notes
    assert Image.open(folder / "a.gif").n_frames > 10
    page = (folder / "a.html").read_text("utf-8")
    assert f'"title":"{ {"gpt": "GPT", "llada": "LLaDA"}[name] }"' in page
    assert f"out/{name}/last.pt; seed 0; generate.py --model {name} --length 30" in page


def test_watching_shows_every_step_and_what_is_corrected(call):
    arguments = ["--length", 16, "--steps", 4, "--correct", 1, "--correct-temperature", 3]
    _, watched, notes = call(*arguments, "--watch", "--pause", 0)
    steps = [line.split(maxsplit=1)[1] for line in notes.splitlines() if line[:4].strip().isdigit()]
    assert [step.count("░") for step in steps] == [12, 8, 4, *[0] * 9]
    assert len(set(steps[3:])) > 1
    assert steps[-1].replace("↵", "\n") == watched[:-1]


def test_a_race_is_the_texts_of_both_models_and_says_which_and_the_page_of_models_needs_no_prompt(folder, call):
    flags = ["--prompt", "ROMEO:", "--length", 30, "--seed", 3]
    code, text, notes = call("--race", *flags, "--steps", 4, "--html", "race.html")
    texts = [call("--model", "llada", *flags, "--steps", 4)[1], call("--model", "gpt", *flags)[1]]
    assert (code, text) == (0, f"--- LLaDA ---\n{texts[0]}--- GPT ---\n{texts[1]}")
    assert all(f"out/{name}/last.pt: {name}" in notes for name in ("llada", "gpt"))
    assert '"title":"LLaDA and GPT"' in (folder / "race.html").read_text("utf-8")
    assert len(call("--race", "--length", 30)[1]) == len("--- LLaDA ------ GPT ---") + 2 * 31 + 2  # no newline before
    for model, names in (([], ["llada", "gpt"]), (["--model", "gpt"], ["gpt"])):
        assert call("--page", "model.html", *model)[:2] == (0, "")
        assert re.findall('"name":"(.*?)"', (folder / "model.html").read_text("utf-8")) == names
    shutil.rmtree(folder / "out/gpt")
    assert "no checkpoint" in call("--race")[2]


# ------------------------------------------------------------------------------------------------- files, pipes
HOLES = b"\xef\xbb\xbfROMEO:\r\n\xc3\xa9 a [MASK*9] love\x00 [MASK]\r\n\tand \xe2\x82\xac so on [MASK*20]"
PARTS = re.split(rb"\[MASK(?:\*(\d+))?\]", HOLES)  # texts, and between them how many masks
FILLED = b"".join(b"[ -~\n]{%d}" % int(p or 1) if i % 2 else re.escape(p) for i, p in enumerate(PARTS))


@pytest.mark.parametrize("flags", [[], ["--order", "left", "--steps", 5], ["--correct", 1]], ids=str)
def test_a_file_is_filled_and_every_other_byte_stays(folder, call, pipe, flags):
    (folder / "holes.txt").write_bytes(HOLES)
    flags = [*flags, "--repetition-penalty", 1.2, "--infill-file"]
    code, filled, notes = call(*flags, "holes.txt")
    assert code == 0
    assert re.fullmatch(FILLED, filled.encode())
    assert notes.splitlines()[1] == "7 characters unknown to the model: left as they are, it reads [MASK] there"
    assert len(notes.splitlines()) == 3
    pipe(HOLES)
    assert call(*flags, "-")[1] == filled


def test_the_network_reads_masks_where_it_does_not_know_the_character():
    model, seen = tiny_model("llada"), []
    template = parse_template("ab\x00c[MASK*3]\u20acd", TOKENIZER, keep_unknown=True)
    assert (template == TOKENIZER.vocab_size).nonzero()[:, 0].tolist() == [2, 7]
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].tolist()))
    *_, state = write(model, [template], SamplingConfig(order="left", temperature=0.0, correct=0))
    known = [i if i < TOKENIZER.vocab_size else MASK_ID for i in template.tolist()]
    assert [[tokens[i] for i in (0, 1, 2, 3, 7, 8)] for tokens in seen] == [[*known[:4], *known[7:]]] * 3
    assert (state.texts[0] == template).tolist() == [True] * 4 + [False] * 3 + [True] * 2


def test_piped_input_is_the_prompt_if_asked_for(call, pipe):
    pipe(b"\xef\xbb\xbfROMEO:\r\nthe\n")
    text = call("--prompt", "-", "--length", 8)[1]
    assert text.startswith("ROMEO:\nthe")
    assert len(text) == len("ROMEO:\nthe") + 8 + 1
    pipe(b"\xff")
    assert "standard input: not UTF-8 text (byte 0)" in call("--prompt", "-")[2]
    pipe(b"not asked for")
    assert len(call("--length", 8)[1]) == 9
    assert sys.stdin.read() == "not asked for"


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_traceback(folder, closed):
    words = f"'{sys.executable}' '{ROOT}/generate.py' --length 5 {closed}"
    process = subprocess.run(words, shell=True, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert len(process.stdout) == (0 if ">&-" in closed.replace("2>&-", "") else 6)


# ------------------------------------------------------------------------------------------------- the library
@BOTH
def test_bad_arguments_are_named_at_the_call(name):
    writer = writer_of(name)
    with pytest.raises(ArgumentError, match="max_out_tokens must be at least 0, got -1"):
        writer.generate(max_out_tokens=-1)
    setting = {"gpt": "order", "llada": "context_len"}[name]
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{setting}'"):
        writer.generate("a", **{setting: 3})


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


@BOTH
@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "top_p": 0.8, "repetition_penalty": 1.3}, {"temperature": 0}])
def test_tokens_are_drawn_without_float64_on_mps(name, settings):
    writer, other = writer_of(name), writer_of(name)
    start = parse_template("the [MASK]", TOKENIZER)
    expected = writer.generate("the ", max_out_tokens=40, **settings), writer.likeliest(start, 5)
    other.model.register_forward_hook(lambda model, inputs, output: output.as_subclass(OnMPS))
    with pytest.raises(AssertionError, match="no float64"):
        other.model(torch.tensor([[4]])).double()
    assert (other.generate("the ", max_out_tokens=40, **settings), other.likeliest(start, 5)) == expected


# ------------------------------------------------------------------------------------------------- chat, Ctrl-C
def test_chat_answers_piped_lines_and_what_is_no_prompt_is_one_line(call, pipe):
    pipe("ROMEO:\n\na [MASK*3]\n\xe9\nROMEO:\n".encode() + b"caf\xe9\nquit\nnot read\n")
    _, text, notes = call("--chat", "--length", 8)
    first, second = text.strip("\n").split("\n\n")
    assert len(first) == len(second) == len("ROMEO:") + 8
    assert first[:6] == second[:6] == "ROMEO:"
    assert first != second
    problems = [line for line in notes.splitlines() if line.startswith("error: ")]
    expected = "[MASK*3] too: give the whole text to --infill", "character 'é'", "byte 0xE9 at position 3 is not valid"
    assert all(part in problem for part, problem in zip(expected, problems, strict=True))


def test_chat_at_a_terminal_has_history_ends_answers_with_ctrl_c_and_then_itself_quietly(folder):
    screen, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), "--chat", "--model", "gpt", "--length", "1000000"],
        stdin=slave, stdout=slave, stderr=slave, cwd=folder, start_new_session=True,
        env=os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(slave)

    def read_until(done) -> str:
        """What the screen shows since the last call, up to where done(it) is true, or to its end."""
        shown, deadline = "", time.monotonic() + 60
        while not done(shown):
            ready = select.select([screen], [], [], 60)[0] and time.monotonic() < deadline
            assert ready, f"waited in vain: {shown[-200:]!r}"
            try:
                shown += os.read(screen, 1 << 16).decode()
            except OSError:  # the other end is closed
                break
        return shown

    read_until(lambda shown: "> " in shown)
    for keys in (b"ROMEO:\n", b"\x1b[A\n"):  # arrow up
        os.write(screen, keys)
        read_until(lambda shown: shown.count("ROMEO:") == 2 and len(shown) > 40)  # as typed, and its answer
        os.killpg(process.pid, signal.SIGINT)
        read_until(lambda shown: shown.endswith("> "))
    os.killpg(process.pid, signal.SIGINT)
    os.write(screen, b"\n")  # readline sees a signal with the next key only
    assert read_until(lambda shown: False).strip() == ""
    assert process.wait(timeout=60) == 0


def test_ctrl_c_during_the_imports_is_silent(folder):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", ROOT / "generate.py", "--length", "10000000"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:  # a line for each module, when it has been imported
        if " torch." in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert process.stdout.read() == ""
    assert all(line.startswith("import time:") for line in rest.splitlines())
