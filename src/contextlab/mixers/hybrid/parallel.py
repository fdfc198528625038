"""Mixers side by side in one layer: every token goes through all of them, and their answers are joined."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from contextlab import registry
from contextlab.errors import InputError
from contextlab.mixers.base import Mixer
from contextlab.mixers.layers import RMSNorm
from contextlab.registry import register
from contextlab.state import StackState, State


@dataclass
class Member:
    """One of the mixers: a registered name and its options. A plain name stands for `{mixer: name}`."""

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)


@register(
    "mixer",
    "parallel",
    family="hybrid",
    papers=("2411.13676", "2410.12850", "2501.00663"),
    cases=(
        {"mixers": ["attention", "mamba2"]},
        {"mixers": ["sliding_window", {"mixer": "gated_delta_net", "options": {"short_conv": 0}}], "combine": "gate"},
        {"mixers": [{"mixer": "attention", "options": {"head_dim": 4}}, "mamba", "gla"], "combine": "sum"},
    ),
)
class Parallel(Mixer):
    """Several mixers on the same input, their outputs joined: hybrid heads within one layer.

    mean: the average of the RMS-normalised outputs, each with a learned gain (Hymba, 2411.13676).
    sum: their plain sum; with output projections that is the same as to concatenate the mixers' heads, some of them
        recurrent (RecurFormer, 2410.12850).
    gate: the RMS-normalised outputs multiplied, all but the first through a sigmoid (memory as a gate of the Titans,
        2501.00663).

    width: size of a token's vector.
    mixers: two or more causal mixers, as names or {mixer, options}.
    combine: how the outputs are joined.
    heads: heads of every member that has heads, unless its options say otherwise.
    position: for every member that knows relative positions.
    """

    parallel_form = "its members'"

    def __init__(
        self,
        width: PositiveInt,
        mixers: Annotated[list[Member | str], Field(min_length=2)],
        combine: Literal["mean", "sum", "gate"] = "mean",
        heads: PositiveInt = 4,
        position: Literal["rope", "alibi", "none"] = "rope",
    ) -> None:
        super().__init__(width)
        self.combine = combine
        members = []
        for member in mixers:
            member = Member(member) if isinstance(member, str) else member
            entry = registry.lookup("mixer", member.mixer)
            if not entry.factory.causal:  # type: ignore[attr-defined]
                raise InputError(
                    f"mixers: {member.mixer!r} reads both ways; name causal mixers, for example 'attention'"
                )
            if entry.factory.reads_tokens:  # type: ignore[attr-defined]
                raise InputError(f"mixers: {member.mixer!r} reads token ids; make it a layer of its own")
            known = {p.name for p in entry.parameters}
            defaults: dict[str, Any] = {"heads": heads} if "heads" in known and "head_dim" not in member.options else {}
            if "position" in known:
                defaults["position"] = position
            entry.check(member.options, path=f"mixers.{member.mixer}", given=("width",))
            members.append(entry.build(width=width, **{**defaults, **member.options}))
        self.members = nn.ModuleList(members)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in members) if combine != "sum" else None

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        befores = state.layers if isinstance(state, StackState) else [None] * len(self.members)
        read = [member(x, before, mask, keep_state) for member, before in zip(self.members, befores, strict=True)]
        outputs = [y for y, _ in read]
        if self.norms is not None:
            outputs = [norm(y) for norm, y in zip(self.norms, outputs, strict=True)]
        y = outputs[0]
        for other in outputs[1:]:
            y = y * other.sigmoid() if self.combine == "gate" else y + other
        if self.combine == "mean":
            y = y / len(outputs)
        if not keep_state:
            return y, None
        length = x.shape[1] + (0 if state is None else state.length)
        return y, StackState([after for _, after in read], length=length)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: that of all members."""
        return sum(member.state_nbytes(length, batch, dtype) for member in self.members)  # type: ignore[operator]

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        return sum(member.flops(length) for member in self.members)  # type: ignore[operator]
