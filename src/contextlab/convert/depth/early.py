"""Models that answer before their last block: all tokens after the same one, or each as soon as the model is sure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes
from contextlab.convert.calibration import Calibration
from contextlab.convert.depth.blocks import of_blocks, of_layers
from contextlab.errors import InputError
from contextlab.models import ExitSpec, Model, ModelSpec
from contextlab.models.stack import Within
from contextlab.registry import register


@register("conversion", "exit_at", family="depth", papers=("2404.16710",), cases=({}, {"blocks": 1}))
@dataclass(frozen=True)
class ExitAt(Conversion):
    """The model answers after its first blocks, by its own read-out: those above are dropped (LayerSkip, 2404.16710).

    It serves a model that was trained or healed to answer early (`layer_skip` of a training); any other loses much.

    blocks: that are left; None: half of them, rounded up.
    """

    nothing: ClassVar[Mapping[str, Any] | None] = {"blocks": 3}

    blocks: PositiveInt | None = None

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """With the first blocks alone. Raises InputError where there are not so many."""
        left = self._left(spec)
        if left > spec.depth:
            raise InputError(f"blocks: the model has {spec.depth}, got {left}")
        return of_layers(spec, spec.pattern()[:left])

    def _left(self, spec: ModelSpec) -> int:
        return -(-spec.depth // 2) if self.blocks is None else self.blocks

    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        planned = self.plan(model.spec)
        made = of_blocks(model, planned, range(planned.depth))
        gone = range(planned.depth, model.spec.depth)
        lines = [Change(f"blocks.{i}", "dropped", 1.0, "weights", module_nbytes(model.blocks[i]), 0) for i in gone]
        return Converted(made, lines)


@register(
    "conversion",
    "calm",
    family="depth",
    papers=("2207.07061",),
    cases=({}, {"by": "saturation", "threshold": 0.6, "first": 2, "decay": 4.0, "length": 30}),
)
@dataclass(frozen=True)
class Calm(Conversion):
    """Each token leaves the stack as soon as the model is sure of its prediction (CALM, 2207.07061); see `ExitSpec`.

    Weights stay as they are, and so does the size of the state. The line tells how many layers a token of the data goes
    through in the mean, and its error is the share of the scored predictions that are no longer the whole model's: of
    logits the likeliest; of vectors ||y - y'|| / ||y||. In the paper the model was trained to answer after each layer
    (`layer_skip` of a training does that), and a test that bounds such errors sets the threshold; here it is given.

    by: how sure the model is: the "softmax" response, or "saturation" of the hidden vector.
    threshold: above which a token leaves; at 1 none does.
    first: layers that each token goes through at least.
    decay: how fast the threshold falls along a text of `length` tokens; None: not at all.
    length: tokens over which it falls.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    nothing: ClassVar[Mapping[str, Any] | None] = {"threshold": 1.0}

    by: Literal["softmax", "saturation"] = "softmax"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    first: PositiveInt = 1
    decay: NonNegativeFloat | None = None
    length: PositiveInt | None = None

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """With early exits. Raises InputError where a model cannot have them."""
        rule = ExitSpec(
            by=self.by, threshold=self.threshold, first=self.first, decay=self.decay, length=self.length
        )  # fmt: skip
        return ModelSpec.parse({**spec.model_dump(), "exit": rule.model_dump()})

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        assert data is not None
        made = copied(model)
        made.spec = self.plan(model.spec)
        mean, error = early_answers(model, made, data)
        layers, size = model.spec.depth * model.spec.loops, module_nbytes(model.blocks)
        did = f"a token goes through {mean:.2f} of {layers} layers"
        return Converted(made, [Change("blocks", did, error, "answers", size, size)])


@torch.no_grad()
def early_answers(model: Model, early: Model, data: Calibration) -> tuple[float, float]:
    """Layers that a token goes through in the mean, and what share of the scored answers differs from the model's."""
    layers = tokens = 0
    differ = of = 0.0
    for prompt, _ in data.on(model):
        used: list[torch.Tensor] = []
        answers, whole = (
            early(prompt.inputs, within=Within(used=used))[prompt.scored],
            model(prompt.inputs)[prompt.scored],
        )
        count = prompt.batch * prompt.length
        layers += int(used[0].sum()) if used else count * early.spec.depth * early.spec.loops
        tokens += count
        if model.spec.read_in == "token":
            differ += float((answers.argmax(-1) != whole.argmax(-1)).sum())
            of += len(whole)
        else:
            differ += float((answers - whole).double().square().sum())
            of += float(whole.double().square().sum())
    share = differ / of if of > 0 else float(differ > 0)
    return layers / max(1, tokens), share if model.spec.read_in == "token" else share**0.5
