"""The notebook in examples/ runs from its first cell to its last, in a kernel."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.cli.conftest import RANK_VARIABLES

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    path = os.pathsep.join(filter(None, [str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONPATH", path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "stored without outputs"
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    trained, matrix, plot, metrics, size, files = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    printed = "".join(output.text for output in trained if output.output_type == "stream")
    assert "step 4/4  loss " in printed, "the run's progress is shown in the notebook"
    assert "runs/notebook: finished, 2 of 2 tasks" in trained[-1].data["text/plain"]
    assert "<table" in trained[-1].data["text/html"]
    assert "untouched" in matrix[-1].data["text/html"]
    assert plot[-1].data["image/png"]
    assert "forgetting" in metrics[-1].data["text/plain"]
    assert int(size[-1].data["text/plain"]) > 10_000
    assert "model.safetensors" in files[-1].data["text/plain"]
