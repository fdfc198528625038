"""Whether a state is the task's vector: the state after one prompt's context, handed to another prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.evaluation.comparisons import _answers
from contextlab.inspect.held import keeps_its_size
from contextlab.inspect.layout import STATE, Plan, sites
from contextlab.inspect.means import mean_of, metric_by_prompt, ratio_of
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, in_percent, largest, probe_table, shown
from contextlab.models import Model
from contextlab.prompt import Prompt
from contextlab.registry import register
from contextlab.words import listed

FIXED, GROWING, ALL, ALONE = "states that do not grow", "states that grow", "all states", "one layer's state"
CARRIED = "share carried"


@register("probe", "state_vector", papers=("2310.15916", "2310.15213"), family="vectors", cases=({"prompts": 16},))
@dataclass(frozen=True)
class StateVector(Probe):
    """Whether what a model hands on is its task vector: the state after one prompt's context, given to another.

    The model reads the context of a prompt B, then the query of a prompt A. Some of its states after the context are
    replaced by those after the context of A, or of a third prompt C, as many tokens long: of one layer alone, of all
    layers whose states do not grow with the text (linear attention, delta rules, state-space layers, windows), of those
    that grow (keys and values), or of all. `share carried` is the part of the difference of A's and C's answers that
    those states bring along, 0 to 1: the answers with A's state less those with C's, projected on the same difference
    where all states are handed over (of probabilities, for tokens and labels; it can lie outside where layers do not
    fit together). Beside it stands the task's metric with A's states, held to A's truth. The controls are the states
    of other prompts of the task in the place of A's and C's, and the metric with B's own.

    All states together carry everything, by their contract; a model without keys and values has all its memory in those
    that do not grow. How a hybrid shares it among the two is what is measured, and which layer holds it.

    The query is a token whose prediction counts, late ones first; where it tells of the example before it, too (layout
    "paired"), it tells that of A's.

    prompts: A's.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "lines", "layer", figures=("what", "measure"), note="Of one layer's state alone; dotted: other prompts'."
    )

    prompts: PositiveInt = 192

    def refusal(self, subject: Subject) -> str:
        spec = subject.model.spec
        if spec.reads_whole:
            return "the model reads prompts whole and hands on no state"
        if not bool(subject.prompts(8).scored[:, 1:].any(1).all()):
            return "the first token is asked: there is no context before it"
        return ""

    @torch.no_grad()
    def measure(self, subject: Subject) -> pd.DataFrame:
        model, task = subject.model, subject.task
        drawn = subject.prompts(3 * self.prompts)
        a, b, c = (drawn.rows(i * self.prompts, (i + 1) * self.prompts) for i in range(3))
        at = _queries(a)
        variants = _variants(model)
        own = _transplanted(model, a, b, at, {("", "none"): ()}, a)["", "none"]
        others = torch.arange(1, a.batch + 1, device=at.device) % a.batch
        moved = [_transplanted(model, a, b, at, variants, giver) for giver in (a, c, a.take(others), c.take(others))]
        asked = torch.zeros_like(a.scored)
        rows_of = torch.arange(a.batch, device=at.device)
        asked[rows_of, at] = True
        judged = dataclasses.replace(a, scored=asked)

        def answers(said: Tensor) -> Tensor:
            return _answers(task, said[:, None], a)[:, 0]

        def metric(said: Tensor) -> Tensor:
            whole = said.new_zeros(a.batch, a.length, said.shape[-1])
            whole[rows_of, at] = said
            return metric_by_prompt(task, whole, judged)

        apart = answers(moved[0]["", ALL]) - answers(moved[1]["", ALL])
        square = apart.square().sum(-1)
        none = mean_of(metric(own), task.metric)["value"]
        rows = []
        for (site, what), said in moved[0].items():
            at_site = {"site": site, "what": what} if site else {"what": what}
            first, second, *control = (answers(each[site, what]) for each in moved)
            if bool(square.any()):
                row = {**at_site, "measure": CARRIED, **ratio_of(((first - second) * apart).sum(-1), square)}
                rows.append({**row, "control": ratio_of(((control[0] - control[1]) * apart).sum(-1), square)["value"]})
            found = mean_of(metric(said), task.metric)
            rows.append({**at_site, "measure": task.metric, **found, "control": none})
        return probe_table(rows)

    def words(self, rows: list[Row]) -> list[str]:
        shares = [row for row in rows if row["measure"] == CARRIED]
        if not shares:
            return ["The context changes no answer, so that no state can carry one."]
        whole = {row["what"]: row for row in shares if row["layer"] is None}
        alone = [row for row in shares if row["layer"] is not None]
        sentences = []
        for what in (FIXED, GROWING):
            if what in whole:
                row = whole[what]
                only = " (it has no others)" if GROWING not in whole or FIXED not in whole else ""
                sentences.append(
                    f"The {what}{only} carry {shown(in_percent(row), 0)}% of what a context changes in the answer "
                    f"(control {_whole(row['control'])}%)."
                )
        if len(alone) > 1:
            best = largest(alone)
            sentences.append(
                f"Of single layers the state of layer {best['layer']} carries most: {shown(in_percent(best), 0)}% "
                f"(control {_whole(best['control'])}%)."
            )
            none = [str(row["layer"]) for row in alone if abs(row["value"]) < 0.02]
            if len(none) > 1:
                sentences.append(f"Alone the states of layers {listed(none)} carry nothing (below 2%).")
            elif none:
                sentences.append(f"Alone the state of layer {none[0]} carries nothing (below 2%).")
        return sentences


def _whole(share: float) -> int:
    return round(100 * share)


def _queries(prompt: Prompt) -> Tensor:
    """Of each prompt a token whose prediction counts, after a context, [N] int64: late ones, at few different places.

    Raises InputError where a prompt has none.
    """
    scored, length = prompt.scored.clone(), prompt.length
    scored[:, 0] = False
    place = torch.arange(length, device=scored.device)
    found = torch.full((prompt.batch,), -1, dtype=torch.int64, device=scored.device)
    while bool((found < 0).any()):
        counts = (scored & (found < 0)[:, None]).sum(0) * (place + 1)
        best = int(counts.argmax())
        if not counts[best]:
            raise InputError("in some prompts no prediction after the first token counts")
        found = torch.where((found < 0) & scored[:, best], best, found)
    return found


Variant = tuple[str, str]


def _variants(model: Model) -> dict[Variant, tuple[int, ...]]:
    """(site; "" of several, what) -> the numbers of the layers whose states are handed over."""
    known = sites(model, named=False)
    fixed: list[int] = []
    growing: list[int] = []
    for number, layer in enumerate(Plan(model).layers):
        if f"{layer.name}.mixer.{STATE}" in known:
            (fixed if keeps_its_size(layer.mixer) else growing).append(number)
    found: dict[Variant, tuple[int, ...]] = {
        (f"blocks.{number}.mixer.{STATE}", ALONE): (number,) for number in sorted((*fixed, *growing))
    }
    for what, numbers in ((FIXED, fixed), (GROWING, growing)):
        if numbers:
            found["", what] = tuple(numbers)
    return {**found, ("", ALL): tuple(range(len(Plan(model).layers)))}


def _transplanted(
    model: Model, asked: Prompt, context: Prompt, at: Tensor, variants: Mapping[Variant, tuple[int, ...]], giver: Prompt
) -> dict[Variant, Tensor]:
    """What is answered to the tokens at these places of `asked` after `context`, with states of `giver`: [N, k] each.

    at: [N] int64. variants: the layers whose states are the giver's.
    """
    found: dict[Variant, Tensor] = {}
    states: dict[str, Any] = {"context": None, "giver": None}
    begin = 0
    for place in at.unique().tolist():
        for name, prompt in (("context", context), ("giver", giver)):
            _, states[name] = model.read(prompt.inputs[:, begin:place], states[name])
        begin = place
        here = (at == place).nonzero()[:, 0]
        query = asked.inputs[here, place : place + 1]
        for variant, numbers in variants.items():
            kept, given = (states[name].select(here) for name in ("context", "giver"))
            layers = [given.layers[i] if i in numbers else layer for i, layer in enumerate(kept.layers)]
            said, _ = model.read(query, dataclasses.replace(kept, layers=layers))
            if variant not in found:
                found[variant] = said.new_zeros(len(at), said.shape[-1])
            found[variant][here] = said[:, 0]
    return found
