"""Learners over a whole class of Boolean functions, or a sample of it, against sums over the class."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from contextlab import build_task
from contextlab.errors import InputError
from contextlab.learners import (
    Halving,
    VersionSpace,
)
from contextlab.learners.answers import SMOOTHING
from tests.learners.test_boolean_learners import CLASSES, by_prefix, draw, few, generator, seeds


def members(space: VersionSpace, d: int) -> list[tuple[tuple[int, ...], float, float]]:
    """(weights, threshold, chance) of each function, from the docstring."""
    values, chances = space.drawn_alone()
    chance = dict(zip(values, chances, strict=True))
    found = []
    thresholds = space.thresholds if space.function == "halfspace" else (0.0,)
    for w in itertools.product(values, repeat=d):
        for t in thresholds:
            if space.relevant is None:
                found.append((w, t, math.prod(chance[a] for a in w)))
            elif all(a in (0, 1) for a in w) and sum(w) == space.relevant:
                found.append((w, t, 1.0))
    return found


@pytest.mark.parametrize(
    "space",
    [
        VersionSpace("conjunction", planted=0.3),
        VersionSpace("disjunction", planted=0.2, noise=0.1),
        VersionSpace("disjunction", relevant=2, planted=0.3),
        VersionSpace("conjunction", values=(0, 1), chances=(0.6, 0.4), noise=0.2),
        VersionSpace("halfspace"),
        VersionSpace("halfspace", values=(-1, 0, 1), thresholds=(-0.5, 1.5)),
        VersionSpace("parity", relevant=2, noise=0.1),
        VersionSpace("parity"),
    ],
    ids=lambda space: f"{space.function}-{space.relevant}-{space.planted}-{space.noise}",
)
def test_version_space_is_bayes_rule_over_the_class(space: VersionSpace) -> None:
    xs, _ = draw(5, dimensions=3, examples=9)
    ys = torch.tensor([[1 if CLASSES[space.function]((1, 0, 1), 0.5, x) else -1 for x in row] for row in xs.tolist()])
    ys = ys.double().unsqueeze(2)
    functions = members(space, 3)
    assert len(functions) == space.size(3)

    def like(w: tuple[int, ...], t: float, x: list[int], y: int) -> float:
        true = CLASSES[space.function](w, t, x)
        rare = true == (space.function == "conjunction")
        chance = (1 - space.planted) / 8 + (space.planted * 2 ** sum(map(abs, w)) / 8 if rare else 0)
        return chance * (1 - space.noise if true == (y > 0) else space.noise)

    def logit(X: list, y: list, x: list) -> float:
        mass = {
            label: sum(
                chance * math.prod(like(w, t, a, b) for a, b in zip([*X, x], [*y, label], strict=True))
                for w, t, chance in functions
            )
            for label in (1, -1)
        }
        if not mass[1] + mass[-1]:
            return 0.0
        share = mass[1] / (mass[1] + mass[-1])
        return float(torch.logit(torch.tensor(share).double().clamp(SMOOTHING, 1 - SMOOTHING)))

    torch.testing.assert_close(space.predict(xs, ys), by_prefix(logit, xs, ys), atol=1e-4, rtol=1e-4)


@few
@seeds
def test_halving_follows_the_majority_of_what_fits(seed: int) -> None:
    xs, ys = draw(seed, dimensions=3)
    for function in CLASSES:
        learner = Halving(function)
        functions = members(VersionSpace(function), 3)

        def vote(X: list, y: list, x: list, function: str = function, functions: list = functions) -> float:
            says = CLASSES[function]
            fit = [w for w, _, _ in functions if all(says(w, 0.5, a) == (b > 0) for a, b in zip(X, y, strict=True))]
            return float(np.sign(sum(1 if says(w, 0.5, x) else -1 for w in fit)))

        assert torch.equal(learner.decide(xs, ys), by_prefix(vote, xs, ys))


def test_halving_makes_at_most_log2_mistakes() -> None:
    task = build_task("boolean_function", function="sparse_parity", dimensions=12, examples=40)
    prompt = task.sample(50, generator())
    labels = Halving("parity", relevant=2).decide(prompt.xs.double(), prompt.ys.double())
    assert (labels * prompt.ys < 0).sum(1).max() <= math.log2(math.comb(12, 2))


@pytest.mark.parametrize(("function", "noise"), [("dnf", 0.0), ("cnf", 0.1)])
def test_drawn_formulas_come_to_the_exact_posterior(function: str, noise: float) -> None:
    """Against a sum over all 729 formulas of two terms of three bits, by the definition of the task."""
    task = build_task("boolean_function", function=function, dimensions=3, terms=2, examples=10, noise=noise)
    drawn = task.draw(8, generator(), "cpu")
    learner = dataclasses.replace(task.learners()["sampled_formulas"], draws=2**15, slip=0.0 if noise else 1e-9)
    got = torch.sigmoid(learner.predict(drawn.xs, drawn.ys))[..., 0]
    sign = 1 if function == "dnf" else -1
    chance = {0: 1 - task.literal, 1: task.literal / 2, -1: task.literal / 2}
    hypotheses = []
    for literals in itertools.product((0, 1, -1), repeat=6):
        terms = [literals[:3], literals[3:]]
        hypotheses.append((terms, np.prod([chance[each] for each in literals])))

    def meets(x: list[float], term: tuple[int, ...]) -> bool:
        return all(w == 0 or sign * w == value for w, value in zip(term, x, strict=True))

    for row in range(8):
        xs, ys = drawn.xs[row].tolist(), drawn.ys[row, :, 0].tolist()
        weights = np.array([weight for _, weight in hypotheses])
        for t, x in enumerate(xs):
            inputs = [
                (1 - task.share) / 8 + task.share * meets(x, terms[0]) * 2.0 ** (sum(map(abs, terms[0])) - 3)
                for terms, _ in hypotheses
            ]
            true = np.array([sign if any(meets(x, term) for term in terms) else -sign for terms, _ in hypotheses])
            weights = weights * inputs
            share = weights[true > 0].sum() / weights.sum()
            assert got[row, t].item() == pytest.approx(share * (1 - noise) + (1 - share) * noise, abs=0.06)
            weights = weights * np.where(true == ys[t], 1 - noise, noise)


def test_drawn_formulas_are_the_best_of_small_dnfs() -> None:
    task = build_task("boolean_function", function="dnf", dimensions=8, examples=24)
    prompt, learners = task.sample(128, generator()), task.learners()
    assert next(iter(learners)) == "sampled_formulas"
    loss = {name: task.loss(learner(prompt), prompt).item() for name, learner in learners.items()}
    assert loss["sampled_formulas"] < min(value for name, value in loss.items() if name != "sampled_formulas") - 0.02
    with pytest.raises(InputError, match="is for 8 bits, the prompt has 3"):
        learners["sampled_formulas"].predict(torch.ones(1, 2, 3), torch.ones(1, 2, 1))
