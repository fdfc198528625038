"""Multi-head attention to grouped heads: keys and values of a group are averaged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic import PositiveInt

from contextlab.convert.base import Conversion, Converted
from contextlab.convert.calibration import Calibration
from contextlab.convert.mixing import ATTENTION, LayerChoice, attention_of, changes_of, choose, rebuilt, with_layers
from contextlab.errors import InputError, nearest_divisor
from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model
from contextlab.models.start_plan import AVERAGED, average_heads
from contextlab.registry import register


@register("conversion", "gqa", family="kv", papers=("2305.13245",), cases=({}, {"kv_heads": 1, "layers": [1]}))
@dataclass(frozen=True)
class Gqa(Conversion):
    """Heads in groups share one key and one value: the mean of the projections of the group's heads.

    Exact where the heads of a group are equal. `kv_heads: 1` is multi-query attention. The paper trains on afterwards,
    for 5% of the first training (`contextlab convert --budget`).

    kv_heads: key and value heads that are left, a divisor of those there are.
    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    """

    takes: ClassVar[tuple[str, ...] | None] = ATTENTION

    kv_heads: PositiveInt = 1
    layers: LayerChoice = field(default="all")

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Conversion.plan`."""
        changes = {}
        for i in choose(spec, self.layers):
            old, layer = attention_of(spec, i), spec.pattern()[i]
            if old.kv_heads % self.kv_heads:
                fewer = min(self.kv_heads, max(1, old.kv_heads // 2))  # as many as there are would change nothing
                fits = nearest_divisor(old.kv_heads, fewer)
                raise InputError(
                    f"kv_heads {self.kv_heads} does not divide the {old.kv_heads} key heads of layer {i}; the nearest "
                    f"that does is {fits}"
                )
            options = {**layer.options, "heads": old.heads, "kv_heads": self.kv_heads}
            changes[i] = layer.model_copy(update={"options": options})
        return with_layers(spec, changes)

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        layers = choose(model.spec, self.layers)
        new = rebuilt(model, self.plan(model.spec), layers, generator)
        words = {}
        for i in layers:
            old, made = model.blocks[i].mixer, new.blocks[i].mixer
            assert isinstance(old, AttentionMixer)
            assert isinstance(made, AttentionMixer)
            weights = made.state_dict()
            for name, tensor in old.state_dict().items():
                by_head = f"mixer.{name}" in AVERAGED
                weights[name].copy_(average_heads(tensor, old, made) if by_head else tensor)
            words[i] = f"{old.kv_heads} key heads to {self.kv_heads}, averaged"
        return Converted(new, changes_of(model, new, words, data))
