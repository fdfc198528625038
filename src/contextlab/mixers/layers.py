"""The layers that mixers and models share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.ops.dense import dense, rms_norm
from contextlab.ops.rounding import absmean, int8_of_tokens, straight_through, ternary


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


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is no more than its weight and bias, so that these may be read in place of calling it.

    It is not where an adapter stands in its place, a hook or a parametrization changes what it gives, or its weight is
    a tensor of another kind (quantized, distributed). All that reads a layer's weight asks here first.
    """
    return (
        type(layer) in (Linear, nn.Linear)
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and "forward" not in layer.__dict__
    )


def in_dtype_of(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x) computed in the dtype of x, whatever that of the weights: where digits count.

    x: [..., inputs] -> [..., outputs]. A layer that is not plain computes in its own dtype.
    """
    if is_plain(layer):
        assert isinstance(layer, nn.Linear)
        weight, bias = layer.weight, layer.bias
        return dense(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    own = getattr(layer, "dtype", None) or getattr(layer, "weight", x).dtype
    y: Tensor = layer(x.to(own))
    return y.to(x.dtype)


def project_wide(y: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """layer(y) for an input of this dtype, of a linear or ternary layer without bias, where float16 may not hold y.

    y: [..., inputs], of `ops.precision.with_room`. dtype: of the mixer's input. Returns [..., outputs]. For float16,
    also that of autocast, rows of y above 4096 are divided by a power of two before the layer and multiplied by it
    after, so that what comes out is infinite only where the dtype does not hold it. Any other dtype leaves all to the
    layer.
    """
    autocast = torch.is_autocast_enabled(y.device.type)
    half = torch.get_autocast_dtype(y.device.type) if autocast else dtype
    if half != torch.float16:
        plain: Tensor = layer(y)
        return plain
    if isinstance(layer, TernaryLinear):  # it normalises its inputs
        return layer(y.to(dtype))
    largest = y.detach().abs().amax(-1, keepdim=True).to(torch.float32)
    factor = torch.exp2((largest / 4096).clamp_min(1).log2().ceil())
    return (layer((y / factor).to(half)) * factor).to(dtype)


def each_its_part(x: Tensor, layer: nn.Module) -> Tensor:
    """Of n inputs, the i-th through the i-th of n equal parts of a layer's outputs.

    x: [B, T, n, inputs] -> [B, T, n, outputs / n]. A layer that is not plain makes all outputs of each input.
    """
    parts = x.shape[-2]
    if is_plain(layer):
        assert isinstance(layer, nn.Linear)
        return torch.einsum("btnd,nod->btno", x, layer.weight.unflatten(0, (parts, -1)))
    return layer(x).unflatten(-1, (parts, -1)).diagonal(dim1=2, dim2=3).movedim(-1, 2)


class TernaryLinear(nn.Module):
    """A linear layer with weights of -1, 0, 1 times one scale, and inputs of 8 bits (BitLinear, 2402.17764).

    The scale is the mean of the weights' sizes; inputs are RMS-normalised and rounded to 127 steps of their largest
    size. Gradients pass straight through the rounding; the weights that are trained keep their precision.

    It is no `nn.Linear`, as an adapter's sum with its weight would be rounded when it is merged, and its weight is
    quantized already: peft and torchao leave it out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs).normal_(std=inputs**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        scale = absmean(self.weight)
        weight = straight_through(ternary(self.weight, scale) * scale, self.weight)
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        return F.linear(int8_of_tokens(x), weight)


def multiplications(layer: nn.Module) -> int:
    """Multiply-adds for one token of a linear layer, or of what stands in its place and says so of itself."""
    told = getattr(layer, "multiplications", None)
    if told is None:
        weight = layer.weight  # also an adapter's, which stands in the layer's place, is the layer's
        assert isinstance(weight, Tensor)
        return weight.numel()
    assert isinstance(told, int)
    return told


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
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())


def initial_dt_bias(heads: int, low: float = 1e-3, high: float = 0.1) -> Tensor:
    """[heads]: inverse softplus of step sizes drawn log-uniformly in [low, high] (as Mamba-2 starts)."""
    dt = torch.empty(heads).uniform_(math.log(low), math.log(high)).exp()
    return dt + torch.log(-torch.expm1(-dt))
