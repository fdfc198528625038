"""EvaluateSpec: what is measured after training, as data."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from contextlab.spec import Spec


class EvaluateSpec(Spec):
    """What is measured after training.

    prompts: prompts drawn for each split; every predictor answers the same ones.
    batch: prompts answered at once.
    seed: of the prompts; never that of training.
    splits: names of the task's splits to measure; None for all.
    learners: names of the task's learners to compare with; None for all.
    """

    prompts: PositiveInt = 1024
    batch: PositiveInt = 256
    seed: NonNegativeInt = 20_000
    splits: tuple[str, ...] | None = None
    learners: tuple[str, ...] | None = None
