"""ListOps at the published sizes draws as the published generator does."""

from __future__ import annotations

import torch

from contextlab.experiments import load_recipe
from contextlab.tasks.text.listops import CLOSE, SYMBOLS
from tests.tasks.published import Figure, hold

PUBLISHED: dict[str, Figure] = {
    "symbols": (1066.7, 392.9, 1500),
    "share of lists": (0.14226, 0.004291, 1500),
    "share of [SM among them": (0.24971, 0.03854, 1500),
    "lists open at once, at most": (9.0, 0.0, 1500),
    "answer": (4.38, 3.184, 1500),
    "answers 0": (0.166, 0.3722, 1500),
    "answers 9": (0.15733, 0.3642, 1500),
}
"""Of generate_tree of lra_benchmarks/data/listops.py with its default flags: more than 500 and fewer than 2000 symbols.

From github.com/google-research/long-range-arena at commit cd31e5c6b8e5bceabd28de2d2afb23f7ae5d36d8.
"""


def test_expressions_are_those_of_the_published_generator() -> None:
    prompt = load_recipe("lra-text").build_task("listops").sample(600, torch.Generator().manual_seed(0))
    size = prompt.scored.int().argmax(1)
    opened = (prompt.inputs >= 10) & (prompt.inputs < CLOSE)
    lists = opened.sum(1)
    depth = (opened.int() - (prompt.inputs == CLOSE).int()).cumsum(1).amax(1)
    answer = prompt.targets[prompt.scored]
    found = {
        "symbols": size,
        "share of lists": lists / size,
        "share of [SM among them": (prompt.inputs == SYMBOLS.index("[SM")).sum(1) / lists,
        "lists open at once, at most": depth,
        "answer": answer,
        "answers 0": answer == 0,
        "answers 9": answer == 9,
    }
    assert list(found) == list(PUBLISHED)
    for name, own in found.items():
        hold(name, own, PUBLISHED[name])
    assert size.min() > 500
    assert size.max() < 2000
