"""Linear attention that reads both ways."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.encoder.base import Encoder
from contextlab.mixers.layers import Linear, multiplications, project_wide
from contextlab.mixers.linear.features import build_feature_map, divided, require_scale, with_ones
from contextlab.ops.linear import working_dtype
from contextlab.ops.precision import wide_einsum, with_room
from contextlab.registry import register


@register(
    "mixer",
    "encoder_linear_attention",
    family="encoder",
    papers=("2006.16236", "2212.07677"),
    cases=(
        {},
        {"feature_map": "identity", "normalise": False, "mean": True, "heads": 2, "key_dim": 3},
        {"feature_map": "silu", "normalise": False},
    ),
)
class EncoderLinearAttention(Encoder):
    """Linear attention of every token to every token: a feature map of q and k in place of the softmax, O(T).

    The causal form is `linear_attention`.

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    feature_map: of q and k: elu + 1, silu or identity.
    normalise: divide by the sum of the weights; not with silu and identity, whose weights can be negative.
    key_dim: size of a head's q and k, that of its v by default.
    mean: divide by the number of other tokens, 1 at least: the 1/n of analyses of in-context regression (2212.07677,
        2306.09927), where a query is read with n examples; without normalise.
    """

    parallel_form = "chunks"

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        feature_map: Literal["elu1", "silu", "identity"] = "elu1",
        normalise: bool = True,
        key_dim: PositiveInt | None = None,
        mean: bool = False,
    ) -> None:
        require_scale(feature_map, normalise, mean, "it is 'elu1'")
        super().__init__(width)
        size = head_size(width, heads)
        self.heads, self.normalise, self.mean = heads, normalise, mean
        self.key_dim = size if key_dim is None else key_dim
        self.feature = build_feature_map(feature_map, self.key_dim, heads, None, 0)
        # Rows: the heads of q, then of k, then of v, as of `linear_attention`.
        self.in_proj, self.out_proj = Linear(width, 2 * heads * self.key_dim + width), Linear(width, width)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Encoder.mix`."""
        qkv = with_room(self.in_proj(without_padding(x, mask)))
        qk, v = qkv.split((2 * self.heads * self.key_dim, self.width), -1)
        q, k = qk.unflatten(-1, (2, self.heads, -1)).unbind(2)
        places, work = torch.arange(x.shape[1], device=x.device), working_dtype(x.dtype)
        q = self.feature(q, places, True).to(work)
        k = without_padding(self.feature(k, places, False), mask).to(work)
        dtype, v = v.dtype, v.unflatten(-1, (self.heads, -1)).to(work)
        v = with_ones(v) if self.normalise else v  # the denominator is the read-out of a column of ones
        o = wide_einsum("bthf,bhfd->bthd", q, wide_einsum("bthf,bthd->bhfd", k, v))
        o = divided(o, self.feature.floor) if self.normalise else o * self.feature.features**-0.5
        if self.mean:
            real = x.new_full((len(x),), x.shape[1], dtype=work) if mask is None else mask.sum(1).to(work)
            o = o / (real - 1).clamp_min(1)[:, None, None, None]
        return project_wide(o.flatten(2).to(dtype), self.out_proj, x.dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        projections = multiplications(self.in_proj) + multiplications(self.out_proj) + self.feature.products
        return 2 * length * (projections + 2 * self.feature.features * (self.width + self.heads * self.normalise))
