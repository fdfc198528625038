"""Rounding that looks at the layer's inputs: scales by channel (AWQ) and outliers kept apart (LLM.int8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from contextlab.convert.base import relative_error
from contextlab.convert.bits.base import Bits, ToRounded
from contextlab.mixers.forms.wrapped import Outliers, Scaled
from contextlab.registry import register


@register("conversion", "awq", family="bits", papers=("2306.00978",), cases=({"bits": 2, "group": 8},))
@dataclass(frozen=True)
class Awq(ToRounded):
    """Columns that meet large inputs are scaled up before the rounding, and the inputs down by as much (AWQ).

    The scales are s = r^a, with r the root mean square of each input on the data, and a the best of `grid` + 1 values
    from 0 to 1 by the error of the layer's outputs; with a = 0 it is `rtn`. AWQ takes the mean size for r, searches
    limits for large weights, too, and lets the layer before do the division; here the layer itself does it.

    to: the format: whole numbers, or a form of `contextlab list linears` that has none.
    bits: of a whole number.
    group: neighbouring inputs that share one scale; null is a scale for each output. The last group of a row may be
        smaller.
    zero: whether each group has a least value, too.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    latent: hold the weights, to be healed through the rounding, instead of their codes; the conversion `pack` packs.
    grid: values of a that are tried beside 0, at most 1000.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    grid: Annotated[int, Field(ge=1, le=1000)] = 20

    def form(self) -> tuple[str, dict[str, Any]]:
        """See `ToForm.form`."""
        return self.within("scaled")

    def fill(self, form: Scaled, weight: Tensor, moment: Tensor | None) -> None:
        """See `ToForm.fill`."""
        assert moment is not None
        size = moment.diagonal().clamp_min(0).sqrt()
        size = size.clamp_min(1e-4 * float(size.max()) or 1.0)
        best: tuple[float, Tensor] | None = None
        for step in range(self.grid + 1):
            scale = size ** (step / self.grid)
            scale = (scale / (scale.max() * scale.min()).sqrt()).to(weight.dtype)
            form.rescale(scale)
            form.assign(weight)
            error, _ = relative_error(weight, form.dense(), moment)
            if best is None or error < best[0]:
                best = error, scale
        assert best is not None
        form.rescale(best[1])
        form.assign(weight)


@register(
    "conversion",
    "outliers",
    family="bits",
    papers=("2208.07339",),
    cases=({"bits": 4, "group": 8, "share": 0.2, "layers": "*.up"},),
)
@dataclass(frozen=True)
class KeepOutliers(ToRounded):
    """The columns that meet the largest inputs stay dense, all others are rounded to the nearest (LLM.int8's split).

    There an input is an outlier where some token's is 6 or more, and inputs are rounded, too; here a fixed share with
    the largest root mean square is, and inputs are not rounded.

    to: the format: whole numbers, or a form of `contextlab list linears` that has none.
    bits: of a whole number.
    group: neighbouring inputs that share one scale; null is a scale for each output. The last group of a row may be
        smaller.
    zero: whether each group has a least value, too.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    latent: hold the weights, to be healed through the rounding, instead of their codes; the conversion `pack` packs.
    share: of a layer's inputs that stay dense; one at least.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    bits: Bits = 8
    share: Annotated[float, Field(gt=0, le=1)] = 0.01

    def form(self) -> tuple[str, dict[str, Any]]:
        """See `ToForm.form`."""
        return self.within("outliers", share=self.share)

    def also(self, form: Outliers) -> str:
        """See `ToForm.also`."""
        return f", {form.kept.shape[1]} of {form.in_features} inputs dense"

    def fill(self, form: Outliers, weight: Tensor, moment: Tensor | None) -> None:
        """See `ToForm.fill`."""
        assert moment is not None
        form.split(weight, torch.sqrt(moment.diagonal().clamp_min(0)).to(weight.dtype))
