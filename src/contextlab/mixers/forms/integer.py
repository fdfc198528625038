"""Weights as whole numbers of 8, 4 or 2 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.mixers.forms.base import RoundedForm, grouped, groups_of, spread
from contextlab.ops import bits as packing
from contextlab.ops.int8 import int8_dense, int8_serves
from contextlab.ops.rounding import int8_of_tokens
from contextlab.registry import register


@register(
    "linear",
    "int",
    family="bits",
    papers=("2210.17323", "2306.00978", "2208.07339"),
    cases=(
        {},
        {"activations": 8},
        {"bits": 4, "group": 5},
        {"bits": 2, "group": 16, "zero": True},
        {"bits": 4, "latent": True},
    ),
)
class Integers(RoundedForm):
    """Weights of 8, 4 or 2 bits, with a scale for each group of a row: 4-bit numbers lie two to a byte, really.

    A number is scale times code, with codes from -2^(bits - 1) to 2^(bits - 1) - 1. The largest number of a group has
    the code -2^(bits - 1) and the scale its sign, so that all codes are used (as in the Q4_0 format of GGML). With a
    zero point it is least + scale times code, with codes from 0 to 2^bits - 1.

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    bits: of a number.
    group: neighbouring inputs of a row that have one scale, in the model's dtype; null is one scale a row. The last
        group of a row may be smaller.
    zero: whether each group has a least value, too: better where numbers lie to one side.
    activations: bits that each token's inputs are rounded to, with its largest size for scale; null leaves them.
    latent: hold the weight itself, to be trained, and round it as it is used; a packed form cannot be trained.
    rounding: of a latent weight in training, `stochastic` is right on average.
    seed: of the stochastic rounding.
    """

    def __init__(
        self,
        inputs: PositiveInt,
        outputs: PositiveInt,
        bias: bool,
        *,
        bits: Literal[2, 4, 8] = 8,
        group: PositiveInt | None = 64,
        zero: bool = False,
        activations: Literal[8] | None = None,
        latent: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self.bits, self.group, self.zero, self.activations = bits, group, zero, activations
        super().__init__(inputs, outputs, bias, latent, rounding, seed)

    def options(self) -> dict[str, Any]:
        """See `RoundedForm.options`."""
        own = {"bits": self.bits, "group": self.group, "zero": self.zero}
        return own if self.activations is None else {**own, "activations": self.activations}

    def layout(self, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """See `RoundedForm.layout`: "codes", "scale" and, with a zero point, "least"."""
        kind = torch.int8 if self.bits == 8 and not self.zero else torch.uint8
        sizes = (outputs, groups_of(inputs, self.group))
        found: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
            "codes": ((outputs, -(-inputs * self.bits // 8)), kind),
            "scale": (sizes, None),
        }
        return {**found, "least": (sizes, None)} if self.zero else found

    def scales(self, weight: Tensor) -> dict[str, Tensor]:
        """The "scale" and, with a zero point, the "least" [O, groups] of weight [O, I]."""
        groups = grouped(weight, self.group)
        if not self.zero:
            largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
            return {"scale": largest / -(2 ** (self.bits - 1))}
        if short := groups.shape[1] * groups.shape[2] - weight.shape[1]:  # the zeros after a row are none of its own
            groups = torch.cat((weight, weight[:, -1:].expand(-1, short)), 1).view_as(groups)
        least, most = groups.aminmax(dim=2)
        return {"scale": (most - least) / (2**self.bits - 1), "least": least}

    def encode(self, weight: Tensor, scales: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """The codes [O, I] of a weight [O, I], or of columns of one, for scales [O, I] or [O, 1] of each number."""
        scale = scales["scale"]
        shifted = weight - scales["least"] if self.zero else weight
        steps = shifted / scale.masked_fill(scale == 0, 1.0)
        steps = steps.round() if noise is None else steps.floor() + (noise < steps - steps.floor())
        if self.zero:
            return steps.clamp(0, 2**self.bits - 1).to(torch.uint8)
        half = 2 ** (self.bits - 1)
        return steps.clamp(-half, half - 1).to(torch.int8)

    def decode(self, codes: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """The numbers [O, I] of codes [O, I] and scales [O, I] or [O, 1]."""
        scale = scales["scale"]
        found = codes.to(scale.dtype) * scale
        return found + scales["least"] if self.zero else found

    def each(self, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scales [O, groups] for each number, [O, I] or [O, 1]."""
        return {name: spread(part, self.in_features, self.group) for name, part in scales.items() if name != "codes"}

    def quantise(self, weight: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """See `RoundedForm.quantise`."""
        scales = self.scales(weight)
        return {"codes": self.encode(weight, self.each(scales), noise), **scales}

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See `RoundedForm.dequantise`."""
        return self.decode(parts["codes"], self.each(parts)).to(dtype)

    def read(self, x: Tensor) -> Tensor:
        """See `LinearForm.read`."""
        return x if self.activations is None else int8_of_tokens(x)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]; see `ops.int8` for where PyTorch's int8 kernel serves."""
        x = self.read(x)
        scale, codes = self._buffers.get("scale"), self._buffers.get("codes")
        if (
            self.bits == 8
            and not self.zero
            and codes is not None
            and scale is not None
            and scale.shape[1] == 1
            and scale.dtype == x.dtype
            and int8_serves(x, codes)
        ):
            y = int8_dense(x, codes, scale[:, 0])
            return y if self.bias is None else y + self.bias
        return super().forward(x)

    def pack(self, codes: Tensor) -> Tensor:
        """See `RoundedForm.pack`."""
        if self.bits == 8:
            return codes
        whole = codes if self.zero else (codes + 2 ** (self.bits - 1)).to(torch.uint8)
        return packing.pack(whole, self.bits)

    def unpack(self, codes: Tensor) -> Tensor:
        """See `RoundedForm.unpack`."""
        if self.bits == 8:
            return codes
        whole = packing.unpack(codes, self.bits, self.in_features)
        return whole if self.zero else whole.to(torch.int8) - 2 ** (self.bits - 1)
