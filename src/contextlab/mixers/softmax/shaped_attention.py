"""Shaped attention, for blocks without values, projections or skip connections."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens
from contextlab.ops.linear import working_dtype
from contextlab.registry import register
from contextlab.state import KVState, State

Projection = Literal["identity", "residual", "linear"]


class ResidualLinear(nn.Module):
    """a x + b W x with learned a and b; W starts at zero, and so the layer as the identity.

    width: of x and of what is returned.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        self.skip_gain, self.gain = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] -> [..., width]."""
        return (self.skip_gain * x + self.gain * self.linear(x)).to(x.dtype)


@register(
    "mixer",
    "shaped_attention",
    family="softmax",
    papers=("2311.01906", "2306.17759"),
    cases=({}, {"heads": 2, "projection": "residual"}, {"heads": 3, "projection": "linear", "position": "none"}),
)
class ShapedAttention(AttentionMixer):
    """Shaped attention (simplified attention, SAS): alpha I + beta A - gamma C of the values, for each head.

    A is causal softmax attention and C what A is where all scores are zero: the mean of the values read so far. The
    three scalars of a head are trained and start at 1, and queries start at zero, so that A = C and the mixer starts as
    its values: the alpha I does the work of a skip connection. The paper's simplest block keeps queries and keys
    only: a head's values are its share of the token itself, and the heads' outputs are the mixer's ("identity").

    In the authors' code identity projections also have a scalar of the layer, here one with the heads' three. Leaving
    out the block's skip connections and norms, and running the MLP beside the mixer (SAS-P), is up to the model.

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    projection: of values and outputs: none (identity), a x + b W x with W = 0 at the start (residual), or W x (linear).
    position: rotary (rope) or none (absolute positions are the model's, as in the paper's GPT-2).
    rope_base: base of the rotary frequencies.
    """

    def __init__(
        self,
        width: PositiveInt,
        *,
        heads: PositiveInt = 4,
        projection: Projection = "identity",
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        size = head_size(width, heads)
        if size % 2 and position == "rope":
            raise InputError(
                f"RoPE rotates pairs of dimensions, but width {width} / {heads} heads is {size}; take an even "
                "size of a "
                "head or position 'none'"
            )
        super().__init__(width, AttentionOptions(heads=heads, position=position, rope_base=rope_base))
        self.qkv_proj = Linear(width, 2 * width)  # queries, which start at zero, and keys
        nn.init.zeros_(self.qkv_proj.weight[:width])
        self.values = _projection(width, projection)
        del self.out_proj
        out_proj = _projection(width, projection)
        if out_proj is not None:
            self.out_proj = out_proj  # type: ignore[assignment]
        self.projection = projection
        # Rows: alpha of the values themselves, beta of attention, gamma of the mean.
        self.gains = nn.Parameter(torch.ones(3, heads, 1))

    def _project_in(
        self, x: Tensor, state: State | None, mask: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, Tensor, State | None, Tensor | None]:
        qk = self.qkv_proj(x).unflatten(-1, (2 * self.heads, self.head_dim))
        v = (x if self.values is None else self.values(x)).unflatten(-1, (self.heads, self.head_dim))
        return qk, v, state, None

    def _attend(self, new: Tokens, state: State | None, keep_state: bool) -> tuple[Tensor, State | None]:
        y, after = super()._attend(new, state, keep_state)
        own, attention, mean = self.gains.unbind(0)
        v = new.v
        return (own * v + attention * y - mean * _mean(v, state, new.mask)).to(v.dtype), after

    def _project_out(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.projection == "identity" else self.out_proj(y)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`; the mean of the values is a running sum."""
        matrices = sum(p.numel() for n, p in self.named_parameters() if n.endswith("weight"))
        return 2 * length * matrices + 4 * self.width * self._pairs(length)


def _projection(width: int, kind: Projection) -> nn.Module | None:
    if kind == "identity":
        return None
    return ResidualLinear(width) if kind == "residual" else Linear(width, width)


def _mean(v: Tensor, state: State | None, mask: Tensor | None) -> Tensor:
    """The mean of the values up to each token, those of the state included; padding counts for nothing.

    v: [B, T, H, V]. Returns [B, T, H, V] in float32 at least: a running sum outgrows half precisions.
    """
    real = v.new_ones(1, v.shape[1], dtype=torch.bool) if mask is None else mask
    total = without_padding(v, mask).to(working_dtype(v.dtype)).cumsum(1)
    count = real.cumsum(1)
    if state is not None:
        assert isinstance(state, KVState)
        values, places = state.cached()[1], state.positions()
        before = None if places is None else places >= 0
        total = total + without_padding(values, before).sum(1, keepdim=True, dtype=total.dtype)
        count = count + (values.shape[1] if before is None else before.sum(1, keepdim=True))
    return total / count.clamp_min(1)[..., None, None]
