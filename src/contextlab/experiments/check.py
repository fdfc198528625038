"""What a spec names, tried before the first training step: every task draws, every model reads, one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from contextlab.errors import ContextlabError, InputError, first_line, unknown
from contextlab.evaluation import predict
from contextlab.evaluation.compress import build_prompts
from contextlab.experiments.jobs import Training
from contextlab.experiments.spec import ExperimentSpec
from contextlab.memory import lack_of_memory
from contextlab.models import Model, build_model
from contextlab.prompt import Prompt, Task
from contextlab.training.schedule import Turns


def check(spec: ExperimentSpec, device: torch.device) -> None:
    """Try what an experiment names, without a step of training; no random stream is disturbed, nothing written.

    Splits and learners to measure are known to each task; each task draws a prompt and its best learner answers it;
    each model reads a prompt of each of its tasks, as they are at the first step of training, too, and of the tasks of
    `compress`.

    Raises InputError with the key's path, or ResourceError where the machine lacks the memory.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        prompts = {name: _try_task(spec, name) for name in spec.tasks}
        tried: list[tuple[object, ...]] = []
        for training in spec.trainings():
            known = (training.task_name, training.model, training.train)
            if known in tried:  # another seed
                continue
            tried.append(known)
            with _trying(f"models.{training.model_name} (for task {training.task_name})"):
                model = build_model(training.model, seed=training.seed).to(device).eval()
            for name, task in training.tasks.items():
                _try_model(training, model, task, prompts[name].to(device))
            first = Turns(list(training.tasks.values()), training.train, training.seed)(0)
            if all(first is not task for task in training.tasks.values()):
                with _trying(f"{_of(training)}.train.curriculum: at step 0"):
                    prompt = first.sample(1, torch.Generator().manual_seed(0))
                _try_model(training, model, first, prompt.to(device))
            if spec.compress is not None and training.model_name in (spec.compress.model, *spec.compress.compare):
                _try_compress(spec, training, model)


def _try_task(spec: ExperimentSpec, name: str) -> Prompt:
    """A prompt of the task, which its best learner has answered."""
    task, wanted = spec.build_task(name), spec.evaluate_spec(name)
    own = spec.tasks[name].evaluate

    def where(key: str) -> str:
        return f"tasks.{name}.evaluate.{key}" if key in own else f"evaluate.{key} (for task {name})"

    with _trying(f"tasks.{name}: its splits"):
        splits = task.splits()
    for split in wanted.splits or ():
        if split not in splits:
            raise InputError(f"{where('splits')}: {unknown('split', split, splits)}")
    if wanted.learners is not None:
        with _trying(f"tasks.{name}: its learners"):
            known = {each for shifted in splits.values() for each in shifted.learners()}
        for learner in wanted.learners:
            if learner not in known:
                raise InputError(f"{where('learners')}: {unknown('learner of this task', learner, known)}")
    with _trying(f"tasks.{name}: drawing a prompt"):
        prompt = task.sample(1, torch.Generator().manual_seed(0))
    with _trying(f"tasks.{name}: its learners"):
        best, learner_of = next(iter(task.learners().items()), (None, None))
    if learner_of is None:
        raise InputError(f"tasks.{name}: the task names no learner; expected the best known one at least")
    with _trying(f"tasks.{name}: its learner {best} answers a prompt"):
        task.errors(learner_of(prompt), prompt)
    return prompt


def _try_model(training: Training, model: Model, task: Task, prompt: Prompt) -> None:
    with _trying(f"models.{training.model_name} (for task {training.task_name}): reading a prompt"):
        prediction = predict(model, prompt)
        task.loss(prediction.float(), prompt)
        task.errors(prediction.float(), prompt)


def _try_compress(spec: ExperimentSpec, training: Training, model: Model) -> None:
    assert spec.compress is not None
    for text in spec.compress.tasks:
        for length in spec.compress.lengths:
            with _trying(f"compress.tasks: {training.model_name} reads {text} at {length} tokens"):
                task = build_prompts(text, length, model)
                prompt = task.sample(1, torch.Generator().manual_seed(0))
                predict(model, prompt.to(next(model.parameters()).device))


def _of(training: Training) -> str:
    return f"{'multitask' if len(training.tasks) > 1 else 'tasks'}.{training.task_name}"


@contextmanager
def _trying(what: str) -> Iterator[None]:
    """Whatever goes wrong is one line that says what was tried."""
    try:
        yield
    except Exception as raised:
        error = lack_of_memory(raised) or raised
        if isinstance(error, ContextlabError):
            raise type(error)(f"{what}: {first_line(error)}") from raised
        raise InputError(f"{what}: failed with {type(error).__name__}: {first_line(error)}") from raised
