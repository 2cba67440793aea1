"""generate.py and generation/: the real commands on tiny checkpoints, and the library."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import generate
from autoregressive import DecodingConfig, exact_nll
from checkpoint import Checkpoint, save_checkpoint
from generation import GeneratorTransformer, generate_text, generate_texts, infill, stream_texts
from model import MODELS, ModelConfig
from sampler import REMASKERS
from tokenizer import END_ID, START_ID, SimpleTokenizer
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
    text = generate_text(tiny_model(name), TOKENIZER, "ROMEO:", max_out_tokens=40)
    assert process.stdout.strip("\n") == text.strip("\n")


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


def test_samples_are_separated_by_an_empty_line(folder, call):
    _, text, _ = call("--prompt", "ROMEO:", "--length", 9, "--num-samples", 3)
    writer = GeneratorTransformer.load_from_checkpoint(folder / "out/gpt/last.pt")
    samples = generate_texts(writer.model, TOKENIZER, ["ROMEO:"] * 3, max_out_tokens=9)
    assert text == "\n\n".join(samples) + "\n"
    assert len(set(samples)) == 3


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
    assert text == f"{best[0][0]}\n\n{best[1][0]}\n"
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
    together = infill(tiny_model("llada"), TOKENIZER, [template] * 2, seed=5, steps=4)
    assert text == "\n\n".join(together) + "\n"


@pytest.mark.parametrize(("length", "cost"), [(1, "1 network evaluation"), (24, "16 network evaluations")])
def test_the_speed_line_counts_network_evaluations(call, length, cost):
    assert call("--infill", f"[MASK*{length}]")[2].endswith(f"characters/s, {cost}\n")


def test_blocks_get_16_evaluations_each(call):
    notes = call("--model", "llada", "--block-length", 16, "--length", 24)[2]
    assert notes.endswith("24 network evaluations\n")  # 16 for the first block, 8 for the half that is left


def test_watching_shows_every_step_and_changes_nothing(call):
    arguments = ["--model", "llada", "--prompt", "RO", "--length", 16, "--steps", 4]
    _, text, _ = call(*arguments)
    _, watched, notes = call(*arguments, "--watch")
    steps = [line.split(maxsplit=1)[1] for line in notes.splitlines() if line[:4].strip().isdigit()]
    assert watched == text
    assert [step.count("·") for step in steps] == [12, 8, 4, 0]
    assert steps[-1].replace("⏎", "\n") == text.strip("\n")


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
    with pytest.raises(ArgumentError, match="stop needs a GPT model"):
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


def test_a_missing_device_is_one_line(folder):
    with pytest.raises(ValueError, match="cuda:99: not available on this machine"):
        GeneratorTransformer.load_from_checkpoint(folder / "out/gpt/last.pt", "cuda:99")


# ------------------------------------------------------------------------------------------------- the command line
def test_the_choices_are_those_of_the_registries():
    assert generate.MODELS == tuple(MODELS)
    assert generate.ORDERS == tuple(ORDERS)
    assert generate.SCHEDULES == tuple(SCHEDULES)
    assert generate.REMASKERS == tuple(REMASKERS)


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
        (["--model", "llada", "--schedule", "8,8,8", "--length", 36], "--schedule reveals 24 positions, but 12 are"),
        (["--model", "llada", "--steps", 2, "--block-length", 6, "--length", 24], "--steps must be at least 4"),
        (["--model", "llada", "--order", "sweep", "--schedule", "cosine"], "--schedule does not go with the sweep"),
        (["--model", "llada", "--order", "sweep", "--remask", "cap"], "--remask does not go with the sweep"),
        (["--device", "cuda:99"], "--device cuda:99: not available on this machine"),
        (["--model", "llada", "--schedule", "fast"], "'fast' is not uniform, cosine, ancestral or counts"),
        (["--model", "llada", "--chat", "--watch"], "--watch has no effect with --chat"),
        (["--top", 3, "--length", 4], "--length has no effect with --top"),
        (["--chat", "--prompt", "a"], "--prompt has no effect with --chat"),
    ],
)
def test_bad_input_is_one_clear_line(call, arguments, message):
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


def test_ctrl_c_ends_the_chat_quietly_even_in_an_answer(folder):
    terminal = Terminal(folder, "--length", "1000000")
    terminal.read_until(lambda shown: "> " in shown)
    terminal.type("ROMEO:\n")
    terminal.read_until(lambda shown: len(shown) > 40)
    os.killpg(terminal.process.pid, signal.SIGINT)
    code, rest = terminal.close()
    assert code == 0
    assert "Traceback" not in rest
