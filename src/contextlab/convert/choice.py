"""Which layers a conversion changes, where the data choose: by trying each alone, or by gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from contextlab.convert.base import Conversion, Converted, set_apart
from contextlab.convert.divergence import compare
from contextlab.convert.gates import train_gates
from contextlab.convert.mixing import rebuilt
from contextlab.convert.transfer import Stage, StageResult, check_stages, share_out, transfer
from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec
from contextlab.progress import Steps as Progress
from contextlab.prompt import Task

GATES_SHARE = 4
"""Gates are trained for one in so many steps of the budget."""


@dataclass(frozen=True)
class Choice:
    """A layer that might have become another mixer.

    divergence: how far the model is from its teacher where it alone does, see `Compared.divergence`, averaged over the
        tasks; None where gates chose. chosen: whether it is one of the least.
    gate: the share of the new mixer that was learned, where gates chose; the largest are chosen.
    """

    layer: int
    divergence: float | None
    chosen: bool
    gate: float | None = None


def differing(before: ModelSpec, after: ModelSpec) -> list[int]:
    """The layers that two specs of one depth describe differently."""
    pairs = zip(before.pattern(), after.pattern(), strict=True)
    return [i for i, (one, other) in enumerate(pairs) if one != other]


@dataclass(frozen=True)
class Training:
    """How a conversion is trained: see `convert`."""

    budget: int
    stages: tuple[Stage, ...]
    settings: Mapping[str, Any] | None
    folder: Path | None
    progress: Progress | bool | None
    seed: int

    def check(self, teacher: Model, student: Model, tasks: Sequence[Task], changed: Sequence[int]) -> None:
        """Raises InputError where some stage cannot be trained: before the first one is."""
        check_stages(
            teacher, student, self.stages, layers=changed, budget=self.budget, tasks=len(tasks),
            train_spec=self.settings,
        )  # fmt: skip

    def run(self, teacher: Model, student: Model, tasks: Sequence[Task], changed: Sequence[int]) -> list[StageResult]:
        """Train the layers that changed, in place."""
        return transfer(
            teacher, student, tasks, self.stages, layers=changed, budget=self.budget, train_spec=self.settings,
            seed=self.seed, folder=self.folder, resume=self.folder is not None, progress=self.progress,
        )  # fmt: skip


def read_choice(layers: Any) -> ByData | None:
    """That of "auto:N" or "gates:N"; None of other layers."""
    for how in ("auto", "gates"):
        if isinstance(layers, str) and layers.startswith(how):
            count = layers.removeprefix(how).removeprefix(":")
            if not (count.isascii() and count.isdigit()) or int(count) < 1:
                raise InputError(f"layers: expected {how}:N, for example {how}:2, got {layers[:40]!r}")
            return ByData(how, int(count))
    return None


@dataclass(frozen=True)
class ByData:
    """The layers that cost least, found on the data.

    how: "auto", each replaced alone; "gates", all at once by gates between the old mixer and the new. count: how many.
    """

    how: Literal["auto", "gates"]
    count: int

    def check(self, method: Conversion, candidates: Sequence[int], tasks: Sequence[Task], steps: int) -> None:
        """Raises InputError where nothing can be chosen so. candidates: layers that can change. steps: the budget."""
        if not tasks:
            raise InputError(
                f"layers {self.how}: are chosen by what the model answers; give data (--data TASK or FILE)"
            )
        if self.count > len(candidates):
            raise InputError(
                f"layers: {self.how}:{self.count} is more than the {len(candidates)} that can change; use all"
            )
        if not getattr(method, "apart", True):
            raise InputError(
                f"{method.name}: its layers change together, so that none can be tried alone; give their numbers"
            )
        if self.how == "gates" and steps < GATES_SHARE * len(tasks):
            raise InputError(
                f"layers: gates are trained; give a budget of at least {GATES_SHARE * len(tasks)} steps, or use auto"
            )

    def choose(
        self,
        teacher: Model,
        method: Conversion,
        converted: Converted,
        tasks: Sequence[Task],
        prompts: int,
        training: Training,
    ) -> tuple[Converted, list[Choice], list[StageResult], Training]:
        """Keep the mixers of the `count` layers that cost least.

        Where the first stage is of layers by themselves, all candidates learn first, together; the stage is then done.
        Returns also what is left of the training.
        """
        student = converted.model
        changed = differing(teacher.spec, student.spec)
        results: list[StageResult] = []
        asked = training.budget // GATES_SHARE if self.how == "gates" and self.count < len(changed) else 0
        training = dataclasses.replace(training, budget=training.budget - asked)
        if training.budget:
            training.check(teacher, student, tasks, changed)
        first, *rest = training.stages or (None,)
        if training.budget and first is not None and first.distil.by_layer:
            steps = share_out(training.budget, training.stages, len(tasks))[0]
            where = None if training.folder is None else training.folder / "candidates"
            begun = dataclasses.replace(training, stages=(first,), budget=steps, folder=where)
            results = begun.run(teacher, student, tasks, changed)
            training = dataclasses.replace(training, stages=tuple(rest), budget=training.budget - steps if rest else 0)
        if self.how == "gates":
            gates, told = train_gates(
                teacher, student, tasks, changed, self.count, asked, training.settings, training.seed,
                None if training.folder is None else training.folder / "gates", training.progress,
            )  # fmt: skip
            results += [told] if told.steps else []
            chosen = sorted(sorted(changed, key=gates.__getitem__, reverse=True)[: self.count])
            choices = [Choice(i, None, i in chosen, gates[i]) for i in changed]
        else:
            far = _alone(teacher, student, tasks, changed, prompts, training.seed + 1)
            chosen = sorted(sorted(changed, key=far.__getitem__)[: self.count])
            choices = [Choice(i, far[i], i in chosen) for i in changed]
        plan = dataclasses.replace(method, layers=chosen).plan(teacher.spec)  # type: ignore[call-arg]
        final = rebuilt(teacher, plan, chosen, torch.Generator().manual_seed(0))
        for i in chosen:
            final.blocks[i].mixer.load_state_dict(student.blocks[i].mixer.state_dict())  # type: ignore[union-attr]
        set_apart(final, teacher)
        lines = [line for i, line in zip(changed, converted.lines, strict=True) if i in chosen]
        return Converted(final, lines), choices, results, training


def _alone(
    teacher: Model, student: Model, tasks: Sequence[Task], layers: Sequence[int], prompts: int, seed: int
) -> dict[int, float]:
    """How far the student is from its teacher where one layer alone is replaced, averaged over the tasks."""
    mixers = {i: student.blocks[i].mixer for i in layers}
    far = {}
    try:
        for i in layers:
            for j in layers:
                student.blocks[j].mixer = mixers[j] if j == i else teacher.blocks[j].mixer
            each = [compare(teacher, student, task, prompts, seed).divergence for task in tasks]
            far[i] = sum(each) / len(each)
    finally:
        for i in layers:
            student.blocks[i].mixer = mixers[i]
    return far
