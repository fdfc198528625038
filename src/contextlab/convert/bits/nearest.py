"""Round to the nearest, as the weights are or rotated; nothing is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from contextlab.convert.bits.base import ToRounded
from contextlab.mixers.forms import LinearForm
from contextlab.registry import register


@register(
    "conversion",
    "rtn",
    family="bits",
    papers=("2206.01861",),
    cases=({}, {"to": "nvfp4", "layers": "blocks.*.mlp.*"}),
)
@dataclass(frozen=True)
class RoundToNearest(ToRounded):
    """Each weight is rounded to the nearest number of a format: no data, a second for a small model.

    to: the format: whole numbers, or a form of `contextlab list linears` that has none.
    bits: of a whole number.
    group: neighbouring inputs that share one scale; null is a scale for each output. The last group of a row may be
        smaller.
    zero: whether each group has a least value, too.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    latent: hold the weights, to be healed through the rounding, instead of their codes; the conversion `pack` packs.
    """

    def form(self) -> tuple[str, dict[str, Any]]:
        """See `ToForm.form`."""
        return self.rounded()

    def fill(self, form: LinearForm, weight: Tensor, moment: Tensor | None) -> None:
        """See `ToForm.fill`."""
        form.assign(weight)


@register(
    "conversion",
    "rotate",
    family="bits",
    papers=("2404.00456",),
    cases=({"bits": 2, "group": 8, "layers": "*.out_proj"},),
)
@dataclass(frozen=True)
class Rotate(ToRounded):
    """Each layer's inputs are rotated by a random Hadamard matrix, and its rotated weights rounded to the nearest.

    The rotation spreads large numbers over all, so that fewer bits lose less (QuaRot); without the rounding it would
    change nothing. Activations are not rounded, and each layer rotates its own inputs (see `contextlab show linear
    rotated`). `gptq` can rotate, too.

    to: the format: whole numbers, or a form of `contextlab list linears` that has none.
    bits: of a whole number.
    group: neighbouring inputs that share one scale; null is a scale for each output. The last group of a row may be
        smaller.
    zero: whether each group has a least value, too.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    latent: hold the weights, to be healed through the rounding, instead of their codes; the conversion `pack` packs.
    seed: of the rotation's signs.
    """

    seed: Annotated[int, Field(ge=0)] = 0

    def form(self) -> tuple[str, dict[str, Any]]:
        """See `ToForm.form`."""
        return self.within("rotated", seed=self.seed)

    def fill(self, form: LinearForm, weight: Tensor, moment: Tensor | None) -> None:
        """See `ToForm.fill`."""
        form.assign(weight)
