"""Texts, names and prompts with control characters: terminals, messages and reports show them and never obey."""

import os
import re
import sys

import pytest
from conftest import TINY

from utils.console import printable

EVIL = "\x1b]0;x\x07 \x9b31m \x08 \r `<b>|*x*` \u202e"  # a title, a colour, marks of HTML and Markdown, reversed text
NAME = "a\x1b[2J`<b>|c.txt"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
SAMPLED = ["--length", "60", "--temperature", "1"]
TEXTS = [  # commands that print text of a model
    ["--model", "gpt", *SAMPLED, "--prompt", EVIL],
    ["--model", "llada", *SAMPLED, "--prompt", EVIL],
    ["--model", "gpt", *SAMPLED, "--num-samples", "2"],
    ["--model", "llada", *SAMPLED, "--num-samples", "2"],
    ["--model", "llada", *SAMPLED, "--watch", "--pause", "0"],
    ["--model", "gpt", *SAMPLED, "--watch", "--pause", "0"],
    ["--model", "llada", "--temperature", "1", "--infill", EVIL + "[MASK*40]" + EVIL],
    ["--model", "gpt", "--length", "20", "--beams", "3", "--num-samples", "2", "--prompt", EVIL],
    ["--race", *SAMPLED, "--prompt", EVIL],
    ["--chat", "--model", "gpt", *SAMPLED],
    ["--chat", "--model", "llada", *SAMPLED],
]
TABLES = [["--top", "30", "--model", model, "--prompt", EVIL] for model in ("gpt", "llada")]
ERRORS = [
    ("generate.py", "--prompt", "\x1b[2Jq"),
    ("generate.py", "--checkpoint", "x\x1b[2J\n"),
    ("generate.py", "--order", "\x9b31m"),
    ("generate.py", "--infill", "\x1b\x9f[MASK]"),
    ("generate.py", "--infill-file", NAME),
    ("generate.py", "a\x1bb\nc"),
    ("generate.py", "--html", "\x1b[2J/x.html"),
    ("train.py", "--data", "\x1b[2J\r"),
    ("train.py", "--pairs", NAME),
    ("train.py", "--data", NAME, "--tokenizer", NAME),
    ("train.py", "--init-from", NAME),
    ("train.py", "--resume", "\x1b[2J"),
    ("train.py", "--data", NAME, "--device", "\x1b[2J"),
    ("train.py", "--data", NAME, "--out", NAME),
    ("evaluate.py", "\x1b[2J.pt"),
    ("evaluate.py", "--data", "\x1b[2J"),
    ("evaluate.py", "--report", NAME + "/x"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of each model on such a text, in a file with such a name."""
    folder = tmp_path_factory.mktemp("terminal")
    (folder / NAME).write_bytes("".join(f"{i} the king {EVIL}\n" for i in range(250)).encode())
    return folder


@pytest.fixture
def call(runs, run_script, monkeypatch):
    """run_script, in that folder, after the models have been trained."""
    monkeypatch.chdir(runs)
    for model in ("llada", "gpt"):
        if not os.path.exists(f"out/{model}"):
            flags = ["--data", NAME, *TINY, "--steps", "2", "--eval-every", "1", "--sample-every", "1"]
            output, messages = run_script("train.py", "--model", model, *flags)
            assert output == ""
            assert_shown(messages)
    return run_script


def assert_shown(text: str) -> None:
    """There are symbols of control characters, and no control characters."""
    assert re.search("[␛␇␈␍�]", text)
    assert RAW.findall(text) == []


@pytest.mark.parametrize("flags", TEXTS, ids=" ".join)
def test_text_is_shown_on_a_terminal_and_exact_in_a_pipe(call, monkeypatch, flags):
    stdin = f"{EVIL}\nthe king\n" if "--chat" in flags else ""
    piped, messages = call("generate.py", *flags, stdin=stdin)
    assert RAW.search(piped)
    assert RAW.findall(messages) == []
    if "--watch" in flags:
        assert_shown(messages)
    if EVIL in flags:
        assert piped.count(EVIL) >= 1
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown, messages = call("generate.py", *flags, stdin=stdin)
    assert_shown(shown)
    assert shown == printable(piped)
    assert RAW.findall(messages) == []


@pytest.mark.parametrize("flags", TABLES, ids=" ".join)
def test_tables_hold_no_control_characters_even_in_a_pipe(call, flags):
    table, messages = call("generate.py", *flags)
    assert "'\\x1b'" in table
    assert RAW.findall(table + messages) == []


@pytest.mark.parametrize("words", ERRORS, ids=map(ascii, ERRORS))
def test_errors_are_one_line_without_control_characters(call, words):
    output, messages = call(*words, check=2)
    assert RAW.findall(output + messages) == []
    assert ": error: " in messages.splitlines()[-1]
    assert messages.count("\n") == 1 + messages.count(", step ")  # which model it is about


@pytest.mark.filterwarnings("error:Glyph")
def test_reports_hold_no_control_characters_and_no_markup_of_the_text(call, runs):
    table, messages = call("evaluate.py", "--quick")
    assert RAW.findall(table + messages) == []
    report = (runs / "out/report/report.md").read_text()
    assert_shown(report)
    assert report.splitlines()[0] == "# LLaDA and GPT on `` a␛[2J`<b>|c.txt ``"
    rows = [line for line in report.splitlines() if line.startswith("|") and "king" not in line]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows if "`data`" in row} == {4}
    for line in report.splitlines():  # outside of code, indented or not, there is no markup
        if not line.startswith("    "):
            assert "<b>" not in re.sub(r"(`+).*?[^`]\1(?!`)", "", line), line


def test_pages_hold_no_control_characters(call, runs):
    call("generate.py", "--model", "gpt", *SAMPLED, "--prompt", EVIL, "--html", "page.html", "--gif", "page.gif")
    page = (runs / "page.html").read_text()
    assert RAW.findall(page) == []
    assert "\\u001b" in page
    assert "`<b>|" not in page
