"""The layout: which modules there are, and which of them import which."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

ROOT_MODULES = {
    *("tokenizer", "data", "layers", "model", "diffusion", "likelihood", "logits", "unmasking", "sampler"),
    *("autoregressive", "optim", "checkpoint", "trainer", "train", "generate", "evaluate"),
}
FOLDERS = {"generation", "evaluation", "benchmarks", "utils"}
SCRIPTS = {"train", "generate", "evaluate"}
ERRORS = {"utils.errors"}
MAY_IMPORT = {  # module -> what it may import of this project; "utils" stands for all of utils
    "tokenizer": set(),
    "optim": set(),
    "layers": set(),
    "logits": set(),
    "data": {"tokenizer", "utils"},
    "model": {"layers", "utils"},
    "likelihood": ERRORS,
    "unmasking": {"logits"} | ERRORS,
    "sampler": {"unmasking", "logits"} | ERRORS,
    "diffusion": {"tokenizer", "likelihood", "data"} | ERRORS,
    "autoregressive": {"layers", "model", "logits", "tokenizer", "likelihood", "data"} | ERRORS,
    "checkpoint": {"model", "tokenizer", "utils"},
    "trainer": ROOT_MODULES - SCRIPTS - {"trainer", "unmasking", "sampler"} | {"utils"},
    "utils": {"utils"},
}
OPTIONAL = {"tokenizers", "sacrebleu", "rouge_score"}  # libraries imported only where they are used
WITHOUT_TORCH = {*SCRIPTS, "utils.console", "utils.errors", "utils.files", "benchmarks.__main__"}


def module_files() -> dict:
    """Every module's name -> its file."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(sorted(zip(names, paths, strict=True)))


MODULES = module_files()


def names_of(node: ast.AST) -> set[str]:
    """What an import statement imports: "torch.nn", or "generation.text" for `from generation import text`."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
    return submodules or {node.module}


def imports(name: str) -> set[str]:
    """What a module imports, anywhere in it."""
    return set().union(*map(names_of, ast.walk(ast.parse(MODULES[name].read_text()))))


def imports_at_top(name: str) -> set[str]:
    """What a module imports when it is imported itself."""
    return set().union(*map(names_of, ast.parse(MODULES[name].read_text()).body))


def top_level(names: set[str]) -> set[str]:
    """Root modules, folders and libraries."""
    return {name.split(".")[0] for name in names}


def own_imports(name: str) -> set[str]:
    """The modules of this project that a module imports."""
    return imports(name) & set(MODULES)


def test_modules_at_the_root_are_those_of_the_design():
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_MODULES
    assert len(ROOT_MODULES) <= 16
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == FOLDERS


def test_no_cycles_between_modules_nor_between_folders():
    TopologicalSorter({name: own_imports(name) for name in MODULES}).prepare()  # raises CycleError
    folders = {name: set() for name in ROOT_MODULES | FOLDERS}
    for name in MODULES:
        here = name.split(".")[0]
        folders[here] |= top_level(own_imports(name)) - {here}
    TopologicalSorter(folders).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_what_the_layout_allows(name):
    folder = name.split(".")[0]
    if folder in MAY_IMPORT:
        allowed = MAY_IMPORT[folder]
        assert {module for module in own_imports(name) if not {module, module.split(".")[0]} & allowed} == set()


def test_scripts_and_benchmarks_are_imported_by_nobody():
    for name in MODULES:
        assert not own_imports(name) & SCRIPTS, name
        if not name.startswith("benchmarks"):
            assert "benchmarks" not in top_level(own_imports(name)), name


@pytest.mark.parametrize("name", ["likelihood", "logits", "unmasking", "sampler", "diffusion"])
def test_the_mathematics_knows_no_network(name):
    """Not even through what it imports."""
    reached, new = set(), {name}
    while new:
        reached |= new
        new = set().union(*map(own_imports, new)) - reached
    assert not reached & {"layers", "model", "checkpoint", "trainer", "autoregressive", *SCRIPTS}


def test_slow_libraries_are_imported_where_they_are_used():
    for name in MODULES:
        libraries = top_level(imports_at_top(name))
        assert not libraries & {"rich", "matplotlib", "requests", *OPTIONAL}, name
        if name in WITHOUT_TORCH:
            assert not libraries & {"torch", "numpy"}, name


@pytest.mark.parametrize("program", sorted(SCRIPTS))
def test_help_does_not_import_torch(program):
    code = f"""
import runpy, sys
sys.argv = ["{program}.py", "--help"]
try:
    runpy.run_path("{program}.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
print(sorted({{"torch", "numpy", "matplotlib", "requests", "rich"}} & set(sys.modules)), file=sys.stderr)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage" in process.stdout
    assert process.stderr.strip() == "[]"


def test_only_declared_libraries_are_used():
    declared = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().split()}
    declared = {"PIL" if name == "pillow" else name for name in declared}
    for name in MODULES:
        libraries = top_level(imports(name)) - ROOT_MODULES - FOLDERS - set(sys.stdlib_module_names) - {"pydoc_data"}
        assert libraries <= declared | OPTIONAL, name


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("data.py", ["vocabulary", "encoded", "decoded", "to train"]),
        ("diffusion.py", ["t = 0.1", "t = 0.5", "t = 0.9"]),
        ("model.py", ["llada", "gpt", "logits (2, 16, 69)", "parameters"]),
    ],
)
def test_modules_that_can_be_run_show_an_example(command, program, words):
    output = command(program).stdout
    assert all(word in output for word in words), output
