"""Attention to gated recurrences: Liger and RADLADS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import PositiveInt

from contextlab.convert.linearize.base import ADAPT, DISTIL, TRANSFER, Replacement
from contextlab.convert.transfer import Stage
from contextlab.registry import register


@register(
    "conversion",
    "liger",
    family="linearize",
    papers=("2503.01496",),
    cases=({"window": 4, "gate_rank": 4}, {"window": 5, "layers": [0]}),
)
@dataclass(frozen=True)
class Liger(Replacement):
    """Liger: gated linear attention and a softmax window at equal parts, of the teacher's weights alone; then LoRA.

    A decay is sigmoid(pooled key)^(1 / 16), so that no weight of the layer is new and nothing of the attention is left
    behind: the mixer is `gated_window`. Adapters of rank 8 on q, k, v and the output projection learn the task, and are
    merged at the end. Output projections are fitted first by least squares, which the paper does not do.

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    window: tokens that are compared by softmax.
    gate_rank: values that the keys are pooled to, a divisor of kv_heads x head_dim; None for as many as there are.
    """

    stages: ClassVar[tuple[Stage, ...]] = (ADAPT,)

    window: PositiveInt = 64
    gate_rank: PositiveInt | None = None

    def target(self) -> tuple[str, Mapping[str, Any]]:
        """See `Replacement.target`."""
        return "gated_window", {"window": self.window, "gate_rank": self.gate_rank}


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
