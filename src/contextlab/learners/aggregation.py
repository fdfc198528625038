"""A mean of learners, weighed by the errors that each made on the examples so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.base import RegressionLearner, before
from contextlab.registry import register


@register("learner", "exponential_weights", family="functions", papers=("2306.04637",), cases=())
@dataclass(frozen=True)
class ExponentialWeights(RegressionLearner):
    """The mean of its members' predictions, each weighed by exp(-rate x its squared errors so far).

    Every example is predicted by each member from those before it, and tested by: model selection in context, without
    evidence in closed form. With rate 1 / (2 variance) these are Bayes' weights of members that expect y ~
    N(prediction, variance); at a high rate it answers with the member of the least error. In the beginning all count
    the same.

    members: learners that predict from examples, such as `GradientDescent`.
    rate: of the errors.
    """

    members: tuple[Any, ...]
    rate: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.members or not all(isinstance(member, RegressionLearner) for member in self.members):
            raise InputError("members: give at least one learner that predicts from examples, such as GradientDescent")

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        said = torch.stack([member.predict(xs, ys) for member in self.members], -1)  # [B, n, k, members]
        errors = before((said - ys.unsqueeze(-1)).square().sum(2, keepdim=True))
        return (said * (-self.rate * errors).softmax(-1)).sum(-1)
