"""Attention to linear attention with a feature map: T2R and Hedgehog."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from contextlab.convert.linearize.base import FINISH, TRANSFER, Replacement
from contextlab.convert.transfer import Stage
from contextlab.registry import register


@register("conversion", "t2r", family="linearize", papers=("2103.13076",), cases=({}, {"layers": "half"}))
@dataclass(frozen=True)
class T2R(Replacement):
    """Transformer to RNN (T2R): linear attention with ReLU features of the carried queries and keys, then finetuned.

    In the paper the features are relu(W q + b), with W of each head new and fewer features than a head has values; W q
    is linear in the token, so that W is here part of the query's and key's projection, which are trained. Left out: b,
    fewer features, and the paper's choice to train on the task from the start of the language model's own training.

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    """

    stages: ClassVar[tuple[Stage, ...]] = (FINISH,)

    def target(self) -> tuple[str, Mapping[str, Any]]:
        """See `Replacement.target`."""
        return "linear_attention", {"feature_map": "relu"}


@register("conversion", "hedgehog", family="linearize", papers=("2402.04347",), cases=({}, {"layers": [1]}))
@dataclass(frozen=True)
class HedgehogConversion(Replacement):
    """Hedgehog: linear attention whose learned feature map softmax(W x), softmax(-W x) first learns from the attention.

    Then the whole model is finetuned on the task. In the paper the map learns the attention's weights, by
    cross-entropy, while all else is frozen; here the new mixer learns the attention's outputs. Rotary positions, which
    the published code keeps before the map, are left behind, as `linear_attention` has none.

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    """

    stages: ClassVar[tuple[Stage, ...]] = (TRANSFER, FINISH)

    def target(self) -> tuple[str, Mapping[str, Any]]:
        """See `Replacement.target`."""
        return "linear_attention", {"feature_map": "hedgehog"}
