"""Deeper models from trained ones: blocks repeated, or added so that nothing changes at first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt

from contextlab.convert.base import Change, Conversion, Converted, module_nbytes
from contextlab.convert.calibration import Calibration
from contextlab.convert.depth.blocks import of_blocks, of_layers
from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec
from contextlab.models.outline import without_memory
from contextlab.models.spec import MOST_LAYERS
from contextlab.models.start_plan import LAST, is_identity
from contextlab.registry import register


@register("conversion", "stack", family="growth", papers=("2405.15319",))
@dataclass(frozen=True)
class Stack(Conversion):
    """The blocks once more on top of themselves, several times (G_stack, 2405.15319): to go on training deeper.

    What comes out answers otherwise until it is trained. The paper's small model has read a few billion tokens, and is
    stacked four times.

    times: copies in all; 1 changes nothing.
    """

    nothing: ClassVar[Mapping[str, Any] | None] = {"times": 1}

    times: PositiveInt = 2

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """`times` as deep. Raises InputError for more layers than a model may have."""
        layers = spec.depth * spec.loops
        if self.times * layers > MOST_LAYERS:
            raise InputError(
                f"times: a model applies at most {MOST_LAYERS} layers, {MOST_LAYERS // layers} times the {layers} of "
                f"this one, got {self.times}"
            )
        return of_layers(spec, spec.pattern() * self.times)

    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        order = list(range(model.spec.depth)) * self.times
        made = of_blocks(model, self.plan(model.spec), order)
        lines = []
        for i, block in enumerate(model.blocks):
            size = module_nbytes(block)
            count = 1 if model.spec.pattern()[i].share is not None else self.times
            lines.append(Change(f"blocks.{i}", f"{self.times} times", 0.0, "weights", size, count * size))
        return Converted(made, lines)


@register("conversion", "expand", family="growth", papers=("2401.02415",), cases=({}, {"count": 2}))
@dataclass(frozen=True)
class Expand(Conversion):
    """Blocks are added that change nothing at first: copies whose projections out are zero (LLaMA Pro, 2401.02415).

    The model answers exactly as before; in the paper the new blocks alone are trained, on new data. They stand evenly:
    of as many groups of blocks as are added, behind the last of each, whose copy they are. (A recipe's `init: zero`
    adds its blocks on top, copies of the lowest ones in order, as stacking does.)

    count: blocks that are added.
    """

    nothing: ClassVar[Mapping[str, Any] | None] = {}

    count: NonNegativeInt = 1

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """`count` blocks deeper. Raises InputError where a block cannot be made to change nothing."""
        if self.count > spec.depth:
            raise InputError(f"count: at most one for each of the {spec.depth} blocks, got {self.count}")
        if spec.residual != "plain":
            raise InputError(f"expand: residual {spec.residual!r} changes the stream by itself; expected 'plain'")
        if any(layer.share is not None or layer.kv == "shared" for layer in spec.pattern()):
            raise InputError("expand: layers that share weights or keys cannot be told from their copies")
        outline = without_memory(spec)
        for number in self._behind(spec.depth):
            if outline is not None:
                _require_projections(outline.blocks[number], f"blocks.{number}")
        pattern = spec.pattern()
        return of_layers(spec, [pattern[number] for number in self._order(spec.depth)])

    def _behind(self, depth: int) -> list[int]:
        """The blocks behind which one is added."""
        return [(place + 1) * depth // self.count - 1 for place in range(self.count)]

    def _order(self, depth: int) -> list[int]:
        behind = self._behind(depth)
        return [number for number in range(depth) for _ in range(1 + (number in behind))]

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        order = self._order(model.spec.depth)
        made = of_blocks(model, self.plan(model.spec), order)
        lines = []
        for place, number in enumerate(order):
            if place and order[place - 1] == number:
                block, size = made.blocks[place], module_nbytes(model.blocks[number])
                for name, parameter in block.named_parameters():
                    if _leads_out(name):
                        parameter.zero_()
                if not is_identity(made, place):
                    kind = type(block.mixer).__name__
                    raise InputError(f"expand: blocks.{number} ({kind}) answers otherwise than by its projection out")
                lines.append(Change(f"blocks.{number}", "a copy behind it, silent", 0.0, "weights", size, 2 * size))
        return Converted(made, lines)


def _require_projections(block: Any, name: str) -> None:
    """Raises InputError where a block's mixer or MLP does not end in a projection that can be zero."""
    for part in ("mixer", "mlp"):
        own = getattr(block, part, None)
        if own is not None and not any(_leads_out(f"{part}.{n}") for n, _ in own.named_parameters()):
            raise InputError(f"expand: {name}.{part} ({type(own).__name__}) has no projection out that can be zero")


def _leads_out(name: str) -> bool:
    """Whether a parameter of a block is of the last projection of its mixer, its MLP, or itself."""
    return name in LAST or name in {f"{part}.{out}" for part in ("mixer", "mlp") for out in LAST}
