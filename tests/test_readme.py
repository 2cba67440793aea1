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
}
SMALL = {  # pattern of a command -> flags that make it small; of several that match, the first counts
    r"train\.py .*--resume": ["--steps", "6"],
    r"train\.py .*--init-from": ["--steps", "3", "--val-fraction", "0.5"],
    r"train\.py .*--pairs": [*TINY, "--steps", "3"],
    r"train\.py .*--minutes": [*CORPUS, *TINY],
    r"train\.py .*--data": [*TINY, "--steps", "3"],
    r"train\.py": [*CORPUS, *TINY, "--steps", "3"],
    r"generate\.py .*--(infill|top|chat|page)": [],
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
    tiny = re.sub(r"pretrained/(\w+)\.pt", r"out/\1/last.pt", command)  # tiny models instead
    words = shlex.split(re.sub(r"--minutes \d+", "--minutes 0.01", tiny))
    for pattern, flags in SMALL.items():
        if words[0] == "python" and re.match(pattern, command.removeprefix("python ")):
            return [*words[1:], *flags]
    raise ValueError(f"{command}: add it to SMALL or, with a reason, to SKIPPED")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with two texts and the checkpoints of both models."""
    folder = tmp_path_factory.mktemp("readme")
    text = "".join(f"{string.ascii_letters}\nROMEO:\nWhat's {i} to thee, {2 * i}?\n\n" for i in range(80))
    for name in ("corpus.txt", "my_novel.txt"):
        (folder / name).write_text(text)
    pairs = [{"prompt": f"ROMEO:{i}", "completion": f"{i}"} for i in range(20)]
    for name in ("tasks.jsonl", "heldout.jsonl"):
        (folder / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    answers = ["--model", "gpt", "--pairs", "tasks.jsonl", "--out", "answers"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for flags in (["--model", "llada", *CORPUS], ["--model", "gpt", *CORPUS], answers):
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
def test_commands_run(run_script, folder, command):
    words = small(command)
    before = {path: path.read_bytes() for path in folder.rglob("*.pt")}
    output = "".join(run_script(*words, stdin="ROMEO:\nquit\n"))
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


def test_the_file_tree_names_every_module_of_the_root_and_of_extras():
    [tree] = [block for block in blocks("text") if "tokenizer.py" in block]
    names = re.findall(r"(\w+\.py)\b", tree)
    root, extras = ({path.name for path in folder.glob("[a-z]*.py")} for folder in (ROOT, ROOT / "extras"))
    assert root | extras <= set(names)
    assert set(names) <= {path.name for path in ROOT.glob("**/*.py")}
    assert {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")} <= set(re.findall(r"(\w+/)", tree))
    assert len(names) == len(set(names))


def test_the_readme_stays_short():
    lines = README.splitlines()
    assert len(lines) <= 140
    assert max(map(len, lines)) <= 120


# ------------------------------------------------------------------------------------------------- all documents
def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_point_to_files_and_headings(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    assert links
    for link in (link for link in links if "://" not in link):
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
    from extras.bench import BENCHMARKS

    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"python -m extras.bench (\w+)", text)) == set(BENCHMARKS)
