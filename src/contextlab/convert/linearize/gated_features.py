"""Attention to gated linear attention of learned features, without rotary positions: Lizard and LAWCAT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import NonNegativeInt, PositiveInt

from contextlab.convert.linearize.base import ADAPT, Replacement
from contextlab.convert.teacher import Distil
from contextlab.convert.transfer import Stage
from contextlab.registry import register
from contextlab.training.spec import LoraSpec


@register(
    "conversion",
    "lizard",
    family="linearize",
    papers=("2507.09025",),
    cases=({"window": 4}, {"window": 3, "meta_tokens": 0, "gate_bias": 4.0, "layers": "half"}),
)
@dataclass(frozen=True)
class LizardConversion(Replacement):
    """Lizard: gated linear attention in place of rotary positions, and a softmax window with meta tokens; then LoRA.

    Grouped heads, biases and normed queries are kept; positions are left behind, whatever they were, and the gate
    learns to tell near from far. First feature maps, gate, meta tokens and the window's part alone learn to give the
    attention's outputs, then adapters of rank 8 on q, k and v learn the task; they are merged at the end. What the
    layer has that the paper leaves open, `contextlab show mixer lizard` says. Attention is compared behind the output
    projection, which is fitted first by least squares; the paper does neither. Learning rates are those of `lolcats`.

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    window: tokens that are compared by softmax.
    meta_tokens: learned scores beside those of the window.
    gate_bias: what a learned bias of the gate starts from, such as 4 for slow forgetting; None for none, as in the
        paper, where each token halves what was read before, until the gate has learned.
    """

    stages: ClassVar[tuple[Stage, ...]] = (
        Stage(
            "attention", Distil(attention=1.0), trains="new", learning_rate=1e-2,
            only=("feature.*", "decay_proj.*", "meta", "alpha"),
        ),
        Stage(
            "task", Distil(task=1.0), trains="lora", learning_rate=3e-3,
            lora=LoraSpec(rank=8, targets=("blocks.*.mixer.qkv_proj",)),
        ),
    )  # fmt: skip

    window: PositiveInt = 128
    meta_tokens: NonNegativeInt = 4
    gate_bias: float | None = None

    def target(self) -> tuple[str, Mapping[str, Any]]:
        """See `Replacement.target`."""
        return "lizard", {"window": self.window, "meta_tokens": self.meta_tokens, "gate_bias": self.gate_bias}


@register(
    "conversion",
    "lawcat",
    family="linearize",
    papers=("2509.18467",),
    cases=({}, {"short_conv": 2, "layers": "half"}),
)
@dataclass(frozen=True)
class LawcatConversion(Replacement):
    """LAWCAT: normalised gated linear attention of convolved queries and keys; then LoRA.

    Grouped heads, biases and normed queries are kept, rotary positions are left behind. First feature maps, decays and
    convolutions alone learn to give the attention's outputs, then adapters of rank 8 on q, k, v and the output
    projection learn the task; they are merged at the end. The convolutions start as the teacher's or pass each token
    on; in the public code each token before has a thousandth, and v is not convolved. Attention is compared behind
    the output projection, which is fitted first by least squares; the paper does neither. How the layer differs from
    the code, `contextlab show mixer lawcat` says.

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    short_conv: tokens that the convolution reads, at least as many as the teacher's.
    """

    stages: ClassVar[tuple[Stage, ...]] = (
        Stage(
            "attention", Distil(attention=1.0), trains="new", learning_rate=1e-2,
            only=("feature.*", "decay_in.*", "decay_out.*", "conv.*"),
        ),
        ADAPT,
    )  # fmt: skip

    short_conv: PositiveInt = 4

    def target(self) -> tuple[str, Mapping[str, Any]]:
        """See `Replacement.target`."""
        return "lawcat", {"short_conv": self.short_conv}
