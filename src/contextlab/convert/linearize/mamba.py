"""Attention to Mamba-2: MOHAWK and Mamba-in-Llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from contextlab.convert.linearize.base import DISTIL, MATRIX, TRANSFER, Replacement
from contextlab.convert.teacher import Distil
from contextlab.convert.transfer import Stage
from contextlab.registry import register


@register("conversion", "mohawk", family="linearize", papers=("2408.10189",), cases=({}, {"layers": "half"}))
@dataclass(frozen=True)
class Mohawk(Replacement):
    """MOHAWK: attention to Mamba-2 in three stages, from the inside out: mixing matrices, outputs, predictions.

    C, B and x start as the teacher's queries, keys and values. First the matrices by which heads mix tokens are
    matched, then what the layers give, both on the teacher's own inputs, then its predictions. In the paper the second
    stage compares whole blocks, MLPs with them; the convolution starts as the identity there, as here, and the gate at
    one, which is drawn here.

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    """

    stages: ClassVar[tuple[Stage, ...]] = (MATRIX, TRANSFER, DISTIL)

    def target(self) -> tuple[str, Mapping[str, Any]]:
        """See `Replacement.target`."""
        return "mamba2", {}


@register("conversion", "mamba_in_llama", family="linearize", papers=("2408.15237",), cases=({}, {"layers": "half"}))
@dataclass(frozen=True)
class MambaInLlama(Replacement):
    """Mamba-in-Llama: attention to Mamba-2, trained on the teacher's predictions and the task together.

    C, B and x start as the teacher's queries, keys and values. Left out: replacing layers step by step, answers that
    the teacher writes, and preference optimisation. The paper freezes the MLPs; here all parameters are trained.

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    """

    stages: ClassVar[tuple[Stage, ...]] = (Stage("logits", Distil(logits=1.0, task=0.1)),)

    def target(self) -> tuple[str, Mapping[str, Any]]:
        """See `Replacement.target`."""
        return "mamba2", {}
