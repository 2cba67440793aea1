"""The README's commands and Python examples run; links, file tree and benchmark names in the documents are right.

Commands run in this process (importing torch again for each would take most of the time), in a copy of a folder with
two tiny trained models, with flags added that make them small.
"""

import json
import re
import runpy
import shlex
import shutil
import string
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CORPUS = ["--data", "corpus.txt"]
SKIPPED = {  # command -> why it is not run here
    "pip install -r requirements.txt": "installs packages",
    "pip install -r requirements-dev.txt": "installs packages",
    "python -m pytest": "would run this test again",
    "torchrun --nproc_per_node=2 train.py": "starts processes; tests/test_train.py runs two",
    "python train.py --preset gpu": "needs a GPU",
}
SMALL = {  # pattern of a command -> flags that make it small; of several that match, the first counts
    r"train\.py .*--resume": ["--steps", "6"],
    r"train\.py .*--init-from": ["--steps", "3", "--val-fraction", "0.5"],
    r"train\.py .*--pairs": [*TINY, "--steps", "3"],
    r"train\.py .*--minutes": [*CORPUS, *TINY, "--minutes", "0.01"],
    r"train\.py .*--data": [*TINY, "--steps", "3"],
    r"train\.py": [*CORPUS, *TINY, "--steps", "3"],
    r"generate\.py .*--slide 64": ["--slide", "8", "--length", "40"],
    r"generate\.py .*--(infill|top|chat)": [],
    r"generate\.py .*--(watch|race|html|gif)": ["--length", "20"],
    r"-m benchmarks pairs --write": [],
    r"generate\.py .*--order": ["--steps", "8", "--length", "12"],
    r"generate\.py": ["--length", "20"],
    r"evaluate\.py": ["--quick"],
}


def blocks(language: str) -> list[str]:
    """The contents of the README's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The commands of all ```sh blocks, without comments; `a && b` is two."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    parts = [part for line in lines for part in re.sub(r"\s+#.*", "", line).split(" && ")]
    return [part.strip() for part in parts if part.strip()]


def small(command: str) -> list[str]:
    """The words of a command after `python`, with the flags of SMALL. Raises ValueError for an unknown command."""
    words = shlex.split(re.sub(r"pretrained/(\w+)\.pt", r"out/\1/last.pt", command))  # tiny models instead
    for pattern, flags in SMALL.items():
        if words[0] == "python" and re.match(pattern, command.removeprefix("python ")):
            return [*words[1:], *flags]
    raise ValueError(f"{command}: add it to SMALL or, with a reason, to SKIPPED")


@pytest.fixture
def run_command(run_script):
    """run_command(words) runs a program as `python words...` would; returns its standard output and its messages."""
    return lambda words: "".join(run_script(*words, stdin="ROMEO:\nquit\n"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with two texts and the checkpoints of both models."""
    folder = tmp_path_factory.mktemp("readme")
    text = "".join(f"{string.ascii_letters}\nROMEO:\nWhat's {i} to thee, {2 * i}?\n\n" for i in range(80))
    for name in ("corpus.txt", "my_novel.txt"):
        (folder / name).write_text(text)
    (folder / "tasks").mkdir()
    for name in ("train.jsonl", "heldout.jsonl"):
        pairs = [{"prompt": f"ROMEO:{i}", "completion": f"{i}"} for i in range(20)]
        (folder / "tasks" / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    answers = ["--model", "gpt", "--pairs", "tasks/train.jsonl", "--out", "answers"]
    fast = ["--model", "gpt", "--parallel", "8", *CORPUS, "--out", "fast"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for flags in (["--model", "llada", *CORPUS], ["--model", "gpt", *CORPUS], answers, fast):
            patch.setattr(sys, "argv", ["train.py", *flags, *TINY, "--steps", "3"])
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    """A copy of `trained`, as the working directory."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


# ------------------------------------------------------------------------------------------------- README
def test_exactly_the_expected_commands_are_skipped():
    assert {command for command in commands() if command in SKIPPED} == set(SKIPPED)


@pytest.mark.parametrize("command", sorted(set(commands()) - set(SKIPPED)))
def test_commands_run(run_command, folder, command):
    words = small(command)
    before = {path: path.read_bytes() for path in folder.rglob("*.pt")}
    output = run_command(words)
    if words[0] == "train.py":
        assert before != {path: path.read_bytes() for path in folder.rglob("*.pt")}
    else:
        assert output.strip()
    if words[0] == "evaluate.py" and "--pairs" not in words:
        assert (folder / "out/report/report.md").exists()


@pytest.mark.parametrize("example", blocks("python"))
def test_python_examples_run(folder, capsys, example):
    example = example.replace("pretrained/llada.pt", "out/llada/last.pt")
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip()


def test_the_file_tree_names_every_root_module_and_nothing_else():
    [tree] = [block for block in blocks("text") if "tokenizer.py" in block]
    names = [name for line in tree.splitlines() for name in re.findall(r"^(\S+)(?: (\S+/))?", line)[0] if name]
    assert all(len(line.split()) > 3 for line in tree.splitlines())
    assert {name for name in names if name.endswith(".py")} == {path.name for path in ROOT.glob("*.py")}
    assert len(list(ROOT.glob("*.py"))) <= 16
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")} | {"tests/", "docs/", "pretrained/"}
    assert {name for name in names if name.endswith("/")} == folders
    assert len(names) == len(set(names))


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 190


# ------------------------------------------------------------------------------------------------- all documents
def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_point_to_files_and_headings(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    assert links
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_functions_that_the_documents_name_exist(path):
    """After "`f` in [m.py](m.py)", m.py must define f."""
    named = re.findall(r"`(\w+)` in\s+\[\w+\.py\]\((?:\.\./)?(\w+\.py)\)", path.read_text(encoding="utf-8"))
    for name, module in named:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / module).read_text(encoding="utf-8"), re.MULTILINE), name


def test_the_documents_name_every_benchmark_and_no_other():
    from benchmarks.__main__ import BENCHMARKS

    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"python -m benchmarks (\w+)", text)) == set(BENCHMARKS)
