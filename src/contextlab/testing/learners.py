"""The laws of learners. Each is put to a learner on a task whose prompts it answers, in the task's option cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from contextlab import registry
from contextlab.errors import InputError
from contextlab.prompt import Learner, Prompt, Task
from contextlab.testing.law import Component, law, require
from contextlab.testing.options import idle_options
from contextlab.testing.tasks import generator, learners_of

FEW = {"draws": 256, "trees": 5, "iterations": 4}
"""Options of learners that make them slow, at the values at which the law "options" asks after the others."""


def of_task(name: str, task: Task, options: object = "") -> list[Component]:
    """The learners of one task, each beside it; `options` are shown."""
    shown = {"on": f"{name}{options or ''}"}
    return [
        Component("learner", called, type(learner), shown, lambda learner=learner: learner, task)
        for called, learner in learners_of(task).items()
    ]


def cases(entry: registry.Entry) -> Iterator[Component]:
    """A registered learner on each registered task that names it; where none does, on those that it answers.

    On the latter it has the options of its cases. Raises InputError where it answers no task's prompts.
    """
    found = False
    tasks = [(each.name, options, each.build(**options)) for each in registry.entries("task") for options in each.cases]
    for name, options, task in tasks:
        for component in of_task(name, task, _in_short(options)):
            if component.factory is entry.factory:
                found = True
                yield component
    if found:
        return
    for name, options, task in tasks:
        for own in entry.cases:
            learner = entry.build(**own)
            if _answers(learner, task):
                found = True
                shown = {**own, "on": f"{name}{_in_short(options)}"}
                yield Component("learner", entry.name, entry.factory, shown, lambda learner=learner: learner, task)
                break
    if not found:
        raise InputError(
            f"learner {entry.name!r}: no registered task names it and it answers no task's prompts; name it in the "
            "learners() of a task"
        )


def _in_short(options: object) -> str:
    return "" if not options else str(options).replace("'", "").replace(" ", "")


def _answers(learner: Learner, task: Task) -> bool:
    """Whether a learner takes a task's prompts: it gives a prediction of the right shape instead of an InputError."""
    prompt = task.sample(2, generator(0))
    try:
        return learner(prompt).shape == (*prompt.inputs.shape[:2], task.output_size)
    except InputError:
        return False


def other_future(prompt: Prompt, other: Prompt, after: int) -> Prompt:
    """`prompt` up to position `after`, then `other`; of the targets nothing stays."""

    def join(here: Tensor, there: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep.view(1, -1, *[1] * (here.ndim - 2)), here, there)

    keep = torch.arange(prompt.length) <= after
    changed = replace(
        other,
        inputs=join(prompt.inputs, other.inputs, keep),
        scored=join(prompt.scored, other.scored, keep),
        shot=join(prompt.shot, other.shot, keep),
        hidden=prompt.hidden,
    )
    if prompt.xs is not None and prompt.ys is not None and prompt.at is not None:
        if other.xs is None or other.ys is None:
            raise AssertionError("some prompts have examples (xs, ys), others have none")
        changed.xs = join(prompt.xs, other.xs, prompt.at <= after)
        changed.ys = join(prompt.ys, other.ys, prompt.at < after)  # y stands one token after it was asked for
    return changed


def looks_ahead(learner: Learner, task: Task, *, oracle: bool = False) -> list[str]:
    """How the learner's predictions change with what it cannot have seen; empty if they do not.

    oracle: it may see what is hidden.
    """
    prompt, other = task.sample(2, generator(1)), task.sample(2, generator(2))
    answered = learner(prompt)
    places = prompt.scored.any(0).nonzero().flatten().tolist()
    cuts = sorted({0, places[0] // 2, places[0], places[len(places) // 2], places[-1]})
    futures = {"another prompt": other}
    if task.read_in == "token":
        noise = torch.randint(task.input_size, other.inputs.shape, generator=generator(3))
        futures["random tokens"] = replace(other, inputs=noise)
    faults, compared = [], 0
    for name, future in futures.items():
        for cut in cuts:
            changed = other_future(prompt, future, cut)
            if not oracle:
                changed.hidden = None
            try:
                again = learner(changed)
            except InputError:  # what is no prompt of the task at all may be refused
                continue
            compared += 1
            if not torch.allclose(again[:, : cut + 1], answered[:, : cut + 1], rtol=1e-4, atol=1e-4):
                faults.append(f"{name} after {cut}")
    return faults if compared else ["never answered"]


@law("learner", "causality", "Predictions do not change with what follows, with targets or with what is hidden.")
def causality(component: Component) -> None:
    """One whose name has "oracle" in it may see what is hidden."""
    faults = looks_ahead(component.build(), component.beside, oracle="oracle" in component.name)
    require(not faults, f"predictions change with {'; '.join(faults)}")


@law("learner", "shapes", "It answers [B, T, output_size], finite floats.")
def shapes(component: Component) -> None:
    """At every position, scored or not."""
    task: Task = component.beside
    prompt = task.sample(3, generator(6))
    answer = component.build()(prompt)
    expected = (*prompt.inputs.shape[:2], task.output_size)
    require(answer.shape == expected, f"it answers {list(answer.shape)}, expected {list(expected)}")
    require(answer.is_floating_point(), f"it answers in {answer.dtype}")
    require(answer.isfinite().all(), "its answers are not finite")


@law("learner", "batch", "A prompt is answered as it is alone, whatever its batch.")
def batch(component: Component) -> None:
    """Three prompts, each alone again."""
    prompt, learner = component.beside.sample(3, generator(7)), component.build()
    together = learner(prompt)
    for row in range(3):
        alone = learner(prompt.rows(row, row + 1))
        far = (together[row : row + 1] - alone).abs().max().item()
        same = torch.allclose(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)
        require(same, f"alone, row {row} is answered {far:.3g} otherwise")


@law("learner", "repeated", "The same prompt is answered alike again, and left as it is.")
def repeated(component: Component) -> None:
    """Bit for bit; nothing is drawn from the global generator or kept from the last call."""
    prompt, learner = component.beside.sample(2, generator(8)), component.build()
    before = _copy(prompt)
    first = learner(prompt)
    for name, value in _tensors(before):
        now = dict(_tensors(prompt))[name]
        require(torch.equal(now, value), f"it changes the prompt's {name}")
    torch.rand(7)  # moves the global generator on
    require(torch.equal(learner(prompt), first), "the same prompt is answered otherwise")


def _copy(prompt: Prompt) -> Prompt:
    return prompt._map(lambda name, value: value.clone())


def _tensors(prompt: Prompt) -> Iterator[tuple[str, Tensor]]:
    for each in dataclasses.fields(prompt):
        value = getattr(prompt, each.name)
        if isinstance(value, Tensor):
            yield each.name, value
        elif value is not None:
            yield from value.items()


@law("learner", "options", "Every option counts: another value changes its answer, or is refused.")
def options(component: Component) -> None:
    """On prompts of the task that it stands beside, with its options there, or with one other of them changed."""
    learner: Any = component.build()
    entry = registry.entry_of("learner", learner)
    if entry is None or not all(hasattr(learner, parameter.name) for parameter in entry.parameters):
        return
    now = {parameter.name: getattr(learner, parameter.name) for parameter in entry.parameters}
    now |= {name: few for name, few in FEW.items() if name in now}
    prompt = component.beside.sample(3, generator(12))

    def marks(options: Mapping[str, Any]) -> Iterator[Any]:
        yield entry.factory(**options)(prompt)

    idle = idle_options(dataclasses.replace(entry, cases=(now,)), marks)
    require(not idle, f"another value of {', '.join(idle)} changes no answer")
