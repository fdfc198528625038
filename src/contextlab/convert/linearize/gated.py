"""Attention to gated recurrences: Liger and RADLADS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import nn

from contextlab.convert.linearize.base import DISTIL, FINISH, TRANSFER, Replacement
from contextlab.convert.linearize.carry import heads_of
from contextlab.convert.mixing import attention_of
from contextlab.convert.transfer import Stage
from contextlab.errors import InputError, nearest_divisor
from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.models.spec import ModelSpec
from contextlab.registry import register


@register(
    "conversion",
    "liger",
    family="linearize",
    papers=("2503.01496",),
    cases=({"gate_rank": 4}, {"gate_rank": 8, "layers": [0]}),
)
@dataclass(frozen=True)
class Liger(Replacement):
    """Liger: gated linear attention whose decays are pooled from the teacher's keys, so that no weight of them is new.

    A decay is sigmoid(pooled key)^(1 / 16): the key's projection is averaged over neighbouring channels down to
    `gate_rank` values, which are spread over the channels again. Then the model is finetuned on the task. Left out: the
    softmax window that the paper adds to each layer at equal parts, softmax features of q and k, and LoRA (all
    parameters are trained). `gla` also has a normalised and gated output, which is new.

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    gate_rank: values that the keys are pooled to, a divisor of heads x head_dim.
    """

    stages: ClassVar[tuple[Stage, ...]] = (FINISH,)

    gate_rank: PositiveInt = 16

    def target(self) -> tuple[str, Mapping[str, Any]]:
        """See `Replacement.target`."""
        return "gla", {"gate_rank": self.gate_rank}

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Conversion.plan`."""
        for i in self.changed(spec):
            old = attention_of(spec, i)
            size = old.heads * old.head_dim
            if size % self.gate_rank:
                fits = nearest_divisor(size, self.gate_rank)
                raise InputError(
                    f"gate_rank {self.gate_rank} does not divide the keys' {size} channels; the nearest is {fits}"
                )
        return super().plan(spec)

    @torch.no_grad()
    def begin(self, old: AttentionMixer, new: nn.Module) -> str:
        """See `Replacement.begin`: the rows that make the decays, and their spread over the channels."""
        keys = heads_of(old, old.qkv_proj.weight)["k"]
        weights = new.state_dict()
        weights["in_proj.weight"][-self.gate_rank :] = keys.unflatten(0, (self.gate_rank, -1)).mean(1)
        each = len(keys) // self.gate_rank
        spread = torch.eye(self.gate_rank).repeat_interleave(each, 0)
        weights["decay_proj.weight"].copy_(spread)
        weights["decay_proj.bias"].zero_()
        return f"decays pooled from {each} key channels each"


@register(
    "conversion", "radlads", family="linearize", papers=("2505.03005", "2501.15570"), cases=({}, {"layers": "half"})
)
@dataclass(frozen=True)
class Radlads(Replacement):
    """RADLADS: attention to RWKV-7, by attention transfer and then the teacher's predictions.

    r, k and v are carried and made of the token itself, not of the one before (the token shift is new and starts at
    none). Left out: the third stage, on longer texts, and RAD-RWKV7's own changes of the layer (rotary positions kept,
    no bonus).

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    """

    stages: ClassVar[tuple[Stage, ...]] = (TRANSFER, DISTIL)

    def target(self) -> tuple[str, Mapping[str, Any]]:
        """See `Replacement.target`."""
        return "rwkv7", {}
