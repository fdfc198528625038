"""Attention to linear layers that keep its rotary positions: LoLCATs and SUPRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import PositiveInt

from contextlab.convert.linearize.base import ADAPT, FINISH, Replacement
from contextlab.convert.mixing import attention_of
from contextlab.convert.teacher import Distil
from contextlab.convert.transfer import Stage
from contextlab.errors import InputError
from contextlab.models.spec import ModelSpec
from contextlab.registry import register


@register(
    "conversion",
    "lolcats",
    family="linearize",
    papers=("2410.10254", "2402.04347"),
    cases=({"window": 4}, {"window": 3, "layers": "half"}),
)
@dataclass(frozen=True)
class Lolcats(Replacement):
    """LoLCATs: softmax attention in a window and linear attention before it, under one sum; then LoRA.

    All of the attention is kept: rotary positions, grouped heads, biases, normed queries. First the feature maps and
    the shares of the windows alone learn to give its outputs, then adapters of rank 8 on q, k, v and the output
    projection learn the task; they are merged at the end. Output projections are fitted first by least squares, which
    the paper does not do. Before anything is fitted or trained, a text no longer than the window is answered as before.
    Left out: the transfer of blocks of layers apart (the paper's, for its largest model), and its cross-entropy of
    attention weights, which it weighs with 0. Attention is compared behind the output projection, not before it.

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    window: tokens that are compared by softmax.
    """

    stages: ClassVar[tuple[Stage, ...]] = (
        Stage("attention", Distil(attention=1.0), trains="new", learning_rate=1e-2, only=("feature.*", "share")),
        ADAPT,
    )

    window: PositiveInt = 64

    def target(self) -> tuple[str, Mapping[str, Any]]:
        """See `Replacement.target`."""
        return "window_linear", {"window": self.window}

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Conversion.plan`."""
        for i in self.changed(spec):
            position = attention_of(spec, i).position
            if position not in ("rope", "none"):
                raise InputError(f"lolcats: layer {i} has the positions {position!r}; expected rope or none")
        return super().plan(spec)


@register("conversion", "supra", family="linearize", papers=("2405.06640",), cases=({}, {"layers": "half"}))
@dataclass(frozen=True)
class SupraConversion(Replacement):
    """SUPRA: linear attention with rotary positions kept, a decay per head and a group norm, trained on the task.

    The features are relu of the carried queries and keys; in the paper relu(W q + b) with new W and b, of which W is
    part of the projection here and b is left out. Output projections are fitted first by least squares, which the paper
    does not do.

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    """

    stages: ClassVar[tuple[Stage, ...]] = (FINISH,)

    def target(self) -> tuple[str, Mapping[str, Any]]:
        """See `Replacement.target`."""
        return "supra", {}
