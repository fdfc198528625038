"""Linear regression in context: (x, y) examples of one linear function after another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.bayes import MOST_SUPPORTS, SparsePosterior
from contextlab.learners.regression import (
    Averaging,
    GradientDescent,
    Lasso,
    LeastSquares,
    NearestNeighbours,
    Newton,
    PoolPosterior,
    Ridge,
)
from contextlab.prompt import Learner, Prompt, Task, wide
from contextlab.registry import register
from contextlab.tasks.base import Drawn, check_options, corrupt_examples, lay_out
from contextlab.tasks.queries import Query, ask

NOISELESS = 1e-4
"""Noise, over the scale of y, that posteriors assume where there is none; well above rounding."""

BETWEEN = 0.9
"""Share of the variance of clustered inputs that is between their centres."""


@register(
    "task",
    "linear_regression",
    family="functions",
    papers=("2208.01066", "2306.15063"),
    cases=(
        {},
        {"dimensions": 5, "examples": 16, "noise": 0.5},
        {"sparsity": 3},
        {"layout": "interleaved"},
        {"dimensions": 6, "examples": 16, "rank": 2},
        {"dimensions": 6, "examples": 16, "inputs": "clustered", "noise": 0.3},
    ),
)
@dataclass(frozen=True)
class LinearRegression(Task):
    """In-context linear regression: y = w . x + noise, a new w for each prompt (Garg et al., 2208.01066).

    w ~ N(0, weight_scale^2 I), x ~ N(0, input_scale^2 C), where C has trace `dimensions` and a random
    eigenbasis for each prompt. Prediction i has seen i examples, i = 0 .. examples - 1. Targets [B, T, 1]
    are y as seen in the context, noise included.

    dimensions: d, the size of x.
    examples: n, the (x, y) problems in a prompt.
    noise: standard deviation of the noise on y.
    weight_scale: standard deviation of each weight.
    input_scale: standard deviation of x in each direction, on average.
    sparsity: number of weights that are not zero, all of them in active dimensions, where there are so many; None for
        all.
    spectrum: eigenvalues of C: "isotropic" (all 1), "skewed" (the i-th proportional to 1 / i^2), or a number
        p for 1 / i^p.
    rank: of C, whose eigenvalues beyond the first `rank` are zero; None for all of them. Its trace stays.
    inputs: "gaussian"; "clustered" around `clusters` Gaussian centres, drawn for each prompt, which have 90% of the
        variance (C is the covariance over prompts).
    clusters: centres in a prompt.
    pool: weights are drawn from a pool of so many vectors; None for fresh weights in each prompt
        (2306.15063).
    pool_seed: of the pool.
    layout: "paired" has n tokens (x_i, x_{i-1}, y_{i-1}), "interleaved" has 2 n tokens (x_1, 0), (0, y_1),
        ...; the prediction of y_i is read at the token that first shows x_i.
    active_dimensions: x is zero beyond so many dimensions (C has trace `active_dimensions`), a curriculum's
        option; None for all.
    query: "same" scores all examples. The others score one random example of each prompt, from the second on, so that
        models that read prompts whole serve, too. "random": drawn as all are. Of the others x is drawn otherwise than
        those before it: "orthogonal" to them, its length kept (an example of 2 .. d, or of
        the rank); with signs of its own, where the others have the signs of one pattern ("random_quadrants"), or with
        the opposite signs ("opposite_quadrants"); "overlapping", one of those before.
    """

    metric: ClassVar[str] = "squared_error"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 5, "examples": 16},
        "hard": {"dimensions": 20, "examples": 40, "noise": 1.0, "spectrum": "skewed"},
    }

    dimensions: PositiveInt = 20
    examples: PositiveInt = 40
    noise: NonNegativeFloat = 0.0
    weight_scale: PositiveFloat = 1.0
    input_scale: PositiveFloat = 1.0
    sparsity: PositiveInt | None = None
    spectrum: Literal["isotropic", "skewed"] | NonNegativeFloat = "isotropic"
    rank: PositiveInt | None = None
    inputs: Literal["gaussian", "clustered"] = "gaussian"
    clusters: PositiveInt = 4
    pool: PositiveInt | None = None
    pool_seed: NonNegativeInt = 0
    layout: Literal["paired", "interleaved"] = "paired"
    active_dimensions: PositiveInt | None = None
    query: Query = "same"

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("sparsity", "active_dimensions"):
            value = getattr(self, name)
            if value is not None and value > self.dimensions:
                raise InputError(f"{name} {value} is more than dimensions {self.dimensions}; at most {self.dimensions}")
        if self.rank is not None and self.rank > self.active:
            raise InputError(f"rank {self.rank} is more than {self.active} active dimensions; at most {self.active}")
        if self.query == "orthogonal" and min(self.directions, self.examples) < 2:
            raise InputError(
                f"query 'orthogonal' needs inputs of rank 2 and 2 examples at least, got rank {self.directions} and "
                f"{self.examples} examples; use query 'same'"
            )
        if self.query != "same" and self.examples < 2:
            raise InputError(f"query {self.query!r} needs 2 examples at least, got {self.examples}; use query 'same'")
        object.__setattr__(self, "one_prediction", self.query != "same")  # of the class it is what the default says

    @property
    def active(self) -> int:
        """Dimensions in which x is not zero."""
        return self.dimensions if self.active_dimensions is None else self.active_dimensions

    @property
    def directions(self) -> int:
        """Dimensions that the x of a prompt span."""
        return self.active if self.rank is None else self.rank

    @property
    def weights_kept(self) -> int:
        """Weights that are not zero, or of a pool, that were not before x was cut to the active dimensions."""
        most = self.dimensions if self.pool is not None else self.active
        return most if self.sparsity is None else min(self.sparsity, most)

    @property
    def input_size(self) -> int:
        return self.dimensions + 1 if self.layout == "interleaved" else 2 * self.dimensions + 1

    @property
    def output_size(self) -> int:
        return 1

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts, float32; T = examples ("paired") or 2 * examples ("interleaved").

        hidden: "weights" [B, d, 1].
        """
        weights = self._draw_weights(batch, generator, device)
        xs = self._draw_xs(batch, generator, device)
        scored = torch.ones(batch, self.examples, dtype=torch.bool, device=device)
        if self.query != "same":
            xs, scored = ask(self.query, xs, self.active, self.directions, generator)
        ys = (xs * weights.unsqueeze(1)).sum(-1, keepdim=True)
        if self.noise:
            ys = ys + self.noise * torch.randn(ys.shape, generator=generator, device=device)
        return lay_out(Drawn(xs, ys, scored, {"weights": weights.unsqueeze(-1)}), self.layout)

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The same inputs with other weights."""

        def outputs(xs: Tensor, ys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            weights = self._draw_weights(len(xs), generator, xs.device).unsqueeze(-1)
            return xs @ weights + self.noise * torch.randn(ys.shape, generator=generator, device=xs.device), {
                "weights": weights
            }

        return corrupt_examples(prompt, self.layout, outputs, True)

    def _draw_weights(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """[batch, d]."""
        if self.pool is not None:
            members = torch.randint(self.pool, (batch,), generator=generator, device=device)
            return self.pool_weights(device)[members]
        return self._fresh_weights(batch, generator, device)

    def _fresh_weights(self, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        weights = self.weight_scale * torch.randn(count, self.dimensions, generator=generator, device=device)
        if self.sparsity is not None:
            order = torch.rand(count, self.dimensions, generator=generator, device=device)
            order[:, self.active :] = -1  # as in the authors' code: x is zero there, and so would most y be
            kept = order.topk(self.weights_kept, dim=1).indices
            weights = weights * torch.zeros_like(weights).scatter_(1, kept, 1.0)
        return weights

    def pool_weights(self, device: torch.device | str = "cpu") -> Tensor:
        """The pool [pool, d], the same on every device. Raises InputError when the task has none."""
        if self.pool is None:
            raise InputError("pool: this task draws fresh weights for each prompt; give pool a size")
        plain = LinearRegression(
            dimensions=self.dimensions,
            weight_scale=self.weight_scale,
            sparsity=self.sparsity,
            pool=self.pool,
            pool_seed=self.pool_seed,
        )  # what the pool depends on, so that splits and curricula share it
        return _pool(plain, str(torch.device(device)))

    def _draw_xs(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """[batch, examples, d]."""
        active = self.active
        xs = torch.randn(batch, self.examples, active, generator=generator, device=device)
        if self.inputs == "clustered":
            centres = torch.randn(batch, self.clusters, active, generator=generator, device=device)
            member = torch.randint(self.clusters, xs.shape[:2], generator=generator, device=device)
            centre = centres.gather(1, member.unsqueeze(-1).expand(xs.shape))
            xs = math.sqrt(BETWEEN) * centre + math.sqrt(1 - BETWEEN) * xs
        if self.spectrum != "isotropic" or self.rank is not None:
            # Q of a Gaussian matrix is uniform over the orthogonal matrices up to the signs of its columns,
            # which change nothing here: C = Q diag Q^T.
            gauss = torch.randn(batch, active, active, generator=generator, device=device)
            xs = (xs * self.eigenvalues(device).sqrt()) @ torch.linalg.qr(gauss).Q.mT
        xs = self.input_scale * xs
        return torch.nn.functional.pad(xs, (0, self.dimensions - active)) if active < self.dimensions else xs

    def eigenvalues(self, device: torch.device | str = "cpu") -> Tensor:
        """Eigenvalues [active] of C in the active dimensions, largest first; their sum is `active`."""
        power = {"isotropic": 0.0, "skewed": 2.0}.get(str(self.spectrum), self.spectrum)
        index = torch.arange(1, self.active + 1, device=device, dtype=torch.float32)
        values = index ** -float(power) * (index <= self.directions)
        return values * (self.active / values.sum())

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean squared error over the scored positions. prediction: [B, T, 1]."""
        square = (wide(prediction) - prompt.targets).square().squeeze(-1)
        return (square * prompt.scored).sum() / prompt.scored.sum()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """squared_error [B, T], against y as seen (so at least noise^2 on average)."""
        return {"squared_error": (wide(prediction) - prompt.targets).square().squeeze(-1)}

    def learners(self) -> dict[str, Learner]:
        """The learners, the best known first.

        They know how this task draws its prompts: a split's learners are tuned to the split. The first is
        the exact Bayes predictor, whatever the inputs: over the pool, over all supports of sparse weights, or ridge
        with strength noise^2 / weight_scale^2. Sparse weights of more supports than can be enumerated have lasso.
        """
        found: dict[str, Learner] = {}
        noise = max(self.noise, NOISELESS * self.weight_scale * self.input_scale)
        if self.pool is not None:
            found["pool_posterior"] = PoolPosterior(self.pool_weights(), noise)
        elif self.sparsity is not None and math.comb(self.active, self.weights_kept) <= MOST_SUPPORTS:
            found["sparse_posterior"] = SparsePosterior(self.weights_kept, noise, self.weight_scale, self.active)
        # The universal strength noise sqrt(2 log d / n) at the prompt's end; without noise a small one.
        universal = self.noise * self.input_scale * math.sqrt(2 * math.log(max(self.dimensions, 2)) / self.examples)
        lasso = Lasso(max(universal, 0.01 * self.weight_scale * self.input_scale**2))
        if self.sparsity is not None:
            found["lasso"] = lasso
        return found | {
            "ridge": Ridge((self.noise / self.weight_scale) ** 2),
            "ols": LeastSquares(),
            "lasso": lasso,
            "newton": Newton(),
            "gradient_descent": GradientDescent(),
            "averaging": Averaging(),
            "knn": NearestNeighbours(),
        }

    def splits(self) -> dict[str, Task]:
        """'train'; the shifts of 2208.01066 and of its code, each one change; new weights with a pool; other inputs.

        'scaled inputs' are the inputs times 2. 'renormalised noise' has a standard deviation of 1, after which y is
        scaled to the mean square that it had.
        """
        found: dict[str, Task] = {
            "train": self,
            "scaled inputs": self.replace(input_scale=2 * self.input_scale),
            "skewed covariance": self.replace(spectrum="skewed"),
            "other noise": self.replace(noise=4 * self.noise if self.noise else 0.5),
            "more examples": self.replace(examples=2 * self.examples),
        }
        if min(self.directions, self.examples) >= 2:
            found["orthogonal query"] = self.replace(query="orthogonal")
        if self.pool is not None:
            found["new weights"] = self.replace(pool=None)
        if self.query == "same" and self.directions > 1:
            found["low-rank inputs"] = self.replace(rank=self.directions // 2)
        if self.inputs != "clustered":
            found["clustered inputs"] = self.replace(inputs="clustered")
        for words, factor in (("1/3", 1 / 3), ("1/2", 1 / 2), ("3", 3.0)):
            found[f"inputs times {words}"] = self.replace(input_scale=factor * self.input_scale)
        for words, factor in (("1/3", 1 / 3), ("1/2", 1 / 2), ("2", 2.0), ("3", 3.0)):
            found[f"outputs times {words}"] = self.replace(weight_scale=factor * self.weight_scale)
        if self.examples >= 2:
            found["random quadrants"] = self.replace(query="random_quadrants")
            found["opposite quadrants"] = self.replace(query="opposite_quadrants")
            found["overlapping query"] = self.replace(query="overlapping")
        if self.noise != 1:
            square = self.chance()["squared_error"]
            factor = math.sqrt(square / (square - self.noise**2 + 1))
            found["renormalised noise"] = self.replace(noise=factor, weight_scale=factor * self.weight_scale)
        return found

    def chance(self) -> Mapping[str, float]:
        """The expected squared error of predicting zero."""
        if self.pool is None:
            square = float(self.weight_scale**2 * self.weights_kept)
        else:
            square = self.pool_weights()[:, : self.active].square().sum(1).mean().item()
        return {"squared_error": self.input_scale**2 * square + self.noise**2}


@lru_cache(maxsize=32)
def _pool(task: LinearRegression, device: str) -> Tensor:
    """The pool of a task, drawn on the CPU so that it does not depend on the device."""
    assert task.pool is not None
    generator = torch.Generator().manual_seed(task.pool_seed)
    return task._fresh_weights(task.pool, generator, "cpu").to(device)
