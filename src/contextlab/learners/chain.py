"""The learner of chain_of_thought: it learns each layer of a network from the features that the prompt shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.base import apply
from contextlab.learners.regression import Ridge
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

NUMBERS = 2**22
"""Numbers in the Gram matrices that are made at once."""


def relu_layer(xs: Tensor, hs: Tensor, queries: Tensor, scale: float, noise: float) -> Tensor:
    """E h at each query [B, n, h], given the examples before it of h = scale * relu(w . x), w ~ N(0, I) for each unit.

    A unit that is active shows w . x, as in linear regression; so w . x is Gaussian at the query, and the mean of
    its relu is known. (That an inactive unit shows w . x < 0 is left out.)

    xs, queries: [B, n, d]. hs: [B, n, h].
    noise: standard deviation that is allowed between h / scale and w . x.
    """
    n, d = xs.shape[1:]
    rows = max(1, NUMBERS // (n * hs.shape[2] * max(n, d * d)))
    if len(xs) > rows:
        parts = zip(xs.split(rows), hs.split(rows), queries.split(rows), strict=True)
        return torch.cat([relu_layer(x, h, query, scale, noise) for x, h, query in parts])
    seen = torch.ones(n, n, dtype=xs.dtype, device=xs.device).tril(-1)
    kept = (hs > 0).to(xs).mT.unsqueeze(2) * seen  # [B, h, n, n]: unit, prefix, example
    outer = (xs.unsqueeze(-1) * xs.unsqueeze(-2)).flatten(2).unsqueeze(1)
    curvature = (kept @ outer).unflatten(3, (d, d))
    curvature.diagonal(dim1=3, dim2=4).add_(noise**2)
    factor = torch.linalg.cholesky(curvature)
    pull = kept @ (hs.mT / scale).unsqueeze(-1).mul(xs.unsqueeze(1))  # [B, h, n, d]
    query = queries.unsqueeze(1).expand_as(pull).unsqueeze(-1)
    pulled = torch.cholesky_solve(query, factor)
    mean = (pulled.squeeze(-1) * pull).sum(-1)
    spread = noise * (pulled * query).sum((3, 4)).clamp_min(torch.finfo(xs.dtype).tiny).sqrt()
    tail = torch.special.ndtr(mean / spread)
    peak = (-(mean / spread).square() / 2).exp() / math.sqrt(2 * math.pi)
    return scale * (mean * tail + spread * peak).mT


@register("learner", "chain", family="functions", papers=("2305.18869",), cases=({"dimensions": 4, "hidden": 3},))
@dataclass(frozen=True)
class ChainLearner(Learner):
    """Learns each layer of a ReLU network from the features shown, active unit by active unit, and the last linearly.

    Where the query's own features are shown (`shown` "all") each step starts from them; where not ("examples"), from
    the features that the step before predicts. Each step is near its Bayes optimum and the last one exact.

    dimensions: size of x.
    hidden: units of each layer.
    layers: layers of hidden units.
    shown: as in chain_of_thought, "all" or "examples".
    noise: allowed between features and layers: rounding.
    """

    dimensions: PositiveInt
    hidden: PositiveInt
    layers: PositiveInt = 1
    shown: Literal["all", "examples"] = "all"
    noise: PositiveFloat = 1e-4

    def __call__(self, prompt: Prompt) -> Tensor:
        """Predictions of the width of the prompt's targets. Raises InputError for other prompts."""
        block, d = self.layers + 2, self.dimensions
        if prompt.inputs.shape[1] % block or prompt.inputs.shape[2] != d + self.hidden + 1:
            raise InputError(
                f"chain needs vectors of {d} + {self.hidden} + 1 numbers, {block} for each example, as "
                f"chain_of_thought draws; got {prompt.inputs.shape[1]} of {prompt.inputs.shape[2]}"
            )
        size = self.hidden + 1 if self.shown == "all" else 1
        if prompt.targets.shape[2] != size:
            raise InputError(f"chain with shown {self.shown!r} predicts {size} numbers; got {prompt.targets.shape[2]}")
        tokens = prompt.inputs.double().unflatten(1, (-1, block))
        if tokens[:, :, 0, d:].any() or tokens[:, :, 1:-1, :d].any() or tokens[:, :, -1, :-1].any():
            raise InputError(f"chain needs examples of x, {self.layers} layers and y, as chain_of_thought draws")
        x, y = tokens[:, :, 0, :d], tokens[:, :, -1, -1:]
        features = [x] + [tokens[:, :, step, d:-1] for step in range(1, block - 1)]
        answer = prompt.inputs.new_zeros(*tokens.shape[:3], prompt.targets.shape[2])
        scale, query = math.sqrt(2 / self.hidden), x
        for step in range(self.layers):
            found = relu_layer(features[step], features[step + 1], query, scale, self.noise)
            query = features[step + 1] if self.shown == "all" else found
            if self.shown == "all":
                answer[:, :, step, : self.hidden] = found.to(answer)
        if self.shown == "all":
            answer[:, :, self.layers, self.hidden :] = Ridge(self.noise**2).predict(features[-1], y).to(answer)
        else:
            answer[:, :, 0] = self._linear(features[-1], y, query).to(answer)
        return answer.flatten(1, 2)

    def _linear(self, features: Tensor, ys: Tensor, queries: Tensor) -> Tensor:
        """Ridge regression on the features shown, asked at other ones."""
        seen = torch.ones(features.shape[1], features.shape[1], dtype=ys.dtype, device=ys.device).tril(-1)
        outer = (features.unsqueeze(-1) * features.unsqueeze(-2)).flatten(2)
        curvature = (seen @ outer).unflatten(2, (self.hidden, self.hidden))
        curvature.diagonal(dim1=2, dim2=3).add_(self.noise**2)
        pull = (seen @ (features * ys)).unsqueeze(-1)
        return apply(queries, torch.cholesky_solve(pull, torch.linalg.cholesky(curvature)))
