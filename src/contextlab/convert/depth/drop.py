"""Blocks that matter least are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt

from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes
from contextlab.convert.calibration import Calibration
from contextlab.convert.depth.blocks import check_count, influences, may_go, of_blocks, of_layers, set_blocks
from contextlab.models import Model, ModelSpec
from contextlab.registry import register


@register(
    "conversion",
    "drop_blocks",
    family="depth",
    papers=("2403.03853", "2402.09025"),
    cases=({}, {"by": "loss", "count": 2}),
)
@dataclass(frozen=True)
class DropBlocks(Conversion):
    """Whole blocks, mixer and MLP, are dropped: fewer weights, less state and less time.

    By influence (ShortGPT, 2403.03853): those that turn the stream least, 1 - the mean cosine between a token's vector
    before and after the block, which is each line's error. By loss (SLEB, 2402.09025): one after another, each time the
    block without which the loss on the data is smallest; the error is what the loss then grew by, as a share. A block
    whose keys later blocks read stays.

    count: blocks to drop.
    by: how they are chosen; by loss the data are read depth times for each of them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    nothing: ClassVar[Mapping[str, Any] | None] = {"count": 0}

    count: NonNegativeInt = 1
    by: Literal["influence", "loss"] = "influence"

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """Without the last blocks that may go. Raises InputError where there are not so many."""
        check_count(spec, self.count)
        gone = may_go(spec)[len(may_go(spec)) - self.count :]
        return _without(spec, gone)

    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        assert data is not None
        if self.by == "influence":
            turns = influences(model, data)
            order = sorted(may_go(model.spec), key=lambda i: turns[i])[: self.count]
            chosen = {i: turns[i] for i in order}
            of = "direction"
        else:
            chosen, of = self._by_loss(model, data), "loss"
        lines = [
            Change(f"blocks.{i}", "dropped", error, of, module_nbytes(model.blocks[i]), 0)
            for i, error in sorted(chosen.items())
        ]
        return Converted(without(model, list(chosen)), lines)

    def _by_loss(self, model: Model, data: Calibration) -> dict[int, float]:
        """The dropped blocks, and by what share of the loss before it each made that grow."""
        chosen: dict[int, float] = {}
        tried, before = copied(model), data.loss(model)
        blocks = list(tried.blocks)
        for _ in range(self.count):
            losses = {}
            for i in (i for i in may_go(model.spec) if i not in chosen):
                stays = [block for j, block in enumerate(blocks) if j not in chosen and j != i]
                set_blocks(tried, _without(model.spec, [*chosen, i]), stays)
                losses[i] = data.loss(tried)
            best = min(losses, key=lambda i: losses[i])
            chosen[best] = losses[best] / before - 1 if before > 0 else float(losses[best] > 0)
            before = losses[best]
        return chosen


def without(model: Model, gone: list[int]) -> Model:
    """A new model without the blocks of these numbers."""
    if not gone:
        return copied(model)
    return of_blocks(model, _without(model.spec, gone), [i for i in range(model.spec.depth) if i not in gone])


def _without(spec: ModelSpec, gone: list[int]) -> ModelSpec:
    if not gone:
        return spec
    return of_layers(spec, [layer for i, layer in enumerate(spec.pattern()) if i not in gone])
