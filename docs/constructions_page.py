"""The table of docs/constructions.md: how far each construction is from its learner.

    python docs/constructions_page.py

writes it anew. The differences are the largest over 64 prompts of a task and all of their prefixes, over the largest
size of an answer (1 at least), of weights in float64 and of the float32 that `contextlab.build_model` gives, both
computing in float64.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from contextlab import build_model, build_task, registry
from contextlab.prompt import Prompt

PAGE = Path(__file__).parent / "constructions.md"
MARKS = ("<!-- table: written by docs/constructions_page.py -->", "<!-- end of table -->")
ROWS = {
    "gd_construction": ({"dimensions": 5, "steps": 4}, "linear_regression", {"dimensions": 5, "examples": 24}),
    "preconditioned_gd_construction": ({"dimensions": 5}, "linear_regression", {"dimensions": 5, "examples": 24}),
    "gd_plus_plus_construction": (
        {"dimensions": 5, "steps": 3}, "linear_regression", {"dimensions": 5, "examples": 24},
    ),
    "newton_construction": (
        {"dimensions": 5, "steps": 6, "start": 0.002}, "linear_regression", {"dimensions": 5, "examples": 24},
    ),
    "kernel_smoother_construction": ({"dimensions": 5}, "quadratic_regression", {"dimensions": 5, "examples": 24}),
    "nearest_neighbour_construction": ({"dimensions": 5}, "quadratic_regression", {"dimensions": 5, "examples": 24}),
    "model_selection_construction": (
        {"dimensions": 5, "steps": 4}, "mixed_regression",
        {"dimensions": 5, "examples": 24, "families": ("linear", "quadratic")},
    ),
    "induction_construction": ({"vocabulary": 26, "size": 2}, "markov_chain", {"vocabulary": 26, "length": 128}),
    "copy_construction": ({}, "copy", {}),
    "subleq_construction": ({"lines": 8, "cells": 4, "steps": 16}, "subleq", {"steps": 16}),
}  # fmt: skip
"""Construction -> its options, a task that it fits, the task's options."""


def answers(model: torch.nn.Module, prompt: Prompt, pooled: bool) -> Tensor:
    """At every prefix; probabilities of tokens."""
    if pooled:
        return torch.stack([model(prompt.inputs[:, : i + 1]) for i in range(prompt.length)], 1)
    said = model(prompt.inputs)
    return said if prompt.inputs.is_floating_point() else said.softmax(-1)


@torch.no_grad()
def differences(name: str) -> tuple[str, float, float]:
    """The learner's name and the two differences."""
    options, task, of_task = ROWS[name]
    spec = registry.lookup("model", name).build(**options)
    made, drawn = spec.construction.made(), build_task(task, **of_task)
    made.check_task(drawn if spec.pool is None else drawn.replace(query="random"))
    prompt = drawn.sample(64, torch.Generator().manual_seed(0)).to(torch.float64)
    wanted = made.learner()(prompt)
    wanted = wanted if prompt.inputs.is_floating_point() else wanted.double().exp()
    found = []
    for model in (made.build(torch.float64), build_model(spec).double()):
        off = (answers(model, prompt, spec.pool is not None) - wanted).abs().max() / wanted.abs().max().clamp_min(1)
        found.append(float(off))
    entry = registry.entry_of("learner", made.learner())
    return entry.name if entry else "", *found


def table() -> str:
    """The page's table."""
    lines = [
        "| construction | papers | equals the learner | largest difference, float64 weights | float32 weights |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ROWS:
        learner, exact, rounded = differences(name)
        papers = ", ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in registry.lookup("model", name).papers)
        lines.append(f"| `{name}` | {papers} | `{learner}` | {exact:.0e} | {rounded:.0e} |")
    return "\n".join(lines)


def renewed(text: str) -> str:
    """The page's text with its table made anew."""
    start, end = map(re.escape, MARKS)
    return re.sub(f"({start}\n).*?({end})", lambda found: f"{found[1]}\n{table()}\n\n{found[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
