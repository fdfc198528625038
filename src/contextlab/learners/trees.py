"""Decision trees and boosted trees, fitted by scikit-learn to one prefix after another."""

from __future__ import annotations

import importlib
import itertools
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.base import RegressionLearner
from contextlab.registry import register


@dataclass(frozen=True)
class _Trees(RegressionLearner):
    """Base: a scikit-learn regressor for each prompt and for each fitted prefix (so thousands of fits: slow).

    every: a fit at 1, `every`, 2 * `every`, ... examples; predictions between use the last fit.
    signs: fit to the signs of the inputs.
    seed: of the regressor's choice among equal splits.
    """

    every: PositiveInt = 10
    signs: bool = False
    seed: NonNegativeInt = 0

    @abstractmethod
    def _model(self) -> Any:
        """An unfitted regressor."""

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        if self.signs:
            xs = torch.where(xs > 0, 1.0, -1.0)
        answer = torch.zeros_like(ys)
        starts = [i for i in sorted({1, *range(self.every, xs.shape[1], self.every)}) if i < xs.shape[1]]
        answer[:, 1:] = ys[:, :1]  # all that one example tells a tree
        model = self._model()
        # The checks of options and finiteness, repeated for each tree, take longer than growing it.
        with _sklearn().config_context(skip_parameter_validation=True, assume_finite=True):
            for x, y, out in zip(xs.cpu().numpy(), ys.cpu().numpy(), answer, strict=True):
                for start, stop in itertools.pairwise([*(i for i in starts if i > 1), len(x)]):
                    for output in range(y.shape[1]):
                        found = model.fit(x[:start], y[:start, output]).predict(x[start:stop])
                        out[start:stop, output] = torch.from_numpy(found)
        return answer


@register("learner", "tree", family="functions", papers=("2208.01066",), cases=({}, {"every": 1, "signs": True}))
@dataclass(frozen=True)
class DecisionTree(_Trees):
    """A regression tree grown greedily on each prompt, by scikit-learn.

    every: a fit at 1, `every`, 2 * `every`, ... examples; predictions between use the last fit.
    signs: fit to the signs of the inputs.
    seed: of the choice among equal splits.
    depth: most questions to a leaf; None for as many as it takes to fit the examples.
    """

    depth: PositiveInt | None = None

    def _model(self) -> Any:
        return _sklearn("tree").DecisionTreeRegressor(max_depth=self.depth, random_state=self.seed)


@register("learner", "boosted_trees", family="functions", papers=("2208.01066",), cases=({}, {"every": 4, "trees": 10}))
@dataclass(frozen=True)
class BoostedTrees(_Trees):
    """Gradient boosting of regression trees on each prompt, by scikit-learn.

    every: a fit at 1, `every`, 2 * `every`, ... examples; predictions between use the last fit.
    signs: fit to the signs of the inputs.
    seed: of the choice among equal splits.
    trees: boosting rounds.
    depth: of each tree.
    rate: learning rate, the factor of each tree's output.
    """

    trees: PositiveInt = 50
    depth: PositiveInt = 4
    rate: PositiveFloat = 0.1

    def _model(self) -> Any:
        return _Boosted(self)


class _Boosted:
    """GradientBoostingRegressor of scikit-learn for the squared error, from its trees, without its checks of each."""

    def __init__(self, options: BoostedTrees) -> None:
        self.options = options

    def fit(self, xs: Any, ys: Any) -> _Boosted:
        import numpy as np

        o, xs, random = self.options, xs.astype("float32"), np.random.RandomState(self.options.seed)
        self.start, self.trees = ys.mean(), []
        fitted = np.full_like(ys, self.start)
        for _ in range(o.trees):
            tree = _sklearn("tree").DecisionTreeRegressor(max_depth=o.depth, random_state=random)
            self.trees.append(tree.fit(xs, ys - fitted, check_input=False))
            fitted += o.rate * tree.predict(xs, check_input=False)
        return self

    def predict(self, xs: Any) -> Any:
        xs = xs.astype("float32")
        return self.start + self.options.rate * sum(tree.predict(xs, check_input=False) for tree in self.trees)


def _sklearn(module: str = "") -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}".rstrip("."))
    except ImportError:
        raise InputError("tree learners need scikit-learn: pip install 'contextlab[reference]'") from None
