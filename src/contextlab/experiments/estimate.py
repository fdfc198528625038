"""How long a run would take: parts of its real work, timed within a budget, and scaled to the whole.

What is timed grows until its share of the budget is used up: prompts by their number, a model's steps by their FLOPs,
first over the length, then over the batch. What is small is timed whole. To read prompts takes a third of what it takes
to learn from them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from contextlab.evaluation import EvaluateSpec
from contextlab.experiments import timing
from contextlab.experiments.halving import HalvingSpec
from contextlab.experiments.jobs import Training
from contextlab.experiments.record import most_at_once, shares
from contextlab.experiments.rungs import most_rungs
from contextlab.experiments.spec import ExperimentSpec
from contextlab.models import build_model
from contextlab.models.outline import one_of_each, without_memory
from contextlab.prompt import Learner, Prompt, Task
from contextlab.threads import torch_threads
from contextlab.training.examples import CHUNK
from contextlab.training.schedule import Turns

POINTS = 8
"""Steps of a training, evenly spaced, whose tasks are counted: a curriculum makes some dearer than others."""
SECONDS, LEAST_SECONDS = 3.0, 0.04
"""For timing everything, shared out evenly; and of a share at least."""
WORKER_START = 3.0
"""Seconds until a worker is ready: `time python -c "import contextlab.experiments.worker"`, 3.2 s of one core."""
FREE = {"learning_rate", "matrix_learning_rate", "betas", "weight_decay", "warmup", "final_fraction", "clip"}
"""What a training takes no longer or shorter for."""
LARGE = 1 << 21
"""Parameters. Of larger models one layer of each kind is timed."""


@dataclass(frozen=True)
class TrainingEstimate:
    """One training of a run, which its seeds share, and the trials of a sweep that take as long.

    task, model, seeds: what is trained; with halving the seeds that decide.
    trials: of a sweep, each from every one of these seeds; else 1.
    parameters, steps: of each seed. prompts: drawn for each seed. epochs: how often each is shown, on average.
    training: seconds of each seed; of a trial with its validation.
    evaluating: seconds of each seed; of a sweep for the best trial alone.
    setting: path -> value of the swept fields that all of these trials share.
    """

    task: str
    model: str
    seeds: int
    trials: int
    parameters: int
    steps: int
    prompts: int
    epochs: float
    training: float
    evaluating: float
    setting: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """What a run would do, and about how long it would take here.

    trainings: one for all seeds of a model on a task, and for all trials of a sweep that take as long.
    learners: seconds of each task's learners.
    jobs, threads: at once, and of each.
    count, steps: of all trainings together; with halving the most that it can take.
    seconds: of the whole run but what `compress` measures and online play; with halving where the dearest trials stay.
    """

    trainings: list[TrainingEstimate]
    learners: dict[str, float]
    jobs: int
    threads: int
    count: int
    steps: int
    seconds: float


def estimate(spec: ExperimentSpec, device: torch.device, jobs: int | None = 1, threads: int | None = None) -> Estimate:
    """Time parts of the work of each training; models are thrown away, nothing is written.

    Arguments are those of `run`. Each is timed alone: where several processes share the memory's bandwidth, or others
    work on the machine too, it takes longer.
    """
    at_once, each = shares(most_at_once(spec), device, jobs, threads)
    with torch_threads(each):
        groups: dict[tuple[str, ...], list[Training]] = {}
        for training in spec.trainings():
            same = training.train.model_dump_json(exclude=FREE)
            key = (training.task_name, training.model_name, training.model.model_dump_json(), same)
            groups.setdefault(key, []).append(training)
        timer = _Timer(spec, device, max(LEAST_SECONDS, SECONDS / (len(groups) + len(spec.tasks))))
        trainings = [timer.training(members) for members in groups.values()]
        learners = {name: timer.learners(name) for name in spec.tasks}
    start = WORKER_START if at_once > 1 else 0.0
    stages, count, steps = planned(spec, trainings)
    stages[0] += learners.values()
    seconds = start + sum(makespan(jobs, at_once) for jobs in stages if jobs)
    return Estimate(trainings, learners, at_once, each, count, steps, seconds)


def planned(spec: ExperimentSpec, trainings: Sequence[TrainingEstimate]) -> tuple[list[list[float]], int, int]:
    """The seconds of each job of each stage, one after another; how many trainings that is, and of how many steps.

    Of a sweep one trial is measured, which may be the dearest. With halving the dearest go on, and every seed that does
    not decide is trained at the dearest setting.
    """
    # Each rung, what is left after the last one, and the best.
    stages: list[list[float]] = [[] for _ in range(most_rungs(spec) + 2)]
    count = steps = 0
    of_sweep: dict[tuple[str, str], list[TrainingEstimate]] = {}
    for each in trainings:
        if spec.sweep_of(each.model).over:
            of_sweep.setdefault((each.task, each.model), []).append(each)
        else:
            stages[0] += [each.training + each.evaluating] * each.seeds
            count, steps = count + each.seeds, steps + each.steps * each.seeds
    for (_, model), group in of_sweep.items():
        halving, deciding = spec.halving_of(model), group[0].seeds
        evaluating = max(each.evaluating for each in group)
        dearest = sorted((each.training for each in group for _ in range(each.trials)), reverse=True)
        longest = sorted((each.steps for each in group for _ in range(each.trials)), reverse=True)
        sizes = [len(dearest)] if halving is None else halving.sizes(len(dearest))
        ends = [1.0] if halving is None else [*halving.rungs[: len(sizes) - 1], 1.0]

        def of_steps(length: int, halving: HalvingSpec | None = halving, held: int = len(sizes) - 1) -> list[int]:
            """The steps after each stage of a trial of so many."""
            return [0, *(halving.step(rung, length) for rung in range(held) if halving), length]

        before = rest = 0.0
        for stage, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            if halving is not None and end == 1.0 and size == 1:
                rest = 1.0 - before  # in the job that measures it
            else:
                at = stage if halving is None or end < 1.0 else len(halving.rungs)
                stages[at] += [(end - before) * seconds for seconds in dearest[:size]] * deciding
            steps += deciding * sum(reached[stage + 1] - reached[stage] for reached in map(of_steps, longest[:size]))
            before = end
        others = len(spec.seeds) - deciding
        stages[-1] += [rest * dearest[0] + evaluating] * deciding + [dearest[0] + evaluating] * others
        count, steps = count + len(dearest) * deciding + others, steps + longest[0] * others
    return stages, count, steps


def makespan(seconds: Sequence[float], at_once: int) -> float:
    """When the last job ends, where each begins as soon as one of `at_once` places is free."""
    ends = [0.0] * at_once
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


class _Timer:
    """What is timed once, and used wherever it occurs again.

    spec, device: of the run. share: seconds for each thing that is timed.
    """

    def __init__(self, spec: ExperimentSpec, device: torch.device, share: float) -> None:
        self.spec, self.device, self.share = spec, device, share
        self.rate = timing.flops_a_second() if device.type == "cpu" else math.inf
        self.batches: dict[str, Prompt] = {}
        self.known_learners: dict[str, dict[str, Learner]] = {}
        self.known: dict[tuple[object, ...], float] = {}
        self.prompts: dict[str, Prompt] = {}  # by the task's repr: trainings make equal tasks of their curricula

    def _once(self, key: tuple[object, ...], find: Callable[[], float]) -> float:
        if key not in self.known:
            self.known[key] = find()
        return self.known[key]

    def _prompt(self, task: Task) -> Prompt:
        if (key := repr(task)) not in self.prompts:
            self.prompts[key] = _draw(task, 1)
        return self.prompts[key]

    def _learners(self, name: str) -> dict[str, Learner]:
        """Of a task, made once: some read a pool of a thousand members."""
        if name not in self.known_learners:
            self.known_learners[name] = self.spec.build_task(name).learners()
        return self.known_learners[name]

    def _batch(self, name: str) -> Prompt:
        """A batch of a task's evaluation, or fewer prompts where drawing takes long."""
        if name not in self.batches:
            task, most = self.spec.build_task(name), min(self.spec.evaluate_spec(name).batch, 32)
            self._prompt(task)  # the first has more to do
            drawing = timing.clock(lambda size: _draw(task, size), 1)
            self.batches[name] = _draw(task, max(1, min(most, int(self.share / drawing))))
        return self.batches[name]

    def training(self, members: Sequence[Training]) -> TrainingEstimate:
        first = members[0]
        outline = without_memory(first.model)
        large = outline is not None and outline.parameter_count > LARGE
        turns = Turns(list(first.tasks.values()), first.train, first.seed)
        at = [turns(int((i + 0.5) * first.train.steps / POINTS)) for i in range(POINTS)]
        longest = max((self._prompt(task).inputs for task in (*at, *first.tasks.values())), key=lambda x: x.shape[1])
        batch = first.train.batch
        # One architecture is timed once, whatever the tasks' sizes.
        name = first.model.model_copy(update={"input_size": None, "output_size": None}).model_dump_json()
        model = cache(
            lambda: build_model(one_of_each(first.model) if large else first.model, seed=first.seed).to(self.device)
        )
        whole = outline or model()

        def a_flop() -> float:
            took = timing.learning_seconds(model(), whole, longest, first.train, self.share, self.rate)
            return took / max(1, batch * whole.flops(longest.shape[1]))

        def a_parameter() -> float:
            took = timing.updating_seconds(model(), whole, longest, first.train, self.share / 2)
            return took / whole.parameter_count

        updating = self._once((name, first.train.optimizer), a_parameter) * whole.parameter_count
        learning = self._once((name, batch, first.train.precision), a_flop)

        def prompt_seconds(task: Task) -> float:
            return learning * whole.flops(self._prompt(task).length)

        steps, size = first.train.steps, first.train.examples
        if size is None:
            drawing = steps * sum(self._drawing(task, batch) for task in at) / POINTS
        else:  # drawn once to train on, and once to leave out of the evaluation
            chunks = 2 * math.ceil(size / CHUNK)
            drawing = chunks * sum(self._drawing(task, CHUNK) for task in first.tasks.values())
        a_step = updating + sum(batch * prompt_seconds(task) for task in at) / POINTS
        if first.teaching is not None:  # the teacher reads the prompts, too
            a_step += sum(batch * prompt_seconds(task) / 3 for task in at) / POINTS
        evaluating = 0.0
        for task_name, task in first.tasks.items():
            prompts = _splits(task, first.evaluate[task_name]) * first.evaluate[task_name].prompts
            best = next(iter(self._learners(task_name)))
            evaluating += prompts * (prompt_seconds(task) / 3 + self._learner(task_name, best))
        prompts = size * len(first.tasks) if size else steps * batch
        seeds = len({member.seed for member in members})
        if first.trial is not None:
            validation = self.spec.sweep_of(first.model_name).validation.prompts
            drawing += validation * sum(prompt_seconds(task) for task in first.tasks.values()) / 3
        return TrainingEstimate(
            first.task_name, first.model_name, seeds, len(members) // seeds, whole.parameter_count, steps, prompts,
            steps * batch / max(1, prompts), drawing + a_step * steps, evaluating,
            {path: value for path, value in first.setting.items() if all(m.setting[path] == value for m in members)},
        )  # fmt: skip

    def learners(self, name: str) -> float:
        """Seconds of all learners of a task, which answer the prompts of all splits."""
        task, wanted = self.spec.build_task(name), self.spec.evaluate_spec(name)
        chosen = [each for each in self._learners(name) if wanted.learners is None or each in wanted.learners]
        return _splits(task, wanted) * wanted.prompts * sum(self._learner(name, each) for each in chosen)

    def _drawing(self, task: Task, batch: int) -> float:
        """Of a batch of prompts."""
        share = max(LEAST_SECONDS / 4, self.share / POINTS)
        return self._once(
            ("draw", repr(task), batch),
            lambda: timing.timed(lambda size: _draw(task, size), timing.numbers(batch), float, share),
        )

    def _learner(self, name: str, learner: str) -> float:
        """Of a learner of the task: to answer one prompt among many."""

        def find() -> float:
            task = self.spec.build_task(name)
            prompt, answers = self._batch(name), self._learners(name)[learner]

            def answer(size: int) -> None:
                part = prompt.rows(0, size)
                with torch.no_grad():
                    task.errors(answers(part), part)

            share = max(LEAST_SECONDS / 4, self.share / len(self._learners(name)))
            return timing.timed(answer, timing.numbers(prompt.batch), float, share) / prompt.batch

        return self._once(("learner", name, learner), find)


def _draw(task: Task, count: int) -> Prompt:
    return task.sample(count, torch.Generator().manual_seed(0))


def _splits(task: Task, spec: EvaluateSpec) -> int:
    return len(task.splits() if spec.splits is None else spec.splits)
