"""A weight of which few numbers are not zero."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from contextlab.mixers.forms.base import LinearForm
from contextlab.ops import bits as packing
from contextlab.registry import register


@register("linear", "sparse", family="sparse", papers=("1506.02626",), cases=({"kept": 100},))
class SparseForm(LinearForm):
    """The numbers that are not zero, row by row, and a bit for each place that says whether there is one.

    The numbers are trained, and the places stay. A dense weight's nearest has its numbers of largest size. The product
    is that of the weight made dense: it saves bytes, not time.

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    kept: numbers that are stored; all of the weight's stand in for more.
    """

    mask: Tensor

    def __init__(self, inputs: PositiveInt, outputs: PositiveInt, bias: bool, *, kept: PositiveInt) -> None:
        super().__init__(inputs, outputs, bias)
        self.kept = min(kept, inputs * outputs)
        self.values = nn.Parameter(torch.zeros(self.kept))
        self.register_buffer("mask", torch.zeros(outputs, -(-inputs // 8), dtype=torch.uint8))

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """See `LinearForm.assign`; of equal sizes the first places are kept."""
        places = weight.abs().flatten().argsort(descending=True, stable=True)[: self.kept]
        stays = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device).index_fill(0, places, True)
        self.values.copy_(weight.flatten()[stays])
        self.mask.copy_(packing.pack(stays.view_as(weight).to(torch.uint8), 1))

    def stays(self) -> Tensor:
        """bool [O, I]: where there is a number."""
        return packing.unpack(self.mask, 1, self.in_features).bool()

    def dense(self) -> Tensor:
        """See `LinearForm.dense`."""
        stays = self.stays()
        place = (stays.flatten().cumsum(0) - 1).clamp(0, self.kept - 1)  # masked_scatter is not computed for several
        return torch.where(stays, self.values[place].view(stays.shape), 0)
