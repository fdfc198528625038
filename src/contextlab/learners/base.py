"""RegressionLearner: the base of every learner that predicts y from the (x, y) examples before it."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.prompt import Learner, Prompt


class RegressionLearner(Learner):
    """A learner that sees the examples themselves, whatever layout made tokens of them."""

    @abstractmethod
    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        """Prediction i, [B, n, k], from the examples before i and xs[:, i].

        xs: [B, n, d] float64.
        ys: [B, n, k] float64.
        """

    def __call__(self, prompt: Prompt) -> Tensor:
        """Predictions [B, T, k] of the dtype of `prompt.ys`, zero where no output is predicted.

        Computed in float64: prefixes with about as many examples as dimensions are ill-conditioned.
        Raises InputError for a prompt without regression examples.
        """
        xs, ys, at = prompt.xs, prompt.ys, prompt.at
        if xs is None or ys is None or at is None:
            raise InputError(
                f"{type(self).__name__} needs a prompt with examples (xs, ys, at), such as linear_regression "
                "draws; this one has none"
            )
        predictions = self.predict(xs.double(), ys.double()).to(ys.dtype)
        return ys.new_zeros(prompt.batch, prompt.length, ys.shape[-1]).index_copy(1, at, predictions)


def gram(xs: Tensor) -> Tensor:
    """Sum of x x^T over the examples before each i. xs [B, n, d] -> [B, n, d, d]."""
    return before(xs.unsqueeze(-1) * xs.unsqueeze(-2))


def moment(xs: Tensor, ys: Tensor) -> Tensor:
    """Sum of x y^T over the examples before each i. xs [B, n, d], ys [B, n, k] -> [B, n, d, k]."""
    return before(xs.unsqueeze(-1) * ys.unsqueeze(-2))


def before(values: Tensor) -> Tensor:
    """Sum of `values` [B, n, ...] over the examples before each i (zero at i = 0)."""
    total = torch.zeros_like(values)
    torch.cumsum(values[:, :-1], dim=1, out=total[:, 1:])
    return total


def apply(xs: Tensor, weights: Tensor) -> Tensor:
    """w_i . x_i for every i. xs [B, n, d], weights [B, n, d, k] -> [B, n, k]."""
    return (xs.unsqueeze(-2) @ weights).squeeze(-2)
