"""Which learning algorithm each layer answers as, and after how many steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.evaluation.comparisons import ROUNDING, _answers, _cosine, _wanted
from contextlab.evaluation.evaluate import predict
from contextlab.evaluation.similarity import layer_read_outs
from contextlab.inspect.means import Measured, mean_of
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, by, largest, over_control, probe_table, shown
from contextlab.inspect.streams import TunedLens, answers_from, batches, read_streams
from contextlab.models import Model
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import LabelTask
from contextlab.words import listed

SIMILARITY, STEPS, BEHIND = "similarity", "steps", "behind"
LEAST = 0.5
"""The similarity of errors below which a layer answers as none of the learners."""
FIT_SEED = 10_007
"""Of the prompts that read-outs are fitted to, beyond the subject's."""
LEAST_FACTOR = 0.25
"""By which a learner's answers are multiplied to be held against read-outs that are fitted."""
RESAMPLED = 400
ReadOut = Literal["", "fitted", "own", "tuned"]


@register("probe", "algorithm", papers=("2211.15661", "2310.17086"), family="reading",
          cases=({"prompts": 16, "pool": 2, "fit": 32, "steps": 4},))  # fmt: skip
@dataclass(frozen=True)
class Algorithm(Probe):
    """Which of the task's learners each layer answers as, and iterative ones after how many steps.

    A layer's answers are held against those of each learner by the cosine of their errors within a prompt, over all
    shots from 1 on (similarity of errors, 2310.17086): `similarity`. Learners with a number of steps (newton,
    gradient_descent) stand for the number at which they are most alike: `steps`, with an interval by resampling the
    prompts. `behind` is by how much less alike a learner is than the nearest one, paired by prompts; where its interval
    holds 0, the two cannot be told apart. Prompts are chosen to part the candidates: of those that are drawn the ones
    on which the learners nearest to the layer differ most, whatever the model answers to them.

    What a layer answers is read out of its stream: "fitted", by a linear map fitted to the targets, after which the
    layer's answers and each learner's are multiplied by the factor that fits them best (of learners at least 1/4), as a
    map would do it; "own", by the model's norm and read-out (the logit lens); "tuned", by the tuned lens. The control
    is the same in a model with fresh weights.

    prompts: that are compared.
    pool: prompts drawn for each of them.
    fit: to fit read-outs to.
    steps: the most that are tried.
    step_size: of gradient descent; null for its own (`contextlab show learner gradient_descent`).
    read_out: "" is "fitted" for real targets of models that read from left to right, else "tuned".
    """

    drawing: ClassVar[Drawing] = Drawing(
        "map", "what", y="site", figures=("measure",), note="Similarity of errors; steps; how far behind the nearest."
    )

    prompts: PositiveInt = 128
    pool: PositiveInt = 2
    fit: PositiveInt = 1024
    steps: PositiveInt = 32
    step_size: PositiveFloat | None = None
    read_out: ReadOut = ""

    def refusal(self, subject: Subject) -> str:
        learners, prompt = subject.task.learners(), subject.prompts(2)
        if len(learners) < 2:
            return f"the task has one learner, {next(iter(learners))}: there is nothing to tell apart"
        if int(prompt.scored.sum(1).min()) < 3:
            return "the task scores one or two predictions a prompt: errors of so few are alike or opposite"
        return ""

    def measure(self, subject: Subject) -> pd.DataFrame:
        task, asked = subject.task, subject.prompts(self.prompts * self.pool)
        fitted = self._reading(subject) == "fitted"
        learned = {name: self._sized(each) for name, each in task.learners().items()}
        known = answers_of(learned, task, asked, self.steps, fitted)
        found, fresh = (self._layers(subject, model, asked) for model in (subject.model, subject.untrained()))
        rows = []
        for site, own in found.items():
            compared = nearest(own, known, self.prompts)
            control = similarities(fresh[site], known)
            for name, (count, measures) in compared.items():
                at = {"site": site, "what": name}
                rows.append({**at, "measure": SIMILARITY, **measures[SIMILARITY]})
                rows[-1]["control"] = control[name, count].mean().item()
                rows.append({**at, "measure": BEHIND, **measures[BEHIND]})
                if count is not None:
                    rows.append({**at, "measure": STEPS, **measures[STEPS]})
        return probe_table(rows)

    def _reading(self, subject: Subject) -> str:
        task, spec = subject.task, subject.model.spec
        real = subject.prompts(1).targets.is_floating_point() and not isinstance(task, LabelTask)
        if self.read_out == "fitted" and (not real or spec.reads_whole):
            raise InputError("read_out: 'fitted' is for real targets and models that read from left to right")
        return self.read_out or ("fitted" if real and not spec.reads_whole else "tuned")

    def _sized(self, learner: Learner) -> Learner:
        if self.step_size is None or not hasattr(learner, "step_size"):
            return learner
        changed: Learner = dataclasses.replace(learner, step_size=self.step_size)  # type: ignore[type-var]
        return changed

    def _layers(self, subject: Subject, model: Model, asked: Prompt) -> dict[str, Tensor]:
        """Site -> errors of what it answers to the prompts, see `errors_of`."""
        with torch.no_grad():
            if (reading := self._reading(subject)) == "fitted":
                outs = layer_read_outs(model, subject.task, prompts=self.fit, seed=subject.seed + FIT_SEED)
                names = [f"blocks.{i}.output" for i in range(len(outs) - 1)] + ["logits"]
                return {
                    name: errors_of(subject.task, asked, [predict(out, part) for part in batches(asked)], fitted=True)
                    for name, out in zip(names, outs.values(), strict=True)
                }
            tuned = TunedLens(model, subject.prompts(self.fit, 1)) if reading == "tuned" else None
            said: dict[str, list[Tensor]] = {}
            for part in batches(asked):
                streams, answers = read_streams(model, part)
                for site, stream in list(streams.items())[1:]:
                    moved = stream if tuned is None else tuned(site, stream)
                    said.setdefault(site, []).append(answers_from(model, part, moved))
                said.setdefault("logits", []).append(answers)
            return {site: errors_of(subject.task, asked, parts) for site, parts in said.items()}

    def words(self, rows: list[Row]) -> list[str]:
        said: list[tuple[str, list[int]]] = []
        for own in by([row for row in rows if row["layer"] is not None], "layer").values():
            measured = {(row["what"], row["measure"]): row for row in own}
            compared = [row for row in own if row["measure"] == SIMILARITY]
            best = largest([row for row in compared if over_control(row)] or compared)
            layer, told = best["layer"], f"similarity of errors {shown(best)}, control {best['control']:.2f}"
            if best["value"] < LEAST or not over_control(best):
                said.append((f"none of the task's learners; the nearest is {best['what']} ({told})", [layer]))
                continue
            steps = measured.get((best["what"], STEPS))
            answer = best["what"] + (f" with {shown(steps, 0)} steps" if steps else "")
            if steps and round(steps["value"]) == _tried(self.steps)[-1]:
                answer += ", the most that were tried"
            behind = [row for row in own if row["measure"] == BEHIND and row["what"] != best["what"]]
            alike = [row["what"] for row in behind if row["ci_low"] is None or row["ci_low"] <= 0]
            more = f"; {listed(alike)} cannot be told apart from it" if alike else ""
            said.append((f"{answer} ({told}{more})", [layer]))
        return [f"Layer {layers[0]} answers as {text}." for text, layers in said]


def _tried(most: int) -> list[int]:
    """Numbers of steps: all up to 8, then further and further apart."""
    found = list(range(1, min(most, 8) + 1))
    while found[-1] < most:
        found.append(min(most, round(1.3 * found[-1])))
    return found


@dataclass
class Known:
    """What learners answer. errors: (name, steps; None of one without) -> [prompts, M]. apart: likewise, answers."""

    errors: dict[tuple[str, int | None], Tensor]
    answers: dict[tuple[str, int | None], Tensor]


def errors_of(task: Task, prompt: Prompt, predictions: Sequence[Tensor], fitted: bool = False) -> Tensor:
    """Errors at all shots from 1 on, 0 elsewhere and where they are rounding: [prompts, T * k], float64.

    predictions: [B, T, k] of one batch of the prompts after the other. fitted: times the factor that fits them best.
    """
    answers = _answers(task, torch.cat(list(predictions)), prompt)
    return _errors(answers * _factor(answers, prompt) if fitted else answers, prompt)


def _factor(answers: Tensor, prompt: Prompt) -> Tensor:
    """By which answers come nearest to the targets, least squares."""
    scored = prompt.scored[..., None]
    wanted = _wanted(prompt, answers.shape[-1])
    return (answers * wanted * scored).sum() / (answers.square() * scored).sum().clamp_min(1e-12)


def _errors(answers: Tensor, prompt: Prompt) -> Tensor:
    wanted = _wanted(prompt, answers.shape[-1])
    floor = ROUNDING * wanted[prompt.scored].square().mean().sqrt()
    counts = (prompt.scored & (prompt.shot > 0))[..., None]
    errors = answers - wanted
    return torch.where(counts & (errors.abs() > floor), errors, 0.0).flatten(1)


def answers_of(learners: Mapping[str, Learner], task: Task, prompt: Prompt, most: int, fitted: bool = False) -> Known:
    """What learners answer, those with steps after each number that is tried.

    fitted: each times a factor, fitted to the targets by least squares. Raises InputError where none errs.
    """
    known = Known({}, {})
    scored = prompt.scored[..., None]
    for name, learner in learners.items():
        steps: Iterable[int | None] = _tried(most) if hasattr(learner, "steps") else (None,)
        for count in steps:
            made = learner if count is None else dataclasses.replace(learner, steps=count)  # type: ignore[type-var]
            answers = torch.cat([_answers(task, made(part), part) for part in batches(prompt)])
            if fitted:
                # One that is far off at some shots would be made nearly nothing, and be another learner.
                answers = answers * _factor(answers, prompt).clamp_min(LEAST_FACTOR)
            known.answers[name, count] = (answers * scored).flatten(1)
            known.errors[name, count] = _errors(answers, prompt)
    if not any(each.any() for each in known.errors.values()):
        raise InputError("every learner is perfect on these prompts, which cannot tell one from another")
    return known


def similarities(own: Tensor, known: Known) -> dict[tuple[str, int | None], Tensor]:
    """The cosine of errors within each prompt, by learner and steps, [prompts]. own: of `errors_of`."""
    square = own.square().sum(1)
    return {key: _cosine((own * errors).sum(1), square, errors.square().sum(1)) for key, errors in known.errors.items()}


def nearest(own: Tensor, known: Known, keep: int) -> dict[str, tuple[int | None, dict[str, Measured]]]:
    """By learner the number of steps at which it is most alike, and its `similarity`, `behind` and `steps`.

    own: errors of what is compared, [prompts, M]. keep: of the prompts, those on which the learners that are nearest
    differ most.
    """
    alike = similarities(own, known)
    families: dict[str, list[tuple[int | None, Tensor]]] = {}
    for (name, count), values in alike.items():
        families.setdefault(name, []).append((count, values))
    steps: dict[str, Measured] = {}
    best: dict[str, tuple[int | None, Tensor]] = {}
    for name, each in families.items():
        means = torch.stack([values for _, values in each])
        best[name] = each[_fewest(means.mean(1, keepdim=True))[0]]
        if best[name][0] is not None:
            steps[name] = _steps([count for count, _ in each], means)
    order = sorted(best, key=lambda name: -best[name][1].mean().item())
    first = best[order[0]][1]
    close = [name for name in order if not _told_apart(first - best[name][1])]
    close = close if len(close) > 1 else order[:2]
    apart = torch.zeros(len(own), dtype=own.dtype, device=own.device)
    for i, one in enumerate(close):
        for other in close[i + 1 :]:
            between = (known.answers[one, best[one][0]] - known.answers[other, best[other][0]]).square().sum(1)
            apart += between / between.mean().clamp_min(torch.finfo(between.dtype).tiny)
    chosen = apart.topk(min(keep, len(apart))).indices
    kept = {name: each[chosen] for name, (_, each) in best.items()}
    top = max(kept, key=lambda name: kept[name].mean().item())
    return {
        name: (
            best[name][0],
            {
                SIMILARITY: _capped(mean_of(each)),
                BEHIND: mean_of(kept[top] - each),
                **({STEPS: steps[name]} if name in steps else {}),
            },
        )
        for name, each in kept.items()
    }


def _told_apart(differences: Tensor) -> bool:
    low = mean_of(differences)["ci_low"]
    return low is not None and low > 0


def _capped(found: Measured) -> Measured:
    """A cosine's interval ends at 1."""
    high = found["ci_high"]
    return found if high is None else {**found, "ci_high": min(float(high), 1.0)}


def _fewest(means: Tensor) -> list[int]:
    """The first row that reaches the largest mean, column by column. means: [steps, draws]."""
    reached = means >= means.amax(0) - 1e-6
    found: list[int] = reached.int().argmax(0).tolist()
    return found


def _steps(counts: Sequence[int | None], values: Tensor) -> Measured:
    """The number of steps that is most alike, with an interval by resampling the prompts. values: [steps, prompts]."""
    n = values.shape[1]
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLED)
    weights = torch.from_numpy(drawn / n).to(values)
    found = sorted(int(counts[i] or 0) for i in _fewest(values @ weights.mT))
    value = int(counts[_fewest(values.mean(1, keepdim=True))[0]] or 0)
    low, high = found[round(0.025 * (RESAMPLED - 1))], found[round(0.975 * (RESAMPLED - 1))]
    return {"value": float(value), "ci_low": float(min(low, value)), "ci_high": float(max(high, value)), "n": n}
