"""Weights of three values, or of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.mixers.forms.base import RoundedForm
from contextlab.ops import bits as packing
from contextlab.ops.rounding import absmean, int8_of_tokens, ternary
from contextlab.registry import register


@register(
    "linear",
    "ternary",
    family="bits",
    papers=("2402.17764",),
    cases=({}, {"latent": True}, {"latent": True, "activations": 8}),
)
class Ternary(RoundedForm):
    """Weights of -1, 0 and 1 times one scale, the mean size of the weight (BitNet b1.58): 1.6 bits, five to a byte.

    Without the paper's normalisation inside the layer, which the model's own norm before it makes up for; the mixers'
    option `ternary`, where they have it, is the layer with it.

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    activations: bits that each token's inputs are rounded to, with its largest size for scale; null leaves them.
    latent: hold the weight itself, to be trained, and round it as it is used; a packed form cannot be trained.
    """

    def __init__(
        self,
        inputs: PositiveInt,
        outputs: PositiveInt,
        bias: bool,
        *,
        activations: Literal[8] | None = None,
        latent: bool = False,
    ) -> None:
        self.activations = activations
        super().__init__(inputs, outputs, bias, latent)

    def options(self) -> dict[str, Any]:
        """See `RoundedForm.options`."""
        return {"activations": self.activations}

    def layout(self, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """See `RoundedForm.layout`: "codes" and one "scale"."""
        return {"codes": ((outputs, -(-inputs // packing.TRITS)), torch.uint8), "scale": ((), None)}

    def quantise(self, weight: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """See `RoundedForm.quantise`."""
        scale = absmean(weight)
        return {"codes": (ternary(weight, scale) + 1).to(torch.uint8), "scale": scale}

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See `RoundedForm.dequantise`."""
        return (parts["codes"].to(dtype) - 1) * parts["scale"].to(dtype)

    def pack(self, codes: Tensor) -> Tensor:
        """See `RoundedForm.pack`."""
        return packing.pack_trits(codes)

    def unpack(self, codes: Tensor) -> Tensor:
        """See `RoundedForm.unpack`."""
        return packing.unpack_trits(codes, self.in_features)

    def read(self, x: Tensor) -> Tensor:
        """See `LinearForm.read`."""
        return x if self.activations is None else int8_of_tokens(x)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        return super().forward(self.read(x))


@register("linear", "binary", family="bits", papers=("1603.05279", "2407.07093"), cases=({}, {"latent": True}))
class Binary(RoundedForm):
    """Weights of -1 and 1 times a scale for each output, the mean size of its row (XNOR-Net's; a bit a number).

    Of all scales it makes the error least (1603.05279, eq. 6). In FBI-LLM scales and shifts are learned beside the
    weight; here they follow it. Zero counts as positive.

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    latent: hold the weight itself, to be trained, and round it as it is used; a packed form cannot be trained.
    """

    def __init__(self, inputs: PositiveInt, outputs: PositiveInt, bias: bool, *, latent: bool = False) -> None:
        super().__init__(inputs, outputs, bias, latent)

    def options(self) -> dict[str, Any]:
        """See `RoundedForm.options`."""
        return {}

    def layout(self, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """See `RoundedForm.layout`: "codes" and a "scale" for each output."""
        return {"codes": ((outputs, -(-inputs // 8)), torch.uint8), "scale": ((outputs, 1), None)}

    def quantise(self, weight: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """See `RoundedForm.quantise`."""
        return {"codes": (weight >= 0).to(torch.uint8), "scale": weight.abs().mean(1, keepdim=True)}

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See `RoundedForm.dequantise`."""
        scale = parts["scale"].to(dtype)
        return torch.where(parts["codes"] > 0, scale, -scale)

    def pack(self, codes: Tensor) -> Tensor:
        """See `RoundedForm.pack`."""
        return packing.pack(codes, 1)

    def unpack(self, codes: Tensor) -> Tensor:
        """See `RoundedForm.unpack`."""
        return packing.unpack(codes, 1, self.in_features)
