"""The learners of a class of Boolean functions, the best known first, and the priors that they are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from contextlab.learners.boolean import (
    EarliestNeighbour,
    Elimination,
    LabelFrequency,
    ParityElimination,
    Perceptron,
    Taught,
    TaughtParity,
    Winnow,
)
from contextlab.learners.boolean_posterior import HalfspaceMessages, HalfspacePosterior, LiteralPosterior
from contextlab.learners.regression import Averaging
from contextlab.learners.version_space import MOST_FUNCTIONS, Halving, SampledFormulas, VersionSpace
from contextlab.prompt import Learner

if TYPE_CHECKING:
    from contextlab.tasks.boolean import BooleanFunctions

FORMULAS = ("conjunction", "disjunction", "sparse_disjunction", "cnf", "dnf")
PARITIES = ("parity", "sparse_parity")
BOUND = 3
"""Largest weight of an integer half-space, and beyond the largest threshold of a sparse one."""
THRESHOLDS = tuple(i + 0.5 for i in range(-BOUND, BOUND))


def learners_of(task: BooleanFunctions) -> dict[str, Learner]:
    """By name; see `BooleanFunctions.learners`."""
    copies = task.start if task.function == "nearest_neighbour" else None
    simple: dict[str, Learner] = {
        "earliest_neighbour": EarliestNeighbour(copies),
        "averaging": Averaging(),
        "label_frequency": LabelFrequency(),
    }
    if task.function == "nearest_neighbour":
        return simple
    space = _version_space(task)
    found: dict[str, Learner] = {}
    # A teaching sequence tells the function by its inputs already, but for parities of all variables.
    if space is not None and not (task.teaching and task.function != "parity"):
        found["version_space"] = space
    if task.function in FORMULAS:
        if task.teaching:
            found["taught"] = Taught(task.parts, task.signed, task.dual, task.noise)
        else:
            if task.parts > 1 and task.dimensions <= 10 and not task.size:
                found["sampled_formulas"] = _sampled_formulas(task)
            found["literal_posterior"] = _literal_posterior(task)
        if task.parts == 1:
            found["elimination"] = Elimination(task.dual, task.signed)
        if task.dual:
            found["winnow"] = Winnow(negations=task.signed)
    elif task.function in PARITIES:
        if task.teaching and task.size:
            found["taught_parity"] = TaughtParity(task.size, task.noise)
        if not task.noise:
            parity = {"gf2_elimination": ParityElimination()}
            found = {**parity, **found} if task.function == "parity" else {**found, **parity}
    else:
        found["halfspace_messages"] = _halfspace_messages(task)
        found["halfspace_posterior"] = _halfspace_posterior(task)
        found["perceptron"] = Perceptron()
    if space is not None and not task.noise:
        found["halving"] = Halving(
            space.function, space.relevant, space.values, thresholds=space.thresholds, most=space.most
        )
    return {**found, **simple}


def _version_space(task: BooleanFunctions) -> VersionSpace | None:
    """The class with the chances of its functions, if it is small enough."""
    if task.parts > 1:
        return None
    relevant, noise = task.size or None, task.noise
    if task.function in FORMULAS:
        kind: Any = "disjunction" if task.dual else "conjunction"
        plain = ((0, 1), (1 - task.literal, task.literal))
        values, chances = (None, None) if relevant or task.signed else plain
        space = VersionSpace(kind, relevant, values, chances, planted=task.share, noise=noise)
    elif task.function in PARITIES:
        space = VersionSpace("parity", relevant, noise=noise)
    elif task.function == "integer_halfspace":
        space = VersionSpace("halfspace", values=tuple(range(-BOUND, BOUND + 1)), noise=noise)
    elif task.function == "sparse_threshold":
        space = VersionSpace("halfspace", None, (0, 1, -1), (0.7, 0.15, 0.15), THRESHOLDS, noise=noise)
    else:
        space = VersionSpace("halfspace", relevant, noise=noise)
    return space if space.size(task.dimensions) <= MOST_FUNCTIONS else None


def _literal_posterior(task: BooleanFunctions) -> LiteralPosterior:
    plain = task.literal / 2 if task.signed else task.literal
    # Another term is satisfied by an even input with the chance that none of its literals is false.
    other = (1 - task.literal / 2) ** task.dimensions
    slip = 1 - (1 - other) ** (task.parts - 1)
    return LiteralPosterior(plain, task.literal - plain, task.share, task.noise, slip, task.dual)


def _sampled_formulas(task: BooleanFunctions) -> SampledFormulas:
    plain = task.literal / 2 if task.signed else task.literal
    return SampledFormulas(
        task.dimensions, task.parts, plain, task.literal - plain, task.share, task.noise, disjunction=task.dual
    )


def _halfspace_messages(task: BooleanFunctions) -> HalfspaceMessages:
    if task.function == "integer_halfspace":
        values = tuple(range(-BOUND, BOUND + 1))
        return HalfspaceMessages(values, (1 / len(values),) * len(values), noise=task.noise)
    if task.function == "sparse_threshold":
        return HalfspaceMessages((0, 1, -1), (0.7, 0.15, 0.15), THRESHOLDS, task.noise)
    chance = min(task.literal, 1 - 1e-9)  # of a majority of all variables, which is one function
    return HalfspaceMessages((0, 1), (1 - chance, chance), noise=task.noise)


def _halfspace_posterior(task: BooleanFunctions) -> HalfspacePosterior:
    if task.function == "integer_halfspace":
        return HalfspacePosterior(0.0, BOUND * (BOUND + 1) / 3, noise=task.noise)
    if task.function == "sparse_threshold":
        return HalfspacePosterior(0.0, 0.3, 0.0, ((2 * BOUND) ** 2 - 1) / 12, task.noise)
    chance = task.literal
    return HalfspacePosterior(chance, chance * (1 - chance) + 1e-9, noise=task.noise)
