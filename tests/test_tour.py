"""tour.ipynb runs from top to bottom in another folder; its stored outputs are complete, small and name no machine."""

import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

TOUR = ROOT / "tour.ipynb"
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|usr|opt|work|mnt|var|private|Users)/|\b[A-Z]:\\|site-packages")
SMALL = {"TOUR_SECONDS": "1", "OMP_NUM_THREADS": "1"}
OFFLINE = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


@pytest.fixture
def tour():
    return nbformat.read(TOUR, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    """What the cells of a notebook have printed."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def numbers(text: str, *labels: str) -> list[str]:
    """The number that follows each label."""
    return [re.search(rf"{re.escape(label)}\s+([\d.]+)", text)[1] for label in labels]


def test_every_cell_runs_offline_in_another_folder(tour, tmp_path, monkeypatch):
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    for name, value in (SMALL | OFFLINE | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(tour, timeout=120, kernel_name="python3", resources=resources).execute()  # raises if a cell fails
    check_what_the_text_claims(printed(tour))


def check_what_the_text_claims(text: str) -> None:
    by_hand, computed = numbers(text, "by hand", "compute_llada_loss")
    assert by_hand == computed
    orders, masks, bound, true = map(
        float, numbers(text, "mean over 24 orders", "all t, all masks, divided by t", "bound_from_masks", "never more")
    )
    assert abs(orders - masks) < 2e-4
    assert abs(orders - bound) < 2e-4
    assert true < orders
    one_side, both_sides = map(float, numbers(text, "GPT, left side", "LLaDA, both sides"))
    assert both_sides < one_side


def test_stored_outputs_are_those_of_one_run_from_top_to_bottom(tour):
    cells = code_cells(tour)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) >= 3
    check_what_the_text_claims(printed(tour))


def test_the_notebook_is_small_and_names_no_machine(tour):
    text = TOUR.read_text(encoding="utf-8")
    assert len(text) < 400_000  # bytes
    for cell in tour.cells:
        for output in cell.get("outputs", []):
            assert len(output.get("data", {}).get("image/png", "")) < 80_000
            shown = output.get("text", "") + "".join(map(str, output.get("data", {}).values()))
            assert not MACHINE.search(shown), shown[:500]
    assert set(tour.metadata) <= {"kernelspec", "language_info"}
