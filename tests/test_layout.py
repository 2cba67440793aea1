"""The layout of docs and design: which modules there are, which import which, and what can be deleted."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT, TINY

ROOT_MODULES = {
    *("config", "tokenizer", "data", "layers", "model", "diffusion", "likelihood", "logits", "sampler"),
    *("autoregressive", "optim", "checkpoint", "trainer", "train", "generate", "evaluate"),
}
FOLDERS = {"generation", "evaluation", "extras", "utils"}
SCRIPTS = {"train", "generate", "evaluate"}
ASK_FOR_EXTRAS = {*SCRIPTS, "checkpoint", "generation.page"}  # where a file or a flag asks for one
ERRORS = {"utils.errors"}
# Module or folder -> what it may import of this project; "utils" stands for all of utils. So the mathematics
# (likelihood, logits, sampler, diffusion) knows no network, not even through what it imports.
MAY_IMPORT = {
    "config": ERRORS,
    "tokenizer": set(),
    "optim": set(),
    "layers": set(),
    "likelihood": set(),
    "logits": {"config"},
    "sampler": {"config", "logits"} | ERRORS,
    "data": {"tokenizer", "utils"},
    "model": {"config", "layers"},
    "diffusion": {"config", "tokenizer", "likelihood", "data"},
    "autoregressive": {"config", "tokenizer", "likelihood", "data", "logits", "model"} | ERRORS,
    "checkpoint": {"config", "model", "tokenizer", "utils", "extras"},
    "trainer": ROOT_MODULES - SCRIPTS - {"trainer", "sampler"} | {"utils"},
    "generation": ROOT_MODULES - SCRIPTS | {"generation", "utils", "extras"},
    "evaluation": ROOT_MODULES - SCRIPTS | {"evaluation", "generation", "utils"},
    "utils": {"utils"},
}
OPTIONAL = {"tokenizers", "sacrebleu", "rouge_score"}  # libraries that only extras use
WITHOUT_TORCH = {*SCRIPTS, "config", "utils.console", "utils.errors", "utils.files"}


PATHS = sorted(path for folder in ("", *FOLDERS) for path in (ROOT / folder).glob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PATHS}
STORY = sorted(name for name in MODULES if name.split(".")[0] not in {"extras", *SCRIPTS})


def imports(name: str, at_top: bool = False) -> set[str]:
    """What a module imports anywhere in it, or when it is imported itself: torch.nn, generation.text."""
    tree, found = ast.parse(MODULES[name].read_text()), set()
    for node in tree.body if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # from generation import text: generation.text
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES) or {node.module}
    return found


def own_imports(name: str) -> set[str]:
    """The modules of this project that a module imports."""
    return imports(name) & set(MODULES)


def top_level(names: set[str]) -> set[str]:
    """Root modules, folders and libraries."""
    return {name.split(".")[0] for name in names}


# ------------------------------------------------------------------------------------------------- imports
def test_modules_and_folders_are_those_of_the_design():
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_MODULES
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == FOLDERS | {"tests"}


def test_no_cycles_between_modules_nor_between_folders():
    """But checkpoint.py, which opens extras where a file asks for one, after everything has been imported."""
    TopologicalSorter({name: imports(name, at_top=True) for name in MODULES}).prepare()  # raises CycleError
    folders = {name: set() for name in ROOT_MODULES | FOLDERS}
    for name in MODULES:
        here, found = name.split(".")[0], own_imports(name)
        if name in ASK_FOR_EXTRAS:
            assert "extras" not in top_level(imports(name, at_top=True)), name
            found = {module for module in found if not module.startswith("extras")}
        folders[here] |= top_level(found) - {here}
    TopologicalSorter(folders).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_what_the_layout_allows(name):
    found, folder = own_imports(name), name.split(".")[0]
    assert not found & SCRIPTS
    allowed = MAY_IMPORT.get(folder)
    if allowed is not None:
        assert {module for module in found if not {module, module.split(".")[0]} & allowed} == set()
    if folder != "extras" and name not in ASK_FOR_EXTRAS:
        assert "extras" not in top_level(found)


def test_only_declared_libraries_are_used_and_slow_ones_imported_where_they_are_used():
    declared = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().split()}
    declared = {"PIL" if name == "pillow" else name for name in declared}
    for name in MODULES:
        libraries = top_level(imports(name)) - ROOT_MODULES - FOLDERS - set(sys.stdlib_module_names) - {"pydoc_data"}
        assert libraries <= declared | (OPTIONAL if name.startswith("extras") else set()), name
        first = top_level(imports(name, at_top=True))
        assert not first & {"rich", "matplotlib", "requests", "PIL", *OPTIONAL}, name
        assert name not in WITHOUT_TORCH or not first & {"torch", "numpy"}, name


# ------------------------------------------------------------------------------------------------- words and lines
def test_views_do_not_ask_which_model_wrote():
    for name in MODULES:
        if name.startswith("generation") and name not in ("generation.write", "generation.page"):  # which runs models
            assert not re.findall(r"\b(?:causal|fills_masks|is_segmented)\b", MODULES[name].read_text()), name


def test_the_code_is_read_in_an_evening():
    code = {path: path.read_text().splitlines() for path in MODULES.values()}
    tests = {path: path.read_text().splitlines() for path in (ROOT / "tests").glob("*.py")}
    assert max(len(line) for lines in (code | tests).values() for line in lines) <= 120
    assert sum(map(len, code.values())) <= 6612  # the goal is 6,000: this number may only fall
    assert sum(map(len, tests.values())) <= 6810  # likewise


# ------------------------------------------------------------------------------------------------- programs
def test_extras_can_be_deleted(tmp_path, corpus_file):
    """The story, the help and a short training stand without them; so does each of them without the others."""
    for name in MODULES:
        if name.startswith("extras."):
            assert not [other for other in own_imports(name) if other.startswith("extras.")], name
        elif not name.startswith("extras."):
            (tmp_path / MODULES[name].relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(MODULES[name], tmp_path / MODULES[name].relative_to(ROOT))
    code = f"""
import importlib, runpy, sys
def run(*argv):
    sys.argv = list(argv)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, end
for program in {sorted(SCRIPTS)}:
    run(program + ".py", "--help")
assert not {{"torch", "numpy", "matplotlib", "requests", "rich"}} & set(sys.modules)
for name in {STORY}:
    importlib.import_module(name)
for model in ("llada", "gpt"):
    run("train.py", "--model", model, "--data", {str(corpus_file)!r}, "--steps", "2", *{TINY})
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("usage: ") == len(SCRIPTS)
    assert all((tmp_path / "out" / model / "last.pt").exists() for model in ("llada", "gpt"))


def test_diffusion_shows_an_example(run_script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    output, _ = run_script("diffusion.py")
    assert all(f"t = {t}" in output for t in (0.1, 0.5, 0.9)), output
