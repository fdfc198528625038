"""Softmax attention between complex vectors, whose phases hold meaning and position."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions
from contextlab.ops.linear import working_dtype
from contextlab.ops.position import rope_table, rotate
from contextlab.registry import register
from contextlab.state import State


@register(
    "mixer",
    "complex_attention",
    family="softmax",
    papers=("2505.10222", "2403.17729"),
    cases=(
        {},
        {"kv_heads": 2, "adapt": "head", "bias": True},
        {"heads": 2, "head_dim": 4, "position": "none", "qk_norm": True},
        {"heads": 3, "rope_base": 500.0, "short_conv": 3, "output_gate": True},
    ),
)
class ComplexAttention(AttentionMixer):
    """Complex vector attention (ComplexFormer): each head weighs the angles of meaning against those of position.

    Pairs of dimensions are complex numbers |q| exp(i theta), and key n scores for query m the sum over pairs of
    |q_m| |k_n| cos(delta (theta_m - theta_n) + b + (m - n) g), with RoPE's frequencies g and delta and b learned by
    each head. The angle is a difference, so query and key are turned on their own and every attention kernel serves;
    the state holds turned keys. With delta = 1 and b = 0, where training starts, this is attention with RoPE.

    Of ComplexFormer (withdrawn by its authors) the abstract gives exp(i(Adapt(semantic) + positional)) for each head;
    that Adapt is delta x + b follows the authors' code of EulerFormer (2403.17729), which has the same two parts and
    shares both numbers among all heads. The scale is head_dim^-0.5, as there. Angles lie in
    (-pi, pi], so that unless delta is whole a score jumps where a pair crosses the negative real axis.

    width: size of a token's vector.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; the query heads on one key head share delta, not b.
    head_dim: size of a head, even; default width / heads.
    adapt: whether each pair of a head has its own delta and b (pair) or all share one (head).
    position: rotary (rope) or none.
    rope_base: base of the rotary frequencies.
    qk_norm: RMS-normalise queries and keys in each head, before they are turned.
    output_gate: multiply the heads' outputs by a sigmoid gate of the token.
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v; 0 for none.
    """

    def __init__(
        self,
        width: PositiveInt,
        *,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        adapt: Literal["pair", "head"] = "pair",
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        qk_norm: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
        output_gate: bool = False,
    ) -> None:
        super().__init__(
            width,
            AttentionOptions(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rope_base=rope_base,
                qk_norm=qk_norm,
                output_gate=output_gate,
                bias=bias,
                short_conv=short_conv,
                position="none",  # positions are turned here, after the angles of meaning
            ),
        )
        if self.head_dim % 2:
            raise InputError(
                f"head_dim must be even, for two dimensions make a complex number, got {self.head_dim}; "
                f"the nearest that fits is {self.head_dim + 1}"
            )
        self.position = position
        pairs = self.head_dim // 2 if adapt == "pair" else 1
        self.delta = nn.Parameter(torch.ones(self.kv_heads, pairs))
        self.shift = nn.Parameter(torch.zeros(heads, pairs))  # b

    def _encode(self, x: Tensor, qk: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k = qk.split((self.heads, self.kv_heads), 2)
        q = turned(q, self.delta.repeat_interleave(self.heads // self.kv_heads, 0), self.shift)
        k = turned(k, self.delta)
        if self.position == "rope":
            read = 0 if state is None else state.length
            places = torch.arange(read, read + q.shape[1], device=q.device)
            table = rope_table(places, self.head_dim, self.rope_base, q.dtype)
            q, k = rotate(q, table), rotate(k, table)
        return q, k


def turned(x: Tensor, delta: Tensor, shift: Tensor | None = None) -> Tensor:
    """|z| exp(i (delta arg(z) + shift)) of the complex numbers z that the pairs of dimensions 2j, 2j + 1 make.

    x: [B, T, H, D]. delta, shift: [H, D / 2 or 1]. Returns [B, T, H, D] in the dtype of x. Numbers whose square is no
    normal number count as zero, which has no angle: they give zeros, and zero gradients.
    """
    real, imaginary = x.to(working_dtype(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    nothing = real.square() + imaginary.square() < torch.finfo(real.dtype).tiny
    real = real.masked_fill(nothing, 1)
    imaginary = imaginary.masked_fill(nothing, 0)
    size = torch.hypot(real, imaginary).masked_fill(nothing, 0)
    angle = delta.to(real.dtype) * torch.atan2(imaginary, real)
    if shift is not None:
        angle = angle + shift.to(real.dtype)
    return torch.stack((size * angle.cos(), size * angle.sin()), -1).flatten(-2).to(x.dtype)
