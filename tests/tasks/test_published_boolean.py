"""The classes of the suite boolean draw as the authors' code does."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_task
from contextlab.experiments import load_recipe
from tests.tasks.published import Figure, hold

PROMPTS = 600

SHARE: dict[str, Figure] = {
    "conjunction": (0.30625, 0.0593, 512),
    "disjunction": (0.6887, 0.05788, 512),
    "sparse_disjunction": (0.65731, 0.06087, 512),
    "cnf": (0.59219, 0.1127, 512),
    "dnf": (0.45179, 0.1039, 512),
    "sparse_threshold": (0.49916, 0.2361, 512),
    "majority": (0.4389, 0.09458, 512),
    "integer_halfspace": (0.47486, 0.06787, 512),
    "parity": (0.49831, 0.04568, 512),
    "sparse_parity": (0.5023, 0.04077, 512),
    "nearest_neighbour": (0.49309, 0.1374, 512),
}
"""The share of the labels of a prompt that are +1, by class.

From src/bool_tasks.py of github.com/satwik77/incontext-bool at commit a25a2cb0c62ad541cd30b0672df136230d878d9c, on the
sizes of the recipe.
"""

CHANGES: dict[str, Figure] = {
    "conjunction": (0.42564, 0.06963, 512),
    "disjunction": (0.42575, 0.06948, 512),
    "sparse_disjunction": (0.44412, 0.06904, 512),
    "cnf": (0.46524, 0.07507, 512),
    "dnf": (0.48211, 0.06858, 512),
    "sparse_threshold": (0.39473, 0.1122, 512),
    "majority": (0.47985, 0.06854, 512),
    "integer_halfspace": (0.49989, 0.0624, 512),
    "parity": (0.49944, 0.0476, 512),
    "sparse_parity": (0.49985, 0.0418, 512),
    "nearest_neighbour": (0.47005, 0.06812, 512),
}
"""How often a label differs from the one before."""

VARIABLES: dict[str, Figure] = {
    "conjunction": (8.2852, 2.382, 512),
    "disjunction": (8.4375, 2.446, 512),
    "sparse_disjunction": (4.0, 0.0, 512),
    "cnf": (16.783, 3.693, 512),
    "dnf": (16.447, 3.445, 512),
    "sparse_threshold": (8.3398, 2.385, 512),
    "majority": (8.3691, 2.327, 512),
    "integer_halfspace": (17.178, 1.527, 512),
    "parity": (5.127, 1.574, 512),
    "sparse_parity": (2.0, 0.0, 512),
}
"""Weights of a function that are not zero; of all its terms or clauses together."""

TEACHING: dict[str, Figure] = {
    "teach_biconjunction": (0.37787, 0.05816, 512),
    "teach_dnf": (0.3841, 0.1050, 4096),
    "teach_conjunction": (0.3678, 0.06154, 512),
}
"""The share of +1 after teaching sequences; 28 variables, 70 examples (90 of a dnf)."""


@pytest.mark.parametrize("name", SHARE)
def test_labels_and_functions_are_those_of_the_authors_code(name: str) -> None:
    prompt = load_recipe("boolean").build_task(name).sample(PROMPTS, torch.Generator().manual_seed(len(name)))
    labels = prompt.ys[..., 0]
    hold(name, (labels > 0).float().mean(1), SHARE[name])
    hold(name, (labels[:, 1:] != labels[:, :-1]).float().mean(1), CHANGES[name])
    if name in VARIABLES:
        hold(name, (prompt.hidden["weights"] != 0).flatten(1).sum(1), VARIABLES[name])
    assert list(load_recipe("boolean").tasks) == list(SHARE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("teach_biconjunction", {"function": "conjunction", "examples": 70}),
        ("teach_conjunction", {"function": "conjunction", "examples": 70, "negations": False}),
        ("teach_dnf", {"function": "dnf", "examples": 90, "negations": False}),
    ],
)
def test_teaching_sequences_are_those_of_the_authors_code(name: str, options: dict) -> None:
    task = build_task("boolean_function", teaching=True, dimensions=28, **options)
    prompt = task.sample(PROMPTS, torch.Generator().manual_seed(1))
    hold(name, (prompt.ys[..., 0] > 0).float().mean(1), TEACHING[name])
