"""Feature maps of linear attention: what takes the place of the softmax's exponential.

A map sends the d values of a head to F features, so that phi(q) . phi(k) is the weight of a key for a query.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers.layers import elu1
from contextlab.ops.linear import working_dtype
from contextlab.ops.precision import wide_einsum, without_autocast

FeatureName = Literal["elu1", "relu", "silu", "identity", "taylor", "rebased", "hedgehog", "performer", "cosformer"]


SIGNED = ("silu", "identity")


class FeatureMap(nn.Module):
    """Base: elementwise maps.

    size: d, values of a head. features: F, what `forward` returns of each head.
    products: multiply-adds of the matrix products that map one token's q and k.
    floor: added to the sum of the weights before it divides.
    """

    products = 0
    floor = 1e-6

    def __init__(self, size: int, function: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.function, self.features = function, size

    def forward(self, x: Tensor, places: Tensor, query: bool) -> Tensor:
        """x: [B, T, H, d]. places: [T] int64, places in what was read. query: whether x is q. Returns [B, T, H, F]."""
        assert self.function is not None
        return self.function(x)


class Taylor(FeatureMap):
    """Based's map (2402.18668, eq. 4): phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(d); F = 1 + d + d^2."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.features = 1 + size + size**2

    def forward(self, x: Tensor, places: Tensor, query: bool) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * 2**-0.5
        return torch.cat((torch.ones_like(x[..., :1]), x, square), -1)


class ReBased(FeatureMap):
    """ReBased's map (2402.10644, section 4): (gamma LN(q) + beta) . (gamma' LN(k) + beta') squared; F = d^2."""

    floor = 1e-2  # all weights of a short prefix can be almost 0; a smaller floor would divide rounding errors

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.features = size**2
        self.q_norm, self.k_norm = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x: Tensor, places: Tensor, query: bool) -> Tensor:
        norm = self.q_norm if query else self.k_norm
        x = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        x = x * x.shape[-1] ** -0.25
        return (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)


class Hedgehog(FeatureMap):
    """Hedgehog's map (2402.04347, eq. 5, softmax form): softmax(W x) and softmax(-W x), W learned; F = 2 d."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__(size)
        self.features = 2 * size
        self.products = 2 * heads * size**2
        self.q_weight, self.k_weight = (nn.Parameter(_identities(size, heads)) for _ in range(2))

    def forward(self, x: Tensor, places: Tensor, query: bool) -> Tensor:
        x = wide_einsum("bthd,hde->bthe", x, (self.q_weight if query else self.k_weight).to(x.dtype))
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)


def _identities(size: int, count: int) -> Tensor:
    """[count, size, size]. `torch.eye` imports sympy for seconds where a model is planned without memory."""
    found = torch.zeros(count, size, size)
    found.diagonal(dim1=1, dim2=2).fill_(1)
    return found


class Performer(FeatureMap):
    """FAVOR+'s positive random features of exp(q . k / sqrt(d)) (2009.14794, lemma 1), orthogonal directions.

    features: F, random directions of a head.
    """

    directions: Tensor

    def __init__(self, size: int, heads: int, features: int) -> None:
        super().__init__(size)
        self.features, self.products = features, 2 * heads * size * features
        blocks = [_orthogonal(heads, size) for _ in range(math.ceil(features / size))]
        lengths = torch.randn(heads, features, size).norm(dim=-1, keepdim=True)
        self.register_buffer("directions", torch.cat(blocks, 1)[:, :features] * lengths)

    @without_autocast
    def forward(self, x: Tensor, places: Tensor, query: bool) -> Tensor:
        dtype, work = x.dtype, working_dtype(x.dtype)  # the exponent is a difference of large numbers
        x = x.to(work) * x.shape[-1] ** -0.25
        exponent = torch.einsum("bthd,hfd->bthf", x, self.directions.to(work)) - x.square().sum(-1, keepdim=True) / 2
        if query:  # a factor of each query leaves with the denominator
            exponent = exponent - exponent.amax(-1, keepdim=True).detach()
        return (exponent.exp() * self.features**-0.5).to(dtype)


class CosFormer(FeatureMap):
    """cosFormer's map (2202.08791, eq. 10): relu(q) . relu(k) cos(pi (i - j) / 2 M); F = 2 d.

    period: M; weights turn negative at distances beyond it.
    """

    def __init__(self, size: int, period: int) -> None:
        super().__init__(size)
        self.features, self.period = 2 * size, period

    def forward(self, x: Tensor, places: Tensor, query: bool) -> Tensor:
        angles = places.to(torch.float64)[:, None, None] * (math.pi / (2 * self.period))
        x = F.relu(x)
        return torch.cat((x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)), -1)


def _orthogonal(heads: int, size: int) -> Tensor:
    """Uniformly drawn orthogonal matrices, [heads, size, size]; the signs of R make QR's Q uniform."""
    q, r = torch.linalg.qr(torch.randn(heads, size, size))
    return q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)


def with_ones(v: Tensor) -> Tensor:
    """Values [..., V] and a column of ones, [..., V + 1], in float32 at least: what they read out divides the rest."""
    return F.pad(v.to(working_dtype(v.dtype)), (0, 1), value=1.0)


def require_scale(feature_map: str, normalise: bool, mean: bool, instead: str) -> None:
    """Refuse what cannot divide linear attention's sum: two divisors, or weights whose sum may be 0.

    instead: which feature map serves with normalise true. Raises InputError.
    """
    if normalise and mean:
        raise InputError("mean: normalise divides already, by the sum of the weights; set normalise to false")
    if normalise and feature_map in SIGNED:
        raise InputError(
            f"feature_map {feature_map!r} can be negative, so normalise must be false; with normalise true {instead}"
        )


def divided(o: Tensor, floor: float) -> Tensor:
    """What was read of `with_ones`, o [..., V + 1], as a mean of values [..., V]; floor: added to what divides."""
    return o[..., :-1] / (o[..., -1:] + floor)


def build_feature_map(name: FeatureName, size: int, heads: int, features: int | None, period: int) -> FeatureMap:
    """The map `name` of heads of `size` values.

    features: F of the performer's map, size by default. period: M of the cosformer's.
    """
    if features is not None and name != "performer":
        raise InputError(f"features is the performer's option; feature_map {name!r} has a fixed number of features")
    if name == "taylor":
        return Taylor(size)
    if name == "rebased":
        return ReBased(size)
    if name == "hedgehog":
        return Hedgehog(size, heads)
    if name == "performer":
        return Performer(size, heads, size if features is None else features)
    if name == "cosformer":
        return CosFormer(size, period)
    return FeatureMap(size, _ELEMENTWISE[name])


def _same(x: Tensor) -> Tensor:
    return x


_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "elu1": elu1,
    "relu": F.relu,
    "silu": F.silu,
    "identity": _same,
}
