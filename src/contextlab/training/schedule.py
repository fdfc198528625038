"""What changes from step to step: the learning rate, the task and its options, the clipping of gradients."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from contextlab.errors import ContextlabError, InputError, unknown
from contextlab.prompt import Task
from contextlab.training.foreign import keeps_its_rate
from contextlab.training.spec import TrainSpec


def rate(step: int, spec: TrainSpec) -> float:
    """The fraction of the peak learning rate at a step (from 0): linear warm-up, then cosine (1608.03983).

    1 at each step of a schedule-free optimiser.
    """
    if keeps_its_rate(spec):
        return 1.0
    if step < spec.warmup:
        return (step + 1) / spec.warmup
    done = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    return spec.final_fraction + (1 - spec.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def clip(gradients: dict[str, Tensor], largest: float | None) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of any shape scaled so that their common 2-norm is at most `largest` (1211.5063); the norm before, [].

    The norm stays a tensor on its device: no synchronisation. The tensors passed in are left as they are,
    because autograd may give one tensor to two parameters.
    """
    found = list(gradients.values())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found)))
    if largest is not None:
        found = list(torch._foreach_mul(found, (largest / (norm + 1e-6)).clamp(max=1.0)))
    return dict(zip(gradients, found, strict=True)), norm


class Curriculum:
    """The task at each step, with the options of `spec.curriculum` at their values for that step.

    task: the task with all options at their last values.
    spec: names the options and how they grow.

    Raises InputError when an option is unknown, impossible, or changes the size of the model's inputs.
    """

    def __init__(self, task: Task, spec: TrainSpec) -> None:
        self.task, self.grows = task, spec.curriculum
        self.cache: dict[tuple[int, ...], Task] = {}
        for name in self.grows:
            if name not in task.growing:
                raise InputError(f"train.curriculum: {unknown('option', name, task.growing, type(task).__name__)}")
        for step in (0, spec.steps - 1):
            try:
                at = self(step)
            except ContextlabError as error:
                raise InputError(f"train.curriculum: at step {step}: {error}") from None
            for size in ("input_size", "output_size"):
                if getattr(at, size) != getattr(task, size):
                    raise InputError(
                        f"train.curriculum: at step {step} the task's {size} is {getattr(at, size)}, but the "
                        f"model is built for {getattr(task, size)}; let only options grow that do not change it"
                    )

    def __call__(self, step: int) -> Task:
        """The task at a step, counted from 0."""
        if not self.grows:
            return self.task
        values = tuple(grow.value(step) for grow in self.grows.values())
        if values not in self.cache:
            self.cache[values] = self.task.replace(**dict(zip(self.grows, values, strict=True)))
        return self.cache[values]


class Turns:
    """The task at each step of a training on one task or on several, which take turns (`spec.order`).

    A function of the seed and the step alone: all processes of a training and a resumed one find the same.

    tasks: in the order of the curriculum.
    spec: steps, order and curriculum are read; each task must have the options of the curriculum.
    seed: of the choices.

    Raises InputError when there are fewer steps than tasks, or as `Curriculum` does.
    """

    def __init__(self, tasks: Sequence[Task], spec: TrainSpec, seed: int = 0) -> None:
        if not tasks:
            raise InputError("train: expected a task or several, got none")
        if 0 < spec.steps < len(tasks):
            raise InputError(
                f"train.steps: {spec.steps} steps are too few for {len(tasks)} tasks; use at least {len(tasks)}"
            )
        if spec.epochs is not None and len(tasks) > 1:
            raise InputError(
                f"train.epochs: {len(tasks)} tasks take turns, each with its own {spec.examples} examples; give steps "
                "in the place of epochs"
            )
        self.tasks, self.spec, self.seed = [Curriculum(task, spec) for task in tasks], spec, seed
        self._counted, self._turns = 0, [0] * len(tasks)  # steps so far, and of which task they were

    def which(self, step: int) -> int:
        """The number of the task at a step, both counted from 0."""
        count = len(self.tasks)
        block = step * count // max(1, self.spec.steps)
        if self.spec.order == "sequential" or count == 1:
            return block
        among = count if self.spec.order == "random" else block + 1
        return int(among * random.Random(f"{self.seed}.{step}").random())

    def turn(self, step: int) -> tuple[int, int]:
        """The number of the task at a step, and at how many steps before it was that task's turn."""
        if len(self.tasks) == 1:
            return 0, step
        if step < self._counted:
            self._counted, self._turns = 0, [0] * len(self.tasks)
        while self._counted < step:
            self._turns[self.which(self._counted)] += 1
            self._counted += 1
        which = self.which(step)
        return which, self._turns[which]

    def __call__(self, step: int) -> Task:
        """The task at a step, counted from 0, with its options at their values for that step."""
        return self.tasks[self.which(step)](step)
