"""Cross-layer sharing: neighbouring attention layers read one set of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from contextlab.convert.base import Change, Conversion, Converted, module_nbytes
from contextlab.convert.calibration import Calibration
from contextlab.convert.mixing import LayerChoice, attention_of, choose, rebuilt, with_layers
from contextlab.convert.students import mixer_of
from contextlab.convert.teacher import Distil
from contextlab.convert.transfer import Stage
from contextlab.errors import InputError
from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model
from contextlab.registry import register


@register("conversion", "share_kv", family="kv", papers=("2405.12981", "2405.05254"), cases=({}, {"layers": [0, 1, 2]}))
@dataclass(frozen=True)
class ShareKv(Conversion):
    """Of each group of attention layers the first makes the keys and values of all (CLA), merged from their own.

    Its projections of keys and values become the mean of the group's, each taken behind its own norm's gains, so that
    they may stand behind the first layer's. Exact only where these are equal and the layers read the same vectors; else
    a training must follow (`contextlab convert` with a budget). The state shrinks by the group's size.

    every: layers that share.
    layers: which attention layers: "all", "half" or numbers such as "0,1"; between those of a group no other attention
        may stand.
    """

    takes: ClassVar[tuple[str, ...] | None] = ("attention",)
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    stages: ClassVar[tuple[Stage, ...]] = (Stage("logits", Distil(logits=1.0)),)

    apart: ClassVar[bool] = False
    """Whether one layer alone can be converted."""

    every: Annotated[int, Field(ge=2)] = 2
    layers: LayerChoice = "all"

    def groups(self, spec: ModelSpec) -> list[list[int]]:
        """The layers that share, in groups of `every`, the rest of the division in one of fewer."""
        found = choose(spec, self.layers, kinds=("attention",))
        if self.every > len(found) > 1:
            raise InputError(f"share_kv: every {self.every} is more than the {len(found)} layers that can share")
        groups = [found[i : i + self.every] for i in range(0, len(found), self.every)]
        if max(map(len, groups)) < 2:
            raise InputError(f"share_kv: only layer {found[0]} can share; expected two attention layers or more")
        return groups

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Conversion.plan`."""
        changes, wanted = {}, list(range(spec.depth))
        for group in self.groups(spec):
            first = attention_of(spec, group[0])
            for i in group:
                old, layer = attention_of(spec, i), spec.pattern()[i]
                if old.conv is not None:
                    raise InputError(f"share_kv: layer {i} has short_conv, behind which keys cannot be shared")
                if (old.kv_heads, old.head_dim) != (first.kv_heads, first.head_dim):
                    raise InputError(f"share_kv: layers {group[0]} and {i} have keys of other shapes")
                if i != group[0]:
                    changes[i] = layer.model_copy(update={"kv": "shared"})
                    wanted[i] = group[0]
        planned = with_layers(spec, changes)
        for i, source in enumerate(planned.sources()):
            if source != wanted[i]:
                raise InputError(
                    f"share_kv: layer {i} would read the keys of layer {source}, not of {wanted[i]}; choose layers "
                    "with no other attention between them"
                )
        return planned

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`; the error of a line is ||W' - W|| / ||W|| of the layer's keys and values."""
        groups = self.groups(model.spec)
        layers = [i for group in groups for i in group]
        new = rebuilt(model, self.plan(model.spec), layers, generator)
        lines = []
        for group in groups:
            first, own = model.blocks[group[0]], new.blocks[group[0]].mixer
            mixers = [_attention(model, i) for i in group]
            assert isinstance(own, AttentionMixer)
            weights = own.state_dict()
            kv = [_behind(model, i, group[0]) for i in group]
            merged = torch.stack(kv).mean(0)
            for name, tensor in first.mixer.state_dict().items():  # type: ignore[union-attr]
                weights[name].copy_(tensor)
            queries = own.heads * own.head_dim
            weights["qkv_proj.weight"][queries:] = merged
            for name in ("qkv_proj.bias", "k_norm.weight"):
                if name in weights:
                    part = slice(queries, None) if name == "qkv_proj.bias" else slice(None)
                    mean = torch.stack([mixer.state_dict()[name][part] for mixer in mixers]).mean(0)
                    weights[name][part] = mean
            for i, mixer in zip(group[1:], mixers[1:], strict=True):
                theirs = mixer.state_dict()
                for name, tensor in new.blocks[i].mixer.state_dict().items():  # type: ignore[union-attr]
                    tensor.copy_(theirs[name][: len(tensor)] if name.startswith("qkv_proj.") else theirs[name])
            lines += _lines(model, new, group, kv, merged)
        return Converted(new, lines)


def _lines(model: Model, new: Model, group: Sequence[int], kv: Sequence[Tensor], merged: Tensor) -> list[Change]:
    found = []
    for i, own in zip(group, kv, strict=True):
        error = float((own - merged).norm() / own.norm().clamp_min(1e-30))
        did = (
            f"keys and values for layers {', '.join(map(str, group))}"
            if i == group[0]
            else f"reads those of {group[0]}"
        )
        before, after = (module_nbytes(mixer_of(each, i)) for each in (model, new))
        found.append(
            Change(f"blocks.{i}.mixer", did if len(group) > 1 else "as it was", error, "weights", before, after)
        )
    return found


def _behind(model: Model, layer: int, first: int) -> Tensor:
    """A layer's rows of keys and values [2 Hkv d, D], for inputs behind the norm of the layer `first`."""
    mixer = _attention(model, layer)
    rows = mixer.qkv_proj.weight[mixer.heads * mixer.head_dim :]
    gains = [getattr(model.blocks[i].mixer_norm, "weight", None) for i in (layer, first)]
    if layer == first or not all(isinstance(gain, Tensor) for gain in gains):
        return rows
    own, other = gains
    assert isinstance(own, Tensor)
    assert isinstance(other, Tensor)
    return rows * torch.where(other.abs() > 1e-6, own / other, 1.0)


def _attention(model: Model, layer: int) -> AttentionMixer:
    mixer = model.blocks[layer].mixer
    assert isinstance(mixer, AttentionMixer)
    return mixer
