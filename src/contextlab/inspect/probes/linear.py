"""What a linear map reads off a model's streams and states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from pydantic import PositiveInt

from contextlab.errors import unknown
from contextlab.inspect.held import keeps_its_size
from contextlab.inspect.layout import STATE, Plan, sites
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, by, largest, over_control, probe_table, shown
from contextlab.inspect.probing import TARGET, linear_probe, readable
from contextlab.registry import register


@register("probe", "linear", papers=("1610.01644", "1909.03368"), family="reading",
          cases=({"prompts": 64, "test": 32},))  # fmt: skip
@dataclass(frozen=True)
class Linear(Probe):
    """What a linear map reads off what the model holds, layer by layer, beside controls.

    Ridge regression of numbers, least squares on indicators of classes, measured on fresh prompts (see
    `contextlab.inspect.linear_probe`). The control is the larger of two: the same map fitted to what belongs to other
    prompts, and the same read off a model with fresh weights. What can be read off is there; whether it is used is
    asked by patching.

    what: a name in the task's `Prompt.hidden`, such as "weights", or "target", the answer; "" takes the first that is
        hidden, or the answer where nothing is.
    sites: places that are read, a pattern; "" takes the streams after each layer, and states that do not grow.
    place: of the token, from the end where it is below 0; null: each prompt's last one whose prediction counts.
    prompts: to fit on.
    test: prompts to measure on.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "lines", "layer", note="Share of the variance (r2) or of prompts (accuracy) that a linear map reads off."
    )

    what: str = ""
    sites: str = ""
    place: int | None = None
    prompts: PositiveInt = 512
    test: PositiveInt = 512

    def refusal(self, subject: Subject) -> str:
        known = {TARGET, *(subject.prompts(2).hidden or {})}
        if self.what and self.what not in known:
            return f"what: {unknown('thing that this task hides', self.what, known)}"
        return ""

    def measure(self, subject: Subject) -> pd.DataFrame:
        prompt = subject.prompts(2)
        what = self.what or next((name for name in prompt.hidden or {} if readable(prompt, name)), TARGET)
        places = self.sites or ["blocks.*.output", *_states(subject)]
        found = linear_probe(
            subject.model, subject.task, what, places, place=self.place, prompts=self.prompts, test=self.test,
            seed=subject.seed,
        )  # fmt: skip
        rows = found.to_dict("records")
        return probe_table(
            {
                **{name: row[name] for name in ("site", "place", "measure", "value", "ci_low", "ci_high", "n")},
                "what": f"{what} in the {'state' if row['site'].endswith(f'.{STATE}') else 'stream'}",
                "control": max(row["shuffled"], row["untrained"]),
            }
            for row in rows
        )

    def words(self, rows: list[Row]) -> list[str]:
        sentences = []
        for what, own in by(rows, "what").items():
            thing, _, where = what.rpartition(" in the ")
            best = largest(own)
            at = f"{'stream after' if where == 'stream' else 'state of'} layer {best['layer']}"
            found = f"{MEASURES[best['measure']]} {shown(best)}, control {best['control']:.2f}"
            sentences.append(
                f"The {at} holds {self._called(thing)} ({found})."
                if over_control(best)
                else f"No linear map reads {self._called(thing)} off the {where} better than off a control "
                f"(layer {best['layer']}: {found})."
            )
        return sentences

    @staticmethod
    def _called(thing: str) -> str:
        return "the answer" if thing == TARGET else f"the prompt's {thing}"


MEASURES = {"r2": "R2", "accuracy": "accuracy"}


def _states(subject: Subject) -> list[str]:
    """The states whose size does not depend on the text."""
    known = sites(subject.model)
    named = [f"{layer.name}.mixer.{STATE}" for layer in Plan(subject.model).layers if keeps_its_size(layer.mixer)]
    return [name for name in named if name in known]
