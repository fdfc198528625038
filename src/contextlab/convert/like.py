"""A model's attention layers become those of another model, position by position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from contextlab.convert.base import Conversion, Converted
from contextlab.convert.calibration import Calibration
from contextlab.convert.kv.gqa import Gqa
from contextlab.convert.kv.mla import Mla
from contextlab.convert.kv.window import Window
from contextlab.convert.linearize.base import Replacement
from contextlab.convert.linearize.plain import Linearize
from contextlab.convert.mixing import ATTENTION, LayerChoice, attention_of, choose, rebuilt, with_layers
from contextlab.convert.transfer import Stage
from contextlab.errors import InputError
from contextlab.models.spec import LayerSpec, ModelSpec
from contextlab.models.stack import Model

OF_WEIGHTS = ("heads", "head_dim", "position", "rope_base", "rope_fraction", "rope_scaling", "qk_norm", "bias")
"""Options of attention that are those of the weights, whatever the other model's are."""


@dataclass(frozen=True)
class LikeModel(Conversion):
    """Attention layers become what stands at their place in another model; no weights of that are needed.

    Layers of the same mixer stay; attention gets windows, fewer key heads (`gqa`) or latents (`mla`); anything else is
    `linearize`, with the other model's options but those that the weights ask for. Each layer is converted from the old
    model, as if alone. Of the other model nothing else counts: neither its width nor its MLPs.

    target: the other model's spec, of the same depth. layers: which attention layers, "all", "half" or numbers.
    """

    target: ModelSpec = field(default_factory=ModelSpec)
    layers: LayerChoice = "all"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Training, where a layer becomes no attention."""
        mixers = {layer.mixer for layer in self.target.pattern()}
        return frozenset({"training"} if mixers - {*ATTENTION, "mla"} else ())

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those of `linearize`, where a layer becomes no attention."""
        return Replacement.stages if self.needs else ()

    @property
    def options(self) -> dict[str, Any]:
        """What stands at each place."""
        return {"mixers": [layer.mixer for layer in self.target.pattern()], "layers": self.layers}

    @property
    def name(self) -> str:
        """For records and messages."""
        return "like"

    def parts(self, spec: ModelSpec) -> Iterator[tuple[int, Conversion]]:
        """Each layer that changes, and its own conversion. Raises InputError where one cannot."""
        if spec.depth != self.target.depth:
            raise InputError(
                f"to: the other model has {self.target.depth} layers, this one {spec.depth}; give one of the same depth"
            )
        wanted = self.target.pattern()
        differ = [i for i, (old, new) in enumerate(zip(spec.pattern(), wanted, strict=True)) if _differ(old, new)]
        chosen = [i for i in choose(spec, self.layers) if i in differ]
        if self.layers == "all" and (stuck := [i for i in differ if i not in chosen]):
            old, new = spec.pattern()[stuck[0]].mixer, wanted[stuck[0]].mixer
            raise InputError(f"to: layer {stuck[0]} is {old!r} and would have to become {new!r}; only attention can")
        for i in chosen:
            if wanted[i].mixer == "none" or wanted[i].kv == "shared" or wanted[i].share is not None:
                raise InputError(f"to: layer {i} of the other model has no mixer or no keys of its own")
            part = _part(spec, i, wanted[i])
            if wanted[i].mixer == "sliding_window":
                _require_window(spec if part is None else part.plan(spec), self.target, i)
            if part is not None:
                yield i, part

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Conversion.plan`."""
        planned = {i: part.plan(spec).pattern()[i] for i, part in self.parts(spec)}
        if not planned:
            raise InputError("to: the layers are those of the other model already; nothing is to be converted")
        return with_layers(spec, planned)

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        parts = dict(self.parts(model.spec))
        new = rebuilt(model, self.plan(model.spec), parts, generator)
        lines = []
        for i, part in parts.items():
            converted = part(model, data, generator)
            new.blocks[i].mixer.load_state_dict(converted.model.blocks[i].mixer.state_dict())  # type: ignore[union-attr]
            lines += converted.lines
        return Converted(new, lines)


def _differ(old: LayerSpec, new: LayerSpec) -> bool:
    """Whether a layer is to become another mixer, or attention with fewer key heads."""
    return old.mixer != new.mixer or (old.mixer in ATTENTION and old.options != new.options)


def _part(spec: ModelSpec, i: int, wanted: LayerSpec) -> Conversion | None:
    """What makes one layer what stands there in the other model; None where attention stays as it is."""
    old, options = attention_of(spec, i), dict(wanted.options)
    if wanted.mixer == spec.pattern()[i].mixer:  # attention of its own weights
        kv_heads = options.get("kv_heads", old.kv_heads)
        return Gqa(kv_heads=kv_heads, layers=[i]) if kv_heads != old.kv_heads else None
    if wanted.mixer == "sliding_window":
        return Window(layers=[i], window=options.get("window", 64), sinks=options.get("sinks", 0))
    if wanted.mixer == "mla":
        return Mla(layers=[i], rank=options.get("rank"))
    return Linearize(layers=[i], mixer=wanted.mixer, mixer_options=_own(options))


def _require_window(made: ModelSpec, target: ModelSpec, i: int) -> None:
    """Refuse a window that would not be the other model's."""
    sizes = {"input_size": made.input_size, "output_size": made.output_size}  # a recipe's model has those of its task
    own, other = attention_of(made, i), attention_of(target.model_copy(update=sizes), i)
    given = ("kv_heads",) if "kv_heads" in target.pattern()[i].options else ()
    for name in ("window", "sinks", "dilation", *given):
        if (has := getattr(own, name)) != (wanted := getattr(other, name)):
            raise InputError(
                f"to: the window of layer {i} has {name} {wanted} in the other model and would have {has} here; give a "
                f"model whose window has {name} {has} there"
            )


def _own(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in OF_WEIGHTS}
