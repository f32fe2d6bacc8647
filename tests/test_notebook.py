"""comparison.ipynb from top to bottom, on the sample, and its committed outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOK = ROOT / "analysis" / "comparison.ipynb"


def test_runs_from_top_to_bottom(finished_task3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished_task3)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    executed = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    printed = "".join(str(cell.get("outputs", "")) for cell in executed.cells)
    assert "5x5" in printed and "There is no run of efficientnet_b0 in this store yet" in printed


def test_committed_outputs_are_of_a_whole_run_on_real_images() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    printed = "".join(str(output) for output in outputs)
    assert "FashionMNIST" in printed and "sample/" not in printed and "/home/" not in printed
