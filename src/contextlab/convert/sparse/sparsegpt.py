"""SparseGPT: weights are set to zero column by column, and the columns after make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from contextlab.convert.feedback import feedback
from contextlab.convert.sparse.base import Sparse
from contextlab.convert.sparse.masks import largest, n_of_m
from contextlab.registry import register

BLOCK = 128


@register(
    "conversion",
    "sparsegpt",
    family="sparse",
    papers=("2301.00774",),
    cases=({}, {"pattern": "2:4", "packed": True}, {"share": 0.3, "layers": "blocks.*.mlp.*"}),
)
@dataclass(frozen=True)
class SparseGpt(Sparse):
    """Weights become zero column by column, each time the least costly, and the columns after make up for them.

    A weight w costs (w / p)^2, with p its pivot in the inverse of X^T X (optimal brain surgery). Which go is chosen for
    128 columns at once, a share of all their weights (2301.00774, algorithm 1), or of a pattern in each m.

    share: of the weights that become zero; default 0.5, or what the pattern says.
    pattern: n:m, such as 2:4: n of each m neighbours in a row stay. Layers whose inputs are no multiple of m are left
        dense, and the lines say so.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    packed: store the numbers that are left and a bit for each place (the form `sparse`), where that takes fewer bytes;
        else zeros are stored, too.
    damping: of the mean of the diagonal of X^T X, which is added to it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    damping: Annotated[float, Field(gt=0)] = 0.01

    def kept(self, outputs: int, inputs: int) -> int:
        """See `Sparse.kept`."""
        if self.pattern is not None:
            return outputs * inputs * self._pattern[0] // self._pattern[1]
        blocks = [outputs * min(BLOCK, inputs - first) for first in range(0, inputs, BLOCK)]
        return sum(size - round(self._share * size) for size in blocks)

    def thinned(self, weight: Tensor, moment: Tensor | None) -> Tensor:
        """See `Sparse.thinned`."""
        assert moment is not None
        n, m = self._pattern
        stays = torch.ones_like(weight, dtype=torch.bool)
        ahead = 0  # up to which column it is chosen

        def rule(place: int, left: Tensor, pivots: Tensor) -> Tensor:
            nonlocal ahead
            if place >= ahead:
                width = left.shape[1] if self.pattern is None else m
                costs = (left[:, :width] / pivots[:width]).square()
                chosen = largest(costs, self._share) if self.pattern is None else n_of_m(costs, n, m)
                stays[:, place : place + width] = chosen
                ahead = place + width
            return torch.where(stays[:, place], left[:, 0], 0.0)

        block = BLOCK if self.pattern is None else max(m, BLOCK // m * m)
        return feedback(weight, moment, rule, damping=self.damping, block=block)
