"""The weights of smallest size become zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from contextlab.convert.sparse.base import Scored
from contextlab.convert.sparse.masks import Scope
from contextlab.registry import register


@register(
    "conversion",
    "magnitude",
    family="sparse",
    papers=("1506.02626", "2104.08378"),
    cases=({}, {"pattern": "2:4", "packed": True}, {"share": 0.3, "scope": "row", "layers": "blocks.*.mlp.*"}),
)
@dataclass(frozen=True)
class Magnitude(Scored):
    """The weights of smallest size become zero, a share of each layer or all but n of each m; nothing is read.

    Layers are thinned one shot, without training (1506.02626 trains between; `--heal` trains after).

    share: of the weights that become zero; default 0.5, or what the pattern says.
    pattern: n:m, such as 2:4: n of each m neighbours in a row stay. Layers whose inputs are no multiple of m are left
        dense, and the lines say so.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    packed: store the numbers that are left and a bit for each place (the form `sparse`), where that takes fewer bytes;
        else zeros are stored, too.
    scope: what the share is of, the layer or each of its rows (an output's weights).
    """

    options_beside_others: ClassVar[Mapping[str, str]] = {"scope": "counts beside a share"}

    scope: Scope = "layer"

    @property
    def _scope(self) -> Scope:
        return self.scope

    def scores(self, weight: Tensor, moment: Tensor | None) -> Tensor:
        """|W|, [O, I] as the weight."""
        return weight.abs()
