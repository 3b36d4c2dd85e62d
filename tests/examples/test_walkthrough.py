"""The notebook's code cells, run one after another in plain Python with a few steps."""

import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples/walkthrough.ipynb"


def test_every_cell_runs(monkeypatch, capsys):
    matplotlib.use("agg")
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert NOTEBOOK.stat().st_size < 1.5e6
    assert all(cell["outputs"] or i < 2 for i, cell in enumerate(code_cells(cells)))
    space: dict = {}
    for cell in code_cells(cells):
        text = "".join(cell["source"]).replace("STEPS = 600", "STEPS = 5").replace("n=4", "n=1")
        exec(compile(text, str(NOTEBOOK), "exec"), space)
    plt.close("all")
    assert len(space["losses"]) == 5 and space["three"].vectors.shape == (3, 192)
    assert "other parameters with a gradient: 0 of" in capsys.readouterr().out


def code_cells(cells: list[dict]) -> list[dict]:
    return [cell for cell in cells if cell["cell_type"] == "code"]
