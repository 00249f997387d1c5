"""Every notebook runs from its first cell to its last."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {"three_acts": "num_demonstrations, num_sft_steps, num_questions, num_iterations = 2000, 8, 256, 2"}


def printed_by(path, parameters=None):
    """What a notebook prints, run with other values in its cell of parameters."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(cells) == 1
    if parameters is not None:
        assert parameters.split(" = ")[0] == cells[0].source.split(" = ")[0]
        cells[0].source = parameters
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=str(path.parent))
    return "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )


def test_there_is_a_notebook():
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)


@pytest.mark.filterwarnings("default")  # what the kernel's machinery warns of is not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    """Every cell, over a few steps."""
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", "cpu")
    printed = printed_by(path, SMALL[path.stem])
    assert printed.count("   PPO  ") == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_three_acts_end_as_they_should(monkeypatch):
    """At the notebook's own size, whose story it tells."""
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # it computes for a minute: here the compiler's passes pay
    printed = printed_by(ROOT / "notebooks" / "three_acts.ipynb")
    low = float(printed.split("gold judge prefers PPO to SFT: ")[1].split("[")[1].split(",")[0])
    assert low > 0.5, printed
