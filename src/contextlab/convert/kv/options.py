"""Conversions that keep every weight of attention and change what it does with positions: longer reach, or none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from contextlab import registry
from contextlab.convert.base import Conversion, Converted
from contextlab.convert.calibration import Calibration
from contextlab.convert.mixing import ATTENTION, LayerChoice, attention_of, changes_of, choose, rebuilt, with_layers
from contextlab.convert.teacher import Distil
from contextlab.convert.transfer import Stage
from contextlab.errors import InputError
from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model
from contextlab.ops.position import RopeScaling
from contextlab.registry import register


@dataclass(frozen=True)
class Reoptioned(Conversion):
    """Base: attention layers get other options, or become another mixer of the same weights.

    layers: which, see `LayerChoice`.
    """

    takes: ClassVar[tuple[str, ...] | None] = ATTENTION

    layers: LayerChoice = "all"

    @abstractmethod
    def become(self, old: AttentionMixer, layer: int) -> tuple[str, dict[str, Any]]:
        """The mixer and the options that change. Raises InputError where the attention cannot have them."""

    def changed(self, model: Model | ModelSpec, data: Calibration | None) -> list[int]:
        """The numbers of the layers that are changed."""
        return choose(model.spec if isinstance(model, Model) else model, self.layers)

    def words(self, data: Calibration | None) -> str:
        """What was done to a layer. data: those that it was done by."""
        return self.name

    def _plan(self, spec: ModelSpec, layers: list[int]) -> ModelSpec:
        changes = {}
        for i in layers:
            old, layer = attention_of(spec, i), spec.pattern()[i]
            mixer, options = self.become(old, i)
            known = {each.name for each in registry.lookup("mixer", mixer).parameters}
            kept = {name: value for name, value in layer.options.items() if name in known}
            options = {**kept, "heads": old.heads, **options}
            changes[i] = layer.model_copy(update={"mixer": mixer, "options": options})
        return with_layers(spec, changes)

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Conversion.plan`."""
        return self._plan(spec, self.changed(spec, None))

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        layers = self.changed(model, data)
        new = rebuilt(model, self._plan(model.spec, layers), layers, generator)
        for i in layers:
            old, made = model.blocks[i].mixer, new.blocks[i].mixer
            assert isinstance(old, nn.Module)
            assert isinstance(made, nn.Module)
            made.load_state_dict({**made.state_dict(), **old.state_dict()})  # what is new stays as it is made
        return Converted(new, changes_of(model, new, dict.fromkeys(layers, self.words(data)), data))


def require_rope(name: str, old: AttentionMixer, layer: int, factor: float = 1.0) -> str:
    """The registered name of an attention that turns by plain rotary positions.

    name: of the conversion. factor: by which contexts grow. Raises InputError where it turns otherwise, or they shrink.
    """
    if old.position != "rope" or old.rope_scaling is not None:
        had = f"rope_scaling {old.rope_scaling.kind!r}" if old.rope_scaling else f"position {old.position!r}"
        raise InputError(f"{name}: layer {layer} has {had}; expected plain rotary positions")
    if factor < 1:
        raise InputError(f"factor: {factor:g} makes contexts shorter; expected at least 1")
    return "attention" if type(old).__name__ == "Attention" else "sliding_window"


@register(
    "conversion",
    "rope_scaling",
    family="kv",
    papers=("2306.15595", "2309.00071"),
    cases=({"factor": 4.0}, {"kind": "ntk", "factor": 2.0}, {"kind": "yarn", "factor": 4.0, "original_length": 64}),
)
@dataclass(frozen=True)
class ScaledRope(Reoptioned):
    """Rotary positions for longer contexts: position interpolation, NTK-aware scaling or YaRN; see `ops.RopeScaling`.

    Training-free; the papers train on afterwards for some hundred steps (`contextlab convert --budget`), on texts of
    the new length.

    kind: "linear" (position interpolation, 2306.15595), "ntk" or "yarn" (2309.00071).
    factor: new length over that of the training; 1 changes nothing.
    original_length: tokens of the training, for yarn.
    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    """

    nothing: ClassVar[Mapping[str, Any] | None] = {"kind": "linear", "factor": 1.0}
    stages: ClassVar[tuple[Stage, ...]] = (Stage("task", Distil(task=1.0), learning_rate=3e-4),)

    kind: Literal["linear", "ntk", "yarn"] = "linear"
    factor: PositiveFloat = 2.0
    original_length: PositiveInt | None = None

    def become(self, old: AttentionMixer, layer: int) -> tuple[str, dict[str, Any]]:
        """See `Reoptioned.become`."""
        known = require_rope(self.name, old, layer, self.factor)
        options: dict[str, Any] = {"kind": self.kind, "factor": self.factor}
        if self.original_length is not None:
            options["original_length"] = self.original_length
        RopeScaling.parse(options, "rope_scaling")
        return known, {"rope_scaling": options}

    def words(self, data: Calibration | None) -> str:
        """See `Reoptioned.words`."""
        trained = "" if self.original_length is None else f", of {self.original_length} tokens"
        return f"rope_scaling {self.kind}, factor {self.factor:g}{trained}"


@register("conversion", "drop_position", family="kv", papers=("2512.12167",), cases=({}, {"layers": "half"}))
@dataclass(frozen=True)
class DropPosition(Reoptioned):
    """Positions are taken out of a trained model, and a short training lets it get along without (DroPE).

    What remains to tell the order is the causal mask and the layers that keep theirs. In the paper the model is trained
    on, at its old length, on text; here it learns the predictions that it made with positions.

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    stages: ClassVar[tuple[Stage, ...]] = (Stage("logits", Distil(logits=1.0), learning_rate=5e-4),)

    def become(self, old: AttentionMixer, layer: int) -> tuple[str, dict[str, Any]]:
        """See `Reoptioned.become`."""
        if old.position not in ("rope", "alibi"):
            raise InputError(f"drop_position: layer {layer} has position {old.position!r}; expected rope or alibi")
        changes: dict[str, Any] = {"position": "none"}
        if old.rope_scaling is not None:
            changes["rope_scaling"] = None
        return "attention" if type(old).__name__ == "Attention" else "sliding_window", changes

    def words(self, data: Calibration | None) -> str:
        """See `Reoptioned.words`."""
        return "positions dropped"
