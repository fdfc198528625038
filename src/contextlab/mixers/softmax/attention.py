"""Softmax attention over everything read."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens, with_conv
from contextlab.ops.position import RopeScaling
from contextlab.ops.position_variants import xpos_attention
from contextlab.registry import register
from contextlab.state import KVState, State


@register(
    "mixer",
    "attention",
    family="softmax",
    papers=(
        "1706.03762",
        "1911.02150",
        "2305.13245",
        "2104.09864",
        "2108.12409",
        "2010.04245",
        "2212.10554",
        "2410.06205",
    ),
    cases=(
        {},
        {"kv_heads": 1},
        {"kv_heads": 2, "head_dim": 8, "rope_fraction": 0.5, "bias": True},
        {"heads": 3, "head_dim": 4, "position": "alibi"},
        {"position": "none", "qk_norm": True},
        {"heads": 2, "rope_base": 500.0, "qk_norm": True, "kv_heads": 1},
        {"short_conv": 4, "kv_heads": 2},
        {"output_gate": True, "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_length": 32}},
        {"heads": 2, "head_dim": 8, "rope_scaling": {"kind": "p_rope", "keep": 0.5}},
        {
            "heads": 2,
            "rope_fraction": 0.5,
            "rope_scaling": {
                "kind": "longrope",
                "factor": 4.0,
                "factors": [1.0, 1.5, 4.0],
                "original_length": 8,
                "plain_tokens": 3,
            },
        },
        {"position": "xpos", "kv_heads": 2},
        {"position": "xpos", "xpos_scale": 16.0, "heads": 2, "rope_fraction": 0.67, "short_conv": 3, "qk_norm": True},
    ),
)
class Attention(AttentionMixer):
    """Causal softmax attention (multi-head, grouped-query or multi-query); all keys and values are its state.

    width: size of a token's vector.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads (multi-head), 1 is multi-query.
    head_dim: size of a head; default width / heads.
    position: rotary (rope), rotary with scores that fade with distance (xpos), a linear bias by distance (alibi), or
        none (absolute positions are the model's).
    rope_base: base of the rotary frequencies.
    rope_fraction: part of each head's dimensions that is rotated.
    rope_scaling: a change of the rotary frequencies, for longer contexts or p-RoPE; see `ops.RopeScaling`.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    norm_eps: of that normalisation; None takes PyTorch's default.
    output_gate: multiply the heads' outputs by a sigmoid gate of the token (Qwen3-Next; 2505.06708).
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v (Primer, 2109.08668); 0 for none.
    xpos_scale: steps in which xpos's pairs fade by factors of 0.29 (the pair that turns fastest) to 1; default 512,
        at least 16. The state holds keys that have not faded, so that a stream may be of any length.
    """

    policies_may_serve: ClassVar[bool] = True

    def __init__(
        self,
        width: PositiveInt,
        *,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "xpos", "alibi", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        qk_norm: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
        norm_eps: PositiveFloat | None = None,
        output_gate: bool = False,
        rope_scaling: RopeScaling | None = None,
        xpos_scale: Annotated[float, Field(ge=16)] | None = None,
    ) -> None:
        if xpos_scale is not None and position != "xpos":
            raise InputError(f"xpos_scale is for position='xpos', but position is {position!r}; leave it out")
        super().__init__(
            width,
            AttentionOptions(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                position=position,
                rope_base=rope_base,
                rope_fraction=rope_fraction,
                rope_scaling=rope_scaling,
                qk_norm=qk_norm,
                norm_eps=norm_eps,
                output_gate=output_gate,
                bias=bias,
                short_conv=short_conv,
            ),
        )
        self.xpos_scale = (xpos_scale or 512.0) if position == "xpos" else None

    def remember(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> State | None:
        """See `Mixer.remember`: keys and values alone."""
        if self.served is not None:
            return super().remember(x, state, mask, tokens)
        self._check(x, state, mask)
        qk, v, before, last = self._project_in(x, state, mask, True)
        _, k = self._encode(x, qk, before, mask)
        held = KVState.empty(k, v) if before is None else before
        assert isinstance(held, KVState)
        return with_conv(held.append(k, v, mask), last)

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        if self.xpos_scale is None:
            return super()._score(new, k, v, q_position, k_position)
        return xpos_attention(
            new.q,
            k,
            v,
            self.rotary,
            scale_base=self.xpos_scale,
            scale=self.head_dim**-0.5,
            q_position=q_position,
            k_position=k_position,
        )
