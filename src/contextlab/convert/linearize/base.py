"""What conversions of attention to another mixer share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from contextlab.convert.base import Conversion, Converted
from contextlab.convert.calibration import Calibration
from contextlab.convert.linearize.carry import carry, check_target, target_options
from contextlab.convert.mixing import (
    ATTENTION,
    LayerChoice,
    attention_of,
    changes_of,
    choose,
    fit_outputs,
    rebuilt,
    require_in_reach,
    with_layers,
)
from contextlab.convert.teacher import Distil
from contextlab.convert.transfer import Stage
from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.models.outline import without_memory
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model
from contextlab.policies.core.parse import write_options
from contextlab.training.spec import LoraSpec

TRANSFER = Stage("attention", Distil(attention=1.0), trains="new", learning_rate=5e-3)
MATRIX = Stage("matrix", Distil(matrix=1.0), trains="new", learning_rate=5e-3)
DISTIL = Stage("logits", Distil(logits=1.0))
FINISH = Stage("task", Distil(task=1.0), learning_rate=5e-4)
ADAPT = Stage(
    "task", Distil(task=1.0), trains="lora", learning_rate=3e-3,
    lora=LoraSpec(rank=8, targets=("blocks.*.mixer.qkv_proj", "blocks.*.mixer.out_proj")),
)  # fmt: skip
"""The task by adapters on q, k, v and the output projection, of mixers that hold these as attention does."""


@dataclass(frozen=True)
class Replacement(Conversion):
    """Base: some attention layers become another mixer that starts from their weights, and is then trained.

    Called, it carries the weights over and trains nothing; `contextlab.convert.convert` trains the `stages`, too. With
    data the output projections are fitted to the teacher's outputs by least squares, as what comes before them is new.

    layers: which, see `LayerChoice`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    takes: ClassVar[tuple[str, ...] | None] = ATTENTION
    stages: ClassVar[tuple[Stage, ...]] = (TRANSFER, DISTIL)
    """What is trained afterwards, one after the other."""

    layers: LayerChoice = "all"

    @abstractmethod
    def target(self) -> tuple[str, Mapping[str, Any]]:
        """The name of the mixer, and its options but those that the weights ask for."""

    def begin(self, old: AttentionMixer, new: nn.Module) -> str:
        """Set what is new in a mixer that has the old one's weights. Returns what was done, in words."""
        return ""

    def changed(self, spec: ModelSpec) -> list[int]:
        """The numbers of the layers that become others."""
        return choose(spec, self.layers)

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Conversion.plan`."""
        name, given = self.target()
        require_in_reach(spec, **{key: given[key] for key in ("window",) if key in given})
        changes = {}
        for i in self.changed(spec):
            layer = spec.pattern()[i]
            options = target_options(name, given, layer.options, attention_of(spec, i))
            changes[i] = layer.model_copy(update={"mixer": name, "options": options})
        planned = with_layers(spec, changes)
        outline = without_memory(planned)
        for i in changes if outline is not None else ():
            check_target(name, attention_of(spec, i), outline.blocks[i].mixer)  # type: ignore[union-attr, arg-type]
        return planned

    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`; the error of each line is that of what the untrained mixer gives."""
        name, given = self.target()
        told = write_options({key: value for key, value in given.items() if value is not None})
        told = f"{name}:{told}" if told else name
        layers = self.changed(model.spec)
        new = rebuilt(model, self.plan(model.spec), layers, generator)
        words = {}
        for i in layers:
            old, made = model.blocks[i].mixer, new.blocks[i].mixer
            assert isinstance(old, AttentionMixer)
            assert isinstance(made, nn.Module)
            words[i] = "; ".join(filter(None, (f"to {told}: {carry(name, old, made)}", self.begin(old, made))))
        if data is not None:
            fit_outputs(model, new, layers, data)
        return Converted(new, changes_of(model, new, words, data))
