"""Linear attention, without decay or with one fixed decay a head."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import RMSNorm
from contextlab.mixers.linear.features import FeatureName, build_feature_map, divided, require_scale, with_ones
from contextlab.mixers.matrix import MatrixMixer, recurrent
from contextlab.ops.linear import (
    lightning_decay,
    retention_decay,
    simple_gla,
    working_dtype,
)
from contextlab.ops.position import rope_table, rotary_size, rotate
from contextlab.registry import register
from contextlab.state import RecurrentState, State, own, tensor_bytes


@register(
    "mixer",
    "linear_attention",
    family="linear",
    papers=("2006.16236", "2402.18668", "2402.10644", "2402.04347", "2009.14794", "2202.08791"),
    cases=(
        {},
        {"feature_map": "identity", "normalise": False, "short_conv": 4},
        {"feature_map": "relu", "heads": 3, "short_conv": 2},
        {"feature_map": "silu", "normalise": False, "heads": 1},
        {"feature_map": "taylor", "heads": 6},
        {"feature_map": "taylor", "heads": 2, "key_dim": 3, "short_conv": 2},
        {"feature_map": "rebased", "heads": 6},
        {"feature_map": "hedgehog"},
        {"feature_map": "performer", "features": 9, "short_conv": 3},
        {"feature_map": "cosformer", "period": 200},
        {"feature_map": "identity", "normalise": False, "mean": True, "short_conv": 2},
    ),
)
class LinearAttention(MatrixMixer):
    """Causal linear attention: a feature map of q and k in place of the softmax, no decay.

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    feature_map: of q and k: elu + 1 (the first paper's), relu, silu, identity, or one with more features than
        values: taylor (Based), rebased, hedgehog, performer (FAVOR+), cosformer.
    normalise: divide by the sum of the weights; not with silu and identity, whose weights can be negative.
    short_conv: width of the causal convolution before q, k and v; 0 for none, as in the paper.
    features: random directions of the performer's map; the size of a head by default.
    period: M of the cosformer's map, the longest distance at which its weights are positive.
    key_dim: size of a head's q and k, that of its v by default; Based has 16, as taylor makes a square of it.
    mean: divide by the number of tokens before this one, 1 at least: the 1/n of analyses of in-context regression
        (2212.07677, 2306.09927), where token n has n examples before it; without normalise.
    """

    tells_mixing = True

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        feature_map: FeatureName = "elu1",
        normalise: bool = True,
        short_conv: NonNegativeInt = 0,
        features: PositiveInt | None = None,
        period: PositiveInt = 1024,
        key_dim: PositiveInt | None = None,
        mean: bool = False,
    ) -> None:
        require_scale(feature_map, normalise, mean, "the nearest is 'relu'")
        size = head_size(width, heads)
        key_dim = size if key_dim is None else key_dim
        feature = build_feature_map(feature_map, key_dim, heads, features, period)
        projected = 2 * heads * key_dim + width
        super().__init__(width, heads, feature.features, size + normalise, projected, projected, short_conv)
        self.feature, self.normalise, self.key_dim, self.mean = feature, normalise, key_dim, mean
        self._project_out(width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        before = recurrent(state)
        q, k, v, conv = self._features(x, before, mask, keep_state)
        q, k, v = self.sites(q=q, k=k, v=v)
        o, matrix = self._read(q, k, v, _matrix(before), keep_state)
        count = None
        if self.mean:
            earlier, count = _counts(x, before, mask)
            o = (o / earlier.clamp_min(1)[..., None, None]).to(o.dtype)
        after = self._kept(x, before, matrix, conv) if keep_state else None
        if after is not None and count is not None:
            after.memory["count"] = own(count)
        return self._answer(self.site("heads", o).flatten(2), x), after

    def _features(
        self, x: Tensor, before: RecurrentState | None, mask: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Features of queries and keys [B, T, H, F], values [B, T, H, V], and the convolution's state."""
        qkv, conv = self._convolved(self.in_proj(without_padding(x, mask)), before, keep, None)
        qk, v = qkv.split((2 * self.heads * self.key_dim, self.width), -1)
        q, k = qk.unflatten(-1, (2, self.heads, -1)).unbind(2)
        start = 0 if before is None else before.length
        places = torch.arange(start, start + x.shape[1], device=x.device)
        q, k = self.feature(q, places, True), without_padding(self.feature(k, places, False), mask)
        return q, k, v.unflatten(-1, (self.heads, -1)), conv

    def _read(self, q: Tensor, k: Tensor, v: Tensor, matrix: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        """The answers [B, T, H, V] to features of queries, and the state after the last token."""
        if not self.normalise:
            return simple_gla(q, k, v, None, None, None, matrix, keep)
        # The denominator is the read-out of a column of ones; in half precision the floor were nothing.
        o, matrix = simple_gla(q, k, with_ones(v), None, None, 1.0, matrix, keep)
        return divided(o, self.feature.floor).to(v.dtype), matrix

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`."""
        count = tensor_bytes(batch, dtype=working_dtype(dtype)) if self.mean else 0
        return super().state_nbytes(length, batch, dtype) + count

    def _op_flops(self, length: int) -> int:
        return super()._op_flops(length) + 2 * length * self.feature.products


@register(
    "mixer",
    "lightning_attention",
    family="linear",
    papers=("2401.04658", "2307.14995"),
    cases=({}, {"short_conv": 4}, {"heads": 3, "short_conv": 1}),
)
class LightningAttention(MatrixMixer):
    """Lightning Attention: linear attention with a constant decay per head, normalised and gated output.

    width: size of a token's vector.
    heads: number of heads, a divisor of width; their decays are exp(-2^(-8h/H)), as ALiBi's slopes.
    short_conv: width of the causal convolution before q, k and v; 0 for none, as in the paper.
    """

    tells_mixing = True

    decay: Tensor

    def __init__(self, width: PositiveInt, heads: PositiveInt = 4, short_conv: NonNegativeInt = 0) -> None:
        size = head_size(width, heads)
        super().__init__(width, heads, size, size, 4 * width, 3 * width, short_conv)
        self.register_buffer("decay", lightning_decay(heads), persistent=False)
        self.norm = RMSNorm(width, eps=1e-6)
        self._project_out(width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        before = recurrent(state)
        qkv, gate = self.in_proj(without_padding(x, mask)).split((3 * self.width, self.width), -1)
        qkv, conv = self._convolved(qkv, before, keep_state, "silu")
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = self.sites(q=q, k=k, v=v)
        o, matrix = simple_gla(q, k, v, None, self.decay, None, _matrix(before), keep_state)
        y = self._answer(self.norm(self.site("heads", o).flatten(2)) * gate.sigmoid(), x)
        return y, self._kept(x, before, matrix, conv) if keep_state else None


@register(
    "mixer",
    "retention",
    family="linear",
    papers=("2307.08621",),
    cases=({}, {"heads": 2, "expand_v": 1, "short_conv": 3}),
)
class Retention(MatrixMixer):
    """Multi-scale retention: rotated q and k, decay 1 - 2^(-5-h), per-head normalisation, swish gate.

    width: size of a token's vector.
    heads: number of heads, a divisor of width with an even quotient.
    expand_v: size of a head's value over that of its key.
    short_conv: width of the causal convolution before q, k and v; 0 for none, as in the paper.
    """

    tells_mixing = True

    decay: Tensor

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        expand_v: PositiveInt = 2,
        short_conv: NonNegativeInt = 0,
    ) -> None:
        size, inner = head_size(width, heads), width * expand_v
        rotary_size(size)  # refuses odd heads
        super().__init__(width, heads, size, size * expand_v, 2 * width + 2 * inner, 2 * width + inner, short_conv)
        self.inner = inner
        self.register_buffer("decay", retention_decay(heads), persistent=False)
        self._project_out(inner)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        before = recurrent(state)
        qkv, gate = self.in_proj(without_padding(x, mask)).split((self.conv_channels, self.inner), -1)
        qkv, conv = self._convolved(qkv, before, keep_state, None)
        qk, v = qkv.split((2 * self.width, self.inner), -1)
        qk, v = qk.unflatten(-1, (2 * self.heads, -1)), v.unflatten(-1, (self.heads, -1))
        # The rotation is relative: the place in what was read serves all rows, however much each is padded.
        start = 0 if before is None else before.length
        places = torch.arange(start, start + x.shape[1], device=x.device)
        q, k = rotate(qk, rope_table(places, self.key, dtype=x.dtype)).chunk(2, 2)
        q, k, v = self.sites(q=q, k=k, v=v)
        o, matrix = simple_gla(q, k, v, None, self.decay, None, _matrix(before), keep_state)
        o = F.layer_norm(self.site("heads", o), (self.value,), eps=1e-6)
        return (
            self._answer(o.flatten(2) * F.silu(gate), x),
            self._kept(x, before, matrix, conv) if keep_state else None,
        )


def _counts(x: Tensor, state: RecurrentState | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens before each token x [B, T, D], [B, T], and all that were read, [B]; padding counts as none."""
    real = torch.ones(x.shape[:2], device=x.device, dtype=working_dtype(x.dtype))
    if mask is not None:
        real = real.masked_fill(~mask, 0)
    total = real.cumsum(1) if state is None else real.cumsum(1) + state["count"][:, None]
    return total - real, total[:, -1] if x.shape[1] else (x.new_zeros(len(x)) if state is None else state["count"])


def _matrix(state: RecurrentState | None) -> Tensor | None:
    return None if state is None else state["matrix"]
