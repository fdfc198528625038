"""How long a run would take: a few real steps of each model on each task, timed."""

from __future__ import annotations

import heapq
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from contextlab.evaluation import EvaluateSpec, predict
from contextlab.experiments.jobs import Training
from contextlab.experiments.record import shares
from contextlab.experiments.spec import ExperimentSpec
from contextlab.models import Model, build_model
from contextlab.prompt import Prompt, Task
from contextlab.training import TrainState, train_step
from contextlab.training.schedule import Turns

POINTS = 8
"""Steps of a training, evenly spaced, at whose tasks a step is timed: a curriculum makes some dearer than others."""
LEAST_SECONDS, MOST_REPEATS = 0.2, 5
"""Of what is timed: repeated until it took so long, or so many times."""


@dataclass(frozen=True)
class TrainingEstimate:
    """One training of a run, which its seeds share.

    task, model, seeds: what is trained. parameters, steps: of each seed.
    training, evaluating: seconds of each seed, by a few steps and one batch of prompts that were timed.
    """

    task: str
    model: str
    seeds: int
    parameters: int
    steps: int
    training: float
    evaluating: float


@dataclass(frozen=True)
class Estimate:
    """What a run would do, and about how long it would take here.

    trainings: one for all seeds of a model on a task. learners: seconds of each task's learners.
    jobs, threads: at once, and of each.
    seconds: of the whole run but what `compress` measures and online play.
    """

    trainings: list[TrainingEstimate]
    learners: dict[str, float]
    jobs: int
    threads: int
    seconds: float

    @property
    def steps(self) -> int:
        """Of all trainings together."""
        return sum(each.steps * each.seeds for each in self.trainings)


def estimate(spec: ExperimentSpec, device: torch.device, jobs: int | None = 1, threads: int | None = None) -> Estimate:
    """Time a few steps and a batch of prompts of each training; models are thrown away, nothing is written.

    Arguments are those of `run`. Each is timed alone: where several processes share the memory's bandwidth, or others
    work on the machine too, it takes longer.
    """
    at_once, each = shares(len(spec.trainings()), device, jobs, threads)
    before = torch.get_num_threads()
    torch.set_num_threads(each)
    try:
        with torch.random.fork_rng(devices=[]):
            groups: dict[tuple[str, str], list[Training]] = {}
            for training in spec.trainings():
                groups.setdefault((training.task_name, training.model_name), []).append(training)
            trainings = [_timed(members, device) for members in groups.values()]
            learners = {name: _learner_seconds(spec.build_task(name), spec.evaluate_spec(name)) for name in spec.tasks}
    finally:
        torch.set_num_threads(before)
    lasting = [t.training + t.evaluating for t in trainings for _ in range(t.seeds)] + list(learners.values())
    start = _worker_start() if at_once > 1 else 0.0
    return Estimate(trainings, learners, at_once, each, makespan([start + seconds for seconds in lasting], at_once))


def makespan(seconds: Sequence[float], at_once: int) -> float:
    """When the last job ends, where each begins as soon as one of `at_once` places is free."""
    ends = [0.0] * at_once
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def _timed(members: Sequence[Training], device: torch.device) -> TrainingEstimate:
    first = members[0]
    model = build_model(first.model, seed=first.seed).to(device)
    evaluating = sum(
        _evaluation_seconds(model.eval(), task, first.evaluate[name], device) for name, task in first.tasks.items()
    )
    parameters, steps = model.parameter_count, first.train.steps
    training = _step_seconds(first, model) * steps
    return TrainingEstimate(
        first.task_name,
        first.model_name,
        len(members),
        parameters,
        steps,
        training,
        evaluating,
    )


def _step_seconds(training: Training, model: Model) -> float:
    """The mean over the whole training of what a step takes; the model is trained a few steps."""
    state = TrainState.start(model.train(), training.train, training.seed)
    turns = Turns(list(training.tasks.values()), training.train, training.seed)
    steps = training.train.steps
    known: list[tuple[Task, float]] = []
    total = 0.0
    for i in range(POINTS):
        task = turns(int((i + 0.5) * steps / POINTS))
        found = next((seconds for each, seconds in known if each is task), None)
        if found is None:
            found = _seconds(lambda task=task: train_step(model, task, training.train, state).loss.item())  # type: ignore[misc]
            known.append((task, found))
        total += found
    return total / POINTS


def _evaluation_seconds(model: Model, task: Task, spec: EvaluateSpec, device: torch.device) -> float:
    """Of all splits, as if each took what the train split takes: answers of the model and of the best learner."""
    prompt, share = _batch(task, spec)
    there = prompt.to(device)
    with torch.no_grad():
        answering = _seconds(lambda: task.errors(predict(model, there).float(), there))
        best = next(iter(task.learners().values()))
        reference = _seconds(lambda: task.errors(best(prompt), prompt))
    return (answering + reference) * share


def _learner_seconds(task: Task, spec: EvaluateSpec) -> float:
    prompt, share = _batch(task, spec)
    chosen = [each for name, each in task.learners().items() if spec.learners is None or name in spec.learners]
    with torch.no_grad():
        return share * sum(_seconds(lambda each=each: task.errors(each(prompt), prompt)) for each in chosen)  # type: ignore[misc]


def _batch(task: Task, spec: EvaluateSpec) -> tuple[Prompt, float]:
    """A batch of prompts, small enough to be timed soon, and how many times as many an evaluation has."""
    size = min(spec.batch, spec.prompts, 32)
    splits = len(task.splits() if spec.splits is None else spec.splits)
    return task.sample(size, torch.Generator().manual_seed(0)), splits * spec.prompts / size


def _seconds(call: Callable[[], object]) -> float:
    """The mean of a few times that a call takes, after one that is not counted."""
    took: list[float] = []
    call()
    while sum(took) < LEAST_SECONDS and len(took) < MOST_REPEATS:
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return sum(took) / len(took)


def _worker_start() -> float:
    """Seconds until a worker process is ready to work."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import contextlab.experiments.worker"], check=True)
    return time.perf_counter() - began
