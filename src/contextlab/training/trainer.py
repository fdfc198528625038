"""`train`: repeat `train_step` with a schedule, a record, checkpoints and an orderly end."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contextlab.errors import InputError
from contextlab.prompt import Prompt, Task
from contextlab.training import checkpoint, optim
from contextlab.training.distributed import Workers, generator, workers
from contextlab.training.schedule import Turns, clip, rate
from contextlab.training.spec import TrainSpec

Progress = Callable[[int, int, float], None]

COMPILE_FROM_STEPS = 20_000
"""`compile: auto` compiles CUDA runs of so many steps; an estimate: a minute to compile, 3 ms a step saved."""


@dataclass
class TrainState:
    """All that changes while training; `train_step` changes it in place.

    params: name -> parameter, the model's own tensors.
    optimizer: name -> tensor, see `training.optim`.
    generator: the source of prompts, on the parameters' device.
    step: steps done.
    failed: scalar, 1 once a gradient was not finite; from then on nothing is updated any more.
    """

    params: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    generator: torch.Generator
    step: int
    failed: Tensor

    @classmethod
    def start(cls, model: nn.Module, spec: TrainSpec, seed: int = 0, rank: int = 0) -> TrainState:
        """The state before the first step.

        seed, rank: choose the stream of prompts.
        """
        params: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        device = next(iter(params.values())).device
        muon = optim.matrices(model) if spec.optimizer == "muon" else ()
        failed = torch.zeros((), device=device)
        return cls(params, optim.init(params, muon), generator(seed, rank, device), 0, failed)


class Step(NamedTuple):
    """What a step reports: tensors on the device, so that nothing waits for them.

    loss: before the update, of the whole batch; of several processes each has its share, whose mean over them is
        the loss of the batch.
    gradient_norm: before clipping.
    tokens: that this process' prompts held.
    """

    loss: Tensor
    gradient_norm: Tensor
    tokens: int


@dataclass
class TrainResult:
    """What came of a training.

    history: a row every `log_every` steps: step, loss and gradient_norm (means over the steps since the last
        row), learning_rate, tokens (read since the start, by all processes), seconds (since the start).
    status: "finished", or "diverged" when a loss or gradient was not finite; the model then holds the last
        parameters that came from finite gradients.
    step: the last step, counted from 1; of a diverged training the step that failed.
    seconds: that this call took.
    steps_per_second: of this call.
    message: one line about a diverged training, or one that was resumed with another number of threads.
    checkpoint: folder of the last checkpoint.
    threads: of the last step on CPU.
    """

    history: pd.DataFrame
    status: Literal["finished", "diverged"]
    step: int
    seconds: float
    steps_per_second: float
    message: str = ""
    checkpoint: Path | None = None
    threads: int = 1


def train_step(model: nn.Module, task: Task, spec: TrainSpec, state: TrainState) -> Step:
    """Draw prompts and take one optimiser step: a function of its arguments, with `state` changed in place.

    model: whose parameters `state.params` are; it may be compiled or wrapped in DistributedDataParallel.
    task: the task at this step (a curriculum is applied by `train`).
    spec: batch, accumulate, precision, optimiser and schedule are read.
    """
    parameter = next(iter(state.params.values()))
    processes = torch.distributed.get_world_size() if isinstance(model, DistributedDataParallel) else 1
    prompt = task.sample(spec.batch // processes, state.generator, parameter.device)
    if parameter.dtype != torch.float32:
        prompt = prompt.to(parameter.dtype)
    loss, gradients = loss_and_gradients(model, task, spec, state.params, prompt)
    gradients, norm = clip(gradients, spec.clip)
    state.failed = torch.maximum(state.failed, (~norm.isfinite()).to(state.failed))
    fraction = rate(state.step, spec)
    optim.update(
        state.params,
        gradients,
        state.optimizer,
        learning_rate=spec.learning_rate * fraction,
        matrix_learning_rate=spec.matrix_learning_rate * fraction,
        betas=spec.betas,
        weight_decay=spec.weight_decay,
        skip=state.failed,
    )
    state.step += 1
    return Step(loss, norm, prompt.batch * prompt.length)


def loss_and_gradients(
    model: nn.Module, task: Task, spec: TrainSpec, params: Mapping[str, Tensor], prompt: Prompt
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole batch, a scalar, and its gradient by parameter's name, whatever the batch is cut into.

    model: wrapped in DistributedDataParallel, its gradient is that of the prompts of all processes together; the loss
        is this process' share, and the mean over the processes is the loss of all.
    spec: accumulate, the number of equal parts, and precision are read.
    params: name -> parameter, of any shape, which its gradient has.
    prompt: of this process.
    """
    parallel = isinstance(model, DistributedDataParallel)
    tensors, parts = list(params.values()), spec.accumulate
    size = prompt.batch // parts
    total = torch.zeros((), device=tensors[0].device)
    weights = _weights(model, prompt, parts) if parallel or parts > 1 else None
    gradients: list[Tensor] = []
    for i in range(parts):
        part = prompt if parts == 1 else prompt.rows(i * size, (i + 1) * size)
        # DDP averages over the processes when the last part's gradients arrive.
        early = parallel and i < parts - 1
        with model.no_sync() if early else nullcontext():  # type: ignore[operator]
            with _autocast(spec, tensors[0].device):
                prediction = model(part.inputs)
            loss = task.loss(prediction.to(tensors[0].dtype), part)
            if weights is not None:
                loss = loss * weights[i].to(loss.dtype)
            if parallel:
                loss.backward()  # DDP's hooks sit on the parameters' `grad`
            else:
                found = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
                gradients = list(torch._foreach_add(gradients, found)) if gradients else list(found)
        total = total + loss.detach()
    if parallel:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in tensors]
        for parameter in tensors:
            parameter.grad = None
    return total, dict(zip(params, gradients, strict=True))


def _weights(model: nn.Module, prompt: Prompt, parts: int) -> Tensor:
    """What the mean loss of each part counts for, [parts] float64: its share of all scored positions.

    Under DDP times the number of processes, because the gradients are averaged over them.
    """
    counts = prompt.scored.sum(1).view(parts, -1).sum(1).double()
    total, processes = counts.sum(), 1
    if isinstance(model, DistributedDataParallel):
        torch.distributed.all_reduce(total, group=model.process_group)
        processes = torch.distributed.get_world_size(model.process_group)
    return counts * processes / total.clamp_min(1)


def train(
    model: Any,
    task: Task | Sequence[Task],
    spec: TrainSpec | Mapping[str, Any] = TrainSpec(),  # noqa: B008 - a spec is immutable
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a model on a task, or on several; the model's parameters are changed in place.

    model: a `Model` built for the task's sizes.
    task: from which fresh prompts are drawn at each step; of several tasks of the same sizes, each step draws from the
        one whose turn it is (`spec.order`).
    spec: a TrainSpec or a mapping of its keys.
    seed: of the prompts.
    device: "auto", "cpu", "cuda"; None leaves the model where it is.
    folder: where checkpoints are kept; None keeps none.
    resume: go on from the folder's newest checkpoint, if there is one; on CPU, with as many threads,
        the result is bit for bit that of a training that was never stopped; with another number, a warning and the
        result's message say so. One that has ended is only read.
    progress: called as progress(step, steps, loss) each time that a row is recorded.

    Under `torchrun` the batch is split over the processes, and the first alone writes and shows progress.
    Ctrl-C or SIGTERM lets the current step end, writes a checkpoint, raises KeyboardInterrupt; a second one
    does not wait. Where Ctrl-C is ignored, as in a shell's background jobs, it stays so. `compile: auto` never compiles
    on CPU: a small transformer (width 64, depth 4, batch 128, 32 tokens) took 23 s to compile and was slower after it,
    147 ms a step against 112 (`benchmarks/training.py --compile`).

    Raises InputError (a model of other sizes, an impossible curriculum, a folder of another training, a
    damaged checkpoint) and ResourceError (no such device, a folder that cannot be written).
    """
    spec = TrainSpec.parse(spec, "train")
    given = [task] if isinstance(task, Task) else list(task)
    for each in given:
        _check_sizes(model, each)
    tasks = Turns(given, spec, seed)
    team = workers(device, model)
    if spec.batch % (team.count * spec.accumulate):
        raise InputError(
            f"train.batch: {spec.batch} prompts cannot be split over {team.count} processes x "
            f"{spec.accumulate} accumulated parts; use a multiple of {team.count * spec.accumulate}"
        )
    model.to(team.device).train()
    state = TrainState.start(model, spec, seed, team.rank)
    run = _Run(model, state, team, _identity(model, given, spec, seed, team), Path(folder) if folder else None)
    run.open(resume)
    if not run.status:
        _loop(run, tasks, spec, progress if team.first else None)
    return run.result()


def _loop(run: _Run, tasks: Turns, spec: TrainSpec, progress: Progress | None) -> None:
    """Steps until the end, with a row, a check and a checkpoint when they are due."""
    state, team = run.state, run.team
    compiled = spec.compile == "on" or (
        spec.compile == "auto" and team.device.type == "cuda" and spec.steps >= COMPILE_FROM_STEPS
    )
    model = team.wrap(torch.compile(run.model) if compiled else run.model)  # type: ignore[arg-type]
    eager_check = team.device.type == "cpu" and team.count == 1  # reading a loss costs nothing there
    with _stop_signals() as asked:
        while state.step < spec.steps:
            run.add(train_step(model, tasks(state.step), spec, state))
            last = state.step == spec.steps
            row_due = last or state.step % spec.log_every == 0
            save_due = last or (spec.checkpoint_every > 0 and state.step % spec.checkpoint_every == 0)
            # Several processes must stop at the same step, and asking them all is not free.
            stopping = asked() if team.count == 1 else row_due and team.any(asked())
            if row_due or save_due or stopping or eager_check:
                run.settle()
            if row_due or run.status:
                row = run.record(rate(state.step - 1, spec) * spec.learning_rate)
                if progress is not None:
                    progress(state.step, spec.steps, row["loss"])
            if last and not run.status:
                run.status = "finished"
            if save_due or stopping or run.status:
                run.save()
            if stopping:
                raise KeyboardInterrupt
            if run.status:
                return


@dataclass
class _Run:
    """A training in progress: its state, what was recorded of it, and where it is kept."""

    model: Any
    state: TrainState
    team: Workers
    identity: dict[str, Any]
    folder: Path | None
    rows: list[dict[str, float]] = field(default_factory=list)
    pending: list[list[float]] = field(default_factory=list)  # [loss, norm] of the steps since the last row
    fresh: list[Tensor] = field(default_factory=list)  # the same, not yet waited for
    tokens: int = 0
    status: str = ""
    earlier: float = 0.0
    threads: list[int] = field(default_factory=lambda: [torch.get_num_threads()])  # of its steps, in order
    first_step: int = 0
    began: float = field(default_factory=time.perf_counter)
    path: Path | None = None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def add(self, step: Step) -> None:
        self.fresh.append(torch.stack([step.loss, step.gradient_norm]))
        self.tokens += step.tokens * self.team.count

    def settle(self) -> None:
        """Wait for the steps' numbers; a first one that is not finite ends the training."""
        if self.fresh:
            known = len(self.pending)
            self.pending += self.team.mean(torch.stack(self.fresh)).tolist()
            bad = [i for i, pair in enumerate(self.pending[known:], known) if not math.isfinite(sum(pair))]
            if bad:
                self.status = "diverged"
                self.state.step -= len(self.pending) - 1 - bad[0]
                self.pending = self.pending[: bad[0] + 1]
            self.fresh = []

    def record(self, learning_rate: float) -> dict[str, float]:
        """Add the row of this step."""
        loss, norm = (sum(values) / len(self.pending) for values in zip(*self.pending, strict=True))
        row = {
            "step": self.state.step,
            "loss": loss,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            "tokens": self.tokens,
            "seconds": self.earlier + self.seconds,
        }
        self.rows.append(row)
        self.pending = []
        return row

    def open(self, resume: bool) -> None:
        """Prepare the folder, and go on from its newest checkpoint when asked to."""
        if self.folder is None:
            if resume:
                raise InputError("resume needs the folder that the training wrote; give folder=...")
            return
        if self.team.first:
            checkpoint.prepare(self.folder)
        self.team.wait()
        self.path = checkpoint.newest(self.folder)
        if self.path is None:
            return
        if not resume:
            raise InputError(f"{self.folder}: holds {self.path.name} already; resume it or choose another folder")
        found = checkpoint.read(self.path, self.model, self.identity, {**self.state.optimizer, **self._streams([])})
        for name, tensor in self.state.optimizer.items():
            tensor.copy_(found.tensors[name])
        self.state.generator.set_state(found.tensors[f"generator.{self.team.rank}"])
        self.state.step = self.first_step = found.record["step"]
        self.rows, self.pending = found.record["history"], found.record["pending"]
        self.tokens, self.status = found.record["tokens"], found.record["status"]
        self.earlier = found.record["seconds"]
        self._note_threads(found.record)

    def _note_threads(self, record: Mapping[str, Any]) -> None:
        """Say so where the steps before were made with another number of threads: sums are then rounded otherwise."""
        used = [*record.get("earlier_threads", ()), record.get("threads")]
        self.threads = [count for count in used if isinstance(count, int)]
        now = torch.get_num_threads()
        if not self.threads or (now != self.threads[-1] and not self.status):
            self.threads.append(now)
            if self.threads_message:
                warnings.warn(f"{self.path}: {self.threads_message}", stacklevel=4)

    @property
    def threads_message(self) -> str:
        """One line about a training that was made with several numbers of threads."""
        if len(self.threads) < 2:
            return ""
        return (
            f"trained with {', then with '.join(map(str, self.threads))} threads: last digits may differ from those of "
            "a training that was never stopped"
        )

    def save(self) -> None:
        """Write a checkpoint, by the first process."""
        if self.folder is None:
            return
        streams = self._streams(self.team.gather(self.state.generator.get_state()))
        if self.team.first:
            record = {
                "step": self.state.step,
                "status": self.status,
                "is": self.identity,
                "seconds": self.earlier + self.seconds,
                "tokens": self.tokens,
                "versions": {"torch": torch.__version__},
                "threads": self.threads[-1],
                "earlier_threads": self.threads[:-1],
                "pending": self.pending,
                "history": self.rows,
            }
            self.path = checkpoint.write(self.folder, self.model, {**self.state.optimizer, **streams}, record)
        self.team.wait()

    def _streams(self, states: list[Tensor]) -> dict[str, Tensor]:
        own = self.state.generator.get_state()
        return {f"generator.{rank}": each for rank, each in enumerate(states or [own] * self.team.count)}

    def result(self) -> TrainResult:
        seconds, done = self.seconds, self.state.step - self.first_step
        message = self.threads_message
        if self.status == "diverged":
            message = (
                f"the loss or its gradient was not finite at step {self.state.step}; the parameters are of "
                "the step before; try a smaller learning_rate or matrix_learning_rate, or a longer warmup"
            )
        history = pd.DataFrame(
            self.rows, columns=["step", "loss", "learning_rate", "gradient_norm", "tokens", "seconds"]
        )
        status: Literal["finished", "diverged"] = "diverged" if self.status == "diverged" else "finished"
        return TrainResult(
            history, status, self.state.step, seconds, done / seconds, message, self.path, self.threads[-1]
        )


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C or SIGTERM a wish to ask for; the second raises KeyboardInterrupt at once."""
    wishes: list[int] = []

    def note(number: int, frame: object) -> None:
        if wishes:
            raise KeyboardInterrupt
        wishes.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python lets only the main thread handle signals
        yield lambda: False
        return
    heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield lambda: bool(wishes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _autocast(spec: TrainSpec, device: torch.device) -> AbstractContextManager[Any]:
    wanted = spec.precision == "bfloat16" or (spec.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def _check_sizes(model: Any, task: Task) -> None:
    for name in ("read_in", "input_size", "output_size"):
        has, needs = getattr(model.spec, name), getattr(task, name)
        if has != needs:
            raise InputError(
                f"the model's {name} is {has!r}, the task needs {needs!r}; build it from spec.for_task(task)"
            )


def _identity(model: Any, tasks: Sequence[Task], spec: TrainSpec, seed: int, team: Workers) -> dict[str, Any]:
    """What makes this training the one it is, as plain data; a checkpoint of any other is not resumed."""
    plain = (str, int, float, bool, type(None))
    described = []
    for task in tasks:
        options = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
        options = {name: value if isinstance(value, plain) else repr(value) for name, value in options.items()}
        described.append({"kind": type(task).__name__, **options})
    return {
        "model": model.spec.model_dump(mode="json"),
        "task": described[0] if len(described) == 1 else described,
        "train": spec.model_dump(mode="json"),
        "seed": seed,
        "device": team.device.type,
        "processes": team.count,
    }
