"""Rounding by torchao, whose whole numbers become those of our own form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from contextlab.convert.bits.base import Bits, ToForm
from contextlab.convert.layers import planned_layers
from contextlab.errors import InputError, ResourceError, nearest_divisor
from contextlab.lazy import without_logs
from contextlab.mixers.forms.integer import Integers
from contextlab.models import ModelSpec
from contextlab.registry import register


@register("conversion", "torchao", family="bits", papers=("2206.01861",), cases=())
@dataclass(frozen=True)
class TorchAo(ToForm):
    """Weights of 8, 4 or 2 bits as torchao rounds them (`pip install 'contextlab[torchao]'`), in our form `int`.

    torchao's `IntxWeightOnlyConfig` gives the codes and scales, symmetric; of 8 bits a row they are those of its
    `Int8WeightOnlyConfig` and `Int8DynamicActivationInt8WeightConfig`. Its tensors are not kept: they are pickled where
    they are saved, and take a byte for each number of fewer bits, too. The form holds the same codes and scales, really
    packed, and computes with the same numbers. `rtn` differs in the scale: it is a group's largest size over 128 with
    its sign, here over 127.5.

    bits: of a number.
    group: neighbouring inputs that share one scale, a divisor of all layers' inputs; null is a scale for each output.
    activations: 8 rounds each token's inputs, too (int8 dynamic), with its largest size over 127 for scale, for
        torchao's over 127.5.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    """

    bits: Bits = 8
    group: PositiveInt | None = None
    activations: Literal[8] | None = None

    @property
    def grouped(self) -> int | None:
        """See `ToForm.grouped`."""
        return self.group

    def form(self) -> tuple[str, dict[str, Any]]:
        """See `ToForm.form`."""
        own = {"bits": self.bits, "group": self.group, "zero": False}
        return "int", own if self.activations is None else {**own, "activations": self.activations}

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `ToForm.plan`. Raises ResourceError without torchao, InputError for a group that divides no layer."""
        _quantization()
        layers = planned_layers(spec, self.layers)
        for name, layer in layers.items():
            if self.group is not None and layer.in_features % self.group:
                fits = nearest_divisor(math.gcd(*(each.in_features for each in layers.values())), self.group)
                raise InputError(
                    f"torchao: group {self.group} does not divide the {layer.in_features} inputs of {name}; {fits} is "
                    "the nearest that divides those of all layers; rtn takes groups that end unevenly"
                )
        return super().plan(spec)

    def fill(self, form: Integers, weight: Tensor, moment: Tensor | None) -> None:
        """See `ToForm.fill`."""
        codes, scale = rounded(weight, self.bits, self.group)
        form.store({"codes": codes, "scale": scale})


def rounded(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """torchao's codes int8 [O, I] and scales [O, groups] of a weight [O, I]; of float64 those of its float32."""
    ao = _quantization()
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().float())
    fine = ao.PerAxis(0) if group is None else ao.PerGroup(group)
    ao.quantize_(layer, ao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=fine))
    made: Any = layer.weight
    return made.qdata, made.scale.view(outputs, -1).to(weight.dtype)


def _quantization() -> Any:
    """torchao's module of that name."""
    try:
        with without_logs():
            from torchao import quantization
    except ImportError:
        raise ResourceError("torchao: needs the package torchao; pip install 'contextlab[torchao]'") from None
    return quantization
