"""The page of `gpu.py`'s figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TITLES = {
    "machine": "The machine",
    "together": "Many trainings as one program",
    "kernels": "flash-linear-attention's kernels",
    "target": "Time to an answer",
    "tests": "Tests on the device",
    "decoding": "Decoding at long contexts",
    "captured": "Whole steps captured",
    "bf16": "bfloat16",
}
WORDS = {
    "together": "Steps of M models of recipe `demo` on regression (batch 128 each), as one program "
    "(`training.train_together`) and one after the other.",
    "kernels": "Forward and backward in bfloat16, two sequences, eight heads of 64. Errors are against float32.",
    "target": "In-context regression, d = 20, 41 examples, without noise: seconds of training until the excess over "
    "least squares is 0.02 per dimension. Ours is a transformer of width 256 and 12 layers; of the model of "
    "Garg et al.'s code the time of a step is measured.",
    "tests": "`tests/device`, which holds results on the GPU to those of the CPU.",
    "decoding": "The model of recipe `byte-lm`, untrained, in bfloat16, one sequence; policies keep 10%, `quantize` 4 "
    "bits.",
    "captured": "A training step of recipe `demo`'s models, batch 128.",
    "bf16": "A training step on regression (d = 20, 41 examples), batch 128, and the loss after equally many steps.",
}
EMPTY = "There are no figures yet: no machine with a GPU has run the script. The headings below are what it measures."


def page(found: Mapping[str, Any] | None) -> str:
    """Markdown of what `gpu.measure` returns; None: of no run yet."""
    lines = ["# On a GPU", ""]
    if found is None:
        lines += [EMPTY]
    elif found["rehearsal"]:
        lines += ["**A rehearsal on a CPU at tiny sizes: these figures tell only that the script works.**"]
    else:
        lines += ["Figures are medians, with the least and the most of the rounds in brackets."]
    lines += ["", "`make bench-gpu` measures all of this in at most eight minutes and writes this page.", ""]
    for name, title in TITLES.items():
        part = (found or {}).get("parts", {}).get(name)
        if found is not None and part is None:
            continue
        lines += [f"## {title}", ""]
        if name in WORDS:
            lines += [WORDS[name], ""]
        if part is not None:
            lines += _part(part)
    return "\n".join(lines).rstrip() + "\n"


def write_page(found: Mapping[str, Any], path: Path) -> None:
    """Write the page of these figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(found))


def _part(part: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    tables: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in part["rows"]:
        tables.setdefault(tuple(row), []).append(row)
    for columns, rows in tables.items():
        lines += ["| " + " | ".join(each.replace("_", " ") for each in columns) + " |", "| --- " * len(columns) + "|"]
        lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in _thinned(rows)]
        lines.append("")
    if part["status"] != "done":
        lines += [f"This part is not complete: it was {part['status']} after {part['seconds']} s. Its last lines:", ""]
        lines += ["```text", *part.get("last_lines", []), "```", ""]
    return lines


def _thinned(rows: list[Mapping[str, Any]], most: int = 20) -> list[Mapping[str, Any]]:
    """A long curve by some of its points, the last among them."""
    if len(rows) <= most:
        return rows
    return [row for i, row in enumerate(rows) if (len(rows) - 1 - i) % -(-len(rows) // most) == 0]


def _cell(value: Any) -> str:
    if isinstance(value, list) and len(value) == 3 and all(isinstance(each, int | float) for each in value):
        return f"{value[0]:g} ({value[1]:g} to {value[2]:g})"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
