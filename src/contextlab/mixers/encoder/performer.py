"""Performer."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.encoder.base import Encoder
from contextlab.mixers.layers import Linear, multiplications
from contextlab.mixers.linear.features import Performer as PerformerFeatures
from contextlab.ops.linear import working_dtype
from contextlab.ops.precision import wide_einsum, with_room
from contextlab.registry import register


@register(
    "mixer",
    "performer",
    family="encoder",
    papers=("2009.14794",),
    cases=({}, {"features": 9, "heads": 2}, {"heads": 3}),
)
class Performer(Encoder):
    """Performer (FAVOR+): softmax attention of every token to every token, estimated by random features in O(T).

    The causal form is `linear_attention` with feature_map "performer".

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    features: random directions of a head; the size of a head by default. The estimate's error falls with their root.
    """

    parallel_form = "chunks"

    def __init__(self, width: PositiveInt, heads: PositiveInt = 4, features: PositiveInt | None = None) -> None:
        super().__init__(width)
        size = head_size(width, heads)
        self.heads = heads
        self.feature = PerformerFeatures(size, heads, size if features is None else features)
        self.in_proj, self.out_proj = Linear(width, 3 * width), Linear(width, width)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Encoder.mix`."""
        q, k, v = with_room(self.in_proj(without_padding(x, mask))).unflatten(-1, (3, self.heads, -1)).unbind(2)
        places, work = torch.arange(x.shape[1], device=x.device), working_dtype(x.dtype)
        q = self.feature(q, places, True).to(work)
        k = without_padding(self.feature(k, places, False), mask).to(work)
        v = F.pad(v, (0, 1), value=1.0).to(work)  # the denominator is the read-out of a column of ones
        o = wide_einsum("bthf,bhfd->bthd", q, wide_einsum("bthf,bthd->bhfd", k, v))
        o = o[..., :-1] / (o[..., -1:] + self.feature.floor)
        return self.out_proj(o.flatten(2).to(x.dtype))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        projections = multiplications(self.in_proj) + multiplications(self.out_proj) + self.feature.products
        return 2 * length * (projections + 2 * self.feature.features * (self.width + self.heads))
