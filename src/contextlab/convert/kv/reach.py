"""Longer reach by frequencies that are found: LongRoPE's search on text, and CLEX's learned ODE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from contextlab.convert.base import Converted
from contextlab.convert.calibration import Calibration
from contextlab.convert.kv.factor_search import PLAIN, Candidate, search, starts
from contextlab.convert.kv.options import Reoptioned, require_rope
from contextlab.convert.mixing import attention_of, changes_of, with_layers
from contextlab.convert.teacher import Distil
from contextlab.convert.transfer import Stage
from contextlab.errors import InputError
from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model
from contextlab.ops.position import RopeScaling
from contextlab.registry import register


@dataclass(frozen=True)
class Extended(Reoptioned):
    """Base of longer reach that starts from plain rotary positions. original_length: tokens of the training."""

    original_length: PositiveInt | None = None

    def trained(self) -> int:
        """The tokens of the training. Raises InputError where they are not told."""
        if self.original_length is None:
            raise InputError(f"original_length: {self.name} needs the tokens of the training, for example 8192")
        return self.original_length


@register(
    "conversion",
    "longrope",
    family="kv",
    papers=("2402.13753",),
    cases=(
        {"factor": 2.0, "original_length": 12, "trials": 12},
        {"factor": 4.0, "original_length": 8, "trials": 9, "layers": [0, 2], "plain_tokens": "search"},
    ),
)
@dataclass(frozen=True)
class LongRope(Extended):
    """Rotary positions for longer contexts whose frequencies an evolutionary search divides, each by its own factor.

    The search starts from position interpolation, NTK-aware scaling and YaRN, and keeps the factors with the least loss
    on the data, which must be longer than the training was: the best give others by mutation and by crossing
    (2402.13753, algorithm 1). Factors are between 1 and 1.25 times `factor` and never fall from the frequencies that
    turn fastest to those that turn slowest. The attention temperature is one of those published (none, YaRN's,
    LongRoPE's, see `ops.RopeScaling`), and searched, too. All layers have the same factors. On the data the result is
    never worse than any of the three it starts from.

    Other than in the paper: mutated factors stay between their neighbours, and crossed ones are raised where they fall,
    where there such candidates are thrown away; no first tokens keep their plain angles unless `plain_tokens` says so,
    as the models of transformers have none; nothing is trained in between. Training-free; `contextlab convert
    --budget` trains on.

    factor: new length over that of the training; 1 changes nothing.
    original_length: tokens of the training.
    trials: how many candidates are measured, the three of the start among them; at most 5,000.
    plain_tokens: first tokens of each sequence that keep their plain angles (see `ops.RopeScaling`): a number, or
        "search" for the paper's (0 to 256, those below the training's length) with the factors.
    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    nothing: ClassVar[Mapping[str, Any] | None] = {"factor": 1.0, "original_length": 12}
    by_data: ClassVar[tuple[str, ...]] = ("rope_scaling",)
    apart: ClassVar[bool] = False
    stages: ClassVar[tuple[Stage, ...]] = (Stage("task", Distil(task=1.0), learning_rate=3e-4),)

    factor: PositiveFloat = 4.0
    trials: Annotated[int, Field(ge=1, le=5_000)] = 64
    plain_tokens: NonNegativeInt | Literal["search"] = 0

    def become(self, old: AttentionMixer, layer: int) -> tuple[str, dict[str, Any]]:
        """See `Reoptioned.become`; the factors are YaRN's until the data have been read."""
        known = require_rope(self.name, old, layer, self.factor)
        first = starts(old.rotary, old.rope_base, self.factor, self.trained(), self._plain()[0])[-1]
        return known, {"rope_scaling": self._scaling(first)}

    def _plain(self) -> tuple[int, ...]:
        """How many first tokens may keep plain angles. Raises InputError where the training had no more."""
        if self.plain_tokens == "search":
            return tuple(each for each in PLAIN if each < self.trained())
        if self.plain_tokens >= self.trained():
            raise InputError(
                f"plain_tokens: {self.plain_tokens} are all {self.trained()} of the training; expected fewer, such as 4"
            )
        return (self.plain_tokens,)

    def _scaling(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "kind": "longrope", "factor": self.factor, "factors": list(candidate.factors),
            "original_length": self.trained(), "sharpen": candidate.sharpen,
            **({"plain_tokens": candidate.plain} if candidate.plain else {}),
        }  # fmt: skip

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Conversion.plan`."""
        self._plain()
        layers = self.changed(spec, None)
        turns = {(each.rotary, each.rope_base) for each in (attention_of(spec, i) for i in layers)}
        if len(turns) > 1:
            raise InputError(f"{self.name}: layers turn by other frequencies; choose layers that are alike")
        return super().plan(spec)

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        assert data is not None
        if self.factor > 1 and max(prompt.length for prompt, _ in data.batches) <= self.trained():
            raise InputError(
                f"{self.name}: no prompt of the data is longer than the {self.trained()} tokens of the training; give "
                "longer ones, or another original_length"
            )
        new = super().apply(model, None, generator).model
        layers = self.changed(model, data)
        mixers: list[Any] = [new.blocks[i].mixer for i in layers]

        def loss(candidate: Candidate) -> float:
            scaling = RopeScaling.parse(self._scaling(candidate), "rope_scaling")
            for mixer in mixers:
                mixer.rope_scaling = scaling
            return data.loss(new)

        rotary = mixers[0].rotary, mixers[0].rope_base
        found = search(loss, *rotary, self.factor, self.trained(), self.trials, generator, self._plain())
        loss(found.best)  # leaves its scaling in the mixers
        changes = {}
        for i in layers:
            layer = new.spec.pattern()[i]
            options = {**layer.options, "rope_scaling": self._scaling(found.best)}
            changes[i] = layer.model_copy(update={"options": options})
        new.spec = with_layers(new.spec, changes)
        words = dict.fromkeys(layers, found.words())
        return Converted(new, changes_of(model, new, words, data))


@register(
    "conversion",
    "clex",
    family="kv",
    papers=("2310.16450",),
    cases=({"original_length": 12, "factor": 2}, {"original_length": 7, "factor": 4, "layers": [1]}),
)
@dataclass(frozen=True)
class Clex(Extended):
    """Rotary positions whose frequencies follow a learned ODE in the length read: to the mixer `clex_attention`.

    Within the length of the training it answers as before, and beyond it by NTK-aware frequencies of the length that
    is read, until it is trained: then each sequence draws a factor, so that texts of the old length teach the
    frequencies of longer ones. As in the paper all parameters are trained.

    factor: longest length over that of the training, a whole number.
    original_length: tokens of the training.
    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    nothing: ClassVar[Mapping[str, Any] | None] = {"original_length": 32}
    stages: ClassVar[tuple[Stage, ...]] = (Stage("task", Distil(task=1.0), learning_rate=3e-4),)

    factor: PositiveInt = 4

    def become(self, old: AttentionMixer, layer: int) -> tuple[str, dict[str, Any]]:
        """See `Reoptioned.become`."""
        if require_rope(self.name, old, layer) != "attention":
            raise InputError(f"{self.name}: layer {layer} has a window, and clex_attention has none")
        options = {"original_length": self.trained(), "max_factor": self.factor, "sample": True}
        return "clex_attention", options

    def words(self, data: Calibration | None) -> str:
        """See `Reoptioned.words`."""
        return f"to clex_attention, up to {self.factor} times {self.trained()} tokens"
