"""Wanda: what a weight is worth is its size times that of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from contextlab.convert.sparse.base import Scored
from contextlab.registry import register


@register(
    "conversion",
    "wanda",
    family="sparse",
    papers=("2306.11695",),
    cases=({}, {"pattern": "2:4", "packed": True}, {"share": 0.3, "layers": "blocks.*.mlp.*"}),
)
@dataclass(frozen=True)
class Wanda(Scored):
    """The weights become zero whose size times the norm of their input over all tokens is smallest (2306.11695, eq. 1).

    Within each output's row, and block by block: a block is calibrated by what the thinned blocks before it give. The
    other weights stay as they are.

    share: of the weights that become zero; default 0.5, or what the pattern says.
    pattern: n:m, such as 2:4: n of each m neighbours in a row stay. Layers whose inputs are no multiple of m are left
        dense, and the lines say so.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    packed: store the numbers that are left and a bit for each place (the form `sparse`), where that takes fewer bytes;
        else zeros are stored, too.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def scores(self, weight: Tensor, moment: Tensor | None) -> Tensor:
        """|W_ij| ||X_j||, [O, I] as the weight; moment: [I, I], whose diagonal has the squared norms."""
        assert moment is not None
        return weight.abs().double() * moment.diagonal().clamp_min(0).sqrt()
