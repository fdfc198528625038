"""Weights as floating-point numbers of 8 or 4 bits, with scales of a row or of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers.forms.base import RoundedForm, grouped, groups_of, spread
from contextlab.ops import bits as packing
from contextlab.ops import rounding as round_
from contextlab.ops.rounded_product import rounded_product
from contextlab.registry import register


class _Floats(RoundedForm):
    """What the forms of this file share: codes of `bits` bits, and a scale for each block of a row."""

    bits = 4
    block: int | None = None

    def __init__(
        self,
        inputs: PositiveInt,
        outputs: PositiveInt,
        bias: bool,
        *,
        latent: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: Annotated[int, Field(ge=0)] = 0,
        activations: bool = False,
        gradients: bool = False,
    ) -> None:
        if gradients and not (latent and activations):
            raise InputError("gradients: they are rounded where all else is; add latent: true and activations: true")
        super().__init__(inputs, outputs, bias, latent, rounding, seed)
        self.activations, self.gradients, self.exact_gradients = activations, gradients, not gradients

    def options(self) -> dict[str, Any]:
        """See `RoundedForm.options`."""
        return {"activations": True} if self.activations else {}

    def read(self, x: Tensor) -> Tensor:
        """See `LinearForm.read`: with `activations` each token's inputs in the form's own numbers."""
        if not self.activations:
            return x
        rows = x.detach().reshape(-1, x.shape[-1])
        return round_.straight_through(self.rounds(rows).view_as(x), x)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]; in training with `gradients` by `ops.rounded_product`."""
        if not (self.gradients and self.training):
            return super().forward(self.read(x))
        with torch.no_grad():
            read, dense = self.read(x), self.dense()
        y = rounded_product(x, self.weight, read, dense, self.rounds, self.seed)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def rounds(self, rows: Tensor, noise: Tensor | None = None) -> Tensor:
        """Rows [R, D] in the form's numbers, each by itself, as no token may tell another's scale.

        noise: as of `RoundedForm.quantise`. What is not finite stays as it is, for whoever looks for it.
        """
        if not rows.numel():
            return rows
        kept = self.dequantise(self.quantise(rows, noise, by_row=True), rows.dtype)
        return torch.where(rows.isfinite().all(-1, keepdim=True), kept, rows)

    def layout(self, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """See `RoundedForm.layout`: "codes" and a "scale" for each block."""
        sizes = (outputs, groups_of(inputs, self.block))
        return {"codes": ((outputs, -(-inputs * self.bits // 8)), torch.uint8), "scale": (sizes, None)}

    def largest(self, weight: Tensor) -> Tensor:
        """[O, blocks]: the largest size in each block of weight [O, I]."""
        return grouped(weight.abs(), self.block).amax(2)

    def scales(self, weight: Tensor, by_row: bool) -> dict[str, Tensor]:
        """The scales that are stored, of weight [O, I]: so that a block's largest number is the format's.

        by_row: whether rows have nothing in common, not even a scale for all.
        """
        return {"scale": self.largest(weight) / round_.E2M1_MOST}

    def factor(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """[O, blocks] of this dtype: what the scales that are stored say."""
        return parts["scale"].to(dtype)

    def quantise(self, weight: Tensor, noise: Tensor | None = None, *, by_row: bool = False) -> dict[str, Tensor]:
        """See `RoundedForm.quantise`; by_row: see `scales`."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        scales = self.scales(wide, by_row)
        stored = {n: p.to(weight.dtype) if p.is_floating_point() else p for n, p in scales.items()}
        factor = spread(self.factor(stored, wide.dtype), weight.shape[1], self.block)
        steps = wide / factor.masked_fill(factor == 0, 1.0)
        codes = round_.e4m3_codes(steps, noise) if self.bits == 8 else round_.e2m1_codes(steps, noise)
        return {"codes": codes, **stored}

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See `RoundedForm.dequantise`."""
        values = (round_.e4m3_values if self.bits == 8 else round_.e2m1_values)(parts["codes"], dtype)
        return values * spread(self.factor(parts, dtype), values.shape[1], self.block)

    def pack(self, codes: Tensor) -> Tensor:
        """See `RoundedForm.pack`."""
        return packing.pack(codes, self.bits)

    def unpack(self, codes: Tensor) -> Tensor:
        """See `RoundedForm.unpack`."""
        return packing.unpack(codes, self.bits, self.in_features)


_CASES: tuple[Mapping[str, Any], ...] = (
    {},
    {"latent": True, "rounding": "stochastic"},
    {"activations": True},
    {"latent": True, "activations": True, "gradients": True},
)


@register("linear", "fp8", family="bits", papers=("2209.05433",), cases=_CASES)
class Float8(_Floats):
    """8-bit floats (E4M3), with a scale for each output so that its largest number is 448.

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    latent: hold the weight itself, to be trained, and round it as it is used; a packed form cannot be trained.
    rounding: of a latent weight in training, `stochastic` is right on average.
    seed: of the stochastic rounding.
    activations: whether inputs are rounded to the same numbers, too, along a token's inputs; a scale for all is each
        token's own, so that none tells of another.
    gradients: whether all that is multiplied in the backward pass is as well (`ops.rounded_product`), which trains as
        hardware of so few bits does (2505.19115); of a latent weight with `activations` alone.
    """

    bits = 8

    def scales(self, weight: Tensor, by_row: bool) -> dict[str, Tensor]:
        """See `_Floats.scales`."""
        return {"scale": self.largest(weight) / round_.E4M3_MOST}


@register("linear", "fp4", family="bits", papers=("2310.16836",), cases=_CASES)
class Float4(_Floats):
    """4-bit floats (E2M1), with a scale for each output so that its largest number is 6.

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    latent: hold the weight itself, to be trained, and round it as it is used; a packed form cannot be trained.
    rounding: of a latent weight in training, `stochastic` is right on average.
    seed: of the stochastic rounding.
    activations: whether inputs are rounded to the same numbers, too, along a token's inputs; a scale for all is each
        token's own, so that none tells of another.
    gradients: whether all that is multiplied in the backward pass is as well (`ops.rounded_product`), which trains as
        hardware of so few bits does (2505.19115); of a latent weight with `activations` alone.
    """


@register("linear", "mxfp4", family="bits", papers=("2310.10537",), cases=_CASES)
class MicroscalingFloat4(_Floats):
    """4-bit floats (E2M1) in blocks of 32 with a power of two for scale (MXFP4): 4.25 bits a number.

    The scale is that of the OCP specification: 2^(floor(log2 of the block's largest size) - 2), so that what is beyond
    6 steps becomes 6. The last block of a row may be smaller.

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    latent: hold the weight itself, to be trained, and round it as it is used; a packed form cannot be trained.
    rounding: of a latent weight in training, `stochastic` is right on average.
    seed: of the stochastic rounding.
    activations: whether inputs are rounded to the same numbers, too, along a token's inputs; a scale for all is each
        token's own, so that none tells of another.
    gradients: whether all that is multiplied in the backward pass is as well (`ops.rounded_product`), which trains as
        hardware of so few bits does (2505.19115); of a latent weight with `activations` alone.
    """

    block = 32

    def layout(self, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """See `RoundedForm.layout`: "codes", and a byte of "scale" for each block."""
        found = super().layout(inputs, outputs)
        return {**found, "scale": (found["scale"][0], torch.uint8)}

    def scales(self, weight: Tensor, by_row: bool) -> dict[str, Tensor]:
        """See `_Floats.scales`."""
        return {"scale": round_.e8m0_codes(self.largest(weight))}

    def factor(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See `_Floats.factor`."""
        return round_.e8m0_values(parts["scale"], dtype)


@register("linear", "nvfp4", family="bits", papers=("2509.25149", "2505.19115"), cases=_CASES)
class NvFloat4(_Floats):
    """4-bit floats (E2M1) in blocks of 16 with a scale in E4M3, and one scale for all (NVFP4): 4.5 bits a number.

    The scale for all is the largest size over 6 x 448, so that the block with the largest number has the scale 448
    (2509.25149, appendix B). The last block of a row may be smaller.

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    latent: hold the weight itself, to be trained, and round it as it is used; a packed form cannot be trained.
    rounding: of a latent weight in training, `stochastic` is right on average.
    seed: of the stochastic rounding.
    activations: whether inputs are rounded to the same numbers, too, along a token's inputs; a scale for all is each
        token's own, so that none tells of another.
    gradients: whether all that is multiplied in the backward pass is as well (`ops.rounded_product`), which trains as
        hardware of so few bits does (2505.19115); of a latent weight with `activations` alone.
    """

    block = 16

    def layout(self, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """See `RoundedForm.layout`: "codes", a byte of "scale" for each block, and the scale for "all"."""
        found = super().layout(inputs, outputs)
        return {**found, "scale": (found["scale"][0], torch.uint8), "all": ((), None)}

    def scales(self, weight: Tensor, by_row: bool) -> dict[str, Tensor]:
        """See `_Floats.scales`."""
        largest = self.largest(weight)
        most = largest.amax(1, keepdim=True) if by_row else largest.amax()
        everywhere = most / (round_.E2M1_MOST * round_.E4M3_MOST)
        per_block = largest / round_.E2M1_MOST / everywhere.masked_fill(everywhere == 0, 1.0)
        return {"scale": round_.e4m3_codes(per_block.clamp_min(round_.E4M3_LEAST)), "all": everywhere}

    def factor(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See `_Floats.factor`."""
        return round_.e4m3_values(parts["scale"], dtype) * parts["all"].to(dtype)
