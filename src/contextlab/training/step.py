"""`train_step`: one optimiser step, a function of its arguments, and the gradients that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contextlab.models.answer import answer, unwrapped
from contextlab.prompt import Prompt, Task
from contextlab.training import optim
from contextlab.training.adapters import Adapters
from contextlab.training.distributed import generator
from contextlab.training.foreign import Foreign, is_foreign
from contextlab.training.layer_skip import Skips
from contextlab.training.schedule import clip, rate
from contextlab.training.spec import TrainSpec


@dataclass
class TrainState:
    """All that changes while training; `train_step` changes it in place.

    params: name -> parameter, the model's own tensors.
    optimizer: name -> tensor, see `training.optim`.
    generator: the source of prompts, on the parameters' device.
    step: steps done.
    failed: scalar, 1 once a gradient was not finite; from then on nothing is updated any more.
    foreign: the optimiser where it is a class of another package, which keeps a state of its own.
    adapters: on the model, where these are trained.
    """

    params: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    generator: torch.Generator
    step: int
    failed: Tensor
    foreign: Foreign | None = None
    adapters: Adapters | None = None

    @classmethod
    def start(
        cls, model: nn.Module, spec: TrainSpec, seed: int = 0, rank: int = 0, adapters: Adapters | None = None
    ) -> TrainState:
        """The state before the first step; parameters that need no gradient are not among those trained.

        seed, rank: choose the stream of prompts. adapters: which are on the model.
        """
        params: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        device = next(iter(params.values())).device
        failed = torch.zeros((), device=device)
        if is_foreign(spec):
            return cls(params, {}, generator(seed, rank, device), 0, failed, Foreign(params, spec), adapters)
        muon = optim.matrices(model) if spec.optimizer == "muon" else ()
        return cls(params, optim.init(params, muon), generator(seed, rank, device), 0, failed, None, adapters)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the model is as it is to be used, measured and saved; afterwards training goes on as it stood."""
        with ExitStack() as stack:
            if self.foreign is not None:
                stack.enter_context(self.foreign.in_use())
            if self.adapters is not None:
                stack.enter_context(self.adapters.merged())
            yield

    def plain(self) -> AbstractContextManager[None]:
        """Within, the model has the form that it is saved in."""
        return nullcontext() if self.adapters is None else self.adapters.plain()

    def leave(self) -> None:
        """Leave the parameters as they are to be used: nothing is trained any more."""
        if self.foreign is not None:
            self.foreign.leave()

    def pack(self) -> tuple[dict[str, Tensor], Any]:
        """What a checkpoint holds beside `optimizer`: tensors of any shape by name, and plain data."""
        tensors, plain = ({}, None) if self.foreign is None else self.foreign.pack()
        if self.adapters is not None:
            # The weights below are others while the adapters are merged.
            tensors |= {name: each.clone() for name, each in self.adapters.tensors().items()}
        return tensors, plain

    def unpack(self, tensors: Mapping[str, Tensor], plain: Any) -> None:
        """Take over what `pack` gave: tensors of any shape. Raises InputError where a part is missing."""
        if self.adapters is not None:
            self.adapters.load(tensors)
        if self.foreign is not None:
            self.foreign.unpack(tensors, plain)

    def write(self, folder: Path) -> None:
        """Write what belongs beside the model's own files."""
        if self.adapters is not None:
            self.adapters.write(folder)


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


def train_step(model: nn.Module, task: Task, spec: TrainSpec, state: TrainState, prompt: Prompt | None = None) -> Step:
    """Draw prompts and take one optimiser step: a function of its arguments, with `state` changed in place.

    model: whose parameters `state.params` are; it may be compiled or wrapped in DistributedDataParallel.
    task: the task at this step (a curriculum is applied by `train`).
    spec: batch, accumulate, precision, optimiser and schedule are read.
    prompt: this process' prompts, of a fixed set, on the parameters' device; None draws them.
    """
    parameter = next(iter(state.params.values()))
    if prompt is None:
        processes = torch.distributed.get_world_size() if isinstance(model, DistributedDataParallel) else 1
        prompt = task.sample(spec.batch // processes, state.generator, parameter.device)
    if parameter.dtype != torch.float32:
        prompt = prompt.to(parameter.dtype)
    skips = None
    if spec.layer_skip is not None:
        skips = Skips.drawn(unwrapped(model).spec, spec, prompt.batch, state.step, state.generator)
    loss, gradients = loss_and_gradients(model, task, spec, state.params, prompt, skips)
    gradients, norm = clip(gradients, spec.clip)
    state.failed = torch.maximum(state.failed, (~norm.isfinite()).to(state.failed))
    fraction = rate(state.step, spec)
    if state.foreign is None:
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
    elif not state.failed.item():  # another's optimiser cannot be told to skip: a GPU is waited for
        state.foreign.step(gradients, spec.learning_rate * fraction)
    state.step += 1
    return Step(loss, norm, prompt.batch * prompt.length)


def loss_and_gradients(
    model: nn.Module,
    task: Task,
    spec: TrainSpec,
    params: Mapping[str, Tensor],
    prompt: Prompt,
    skips: Skips | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole batch, a scalar, and its gradient by parameter's name, whatever the batch is cut into.

    model: wrapped in DistributedDataParallel, its gradient is that of the prompts of all processes together; the loss
        is this process' share, and the mean over the processes is the loss of all.
    spec: accumulate, the number of equal parts, and precision are read.
    params: name -> parameter, of any shape, which its gradient has.
    prompt: of this process. skips: which of its prompts skip which layers, and what early answers count.
    """
    parallel = isinstance(model, DistributedDataParallel)
    tensors, parts = list(params.values()), spec.accumulate
    size = prompt.batch // parts
    total = torch.zeros((), device=tensors[0].device)
    weights = part_weights(model, prompt, parts) if parallel or parts > 1 else None
    gradients: list[Tensor] = []
    for i in range(parts):
        part = prompt if parts == 1 else prompt.rows(i * size, (i + 1) * size)
        # DDP averages over the processes when the last part's gradients arrive.
        early = parallel and i < parts - 1
        with model.no_sync() if early else nullcontext():  # type: ignore[operator]
            with autocast(spec, tensors[0].device):
                within = None if skips is None else skips.within(slice(i * size, (i + 1) * size))
                prediction = answer(model, part, within).to(tensors[0].dtype)
            loss = task.loss(prediction, part) if skips is None else skips.loss(task, prediction, within, part)
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


def part_weights(model: nn.Module | None, prompt: Prompt, parts: int) -> Tensor:
    """What the mean loss of each part counts for, [parts] float64: its share of all scored positions.

    Under DDP times the number of processes, because the gradients are averaged over them.
    """
    counts = prompt.scored.sum(1).view(parts, -1).sum(1).double()
    total, processes = counts.sum(), 1
    if isinstance(model, DistributedDataParallel):
        torch.distributed.all_reduce(total, group=model.process_group)
        processes = torch.distributed.get_world_size(model.process_group)
    return counts * processes / total.clamp_min(1)


def autocast(spec: TrainSpec, device: torch.device) -> AbstractContextManager[Any]:
    """The precision that predictions are computed in (`spec.precision`)."""
    wanted = spec.precision == "bfloat16" or (spec.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()
