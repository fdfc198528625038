"""`train`: repeat `train_step` with a schedule, a record, checkpoints and an orderly end."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from contextlab.allocator import keep_freed_memory
from contextlab.errors import InputError
from contextlab.models.answer import answer
from contextlab.models.stack import Model
from contextlab.progress import Steps as Progress
from contextlab.progress import shown
from contextlab.prompt import Task
from contextlab.threads import warn_of_spinning
from contextlab.training.adapters import adapted
from contextlab.training.distributed import Workers, workers
from contextlab.training.examples import Examples, fingerprints, without_known
from contextlab.training.freeze import frozen
from contextlab.training.layer_skip import check_layer_skip
from contextlab.training.parent import parent_watched
from contextlab.training.run import Run, TrainResult
from contextlab.training.schedule import Turns, rate
from contextlab.training.spec import TrainSpec
from contextlab.training.step import TrainState, train_step
from contextlab.training.until import Until

COMPILE_FROM_STEPS = 20_000
"""`compile: auto` compiles CUDA runs of so many steps; an estimate: a minute to compile, 3 ms a step saved."""


def train(
    model: Any,
    task: Task | Sequence[Task],
    spec: TrainSpec | Mapping[str, Any] = TrainSpec(),  # noqa: B008 - a spec is immutable
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    pause: int | None = None,
    progress: Progress | bool | None = None,
) -> TrainResult:
    """Train a model on a task, or on several; the model's parameters are changed in place.

    model: a `Model` built for the task's sizes.
    task: from which fresh prompts are drawn at each step, or a fixed set of them once (`spec.examples`); of several
        tasks of the same sizes, each step draws from the one whose turn it is (`spec.order`).
    spec: a TrainSpec or a mapping of its keys.
    seed: of the prompts.
    device: "auto", "cpu", "cuda"; None leaves the model where it is.
    folder: where checkpoints are kept; None keeps none.
    resume: go on from the folder's newest checkpoint, if there is one; on CPU, with as many threads,
        the result is bit for bit that of a training that was never stopped; with another number, a warning and the
        result's message say so. One that has ended is only read.
    pause: return after this step, from 1 on, with a checkpoint from which `resume` goes on as if it had never paused;
        None trains to the end.
    progress: called as progress(step, steps, loss) each time that a row is recorded; True shows a bar, False none, and
        None one where a person watches: in an interactive terminal or a notebook.

    Under `torchrun` the batch is split over the processes, and the first alone writes and shows progress.
    Ctrl-C or SIGTERM lets the current step end, writes a checkpoint, raises KeyboardInterrupt; a second one
    does not wait. Where Ctrl-C is ignored, as in a shell's background jobs, it stays so. In a process of
    `multiprocessing`, such as a pool's, the training ends so, too, when the process that started it is gone, and then
    this process does. `compile: auto` never compiles on CPU: a small transformer (width 64, depth 4, batch 128,
    32 tokens) took 23 s to compile and was slower after it, 147 ms a step against 112
    (`benchmarks/training.py --compile`).

    Raises InputError (a model of other sizes, an impossible curriculum, a folder of another training, a
    damaged checkpoint) and ResourceError (no such device, a folder that cannot be written).
    """
    spec = TrainSpec.parse(spec, "train")
    check_pause(pause)
    given = [task] if isinstance(task, Task) else list(task)
    for each in given:
        check_sizes(model, each)
    if spec.layer_skip is not None:
        if not isinstance(model, Model):
            raise InputError("layer_skip: a model learns so from its task; leave layer_skip or distill out")
        check_layer_skip(model.spec, spec.layer_skip)
    tasks = Turns(given, spec, seed)
    team = workers(device, model)
    if spec.batch % (team.count * spec.accumulate):
        raise InputError(
            f"train.batch: {spec.batch} prompts cannot be split over {team.count} processes x "
            f"{spec.accumulate} accumulated parts; use a multiple of {team.count * spec.accumulate}"
        )
    model.to(team.device).train()
    with frozen(model, spec.freeze), adapted(model, spec.adapter, seed) as adapters:
        state = TrainState.start(model, spec, seed, team.rank, adapters)
        who, place = identity(model, given, spec, seed, team), Path(folder) if folder else None
        run = Run(model, state, team, who, place, keep_all=spec.keep_checkpoints)
        try:
            run.open(resume)
            if not run.status:
                examples = None if spec.examples is None else Examples(tasks, spec, seed, team)
                set_goal(run, given, spec, examples)
                if team.device.type == "cpu":
                    warn_of_spinning(torch.get_num_threads())
                    keep_freed_memory()
                with shown(progress if team.first else False) as tell:
                    _loop(run, tasks, examples, spec, pause, tell)
        finally:
            state.leave()
    return run.result()


def _loop(
    run: Run, tasks: Turns, examples: Examples | None, spec: TrainSpec, pause: int | None, progress: Progress | None
) -> None:
    """Steps until the end or the pause, with a row, a check and a checkpoint when they are due."""
    state, team = run.state, run.team
    compiled = spec.compile == "on" or (
        spec.compile == "auto"
        and team.device.type == "cuda"
        and spec.steps >= COMPILE_FROM_STEPS
        and spec.layer_skip is None  # whose batches change their size from layer to layer
    )
    model = team.wrap(torch.compile(run.model) if compiled else run.model)  # type: ignore[arg-type]
    eager_check = team.device.type == "cpu" and team.count == 1  # reading a loss costs nothing there
    if spec.steps == 0 and not run.status:
        _as_it_is(run, tasks(0), spec)
        return
    with stop_signals() as asked:
        while state.step < min(spec.steps, pause or spec.steps):
            prompt = None if examples is None else examples(state.step)
            run.add(train_step(model, tasks(state.step), spec, state, prompt))
            row_due, save_due = due(state.step, spec)
            # Several processes must stop at the same step, and asking them all is not free.
            stopping = asked() if team.count == 1 else row_due and team.any(asked())
            pausing = state.step == pause
            if row_due or save_due or stopping or pausing or eager_check:
                run.settle()
            keep(run, spec, stopping or pausing, progress)
            if stopping:
                raise KeyboardInterrupt
            if run.status:
                return


@torch.no_grad()
def _as_it_is(run: Run, task: Task, spec: TrainSpec) -> None:
    """End a training of no steps, with a row of the loss on a batch."""
    parameter = next(run.model.parameters())
    prompt = task.sample(max(1, spec.batch // run.team.count), run.state.generator, parameter.device)
    if parameter.dtype != torch.float32:
        prompt = prompt.to(parameter.dtype)
    loss = task.loss(answer(run.model, prompt).to(parameter.dtype), prompt)
    run.fresh.append(torch.stack([loss, loss.new_zeros(())]))
    run.settle()
    run.record(0.0)
    run.status = run.status or "finished"
    run.save()


def set_goal(run: Run, tasks: Sequence[Task], spec: TrainSpec, examples: Examples | None) -> None:
    """Let a training end when it is good enough, or hopeless, by prompts not trained on. See `TrainSpec.until`."""
    if spec.until is not None:
        known = [] if examples is None else [fingerprints(each.inputs).unique() for each in examples.sets]
        run.until = Until(run.model, tasks, spec, run.team.device, [without_known(each) for each in known] or None)


def due(step: int, spec: TrainSpec) -> tuple[bool, bool]:
    """Whether a row and a checkpoint are due after so many steps."""
    last = step == spec.steps
    look = spec.until is not None and step % spec.until.every == 0
    save = last or (spec.checkpoint_every > 0 and step % spec.checkpoint_every == 0)
    return last or look or step % spec.log_every == 0, save


def keep(run: Run, spec: TrainSpec, stopping: bool, progress: Progress | None) -> None:
    """After a step: its row, the training's end and a checkpoint, as they are due; `run` is settled where one is."""
    step = run.state.step
    row_due, save_due = due(step, spec)
    run.look()
    if row_due or run.status:
        row = run.record(rate(step - 1, spec) * spec.learning_rate)
        if progress is not None:
            progress(step, spec.steps, row["loss"])
    if (step == spec.steps or run.stopped) and not run.status:
        run.status = "finished"
    if save_due or stopping or run.status:
        run.save()


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C or SIGTERM a wish to ask for; the second raises KeyboardInterrupt at once.

    That the process which started this one by `multiprocessing` is gone is such a wish, too.
    """
    wishes: list[int] = []

    def note(number: int, frame: object) -> None:
        if wishes:
            raise KeyboardInterrupt
        wishes.append(number)

    with parent_watched() as lost:
        if threading.current_thread() is not threading.main_thread():  # Python lets only that one handle signals
            yield lost
            return
        heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in heeded}
        try:
            yield lambda: bool(wishes) or lost()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def check_pause(pause: int | None) -> None:
    """Raises InputError where a training is to pause at what is no step."""
    if pause is not None and pause < 1:
        raise InputError(f"pause: expected a step from 1 on, or None, got {pause}")


def check_sizes(model: Any, task: Task, otherwise: str = "build it from spec.for_task(task)") -> None:
    """Raises InputError where the model was built for other sizes than the task's. otherwise: what to do then."""
    if getattr(model.spec, "pool", None) is not None:
        model.spec.check_one_prediction(task)
    for name in ("read_in", "input_size", "output_size"):
        has, needs = getattr(model.spec, name), getattr(task, name)
        if has != needs:
            raise InputError(f"the model's {name} is {has!r}, the task needs {needs!r}; {otherwise}")


def task_as_data(task: Task) -> dict[str, Any]:
    """What a task is, as plain data: its kind and all of its options."""
    plain = (str, int, float, bool, type(None))
    options = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    options = {name: value if isinstance(value, plain) else repr(value) for name, value in options.items()}
    return {"kind": type(task).__name__, **options}


def identity(model: Any, tasks: Sequence[Task], spec: TrainSpec, seed: int, team: Workers) -> dict[str, Any]:
    """What makes this training the one it is, as plain data; a checkpoint of any other is not resumed."""
    described = [task_as_data(task) for task in tasks]
    return {
        "model": model.spec.model_dump(mode="json"),
        "task": described[0] if len(described) == 1 else described,
        "train": spec.identity(),
        "seed": seed,
        "device": team.device.type,
        "processes": team.count,
    }
