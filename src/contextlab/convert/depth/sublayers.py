"""Mixers or MLPs that matter least are dropped, their blocks' other halves stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt
from torch import nn

from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes
from contextlab.convert.calibration import Calibration
from contextlab.convert.depth.blocks import may_go, of_layers, set_blocks, turns
from contextlab.errors import InputError
from contextlab.mixers.static.none import NoMixer
from contextlab.models import LayerSpec, Model, ModelSpec
from contextlab.registry import register

Part = Literal["mixer", "mlp"]


@register(
    "conversion", "drop_sublayers", family="depth", papers=("2406.15786",), cases=({}, {"what": "mlp", "count": 2})
)
@dataclass(frozen=True)
class DropSublayers(Conversion):
    """The mixers, or the MLPs, that turn the stream least are dropped: a mixer with all of its state (LLM-Drop).

    How much one turns it is 1 - the mean cosine between a token's vector before it and with what it adds (2406.15786,
    eq. 3), which is each line's error. Layers that share weights, whose keys others read, or that read the input beside
    the stream keep theirs. In the spec the layer then has mixer "none", or mlp "none".

    count: how many to drop.
    what: mixers or MLPs. The paper finds that of transformers attention goes at less cost.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    nothing: ClassVar[Mapping[str, Any] | None] = {"count": 0}
    places_by_data: ClassVar[bool] = True

    count: NonNegativeInt = 1
    what: Part = "mixer"

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """Without those of the last layers that may go. Raises InputError where there are not so many."""
        if spec.block == "parallel":
            raise InputError("drop_sublayers: block 'parallel' adds mixer and MLP at once; drop blocks instead")
        if spec.residual != "plain":
            raise InputError(
                f"drop_sublayers: residual {spec.residual!r} changes the stream by itself; expected 'plain'"
            )
        if spec.atoms is not None:
            raise InputError("drop_sublayers: projections made of atoms belong to all layers; drop none")
        free = self._free(spec)
        if self.count > len(free):
            raise InputError(f"count: at most {len(free)} of the {spec.depth} layers can lose theirs, got {self.count}")
        return self._without(spec, free[len(free) - self.count :])

    def _free(self, spec: ModelSpec) -> list[int]:
        """The layers that can lose theirs."""
        known, pattern = may_go(spec) if self.what == "mixer" else range(spec.depth), spec.pattern()
        return [
            i
            for i in known
            if pattern[i].share is None and not pattern[i].with_input and _has(spec, pattern[i], self.what)
        ]

    def _without(self, spec: ModelSpec, gone: list[int]) -> ModelSpec:
        none = {"mixer": "none", "options": {}, "kv": "own"} if self.what == "mixer" else {"mlp": {"kind": "none"}}
        layers = [
            LayerSpec.parse({**layer.model_dump(), **none}) if i in gone else layer
            for i, layer in enumerate(spec.pattern())
        ]
        return of_layers(spec, layers) if gone else spec

    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        assert data is not None
        far = sublayer_influences(model, data, self.what)
        gone = sorted(sorted(self._free(model.spec), key=lambda i: far[i])[: self.count])
        made, lines = copied(model), []
        for i in gone:
            block: Any = made.blocks[i]
            size = module_nbytes(getattr(block, self.what))
            if self.what == "mixer":
                block.mixer, block.mixer_norm = NoMixer(model.spec.width).eval(), nn.Identity()
            else:
                block.mlp = block.mlp_norm = block.mlp_residual = None
            lines.append(Change(f"blocks.{i}.{self.what}", "dropped", far[i], "direction", size, 0))
        set_blocks(made, self._without(model.spec, gone), list(made.blocks))
        return Converted(made, lines)


def sublayer_influences(model: Model, data: Calibration, what: Part) -> dict[int, float]:
    """By a block's number, how far its mixer or MLP turns the stream: 1 - the mean of cos(x, x + f(norm(x)))."""
    parts = {i: part for i, block in enumerate(model.blocks) if (part := getattr(block, f"{what}_residual", None))}
    return turns(model, data, parts)


def _has(spec: ModelSpec, layer: LayerSpec, what: Part) -> bool:
    return layer.mixer != "none" if what == "mixer" else (layer.mlp or spec.mlp).kind != "none"
