"""Texts, names and prompts with control characters: terminals, messages and reports show them and never obey."""

import os
import re
import sys

import pytest
from conftest import TINY

from utils.console import printable

EVIL = "\x1b]0;x\x07 \x9b31m \x08 \x0c `<b>|*x*` \u202e"  # a title, a colour, marks of HTML and Markdown, reversed text
NAME = "a\x1b[2J`<b>|c.txt"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
SAMPLED = ["--length", "60", "--temperature", "1"]
TEXTS = [  # commands that print text of a model
    *(
        ["--model", model, *SAMPLED, *flags]
        for model in ("gpt", "llada")
        for flags in (["--prompt", EVIL], ["--num-samples", "2"], ["--watch", "--pause", "0"], ["--chat"])
    ),
    ["--model", "llada", "--temperature", "1", "--infill", EVIL + "[MASK*40]" + EVIL],
    ["--model", "gpt", "--length", "20", "--beams", "3", "--num-samples", "2", "--prompt", EVIL],
    ["--race", *SAMPLED, "--prompt", EVIL],
]
ERRORS = [
    *(f"generate.py {flags}" for flags in ("--prompt \x1b[2Jq", "--checkpoint x\x1b[2J\n", "--order \x9b31m")),
    *(f"generate.py {flags}" for flags in ("--infill \x1b\x9f[MASK]", f"--infill-file {NAME}", "a\x1bb\nc")),
    *("generate.py --html \x1b[2J/x.html", "train.py --data \x1b[2J\r", f"train.py --pairs {NAME}"),
    *(f"train.py --data {NAME} {flags}" for flags in (f"--tokenizer {NAME}", "--device \x1b[2J", f"--out {NAME}")),
    *(f"train.py --init-from {NAME}", "train.py --resume \x1b[2J"),
    *(f"evaluate.py {flags}" for flags in ("\x1b[2J.pt", "--data \x1b[2J", f"--report {NAME}/x")),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of each model on such a text, in a file with such a name."""
    folder = tmp_path_factory.mktemp("terminal")
    (folder / NAME).write_bytes("".join(f"{i} the king {EVIL}\n" for i in range(250)).encode())
    return folder


@pytest.fixture
def call(runs, run_script, monkeypatch):
    """run_script, in that folder, after the models have been trained. No message holds a control character."""
    monkeypatch.chdir(runs)

    def checked(*words, **options) -> tuple[str, str]:
        output, messages = run_script(*words, **options)
        assert RAW.findall(messages) == []
        return output, messages

    for model in ("llada", "gpt"):
        if not os.path.exists(f"out/{model}"):
            flags = ["--data", NAME, *TINY, "--steps", "2", "--eval-every", "1"]
            assert_shown(checked("train.py", "--model", model, *flags)[1])
    return checked


def assert_shown(text: str) -> None:
    """There are symbols of control characters, and no control characters."""
    assert re.search("[␛␇␈␌�]", text)
    assert RAW.findall(text) == []


@pytest.mark.parametrize("flags", TEXTS, ids=" ".join)
def test_text_is_shown_on_a_terminal_and_exact_in_a_pipe(call, monkeypatch, flags):
    stdin = f"{EVIL}\nthe king\n" if "--chat" in flags else ""
    piped, messages = call("generate.py", *flags, stdin=stdin)
    assert RAW.search(piped)
    if "--watch" in flags:
        assert_shown(messages)
    assert (EVIL in piped) >= (EVIL in flags)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown, _ = call("generate.py", *flags, stdin=stdin)
    assert_shown(shown)
    assert shown == printable(piped)


@pytest.mark.parametrize("model", ["gpt", "llada"])
def test_tables_hold_no_control_characters_even_in_a_pipe(call, model):
    table, _ = call("generate.py", "--top", "30", "--model", model, "--prompt", EVIL)
    assert "'\\x1b'" in table
    assert RAW.findall(table) == []


@pytest.mark.parametrize("words", ERRORS, ids=ascii)
def test_errors_are_one_line_without_control_characters(call, words):
    output, messages = call(*words.split(" "), check=2)
    assert RAW.findall(output) == []
    assert ": error: " in messages.splitlines()[-1]
    assert messages.count("\n") == 1 + messages.count(", step ")  # which model it is about


@pytest.mark.filterwarnings("error:Glyph")
def test_reports_hold_no_control_characters_and_no_markup_of_the_text(call, runs):
    assert RAW.findall(call("evaluate.py", "--quick")[0]) == []
    report = (runs / "out/report/report.md").read_text()
    assert_shown(report)
    assert report.splitlines()[0] == "# LLaDA and GPT on `` a␛[2J`<b>|c.txt ``"
    for line in report.splitlines():  # outside of code, indented or not, there is no markup
        if not line.startswith("    "):
            assert "<b>" not in re.sub(r"(`+).*?[^`]\1(?!`)", "", line), line


def test_pages_hold_no_control_characters(call, runs):
    call("generate.py", "--model", "gpt", *SAMPLED, "--prompt", EVIL, "--html", "page.html", "--gif", "page.gif")
    page = (runs / "page.html").read_text()
    assert RAW.findall(page) == []
    assert "\\u001b" in page
    assert "`<b>|" not in page
