"""SUPRA's linear attention: rotated features, a decay of each head, and a norm in place of the normaliser."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.matrix import MatrixMixer, recurrent
from contextlab.ops.linear import retention_decay, simple_gla
from contextlab.ops.position import RopeScaling, rope_frequencies, rope_table, rotary_size, rotate
from contextlab.registry import register
from contextlab.state import State


@register(
    "mixer",
    "supra",
    family="linear",
    papers=("2405.06640",),
    cases=({}, {"heads": 3, "rope_fraction": 0.5, "short_conv": 2}, {"heads": 2, "head_dim": 5, "position": "none"}),
)
class Supra(MatrixMixer):
    """SUPRA's linear attention: rotated ReLU features, decay 1 - 2^(-5-h), group norm in place of the normaliser.

    o_t = GroupNorm(sum_j gamma^(t-j) (R_t relu(q_t)) . (R_j relu(k_j)) v_j), a group a head. The features are
    relu(W q + b) in paper and public code, with one W and b for q and k; here W is part of the projections, and b is
    left out. The decays are RetNet's, an option of the public code, whose own configurations take Lightning
    Attention's. The norm has a gain and a bias, where theirs has neither, and adds 1e-6 to the variance, theirs 1e-5.

    width: size of a token's vector.
    heads: number of heads.
    head_dim: size of a head; default width / heads.
    position: rotary positions of the features (rope), or none.
    rope_base: base of the rotary frequencies.
    rope_fraction: part of each head's dimensions that is rotated.
    rope_scaling: a change of the rotary frequencies; see `ops.RopeScaling`.
    short_conv: width of the causal convolution before q, k and v; 0 for none, as in the paper.
    """

    tells_mixing = True

    decay: Tensor

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        rope_scaling: RopeScaling | None = None,
        short_conv: NonNegativeInt = 0,
    ) -> None:
        size = head_size(width, heads) if head_dim is None else head_dim
        inner = heads * size
        super().__init__(width, heads, size, size, 3 * inner, 3 * inner, short_conv)
        self.rotary = rotary_size(size, rope_fraction) if position == "rope" else 0
        self.rope_base, self.rope_scaling = rope_base, rope_scaling
        if rope_scaling is not None and rope_scaling.plain_tokens:
            raise InputError("plain_tokens: supra turns by distances alone; leave it out, or use window_linear")
        if self.rotary:
            rope_frequencies(self.rotary, rope_base, rope_scaling)  # refuses what does not fit the head
        self.register_buffer("decay", retention_decay(heads), persistent=False)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(inner)), nn.Parameter(torch.zeros(inner))
        self._project_out(inner)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        before = recurrent(state)
        qkv, conv = self._convolved(self.in_proj(without_padding(x, mask)), before, keep_state, None)
        qk, v = qkv.unflatten(-1, (3 * self.heads, -1)).split((2 * self.heads, self.heads), 2)
        qk = F.relu(qk)
        if self.rotary:
            # The rotation is relative: the place in what was read serves all rows, however much each is padded.
            start = 0 if before is None else before.length
            places = torch.arange(start, start + x.shape[1], device=x.device)
            qk = rotate(qk, rope_table(places, self.rotary, self.rope_base, x.dtype, self.rope_scaling))
        q, k = qk.chunk(2, 2)
        matrix = None if before is None else before["matrix"]
        q, k, v = self.sites(q=q, k=k, v=v)
        o, matrix = simple_gla(q, k, v, None, self.decay, None, matrix, keep_state)
        o = F.layer_norm(self.site("heads", o), (self.value,), eps=1e-6).flatten(2)
        y = self._answer(o * self.norm_weight.to(o.dtype) + self.norm_bias.to(o.dtype), x)
        return y, self._kept(x, before, matrix, conv) if keep_state else None
