"""A two-layer network trained on the examples of each prompt, all prompts and prefixes at once."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.learners.base import RegressionLearner
from contextlab.registry import register


@register(
    "learner", "network", family="functions", papers=("2208.01066",), cases=({}, {"hidden": 8, "steps": 20, "every": 4})
)
@dataclass(frozen=True)
class TwoLayerNetwork(RegressionLearner):
    """A two-layer ReLU network trained from scratch on each prefix: full-batch Adam on the mean squared error.

    Every fit starts from the same random weights, N(0, 1 / fan-in) with zero biases. The fits are independent, so
    they are batched matrix products with the gradient written out; in float32, unlike the other learners.

    hidden: hidden units.
    steps: Adam steps.
    rate: Adam's step size.
    decay: weight of the squared weights, added to the loss.
    every: a fit at 1, `every`, 2 * `every`, ... examples; predictions between use the last fit.
    seed: of the weights that training starts from.
    """

    hidden: PositiveInt = 100
    steps: PositiveInt = 300
    rate: PositiveFloat = 0.01
    decay: NonNegativeFloat = 0.0
    every: PositiveInt = 5
    seed: NonNegativeInt = 0

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        starts = [start for start in sorted({1, *range(self.every, xs.shape[1], self.every)}) if start < xs.shape[1]]
        answer = torch.zeros_like(ys)
        # Adam goes through all weights at each step: as many prompts at once as stay in the cache.
        rows = max(1, 2**17 // (self.hidden * (xs.shape[-1] + ys.shape[-1])))
        for x, y, out in zip(xs.float().split(rows), ys.float().split(rows), answer.split(rows), strict=True):
            for start, stop in zip(starts, [*starts[1:], xs.shape[1]][: len(starts)], strict=True):
                out[:, start:stop] = _forward(x[:, start:stop], self._train(x[:, :start], y[:, :start]))[1]
        return answer

    def _train(self, xs: Tensor, ys: Tensor) -> list[Tensor]:
        """W [B, d, h], b [B, 1, h], V [B, h, k], c [B, 1, k], each prompt's own, fitted to all its examples."""
        sizes = xs.shape[-1], self.hidden, ys.shape[-1]
        generator = torch.Generator().manual_seed(self.seed)
        first, second = (
            (torch.randn(a, b, generator=generator, dtype=torch.float64) / math.sqrt(a)).to(xs)
            for a, b in itertools.pairwise(sizes)
        )
        start = [first, first.new_zeros(1, sizes[1]), second, second.new_zeros(1, sizes[2])]
        weights = [w.expand(len(xs), -1, -1).clone() for w in start]
        moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
        for step in range(1, self.steps + 1):
            active, out = _forward(xs, weights)
            miss = (out - ys) * (2 / xs.shape[1])
            back = (miss @ weights[2].mT).mul_(active.sign())
            slopes = [xs.mT @ back, back.sum(1, keepdim=True), active.mT @ miss, miss.sum(1, keepdim=True)]
            scale = math.sqrt(1 - 0.999**step)  # Adam's corrections of both moments, put into two numbers
            for w, g, (mean, square) in zip(weights, slopes, moments, strict=True):
                if self.decay:
                    g = g + 2 * self.decay * w
                mean.lerp_(g, 0.1)
                square.mul_(0.999).addcmul_(g, g, value=0.001)
                w.addcdiv_(mean, square.sqrt().add_(1e-8 * scale), value=-self.rate * scale / (1 - 0.9**step))
        return weights


def _forward(xs: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    first, bias, second, offset = weights
    active = torch.baddbmm(bias, xs, first).relu_()
    return active, torch.baddbmm(offset, active, second)
