"""Attention to any mixer that can take its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from contextlab.convert.linearize.base import Replacement
from contextlab.convert.linearize.carry import check_mixer
from contextlab.registry import register


@register(
    "conversion",
    "linearize",
    family="linearize",
    papers=("2410.10254",),
    cases=(
        {"mixer": "gated_delta_net", "layers": "half"},
        {"mixer": "kda", "mixer_options": {"short_conv": 2}},
        {"mixer": "gla"},
        {"mixer": "retention"},
        {"mixer": "delta_net", "layers": [0]},
    ),
)
@dataclass(frozen=True)
class Linearize(Replacement):
    """Attention layers become another mixer with their queries, keys, values and output projection.

    Then the new mixers learn to give the outputs of the attention on the teacher's inputs, and the whole model to give
    the teacher's predictions. Positions, biases, normed queries and output gates of the attention are left behind, and
    each line of the report says which.

    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    mixer: its registered name; known to take queries, keys and values are the keys of `carry.TARGETS`; any other causal
        mixer takes the tensors that it has in the same name and shape, at least two.
    mixer_options: of the mixer, beside those that the weights ask for.
    """

    mixer: str = "gated_delta_net"
    mixer_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mixer(self.mixer, self.mixer_options)

    def target(self) -> tuple[str, Mapping[str, Any]]:
        """See `Replacement.target`."""
        return self.mixer, self.mixer_options
