"""Run the notebooks and keep what they print: `python docs/notebooks.py [NAME ...]`; of none that is named, all."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "notebooks"


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that run."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict[str, Any]) -> str:
    """Run a cell's source in a namespace; returns what it prints, and its last expression's value, as notebooks do."""
    tree, printed = ast.parse(source), io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
            if value is not None:
                print(value)
    return printed.getvalue()


def renew(path: Path) -> None:
    """Run a notebook from its first cell, and write what each cell printed below it."""
    notebook, names = json.loads(path.read_text()), dict[str, Any]()
    for number, cell in enumerate(code_cells(notebook), 1):
        printed = run_cell("".join(cell["source"]), names)
        told = [{"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)}]
        cell |= {"outputs": told if printed else [], "execution_count": number}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or [each.stem for each in sorted(FOLDER.glob("*.ipynb"))]:
        renew(FOLDER / f"{name}.ipynb")
