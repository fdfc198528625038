"""The engine of conversions that train: a student learns from its teacher in stages, by the project's own `train`.

What is learned stands in the tasks (`convert.teacher`); each stage is one training.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from torch import nn

from contextlab import registry
from contextlab.convert.students import Layers, Watched, mixer_of
from contextlab.convert.teacher import Distil, task_of
from contextlab.errors import InputError
from contextlab.models.digest import fingerprint
from contextlab.models.stack import Model
from contextlab.prompt import Task
from contextlab.training.adapters import adapter_targets, require_peft
from contextlab.training.run import TrainResult
from contextlab.training.spec import LoraSpec, TrainSpec
from contextlab.training.trainer import train

MATRIX_RATES = {"new": 0.02, "all": 0.01, "lora": 0.01}
"""Muon's: what is new is trained as from scratch. Of a small recall model's two layers the first became a gated delta
rule: after 400 steps Muon kept 97% of the recall, AdamW 88%."""


ADAPTERS = LoraSpec(targets=("blocks.*.mixer.*",))


@dataclass(frozen=True)
class Stage:
    """A part of a conversion's training.

    name: of the stage. distil: what is learned. share: of the conversion's steps. trains: "new", the mixers that were
    replaced; "all", every parameter; or "lora", low-rank adapters alone, which are merged into the weights at the end.
    learning_rate: AdamW's peak. Matrices are Muon's, at `MATRIX_RATES`, unless the training says otherwise; adapters
        are AdamW's.
    only: of "new": patterns over the names of a replaced mixer's parameters, such as "feature.*"; none for all.
    lora: of "lora": rank, targets and the like.
    """

    name: str
    distil: Distil
    share: float = 1.0
    trains: Literal["new", "all", "lora"] = "all"
    learning_rate: float = 1e-3
    only: tuple[str, ...] = ()
    lora: LoraSpec = ADAPTERS


@dataclass(frozen=True)
class StageResult:
    """What came of a stage.

    steps, tokens: taken and read. seconds: of training, those before an interruption counted. first, last: the recorded
    loss at the beginning and at the end.
    """

    name: str
    steps: int
    tokens: int
    seconds: float
    first: float
    last: float


def transfer(
    teacher: Model,
    student: Model,
    tasks: Sequence[Task],
    stages: Sequence[Stage],
    *,
    layers: Sequence[int],
    budget: int,
    train_spec: TrainSpec | Mapping[str, Any] | None = None,
    seed: int = 0,
    folder: Path | None = None,
    resume: bool = False,
    progress: Any = None,
) -> list[StageResult]:
    """Train a student, in place, to give what its teacher gives; both stay where they are.

    teacher, student: of the same sizes and depth. tasks: the prompts that both read; of several, each step draws from
        one. stages: what is learned, one after the other. layers: those that were replaced.
    budget: steps of all stages together.
    train_spec: keys of a TrainSpec but `steps` that replace the defaults of every stage.
    folder: where the stages' checkpoints are kept, each stage in a folder of its own; with `resume` a stage that has
        ended is read, one that was interrupted goes on exactly as if it had not been, and the next ones follow.

    Raises InputError where there are fewer steps than the stages and tasks take, where a stage's patterns name nothing,
    and where a loss is not finite.
    """
    specs = check_stages(
        teacher, student, stages, layers=layers, budget=budget, tasks=len(tasks), train_spec=train_spec
    )
    was_training, training = teacher.training, [p.requires_grad for p in student.parameters()]
    teacher.eval()
    digest = fingerprint(teacher)
    found = []
    try:
        for number, (stage, spec) in enumerate(zip(stages, specs, strict=True)):
            found.append(
                _stage(
                    teacher, student, tasks, stage, tuple(layers), spec, digest, seed + number,
                    None if folder is None else folder / f"{number + 1}-{stage.name}", resume, progress,
                )
            )  # fmt: skip
    finally:
        teacher.train(was_training)
        for parameter, wanted in zip(student.parameters(), training, strict=True):
            parameter.requires_grad_(wanted)
        student.eval()
    return found


def check_stages(
    teacher: Model,
    student: Model,
    stages: Sequence[Stage],
    *,
    layers: Sequence[int],
    budget: int,
    tasks: int = 1,
    train_spec: TrainSpec | Mapping[str, Any] | None = None,
) -> list[TrainSpec]:
    """How each stage is trained. tasks: how many; the rest as `transfer` takes it. Raises InputError as it does."""
    given = dict(train_spec.model_dump(exclude_unset=True) if isinstance(train_spec, TrainSpec) else train_spec or {})
    if "steps" in given:
        raise InputError("train.steps: the budget says how many; leave steps out")
    counts = share_out(budget, stages, tasks)
    specs = [
        TrainSpec.parse({**_defaults(stage, steps), **given, "steps": steps}, "train")
        for stage, steps in zip(stages, counts, strict=True)
    ]
    for stage in stages:
        if stage.trains == "lora":
            where = f"stage {stage.name}: lora"
            adapter_targets(student, stage.lora, where)
            require_peft(where)
        else:
            _trained(student, stage, layers)
        if stage.distil.matrix:
            check_matrices(teacher, student, layers)
    return specs


def share_out(budget: int, stages: Sequence[Stage], tasks: int = 1) -> list[int]:
    """The steps of each stage, by their shares. Raises InputError where one would have fewer than there are tasks."""
    total = sum(stage.share for stage in stages)
    ends = [round(budget * sum(stage.share for stage in stages[: i + 1]) / total) for i in range(len(stages))]
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if min(counts, default=tasks) < tasks:
        least = max(-(-tasks * total // stage.share) for stage in stages) + len(stages) - 1
        names = ", ".join(stage.name for stage in stages)
        raise InputError(
            f"budget: {budget} steps are too few for the stages {names} on {tasks} task{'s' * (tasks > 1)}; give at "
            f"least {least:.0f}, or 0 to train nothing"
        )
    return counts


def refuse_divergence(where: str, result: TrainResult, folder: Path | None) -> None:
    """Raises InputError where a training has diverged; its checkpoints go, as other settings could not go on from them.

    where: for the message. folder: of the training, removed with the one above it where nothing else is in that.
    """
    if result.status != "diverged":
        return
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()
    raise InputError(f"{where}: {result.message}")


def _trained(student: Model, stage: Stage, layers: Sequence[int]) -> set[int]:
    """The ids of the parameters that a stage trains, but for adapters. Raises InputError where a pattern names none."""
    if stage.trains != "new":
        return {id(each) for each in student.parameters()} if stage.trains == "all" else set()
    named = [pair for i in layers for pair in mixer_of(student, i).named_parameters()]
    for pattern in stage.only:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            known = ", ".join(dict.fromkeys(name for name, _ in named))
            raise InputError(
                f"stage {stage.name}: {pattern!r} names no parameter of the new mixers, which have {known}"
            )
    return {id(each) for name, each in named if not stage.only or any(fnmatchcase(name, at) for at in stage.only)}


def check_matrices(teacher: Model, student: Model, layers: Sequence[int]) -> None:
    """Raises InputError where the mixers of a layer have no mixing matrices that can be compared."""
    for i in layers:
        for model in (teacher, student):
            if not getattr(mixer_of(model, i), "tells_mixing", False):
                know = [each.name for each in registry.entries("mixer") if each.factory.tells_mixing]  # type: ignore[attr-defined]
                raise InputError(
                    f"matrix: layer {i}, {model.spec.pattern()[i].mixer!r}, does not tell by which matrices it mixes "
                    f"tokens; those that do are {', '.join(know)}; else use attention"
                )
        old, new = (int(mixer_of(model, i).heads) for model in (teacher, student))  # type: ignore[arg-type]
        if old != new:
            raise InputError(f"matrix: layer {i} has {new} heads and the teacher's {old}; expected as many")


def _defaults(stage: Stage, steps: int) -> dict[str, Any]:
    return {
        "batch": 16,
        "learning_rate": stage.learning_rate,
        "matrix_learning_rate": MATRIX_RATES[stage.trains],
        "warmup": min(50, steps // 10),
        "final_fraction": 0.1,
        "log_every": max(1, min(20, steps // 10)),
        "compile": "off",
        **({"lora": stage.lora} if stage.trains == "lora" else {}),
    }


def _stage(
    teacher: Model,
    student: Model,
    tasks: Sequence[Task],
    stage: Stage,
    layers: tuple[int, ...],
    spec: TrainSpec,
    digest: str,
    seed: int,
    folder: Path | None,
    resume: bool,
    progress: Any,
) -> StageResult:
    wrapped: list[Task] = [task_of(teacher, task, stage.distil, layers, digest) for task in tasks]
    model: nn.Module = student
    if stage.distil.by_layer:
        model = Layers(student, layers, matrices=bool(stage.distil.matrix))
    elif stage.distil.hidden:
        model = Watched(student)
    trained = _trained(student, stage, layers)
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    result = train(model, wrapped, spec, seed=seed, folder=folder, resume=resume, progress=progress)
    refuse_divergence(f"stage {stage.name}", result, folder)
    history = result.history
    return StageResult(
        stage.name, result.step, int(history["tokens"].iloc[-1]), float(history["seconds"].iloc[-1]),
        float(history["loss"].iloc[0]), float(history["loss"].iloc[-1]),
    )  # fmt: skip
