"""Prompts of one of several families, unknown which: Gaussian mixtures of weights, and mixed function classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.bayes import (
    MOST_SUPPORTS,
    BasisPosterior,
    BayesLearner,
    BayesMixture,
    MemberOracle,
    SparsePosterior,
)
from contextlab.learners.kernels import GaussianProcess
from contextlab.learners.regression import LeastSquares, NearestNeighbours, Ridge
from contextlab.prompt import Learner, Task
from contextlab.registry import register
from contextlab.tasks.functions import FunctionTask, QuadraticRegression, squares
from contextlab.tasks.networks import ReluNetwork

Family = Literal["linear", "sparse", "quadratic", "relu"]


def identity(xs: Tensor) -> Tensor:
    """xs [..., d] as they are."""
    return xs


@register(
    "task",
    "gaussian_mixture_regression",
    family="functions",
    papers=("2306.04891",),
    cases=({"dimensions": 4, "examples": 8}, {"dimensions": 4, "examples": 8, "noise": 0.5, "share": 0.2}),
)
@dataclass(frozen=True)
class GaussianMixtureRegression(FunctionTask):
    """Linear regression with weights from one of two Gaussians: y = w . x, the first weight `centre` or -`centre`.

    The other weights are N(0, 1) ("Bayesian prism", 2306.04891). The exact predictor weighs the two posterior
    means by the evidence; ridge regression, and one Gaussian of the mixture's mean and covariance, are not it.

    centre: the first weight's absolute value.
    share: probability that it is positive.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 3, "examples": 8},
        "hard": {"dimensions": 20, "examples": 40, "noise": 1.0, "centre": 1.0},
    }

    dimensions: PositiveInt = 10
    examples: PositiveInt = 20
    centre: NonNegativeFloat = 3.0
    share: Annotated[float, Field(ge=0, le=1)] = 0.5

    def functions(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        weights = torch.randn(len(xs), self.dimensions, 1, generator=generator, device=xs.device)
        member = (torch.rand(len(xs), generator=generator, device=xs.device) < self.share).long()
        weights[:, 0, 0] = self.centre * (2 * member - 1)
        return xs @ weights, {"member": member, "weights": weights}

    def square(self) -> float:
        return self.input_scale**2 * (self.centre**2 + self.active - 1)

    def learners(self) -> dict[str, Learner]:
        """`bayes` is exact. `one_gaussian` has the right mean and covariance; `oracle` knows the sign."""
        noise = self.assumed_noise()
        first, scale = torch.zeros(self.dimensions), torch.ones(self.dimensions)
        first[0], scale[0] = self.centre, 0.0
        members = tuple(BasisPosterior(identity, noise, scale, sign * first) for sign in (-1, 1))
        mean = 2 * self.share - 1
        single = scale.clone()
        single[0] = self.centre * math.sqrt(1 - mean**2)
        chosen: Learner = members[int(self.share)]
        if 0 < self.share < 1:
            chosen = BayesMixture(members, (1 - self.share, self.share))
        return {
            "bayes": chosen,
            "one_gaussian": BasisPosterior(identity, noise, single, mean * first),
            "ridge": Ridge(noise**2),
            "ols": LeastSquares(),
            "oracle": MemberOracle(members),
        }

    def splits(self) -> dict[str, Task]:
        """Those of every function class, each Gaussian alone, and other shares and centres."""
        return super().splits() | {
            "positive": self.replace(share=1.0),
            "negative": self.replace(share=0.0),
            "other share": self.replace(share=0.9 if self.share < 0.7 else 0.1),
            "other centre": self.replace(centre=2 * self.centre if self.centre else 1.0),
        }


@register(
    "task",
    "mixed_regression",
    family="functions",
    papers=("2311.00871",),
    cases=(
        {"dimensions": 4, "examples": 12, "sparsity": 2},
        {"dimensions": 4, "examples": 12, "families": ("linear", "quadratic", "relu"), "noise": 0.3},
    ),
)
@dataclass(frozen=True)
class MixedRegression(FunctionTask):
    """Each prompt is of one family of functions, unknown which: model selection in context (2311.00871).

    Families: "linear", w ~ N(0, I); "sparse", linear with only `sparsity` weights that are not zero; "quadratic"
    and "relu" as in quadratic_regression and relu_network. All are equally likely and scaled to the same E y^2 (on
    isotropic inputs), so that the size of y alone does not tell. `bayes` weighs the families' posteriors by the
    evidence: exact for the first three; of the networks it knows the covariance.

    families: that prompts are drawn from.
    sparsity: weights of "sparse" that are not zero.
    hidden: units of the networks of "relu".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 5, "examples": 16, "sparsity": 1},
        "hard": {"families": ("linear", "sparse", "quadratic", "relu"), "noise": 0.5, "examples": 60},
    }

    families: tuple[Family, ...] = ("linear", "sparse")
    sparsity: PositiveInt = 2
    hidden: PositiveInt = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.families or len(set(self.families)) < len(self.families):
            raise InputError(f"families {self.families}: give at least one, each once")
        supports = math.comb(self.active, self._kept) if self.sparsity <= self.dimensions else 0
        if "sparse" in self.families and not 1 <= supports <= MOST_SUPPORTS:
            raise InputError(
                f"sparsity {self.sparsity} of {self.dimensions} dimensions has {supports} supports; the exact "
                f"posterior enumerates 1 to {MOST_SUPPORTS}"
            )

    def functions(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        values = torch.stack([self._family(family, xs, generator) for family in self.families])
        member = torch.randint(len(self.families), (len(xs),), generator=generator, device=xs.device)
        return values[member, torch.arange(len(xs), device=xs.device)], {"member": member}

    def _family(self, family: Family, xs: Tensor, generator: torch.Generator) -> Tensor:
        sizes: dict[str, Any] = {"dimensions": self.dimensions, "examples": self.examples}
        if family == "quadratic":
            return QuadraticRegression(**sizes).functions(xs, generator)[0]
        if family == "relu":
            return ReluNetwork(**sizes, hidden=self.hidden).functions(xs, generator)[0]
        linear = self._linear().replace(sparsity=self.sparsity if family == "sparse" else None)
        weights = linear._draw_weights(len(xs), generator, xs.device).unsqueeze(-1)
        return xs @ weights * (self._sparse_scale if family == "sparse" else 1.0)

    @property
    def _kept(self) -> int:
        """Weights of "sparse" that are not zero: they are among those of the active dimensions."""
        return min(self.sparsity, self.active)

    @property
    def _sparse_scale(self) -> float:
        return math.sqrt(self.active / self._kept)

    def square(self) -> float:
        linear = self.active * self.input_scale**2  # and of networks
        quadratic = self.active * self.fourth
        return sum(quadratic if family == "quadratic" else linear for family in self.families) / len(self.families)

    def _posterior(self, family: Family) -> BayesLearner:
        noise = self.assumed_noise()
        make: dict[Family, Callable[[], BayesLearner]] = {
            "linear": lambda: BasisPosterior(identity, noise),
            "sparse": lambda: SparsePosterior(self._kept, noise, self._sparse_scale, self.active),
            "quadratic": lambda: BasisPosterior(squares, noise),
            "relu": lambda: GaussianProcess("arc_cosine", (1.0,), noise),
        }
        return make[family]()

    def learners(self) -> dict[str, Learner]:
        """`bayes`, then the posterior of each family alone, and `family_oracle`, which knows the family."""
        members = tuple(self._posterior(family) for family in self.families)
        return {
            "bayes": BayesMixture(members),
            **dict(zip(self.families, members, strict=True)),
            "knn": NearestNeighbours(),
            "family_oracle": MemberOracle(members),
        }

    def splits(self) -> dict[str, Task]:
        """Those of every function class, each family alone, and each family that training leaves out."""
        found = super().splits()
        every: tuple[Family, ...] = ("linear", "sparse", "quadratic", "relu")
        for family in every:
            if family in self.families and len(self.families) > 1:
                found[f"{family} only"] = self.replace(families=(family,))
            elif family not in self.families and (family != "sparse" or self.sparsity <= self.dimensions):
                found[f"unseen {family}"] = self.replace(families=(family,))
        return found
