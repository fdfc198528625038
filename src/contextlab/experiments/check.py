"""What a spec names, tried before the first training step: every task draws, every model reads, one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from contextlab.errors import ContextlabError, InputError, first_line, unknown
from contextlab.evaluation import predict
from contextlab.evaluation.compress import build_prompts
from contextlab.evaluation.splits import wanted_splits
from contextlab.experiments.jobs import Training
from contextlab.experiments.spec import ExperimentSpec
from contextlab.inspect.looking import named_probes
from contextlab.inspect.probe import Subject
from contextlab.inspect.spec import InspectSpec
from contextlab.memory import lack_of_memory
from contextlab.models import build_model
from contextlab.models.draws import OwnDraws
from contextlab.models.outline import one_of_each, without_memory
from contextlab.models.room import require_room, require_room_for_training
from contextlab.prompt import Prompt, Task
from contextlab.training.adapters import adapter_targets
from contextlab.training.examples import CHUNK, draw_examples, require_examples
from contextlab.training.foreign import is_foreign, require_resumable
from contextlab.training.freeze import to_freeze
from contextlab.training.layer_skip import check_layer_skip
from contextlab.training.schedule import Turns
from contextlab.training.until import check_goal, check_metric

LARGE, LARGE_FLOPS = 1 << 20, 2e9
"""Parameters, and FLOPs to read one prompt. Of larger models one layer of each kind reads, which takes a second at most
for prompts of some thousand tokens."""

TRIED = {
    "batch",
    "accumulate",
    "precision",
    "examples",
    "curriculum",
    "order",
    "until",
    "freeze",
    "lora",
    "ia3",
    "layer_skip",
}
"""What of a training's settings decides whether its first step is possible."""


def check(spec: ExperimentSpec, device: torch.device) -> None:
    """Try what an experiment names, without a step of training; no random stream is disturbed, nothing written.

    Splits and learners to measure are known to each task; each task draws a prompt and its best learner answers it;
    each model reads a prompt of each shape of its tasks, as they are at the first step of training, too, and of the
    tasks of `compress`. Of a large model every layer is made without memory, and one of each kind reads.

    Raises InputError with the key's path, or ResourceError where the machine lacks the memory.
    """
    with OwnDraws(0), torch.no_grad():  # ours draw from generators of their own; a plugin's may not
        prompts = {name: _try_task(spec, name) for name in spec.tasks}
        tried: set[tuple[str, ...]] = set()
        readers: dict[str, _Reader] = {}
        sets: set[tuple[str, int]] = set()  # those tried
        refused: dict[str, list[str]] = {}  # probe -> why, "" where it can be put to a model
        for training in spec.trainings():
            key = training.model.model_dump_json()
            halving = spec.halving_of(training.model_name)
            judged = str(halving and halving.metric)
            known = (training.task_name, key, training.train.model_dump_json(include=TRIED), judged, _taught(training))
            if is_foreign(training.train):
                with _trying(f"{_of(training)} (model {training.model_name})"):
                    outline = without_memory(training.model)
                    ndims = {1, 2} if outline is None else {each.ndim for each in outline.parameters()}
                    require_resumable(training.train, ndims, device)
            if known in tried:  # another seed, or another trial of a sweep that reads the same
                continue
            tried.add(known)
            if key not in readers:  # a model that all tasks share is made once
                with _trying(f"models.{training.model_name} (for task {training.task_name})"):
                    readers[key] = _Reader(training, max(prompts[name].length for name in training.tasks), device)
            reader = readers[key]
            if training.start is not None:
                with _trying(f"models.{training.model_name} (for task {training.task_name}): its start"):
                    training.start.plan(training.model)
            if training.teaching is not None:
                with _trying(f"models.{training.model_name} (for task {training.task_name}): distill"):
                    training.teaching.check(training)
            with _trying(f"{_of(training)} (model {training.model_name})"):
                model = without_memory(training.model) or reader.model
                to_freeze(model, training.train.freeze or ())
                check_layer_skip(training.model, training.train.layer_skip)
                if training.train.adapter is not None:
                    adapter_targets(model, training.train.adapter)
            for name, task in training.tasks.items():
                errors = _try_model(training, reader, task, prompts[name])
                if halving is not None and halving.metric is not None and halving.metric not in errors:
                    what = unknown("metric of this task", halving.metric, errors)
                    raise InputError(f"sweep.halving.metric (for task {name}): {what}")
                _try_room(training, prompts[name].length, device)
            _try_examples(training, prompts, sets)
            first = Turns(list(training.tasks.values()), training.train, training.seed)(0)
            if all(first is not task for task in training.tasks.values()):
                with _trying(f"{_of(training)}.train.curriculum: at step 0"):
                    prompt = first.sample(1, torch.Generator().manual_seed(0))
                    _require_known_tokens(first, prompt)
                _try_model(training, reader, first, prompt)
            if spec.compress is not None and training.model_name in (spec.compress.model, *spec.compress.compare):
                _try_compress(spec, training, reader)
            if spec.inspect is not None and training.model_name in (spec.inspect.models or (training.model_name,)):
                _try_probes(spec, training, reader, refused)
        if spec.inspect is not None:
            _require_probes(spec.inspect, refused)


class _Reader:
    """A model, made once, that reads one prompt of each shape.

    training: whose model it is. length: tokens of the longest prompt.
    """

    def __init__(self, training: Training, length: int, device: torch.device) -> None:
        spec = training.model
        require_room(spec)
        outline = without_memory(spec)
        large = outline is not None and (outline.parameter_count > LARGE or outline.flops(length) > LARGE_FLOPS)
        self.model = build_model(one_of_each(spec) if large else spec, seed=training.seed).to(device).eval()
        self.device = device
        self.known: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, prompt: Prompt) -> Tensor:
        """The prediction for the prompt, or for another of the same shape."""
        key = (prompt.inputs.shape, prompt.inputs.dtype)
        if key not in self.known:
            self.known[key] = predict(self.model, prompt.to(self.device)).float()
        return self.known[key]


def _try_task(spec: ExperimentSpec, name: str) -> Prompt:
    """A prompt of the task, which its best learner has answered."""
    task, wanted = spec.build_task(name), spec.evaluate_spec(name)
    own = spec.tasks[name].evaluate

    def where(key: str) -> str:
        return f"tasks.{name}.evaluate.{key}" if key in own else f"evaluate.{key} (for task {name})"

    with _trying(f"tasks.{name}: its splits"):
        splits = task.splits()
    wanted_splits(task, wanted.splits, splits, where("splits"))
    if wanted.learners is not None:
        with _trying(f"tasks.{name}: its learners"):
            known = {each for shifted in splits.values() for each in shifted.learners()}
        for learner in wanted.learners:
            if learner not in known:
                raise InputError(f"{where('learners')}: {unknown('learner of this task', learner, known)}")
    with _trying(f"tasks.{name}: drawing a prompt"):
        prompt = task.sample(1, torch.Generator().manual_seed(0))
        _require_known_tokens(task, prompt)
    with _trying(f"tasks.{name}: its learners"):
        best, learner_of = next(iter(task.learners().items()), (None, None))
    if learner_of is None:
        raise InputError(f"tasks.{name}: the task names no learner; expected the best known one at least")
    with _trying(f"tasks.{name}: its learner {best} answers a prompt"):
        task.errors(learner_of(prompt), prompt)
    return prompt


def _require_known_tokens(task: Task, prompt: Prompt) -> None:
    """Refuse token ids that no model of the task's size knows."""
    if task.read_in == "token" and prompt.inputs.numel():
        least, most = (int(end) for end in prompt.inputs.aminmax())
        if least < 0 or most >= task.input_size:
            raise InputError(f"expected token ids from 0 to {task.input_size - 1}, got {least if least < 0 else most}")


def _try_model(training: Training, reader: _Reader, task: Task, prompt: Prompt) -> dict[str, Tensor]:
    """The errors of the model's answers to the prompt, by metric."""
    with _trying(f"models.{training.model_name} (for task {training.task_name}): reading a prompt"):
        prediction = reader(prompt)
        there = prompt.to(reader.device)
        task.loss(prediction, there)
        errors = task.errors(prediction, there)
        if training.train.until is not None:
            check_goal(task, training.train.until)
            check_metric(task, training.train.until, errors)
    return errors


def _try_room(training: Training, length: int, device: torch.device) -> None:
    if device.type == "cpu":
        train = training.train
        with _trying(f"models.{training.model_name} (for task {training.task_name})"):
            size = 2 if train.precision == "bfloat16" else 4
            require_room_for_training(training.model, length, train.batch // train.accumulate, size)


def _try_examples(training: Training, prompts: dict[str, Prompt], tried: set[tuple[str, int]]) -> None:
    """A fixed set must fit into memory, and its draws must have one form: two of them are made."""
    size = training.train.examples
    for name, task in training.tasks.items():
        if size is None or (name, size) in tried:
            continue
        tried.add((name, size))
        with _trying(_of(training)):
            require_examples(size, prompts[name].nbytes)
            draw_examples(task, min(size, CHUNK + 1))


def _try_compress(spec: ExperimentSpec, training: Training, reader: _Reader) -> None:
    assert spec.compress is not None
    for text in spec.compress.tasks:
        for length in spec.compress.lengths:
            with _trying(f"compress.tasks: {training.model_name} reads {text} at {length} tokens"):
                task = build_prompts(text, length, reader.model)
                prompt = task.sample(1, torch.Generator().manual_seed(0))
                _require_known_tokens(task, prompt)
                reader(prompt)


def _try_probes(spec: ExperimentSpec, training: Training, reader: _Reader, refused: dict[str, list[str]]) -> None:
    """Note of each probe why it cannot be put to the model, by what the two declare; "" where it can."""
    assert spec.inspect is not None
    for name, task in training.tasks.items():
        if name not in (spec.inspect.tasks or (name,)):
            continue
        steps = range(training.train.steps)[:3]
        subject = Subject(reader.model, task, checkpoints={step: lambda: reader.model for step in steps})
        for text, probe in named_probes(spec.inspect.probes).items():
            with _trying(f"inspect.probes: {text}, put to {training.model_name} on {name}"):
                refused.setdefault(text, []).append(probe.refusal(subject))


def _require_probes(wanted: InspectSpec, refused: dict[str, list[str]]) -> None:
    """Refuse probes that can be put to none of the models: nobody waits for a training to hear so."""
    for text in wanted.probes:
        if all(reasons := refused.get(text) or ["no model is trained on these tasks"]):
            raise InputError(f"inspect.probes: {text} can be put to no model of this recipe: {reasons[0]}")


def _taught(training: Training) -> str:
    """What decides whether a teacher can be learned from, as text."""
    teaching = training.teaching
    return "" if teaching is None else f"{teaching.distil!r} {teaching.source.spec.model_dump_json()}"


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
