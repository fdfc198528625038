"""A weight as the product of two narrow matrices."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from contextlab.mixers.forms.base import LinearForm
from contextlab.ops.dense import dense
from contextlab.registry import register


@register("linear", "low_rank", family="low-rank", papers=("2403.07378",), cases=({"rank": 3},))
class LowRank(LinearForm):
    """U V with U [outputs, rank] and V [rank, inputs], both trained: rank (inputs + outputs) numbers a layer.

    A dense weight's nearest is its truncated SVD, each factor with the root of the singular values. Of full rank it is
    the weight itself, up to rounding.

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    rank: values between the two; the smaller of inputs and outputs stands in for a larger one.
    """

    def __init__(self, inputs: PositiveInt, outputs: PositiveInt, bias: bool, *, rank: PositiveInt) -> None:
        super().__init__(inputs, outputs, bias)
        self.rank = min(rank, inputs, outputs)
        self.up = nn.Parameter(torch.zeros(outputs, self.rank))
        self.down = nn.Parameter(torch.zeros(self.rank, inputs))

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """See `LinearForm.assign`."""
        up, down = nearest_of_rank(weight, self.rank)
        self.up.copy_(up)
        self.down.copy_(down)

    def dense(self) -> Tensor:
        """See `LinearForm.dense`."""
        return self.up @ self.down

    @property
    def multiplications(self) -> int:
        """See `LinearForm.multiplications`."""
        return self.rank * (self.in_features + self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        return dense(dense(x, self.down), self.up, self.bias)


def nearest_of_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [O, rank] and V [rank, I], the truncated SVD of weight [O, I], each with the root of the singular values.

    In float32 at least.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    left, sizes, right = torch.linalg.svd(wide, full_matrices=False)
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
