"""Rounding column by column, where the columns still to come make up for the error (GPTQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.convert.bits.base import Bits, ToForm
from contextlab.convert.feedback import feedback
from contextlab.mixers.forms import LinearForm
from contextlab.mixers.forms.integer import Integers
from contextlab.mixers.forms.wrapped import Rotated
from contextlab.registry import register

LAZY = 128
"""Columns that are corrected at once; more than one group where groups are small."""


@register(
    "conversion",
    "gptq",
    family="bits",
    papers=("2210.17323", "2404.00456"),
    cases=({"bits": 2, "group": 8}, {"zero": True, "order": "activations", "rotate": True}),
)
@dataclass(frozen=True)
class Gptq(ToForm):
    """Weights become whole numbers one column after another; those still to come make up for each column's error.

    The error is that of the layer's outputs on the data (GPTQ; the solver is `contextlab.convert.feedback`). A group's
    scale is found when its first column's turn comes, from what its columns are by then; in the order of activations
    all scales are found before.

    bits: of a number.
    group: neighbouring inputs that share one scale; null is a scale for each output. The last group of a row may be
        smaller.
    zero: whether each group has a least value, too.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    order: "activations" begins with the columns that meet the largest inputs (act-order).
    damping: share of the mean squared input that is added to each, so that the second moments can be inverted.
    rotate: rotate the inputs first, as `rotate` does (QuaRot).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    bits: Bits = 4
    group: PositiveInt | None = 64
    zero: bool = False
    order: Literal["natural", "activations"] = "natural"
    damping: Annotated[float, Field(gt=0)] = 0.01
    rotate: bool = False

    @property
    def grouped(self) -> int | None:
        """See `ToForm.grouped`."""
        return self.group

    def form(self) -> tuple[str, dict[str, Any]]:
        """See `ToForm.form`."""
        own = {"bits": self.bits, "group": self.group, "zero": self.zero}
        return ("rotated", {"form": "int", "options": own}) if self.rotate else ("int", own)

    def fill(self, form: LinearForm, weight: Tensor, moment: Tensor | None) -> None:
        """See `ToForm.fill`."""
        assert moment is not None
        if isinstance(form, Rotated):
            weight, moment, form = form.moved(weight), form.moved(form.moved(moment).T), form.inner
        assert isinstance(form, Integers)
        round_with_feedback(form, weight, moment, self.order, self.damping)


def round_with_feedback(
    form: Integers, weight: Tensor, moment: Tensor, order: Literal["natural", "activations"], damping: float
) -> None:
    """Fill an integer form from a weight [O, I] and its inputs' second moments [I, I], by GPTQ."""
    size = weight.shape[1] if form.group is None else min(form.group, weight.shape[1])
    scales = form.scales(weight)
    codes = torch.zeros_like(weight, dtype=torch.uint8 if form.zero else torch.int8)

    def rule(place: int, free: Tensor, pivots: Tensor) -> Tensor:
        group = place // size
        if order == "natural" and form.group is not None and place % size == 0:
            for name, part in form.scales(free[:, :size].to(weight.dtype)).items():
                scales[name][:, group : group + 1] = part
        own = {name: part[:, group : group + 1].to(free.dtype) for name, part in scales.items()}
        codes[:, place : place + 1] = form.encode(free[:, :1], own)
        return form.decode(codes[:, place : place + 1], own)[:, 0]

    lazy = LAZY if form.group is None else size * max(1, LAZY // size)
    feedback(weight, moment, rule, damping=damping, block=lazy, order=order)
    form.store({"codes": codes, **scales})
