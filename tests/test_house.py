"""The house itself: who imports whom, and every room can be visited."""

import ast
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

ROOMS = {path.stem: path for path in ROOT.glob("*.py")}
ALONE = ("tokenizer", "model", "drawing", "console", "likelihood")  # they import no other room


def imports(room: str) -> set[str]:
    """All modules a room imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(ROOMS[room].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_no_cycles_and_the_mathematics_stands_alone():
    rooms = {room: imports(room) & set(ROOMS) for room in ROOMS}
    TopologicalSorter(rooms).prepare()  # raises CycleError
    for room in ALONE:
        assert not rooms[room], f"{room}.py imports {rooms[room]}"
    assert not {"model", "train", "generate"} & (rooms["sampler"] | rooms["likelihood"] | rooms["diffusion"])
    assert "sampler" not in rooms["train"]


def test_slow_libraries_are_imported_where_they_are_used():
    for room, path in ROOMS.items():
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {alias.name for n in top if isinstance(n, ast.Import) for alias in n.names}
        names |= {n.module for n in top if isinstance(n, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & {"rich", "matplotlib", "requests"}, room


def test_only_declared_libraries_are_used():
    declared = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().split()}
    optional = {"tokenizers"}
    for room in ROOMS:
        foreign = imports(room) - set(ROOMS) - set(sys.stdlib_module_names) - {"pydoc_data"}
        assert foreign <= declared | optional, room


@pytest.mark.parametrize(
    ("room", "words"),
    [
        ("data.py", ["vocabulary", "encoded", "decoded", "to train"]),
        ("diffusion.py", ["t = 0.1", "t = 0.5", "t = 0.9"]),
        ("model.py", ["llada", "gpt", "logits (2, 16, 69)", "parameters"]),
    ],
)
def test_rooms_can_be_visited(command, room, words):
    output = command(room).stdout
    assert all(word in output for word in words), output
