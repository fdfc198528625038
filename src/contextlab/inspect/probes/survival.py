"""What is forgotten when: how much of what a token wrote is left after more tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.evaluation.evaluate import predict
from contextlab.evaluation.intervals import TELLS
from contextlab.inspect.capturing import capture, patch
from contextlab.inspect.held import Part, mean_of, parts, spread_places, state_sites, states_over
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, beside, by, probe_table, shown
from contextlab.models import Model
from contextlab.prompt import HIGHER_IS_BETTER, Prompt, last_scored, wide
from contextlab.registry import register
from contextlab.words import listed

LEFT, HALF, OF_HEAD = "left of a write", "half-life", "half-life of a head"
CHANGE, LOG = "change of the answer", "log probability"
RESAMPLED = 400
"""Times that prompts are drawn anew for the interval of a half-life (bootstrap)."""


@register("probe", "survival", family="state", cases=({"prompts": 4, "writes": 1},))
@dataclass(frozen=True)
class Survival(Probe):
    """What is forgotten when: what is left of a token's write, and how far back the answer reaches.

    - "left of a write": in each layer alone. What its mixer reads at one place is replaced by what it reads there in
      another prompt, all that follows stays, and the two states are compared: the norm of their difference after d
      more tokens, over the largest that it comes to (at once, or where a short convolution has spread the token over
      the next ones, or a segment is complete). A decay gamma leaves gamma^d; keys and values are kept whole until a
      window drops them. "half-life" is where half is left, read off between the measured distances as an exponential,
      in each head, too. It stands in the table only where it lies within the text, also in 97.5% of resampled prompts.
    - "change of the answer": in the model as a whole. The token d places before a prompt's last scored prediction is
      replaced by another prompt's, and the prediction compared: half the sum of absolute differences of probabilities
      (total variation, 0 to 1), of numbers the norm of the change over the predictions' root mean square.
    - The task's metric (and the answer's log probability) by the distance between what is asked for and the question,
      for tasks that tell it, such as recall; each distance stands for those up to twice as far, if
      enough prompts have such.

    `place` is the distance in tokens. The control is the same in a model with fresh weights.

    prompts: over which values are means.
    writes: places in the first third of the text that are tried.
    tokens: adjoining ones that are replaced together; 2 for a key with its value.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "lines", "place", figures=("site", "what", "measure"),
        measures=(LEFT, CHANGE, LOG, *sorted(HIGHER_IS_BETTER), "error"),
        note="By the distance in tokens (place). Dotted: fresh weights.",
    )  # fmt: skip

    prompts: PositiveInt = 64
    writes: PositiveInt = 4
    tokens: PositiveInt = 1

    def refusal(self, subject: Subject) -> str:
        return "prompts: expected at least 2" if self.prompts < 2 else ""

    @torch.no_grad()
    def measure(self, subject: Subject) -> pd.DataFrame:
        prompt = subject.prompts(self.prompts)
        if prompt.length < 2 * self.tokens + 2:
            raise InputError(f"the task's prompts of {prompt.length} tokens are too short to look back in")
        return probe_table(
            beside(*(self._rows(model, prompt, subject) for model in (subject.model, subject.untrained())))
        )

    def _rows(self, model: Model, prompt: Prompt, subject: Subject) -> Iterator[Row]:
        kept = {} if model.spec.pool is not None else state_sites(model)
        return chain(
            self._states(model, prompt.inputs, list(kept), subject) if kept else (),
            self._answers(model, prompt),
            _by_distance(model, prompt, subject),
        )

    def _states(self, model: Model, inputs: Tensor, names: list[str], subject: Subject) -> Iterator[Row]:
        """How much of a write is left in each layer's state, and half-lives."""
        length, count = inputs.shape[1], self.tokens
        begins = spread_places(max(1, length // 3), self.writes)
        distances = doubling(length - begins[-1] - count)
        sides = [name.removesuffix("state") + "input" for name in names]
        with capture(model, sides) as taken:
            model.read(inputs)
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for begin in begins:
            places = [begin + count - 1 + distance for distance in distances]
            read = {side: taken[side][:, : places[-1] + 1] for side in sides}
            edits = {side: torch.cat([value, _swapped(value, begin, count)]) for side, value in read.items()}
            with patch(model, edits):
                states = states_over(model, torch.cat([inputs, inputs]), places, names)
            mixers = state_sites(model)
            for name in names:
                apart = [difference(parts(state, mixers[name])) for state in states[name]]
                heads = min(each.shape[1] for each in apart)  # of some states more come as the text grows
                found[name].append(torch.stack([each[:, :heads] for each in apart], -1))  # [B, 1 + heads, distances]
        generator = torch.Generator().manual_seed(subject.seed)
        for name, curves in found.items():
            left = torch.stack([_left(curve) for curve in curves]).nanmean(0).cpu()  # [B, 1 + heads, distances]
            for number, distance in enumerate(distances):
                if not bool(left[:, 0, number].isnan().all()):
                    yield {
                        "site": name,
                        "what": "state",
                        "measure": LEFT,
                        "place": distance,
                        **mean_of(left[:, 0, number]),
                    }
            for head in range(left.shape[1]):
                whose = {"measure": HALF} if head == 0 else {"measure": OF_HEAD, "head": head - 1}
                if told := half_life(distances, left[:, head], generator):
                    yield {"site": name, "what": "state", **whose, **told}

    def _answers(self, model: Model, prompt: Prompt) -> Iterator[Row]:
        """How much the last scored prediction changes with a token before it."""
        rows = torch.arange(prompt.batch, device=prompt.inputs.device)
        last = last_scored(prompt)
        asked, last = last >= 0, last.clamp_min(0)
        before = _answered(model, prompt)[rows, last]
        for distance in doubling(int(last.max()) + 1 - self.tokens):
            at = last - distance
            inputs = prompt.inputs.clone()
            other = prompt.inputs.roll(1, 0)
            for place in (at - more for more in range(self.tokens)):
                place = place.clamp_min(0)
                inputs[rows, place] = other[rows, place]
            known = asked & (at >= self.tokens - 1) & (inputs != prompt.inputs).flatten(1).any(1)
            after = _answered(model, Prompt(inputs, prompt.targets, prompt.scored, prompt.shot))[rows, last]
            moved = (after - before).abs().sum(-1) / 2
            if prompt.targets.is_floating_point():
                size = before.square().sum(-1).mean().sqrt().clamp_min(torch.finfo(before.dtype).tiny)
                moved = (after - before).norm(dim=-1) / size
            if bool(known.any()):
                bounds = None if prompt.targets.is_floating_point() else (0.0, 1.0)
                told = mean_of(moved[known].cpu(), bounds)
                yield {"what": "answer", "measure": CHANGE, "place": distance, **told}

    def words(self, rows: list[Row]) -> list[str]:
        told = by(rows, "measure")
        sentences = []
        ends = [own[-1] for own in by(told.get(LEFT, []), "site").values()]
        for place, own in by(ends, "place").items():
            after = "1 more token" if place == 1 else f"{place} more tokens"
            left = [f"{shown(row)} in layer {row['layer']}{_fresh([row])}" for row in own]
            sentences.append(f"Of a token's write there is left after {after}: {listed(left)}.")
        if HALF in told:
            halves = [f"{shown(row, 1)} tokens in layer {row['layer']}{_fresh([row], 1)}" for row in told[HALF]]
            sentences.append(f"Half of a write is left after {listed(halves)}.")
        for measure, own in told.items():
            if measure not in (LEFT, HALF, OF_HEAD):
                near, far = next((row for row in own if row["place"]), own[0]), own[-1]
                span = f"{shown(near)} at distance {near['place']} and {shown(far)} at distance {far['place']}"
                sentences.append(f"The {measure} is {span}{_fresh([near, far])}.")
        return sentences


def _fresh(rows: list[Row], digits: int = 2) -> str:
    """What the control gives, in brackets."""
    values = [f"{round(row['control'], digits) + 0.0:.{digits}f}" for row in rows if row["control"] is not None]
    return f" (fresh weights {listed(values)})" if values else ""


def doubling(length: int) -> list[int]:
    """Distances below a length: 0, 1, 2, 4, ..., and the last."""
    return sorted({0, *(2**power for power in range(length.bit_length()) if 2**power < length), max(0, length - 1)})


def difference(held: list[Part]) -> Tensor:
    """How far the states of the first and the second half of the rows are apart: norms [B, 1 + H], the whole's first.

    H heads are told where all parts are matrices of as many.
    """
    squares = []
    for part in held:
        first, second = part.value.double().chunk(2)
        apart = (first - second).square()
        squares.append(apart.flatten(2).sum(-1) if part.matrix else apart.sum(1, keepdim=True))
    whole = torch.cat(squares, 1).sum(1, keepdim=True)
    alike = squares[0].shape[1] > 1 and all(each.shape == squares[0].shape for each in squares)
    return torch.cat([whole, torch.stack(squares).sum(0)] if alike else [whole], 1).sqrt()


def half_life(distances: list[int], left: Tensor, generator: torch.Generator) -> Row | None:
    """Where a mean curve comes to a half, with an interval over prompts; None where that is not sure.

    left: [B, distances], nan where a prompt tells nothing.
    """
    left = left[~left.isnan().any(1)]
    if len(left) < 2:
        return None
    drawn = torch.randint(len(left), (RESAMPLED, len(left)), generator=generator)
    found = crossing(distances, torch.cat([left.mean(0, keepdim=True), left[drawn].mean(1)]))
    ends = found[1:].sort().values[[round(0.025 * RESAMPLED), round(0.975 * RESAMPLED) - 1]].tolist()
    value = found[0].item()
    if math.isinf(value) or math.isinf(ends[1]):
        return None
    return {"value": value, "ci_low": min(value, ends[0]), "ci_high": max(value, ends[1]), "n": len(left)}


def crossing(distances: list[int], curves: Tensor) -> Tensor:
    """Where curves [N, distances] fall to a half after their peak, [N]: as an exponential in between; inf for never."""
    number = torch.arange(curves.shape[1])
    below = (curves <= 0.5) & (number > curves.argmax(1, keepdim=True))
    at = below.to(torch.uint8).argmax(1).clamp_min(1)
    row = torch.arange(len(curves))
    steps = torch.tensor(distances, dtype=curves.dtype)
    begin, end = curves[row, at - 1], curves[row, at]
    straight = (begin - 0.5) / (begin - end)  # to what is nothing no exponential falls
    part = torch.where(end > 0, (begin.log() - math.log(0.5)) / (begin.log() - end.log()), straight)
    found = steps[at - 1] + part * (steps[at] - steps[at - 1])
    return torch.where(below.any(1), found, math.inf)


def _swapped(value: Tensor, begin: int, count: int) -> Tensor:
    """value [B, T, ...] with tokens of the next row at some places."""
    made = value.clone()
    made[:, begin : begin + count] = value.roll(1, 0)[:, begin : begin + count]
    return made


def _left(apart: Tensor) -> Tensor:
    """Norms [..., distances] over the largest; nan where nothing was ever written."""
    most = apart.amax(-1, keepdim=True)
    return torch.where(most > 0, apart / most, math.nan)


def _answered(model: Model, prompt: Prompt) -> Tensor:
    """Predictions [B, T, k]; of tokens their probabilities."""
    found = wide(predict(model, prompt))
    return found if prompt.targets.is_floating_point() else found.softmax(-1)


def _by_distance(model: Model, prompt: Prompt, subject: Subject) -> Iterator[Row]:
    """The task's metric by the distance between what is asked for and the question."""
    task = subject.task
    far = task.facets(prompt).get("distance")
    if far is None:
        return
    predicted = predict(model, prompt)
    values = {task.metric: task.errors(predicted, prompt)[task.metric].double()}
    if not prompt.targets.is_floating_point():
        values[LOG] = -F.cross_entropy(wide(predicted).mT, prompt.targets, reduction="none").double()
    known = prompt.scored & (far > 0)
    if not bool(known.any()):
        return
    for measure, value in values.items():
        bounds = (0.0, 1.0) if measure in HIGHER_IS_BETTER else None
        for power in range(int(far[known].max()).bit_length()):
            near = known & (far >= 2**power) & (far < 2 ** (power + 1))
            if int(near.any(1).sum()) >= min(TELLS, prompt.batch):
                told = mean_of(((value * near).sum(1) / near.sum(1)).cpu(), bounds)  # nan of prompts without such
                yield {"what": "answer", "measure": measure, "place": 2**power, **told}
