"""The layers that mixers and models share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.ops.dense import dense, rms_norm


class Linear(nn.Linear):
    """`torch.nn.Linear`, at the speed of the CPU's faster library (`contextlab.ops.dense`).

    Weights are drawn with standard deviation inputs^-0.5; a bias starts at zero.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        return dense(x, self.weight, self.bias)


class TernaryLinear(Linear):
    """A linear layer with weights of -1, 0, 1 times one scale, and inputs of 8 bits (BitLinear, 2402.17764).

    The scale is the mean of the weights' sizes; inputs are RMS-normalised and rounded to 127 steps of their largest
    size. Gradients pass straight through the rounding; the weights that are trained keep their precision.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        scale = self.weight.abs().mean().clamp_min(1e-5)
        weight = _straight_through((self.weight / scale).round().clamp(-1, 1) * scale, self.weight)
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        step = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127
        return F.linear(_straight_through((x / step).round() * step, x), weight, self.bias)


def _straight_through(value: Tensor, like: Tensor) -> Tensor:
    """`value`, with the gradient going to `like` as if they were one."""
    return like + (value - like).detach()


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, in fewer passes over memory on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> [..., D], divided by the root mean square of the last dimension."""
        return rms_norm(x, self.weight, self.eps)


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1, positive, of x [...], any shape.

    Below zero that is exp(x), in which the sum would keep no digit from -16 on (float32).
    """
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


def with_loss(y: Tensor, loss: Tensor) -> Tensor:
    """y, unchanged; in the backward pass `loss` is minimised too, as if it had been added to the training loss.

    For a layer's own terms (balance of experts, nearness of centroids), which no caller then has to collect. The loss
    that is reported does not include them.

    y: [...], any shape. loss: scalar. Returns the same shape as y.
    """
    joined: Tensor = _WithLoss.apply(y, loss)
    return joined


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())


def initial_dt_bias(heads: int, low: float = 1e-3, high: float = 0.1) -> Tensor:
    """[heads]: inverse softplus of step sizes drawn log-uniformly in [low, high] (as Mamba-2 starts)."""
    dt = torch.empty(heads).uniform_(math.log(low), math.log(high)).exp()
    return dt + torch.log(-torch.expm1(-dt))
