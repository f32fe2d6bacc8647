"""The notebooks from top to bottom, on the sample, and their committed outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT, copy_checkout

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "analysis" / "comparison.ipynb"
COLAB = ROOT / "docs" / "colab.ipynb"


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


def test_colab_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy_checkout(tmp_path / "classifiers", "*.py", "requirements-ranges.txt")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # what is installed is new enough, so pip leaves it alone
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(COLAB, as_version=4)
    executed = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in executed.cells for output in cell.get("outputs", []))
    assert "lenet5" in printed and "4/4" in printed and "verdict" in printed
    (figure,) = (output.data for output in executed.cells[-2].outputs)
    assert "image/png" in figure
    assert not (tmp_path / "mlruns").exists() and (tmp_path / "classifiers" / "mlruns" / "mlflow.db").exists()


def test_colab_has_no_outputs() -> None:
    notebook = nbformat.read(COLAB, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
