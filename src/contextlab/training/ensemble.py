"""`train_together`: several trainings of one form as one program, for a GPU that small models leave idle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contextlab.allocator import keep_freed_memory
from contextlab.errors import InputError
from contextlab.models.stacked import reasons_apart
from contextlab.prompt import Prompt, Task
from contextlab.training.distributed import workers
from contextlab.training.examples import Examples
from contextlab.training.foreign import is_foreign
from contextlab.training.freeze import frozen
from contextlab.training.run import Run, TrainResult
from contextlab.training.schedule import Turns
from contextlab.training.spec import TrainSpec
from contextlab.training.stack import Stack
from contextlab.training.step import TrainState
from contextlab.training.trainer import check_pause, check_sizes, due, identity, keep, set_goal, stop_signals

Progress = Callable[[int, int, int, float], None]


@dataclass(frozen=True)
class Member:
    """One of the trainings that go together: what `train` takes.

    model: a `Model` of its own, built for the task's sizes; its parameters are changed in place.
    task: a task or several.
    spec: a TrainSpec or a mapping of its keys.
    seed: of the prompts.
    folder: where its checkpoints are kept, its own; None keeps none.
    pause: after this step it goes no further, as in `train`; None trains it to its end.
    """

    model: Any
    task: Task | Sequence[Task]
    spec: TrainSpec | Mapping[str, Any] = TrainSpec()  # noqa: RUF009 - a spec is immutable
    seed: int = 0
    folder: str | Path | None = None
    pause: int | None = None


def train_together(
    members: Sequence[Member],
    *,
    device: str | torch.device | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[TrainResult]:
    """Train several models as one program: one forward, one backward and one update for all.

    What comes of each is what `train` makes of it alone, up to rounding: the same prompts, schedule, clipping and end.
    One that diverges is left as it was before, and the others go on; so do those that have more steps than others.
    Checkpoints are those of `train`, which may resume a member alone, and the other way round.

    members: models of equal specs, from whatever seeds; tasks of the same sizes, with other noise, say. Of the
        training specs optimizer (one of ours), freeze, accumulate and precision are equal, all else may differ.
    device: as for `train`; on a CPU it is slower than one after the other.
    resume: each goes on from its folder's newest checkpoint, where there is one.
    progress: called as progress(member, step, steps, loss) each time that a member's row is recorded.

    Returns a result for each. Seconds in the history are a member's share of the program's time. Ops run in PyTorch,
    and `compile` must not be "on". Ctrl-C and SIGTERM end as in `train`, with a checkpoint of each.

    Raises InputError as `train` does, and where the members differ in form, or have a part that several of which
    cannot be computed as one: `models.stacked.reasons_apart` tells.
    """
    with ExitStack() as freezing:
        for member in members:
            freezing.enter_context(frozen(member.model, TrainSpec.parse(member.spec, "train").freeze))
        return _train_together(_prepared(members, device, resume, progress))


def _train_together(trainings: list[_Training]) -> list[TrainResult]:
    with warnings.catch_warnings():
        # PyTorch loops over members in the few ops that it has no rule for, and says so once for each.
        warnings.filterwarnings("ignore", "There is a performance drop because", UserWarning)
        while going := [each for each in trainings if each.going]:
            for each in going:
                each.run.shared_by(len(going))
            stack = Stack([t.run.model for t in going], [t.run.state for t in going], [t.spec for t in going])
            try:
                _until_one_stops(stack, going)
            finally:
                stack.release()
    return [training.run.result() for training in trainings]


@dataclass
class _Training:
    """One member in progress. pause, progress: as `train` takes them, for this member."""

    run: Run
    spec: TrainSpec
    turns: Turns
    examples: Examples | None
    pause: int | None
    progress: Callable[[int, int, float], None] | None

    @property
    def going(self) -> bool:
        """Whether there are steps to make, of this call."""
        return not self.run.status and (self.pause is None or self.run.state.step < self.pause)

    def prompt(self) -> tuple[Task, Prompt]:
        """The task and the prompts of its next step."""
        state, parameter = self.run.state, next(iter(self.run.state.params.values()))
        task = self.turns(state.step)
        if self.examples is not None:
            prompt = self.examples(state.step)
        else:
            prompt = task.sample(self.spec.batch, state.generator, parameter.device)
        return task, prompt if parameter.dtype == torch.float32 else prompt.to(parameter.dtype)


def _prepared(
    members: Sequence[Member], device: str | torch.device | None, resume: bool, progress: Progress | None
) -> list[_Training]:
    if not members:
        raise InputError("train_together: expected a member or several, got none")
    specs = [TrainSpec.parse(member.spec, "train") for member in members]
    _check(members, specs)
    team = workers(device, members[0].model)
    if team.count > 1:
        raise InputError("train_together: one process trains all; start it without torchrun, or use train")
    if team.device.type == "cpu":
        keep_freed_memory()
    curricula: dict[Any, Turns] = {}
    known: dict[Task, Task] = {}
    prepared = []
    for m, (member, spec) in enumerate(zip(members, specs, strict=True)):
        tasks = [member.task] if isinstance(member.task, Task) else list(member.task)
        tasks = [_same(known, task) for task in tasks]
        for task in tasks:
            check_sizes(member.model, task)
        turns = Turns(tasks, spec, member.seed)
        # Members on the same tasks share what a curriculum makes of them: their losses are then taken in one call.
        alike = (*map(id, tasks), spec.steps, repr(spec.curriculum))
        turns.tasks = curricula.setdefault(alike, turns).tasks
        member.model.to(team.device).train()
        state = TrainState.start(member.model, spec, member.seed)
        who = identity(member.model, tasks, spec, member.seed, team)
        run = Run(
            member.model,
            state,
            team,
            who,
            Path(member.folder) if member.folder else None,
            keep_all=spec.keep_checkpoints,
        )
        run.open(resume and member.folder is not None)
        examples = None if spec.examples is None or run.status else Examples(turns, spec, member.seed, team)
        if not run.status:
            set_goal(run, tasks, spec, examples)
        prepared.append(_Training(run, spec, turns, examples, member.pause, _told(progress, m)))
    if resume and all(member.folder is None for member in members):
        raise InputError("resume needs the folders that the trainings wrote; give each member its folder")
    return prepared


def _same(known: dict[Task, Task], task: Task) -> Task:
    """The equal task that another member has, if there is one: what members share is asked once for all."""
    try:
        return known.setdefault(task, task)
    except TypeError:  # an option that has no hash
        return task


def _check(members: Sequence[Member], specs: Sequence[TrainSpec]) -> None:
    """Raises InputError where the members cannot be one program."""
    models = [member.model for member in members]
    if len({id(model) for model in models}) < len(models):
        raise InputError("train_together: two members have the same model; build one for each")
    for member in members:
        check_pause(member.pause)
    folders = [Path(member.folder).resolve() for member in members if member.folder is not None]
    if len(set(folders)) < len(folders):
        raise InputError("train_together: two members have the same folder; give each its own")
    reasons = reasons_apart(models[0])
    if reasons:
        raise InputError(f"train_together: {'; '.join(reasons)}; train each alone")
    for m, model in enumerate(models[1:], 1):
        if model.spec != models[0].spec:
            raise InputError(f"train_together: member {m}'s model has another spec than member 0's; give equal ones")
    for spec in specs:
        if is_foreign(spec):
            raise InputError(
                f"train_together: train.optimizer is {spec.optimizer}, which knows one model's parameters; expected "
                "muon or adamw, or train each alone"
            )
        if spec.adapter is not None:
            raise InputError(
                f"train_together: train.{spec.adapter.kind} puts adapters into one model; train each alone"
            )
        if spec.layer_skip is not None:
            raise InputError("train_together: layer_skip drops other layers in each model; train each alone")
    for name in ("optimizer", "freeze", "accumulate", "precision"):
        values = {getattr(spec, name) for spec in specs}
        if len(values) > 1:
            found = " and ".join(sorted(map(str, values)))
            raise InputError(f"train_together: train.{name} is {found}; expected one for all members")
    if any(spec.compile == "on" for spec in specs):
        raise InputError("train_together: train.compile is 'on'; expected 'auto' or 'off', which compile nothing here")


def _told(progress: Progress | None, member: int) -> Callable[[int, int, float], None] | None:
    return None if progress is None else lambda step, steps, loss: progress(member, step, steps, loss)


def _until_one_stops(stack: Stack, going: Sequence[_Training]) -> None:
    """Steps until a member has finished, paused or diverged; then fewer go on, in a smaller stack."""
    eager_check = stack.device.type == "cpu"  # reading a loss costs nothing there
    fresh: list[Tensor] = []
    with stop_signals() as asked:
        while all(training.going for training in going):
            drawn = [training.prompt() for training in going]
            fresh.append(stack.step([task for task, _ in drawn], [prompt for _, prompt in drawn]))
            for training, (_, prompt) in zip(going, drawn, strict=True):
                training.run.tokens += prompt.batch * prompt.length
            stopping = asked()
            pausing = [training.run.state.step == training.pause for training in going]
            if stopping or eager_check or any(pausing) or any(any(due(t.run.state.step, t.spec)) for t in going):
                numbers = torch.stack(fresh).cpu()  # [steps, M, 2], waited for once
                fresh = []
                for m, training in enumerate(going):
                    training.run.fresh += list(numbers[:, m])
                    training.run.settle()
            for training, paused in zip(going, pausing, strict=True):
                keep(training.run, training.spec, stopping or paused, training.progress)
            if stopping:
                raise KeyboardInterrupt
