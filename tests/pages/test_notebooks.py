"""Every notebook of the docs runs from its first cell to its last, with less training, and shows what it printed."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def notebooks():
    spec = importlib.util.spec_from_file_location("notebooks", DOCS / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebooks, path):
    cells = notebooks.code_cells(json.loads(path.read_text()))
    assert len(cells) > 2
    assert all(cell["outputs"] for cell in cells), "run python docs/notebooks.py"
    names = {}
    for cell in cells:
        source = re.sub(r"^STEPS = \d+$", "STEPS = 2", "".join(cell["source"]), flags=re.M)
        assert notebooks.run_cell(source, names).strip()


def test_there_are_notebooks():
    assert NOTEBOOKS
