"""Models that answer before their last block: all tokens after the same one, or each as soon as the model is sure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes
from contextlab.convert.calibration import Calibration
from contextlab.convert.depth.blocks import of_blocks, of_layers
from contextlab.convert.depth.risk import fewest, last_bounded
from contextlab.errors import InputError
from contextlab.models import ExitSpec, Model, ModelSpec
from contextlab.models.stack import Within
from contextlab.registry import register

THRESHOLDS = {
    "softmax": tuple((100 - i) / 100 for i in (1, 2, 5, *range(10, 101, 5))),
    "saturation": tuple((1000 - i) / 1000 for i in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500)),
}
"""What `Calm` tries, in order: cosines of vectors before and after a layer crowd near 1."""


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
    (`layer_skip` of a training does that).

    With `risk` the data set the threshold (section 4): the lowest of a list from 1 down, up to which each passes a test
    that prompts like these have a share of other answers of at most `risk` in the mean, so that this holds with
    probability `confidence` over the draw of the data (Learn then Test, 2110.01052; `depth.risk`). The paper's p-value
    is Hoeffding's; here it is the smaller one of Hoeffding and Bentkus. In the paper both models write texts that are
    compared as a whole; here both read the data, and answers are compared place by place, so that it holds for texts as
    the data's. Prompts must be drawn independently, as those of tasks are.

    by: how sure the model is: the "softmax" response, or "saturation" of the hidden vector.
    threshold: above which a token leaves; at 1 none does. None: 0.9, or with `risk` what the data say.
    first: layers that each token goes through at least.
    decay: how fast the threshold falls along a text of `length` tokens; None: not at all.
    length: tokens over which it falls.
    risk: share of a prompt's scored answers that may be others than the whole model's; None bounds nothing.
    confidence: of that bound.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    nothing: ClassVar[Mapping[str, Any] | None] = {"threshold": 1.0}

    by: Literal["softmax", "saturation"] = "softmax"
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    first: PositiveInt = 1
    decay: NonNegativeFloat | None = None
    length: PositiveInt | None = None
    risk: Annotated[float, Field(gt=0, lt=1)] | None = None
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """With early exits, at threshold 1 where the data are to say it. Raises InputError where none can be had."""
        if self.risk is not None and self.threshold is not None:
            raise InputError("threshold: with risk the data set it; leave out one of the two")
        if self.risk is not None and spec.read_in != "token":
            raise InputError("risk: bounds the share of other answers, and a model of vectors has no likeliest answer")
        if self.risk is None and self.confidence != type(self).confidence:
            raise InputError("confidence: of which bound? give risk, for example risk=0.05")
        if self.risk is not None:
            return self._at(spec, 1.0)
        return self._at(spec, 0.9 if self.threshold is None else self.threshold)

    def _at(self, spec: ModelSpec, threshold: float) -> ModelSpec:
        """With early exits at a threshold."""
        rule = ExitSpec(by=self.by, threshold=threshold, first=self.first, decay=self.decay, length=self.length)
        return ModelSpec.parse({**spec.model_dump(), "exit": rule.model_dump()})

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        assert data is not None
        made = copied(model)
        made.spec = self.plan(model.spec)
        bound = "" if self.risk is None else self._bound(model, made, data)
        mean, error = early_answers(model, made, data)
        layers, size = model.spec.depth * model.spec.loops, module_nbytes(model.blocks)
        falls = "" if self.length is None else f"; the threshold falls over {self.length} tokens"
        did = f"a token goes through {mean:.2f} of {layers} layers{falls}{bound}"
        return Converted(made, [Change("blocks", did, error, "answers", size, size)])

    def _bound(self, model: Model, made: Model, data: Calibration) -> str:
        """Set the threshold of `made` to the lowest whose risk is bounded, and say which, and what is known of it."""
        assert self.risk is not None
        whole = [model(prompt.inputs).argmax(-1) for prompt, _ in data.on(model)]
        scored = sum(int(prompt.scored.any(1).sum()) for prompt, _ in data.batches)
        if scored < (least := fewest(self.risk, self.confidence)):
            raise InputError(
                f"risk: {self.risk:g} at confidence {self.confidence:g} takes {least} prompts at least, even where no "
                f"answer is another, and the data have {scored}; give more (--prompts {least})"
            )

        def losses(threshold: float) -> np.ndarray:
            made.spec = self._at(model.spec, threshold)
            found = []
            for (prompt, _), answers in zip(data.on(model), whole, strict=True):
                other = (made(prompt.inputs).argmax(-1) != answers) & prompt.scored
                count = prompt.scored.sum(1)
                found.append((other.sum(1) / count)[count > 0].double().cpu())
            return torch.cat(found).numpy()

        best = last_bounded(THRESHOLDS[self.by], losses, self.risk, self.confidence)
        made.spec = self._at(model.spec, 1.0 if best is None else best.value)
        if best is None:
            return f"; threshold 1, as none below it is sure to change at most {self.risk:g} of a prompt's answers"
        return (
            f"; threshold {best.value:g}, the lowest that is sure to change at most {self.risk:g} of a prompt's "
            f"answers in the mean, with confidence {self.confidence:g} ({best.risk:.3g} of {scored} "
            f"prompts, p {best.p:.2g})"
        )


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
