"""`Stack`: the parameters of several models of one form as one tensor, with gradients and updates for each member."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models.answer import readable, spread
from contextlab.models.stacked import call_together, untrained
from contextlab.prompt import Prompt, Task
from contextlab.training.optim import EPS, MOMENTUM, orthogonalize
from contextlab.training.schedule import rate
from contextlab.training.spec import TrainSpec
from contextlab.training.step import TrainState, autocast, part_weights


class _Place(NamedTuple):
    """Where a parameter stands in a member's row."""

    name: str
    shape: torch.Size
    start: int
    stop: int

    def of(self, rows: Tensor, skip: int = 0) -> Tensor:
        """Its part [M, *shape] of rows [M, ...] that lack the first `skip` columns: a view."""
        return rows[:, self.start - skip : self.stop - skip].view(len(rows), *self.shape)


class Stack:
    """M trainings of one form, a step of all at a time.

    A member's parameters and its optimiser's tensors are, while it is in the stack, views of one row of the stack's:
    `TrainState` and model always hold what they would if it trained alone, and may be saved and loaded as ever.

    models: M models of one form, on one device; `release` gives them tensors of their own again.
    states: theirs.
    specs: theirs; precision, optimizer and accumulate are the same in all.

    Raises InputError where the models' parameters differ in shape or are of several dtypes.
    """

    def __init__(self, models: Sequence[Any], states: Sequence[TrainState], specs: Sequence[TrainSpec]) -> None:
        self.models, self.states, self.specs = list(models), list(states), list(specs)
        first = states[0].params
        self.device = next(iter(first.values())).device
        for state in states[1:]:
            if {n: p.shape for n, p in state.params.items()} != {n: p.shape for n, p in first.items()}:
                raise InputError("models that train together have the same parameters; these differ in names or shapes")
        kinds = {parameter.dtype for state in states for parameter in state.params.values()}
        if len(kinds) > 1:
            raise InputError(f"models that train together have parameters of one dtype, got {_words(kinds)}")
        muon = [name for name in first if f"momentum.{name}" in states[0].optimizer]
        self.places, start = [], 0
        for name in [*(name for name in first if name not in muon), *muon]:
            self.places.append(_Place(name, first[name].shape, start, start + first[name].numel()))
            start += first[name].numel()
        self.adamw = [place for place in self.places if place.name not in muon]
        self.muon = [place for place in self.places if place.name in muon]
        self.split = self.muon[0].start if self.muon else start  # the first column that is Muon's
        self._gather(start, kinds.pop())
        self.buffers = untrained(self.models)
        self.loss_maps = True  # until a task's loss turns out not to

    def _gather(self, columns: int, dtype: torch.dtype) -> None:
        """Take over all tensors that change, and put views of the stack's in their places."""
        count = len(self.states)

        def rows(width: int) -> Tensor:
            return torch.empty(count, width, dtype=dtype, device=self.device)

        self.weights = rows(columns)
        self.first, self.second, self.momentum = rows(self.split), rows(self.split), rows(columns - self.split)
        self.steps = torch.zeros(count, dtype=torch.float32, device=self.device)
        self.failed = torch.zeros(count, device=self.device)
        for m, state in enumerate(self.states):
            for place in self.places:
                parameter = state.params[place.name]
                parameter.data = _moved(parameter.data, place.of(self.weights)[m])
                for kind, held, skip in self._held(place):
                    key = f"{kind}.{place.name}"
                    state.optimizer[key] = _moved(state.optimizer[key], place.of(held, skip)[m])
                if place.start < self.split:
                    key = f"step.{place.name}"
                    state.optimizer[key] = _moved(state.optimizer[key], self.steps[m])
            state.failed = _moved(state.failed, self.failed[m])
        # Leaves of the same memory: what is differentiated, and what is updated.
        self.leaves = {place.name: place.of(self.weights).detach().requires_grad_() for place in self.places}

    def _held(self, place: _Place) -> list[tuple[str, Tensor, int]]:
        if place.start < self.split:
            return [("exp_avg", self.first, 0), ("exp_avg_sq", self.second, 0)]
        return [("momentum", self.momentum, self.split)]

    def release(self) -> None:
        """Give each member tensors of its own again; the stack is of no use afterwards."""
        for state in self.states:
            for parameter in state.params.values():
                parameter.data = parameter.data.clone()
            state.optimizer.update({name: tensor.clone() for name, tensor in state.optimizer.items()})
            state.failed = state.failed.clone()
        self.leaves = {}

    def step(self, tasks: Sequence[Task], prompts: Sequence[Prompt]) -> Tensor:
        """One optimiser step of each member, by its own spec. Returns losses and gradient norms [M, 2].

        tasks, prompts: of each member at this step. A member that has failed is left as it is.
        """
        losses, gradients = self.gradients(tasks, prompts)
        norms = torch.linalg.vector_norm(gradients, dim=1)
        largest = [math.inf if spec.clip is None else spec.clip for spec in self.specs]
        scale = (gradients.new_tensor(largest) / (norms + 1e-6)).clamp(max=1.0)
        self.failed.copy_(torch.maximum(self.failed, (~norms.isfinite()).to(self.failed)))
        self._update(gradients * scale.unsqueeze(1))
        for state in self.states:
            state.step += 1
        return torch.stack([losses.to(norms.dtype), norms], 1)

    # ---- gradients ----

    def gradients(self, tasks: Sequence[Task], prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """The losses [M] and the gradients [M, N], columns as those of `weights`."""
        parts = self.specs[0].accumulate
        weights = None if parts == 1 else [part_weights(None, prompt, parts) for prompt in prompts]
        losses, total = self.weights.new_zeros(len(prompts)), torch.zeros_like(self.weights)
        for i in range(parts):
            cut = [prompt if parts == 1 else _part(prompt, i, parts) for prompt in prompts]
            found = self._losses(tasks, cut)
            if weights is not None:
                found = found * torch.stack([each[i] for each in weights]).to(found)
            leaves = list(self.leaves.values())
            each = torch.autograd.grad(found.sum(), leaves, allow_unused=True, materialize_grads=True)
            row = torch.cat([gradient.reshape(len(gradient), -1) for gradient in each], 1)
            total = row if parts == 1 else total.add_(row)
            losses = losses + found.detach()
        return losses, total

    def _losses(self, tasks: Sequence[Task], prompts: Sequence[Prompt]) -> Tensor:
        """[M]; members whose prompts differ in shape go one group after another."""
        groups: dict[torch.Size, list[int]] = {}
        for m, prompt in enumerate(prompts):
            groups.setdefault(prompt.inputs.shape, []).append(m)
        found: dict[int, Tensor] = {}
        for group in groups.values():
            tensors = {**self.leaves, **self.buffers}
            if len(group) < len(prompts):
                tensors = {name: tensor[group] for name, tensor in tensors.items()}
            losses = self._group([tasks[m] for m in group], [prompts[m] for m in group], tensors)
            found |= dict(zip(group, losses.unbind(), strict=True))
        return torch.stack([found[m] for m in range(len(prompts))])

    def _group(self, tasks: list[Task], prompts: list[Prompt], tensors: dict[str, Tensor]) -> Tensor:
        model, dtype = self.models[0], self.weights.dtype
        if any(readable(model, prompt) is not None for prompt in prompts):
            raise InputError("models that read prompts whole train together only where all end at the same place")
        with autocast(self.specs[0], self.device):
            answers = call_together(model, tensors, _answer, torch.stack([prompt.inputs for prompt in prompts]))
        answers = answers.to(dtype)
        if self.loss_maps and all(task is tasks[0] for task in tasks):
            try:
                return _mapped_loss(tasks[0], answers, prompts)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # PyTorch does not map it: it picks by values, say
                self.loss_maps = False
        return torch.stack([task.loss(y, prompt) for task, y, prompt in zip(tasks, answers, prompts, strict=True)])

    # ---- updates ----

    @torch.no_grad()
    def _update(self, gradients: Tensor) -> None:
        """AdamW and Muon as `optim.update` has them, each member with its own numbers: gradients [M, N]."""
        rows = []
        for state, spec in zip(self.states, self.specs, strict=True):
            now = rate(state.step, spec)
            rates = (spec.learning_rate * now, spec.matrix_learning_rate * now)
            rows.append((*rates, *spec.betas, spec.weight_decay))
        numbers = torch.tensor(rows, dtype=torch.float64).to(self.device, non_blocking=True)
        keep = (self.failed == 0).double()
        gradients = torch.where(keep.unsqueeze(1) > 0, gradients, 0)
        adamw, muon, beta1, beta2, decay = (column.unsqueeze(1) for column in numbers.unbind(1))
        column = keep.unsqueeze(1)
        self._adamw(gradients[:, : self.split], adamw, beta1, beta2, decay, column)
        if self.muon:
            self._muon(gradients[:, self.split :], muon, decay, column)

    def _adamw(
        self, gradients: Tensor, rates: Tensor, beta1: Tensor, beta2: Tensor, decay: Tensor, keep: Tensor
    ) -> None:
        """AdamW (1711.05101). The numbers are [M, 1] float64; keep is 0 where nothing may change."""
        dtype, weights = gradients.dtype, self.weights[:, : self.split]
        self.steps.add_(keep.squeeze(1).to(self.steps))
        steps = self.steps.double().clamp_min(1).unsqueeze(1)
        self.first.lerp_(gradients, ((1 - beta1) * keep).to(dtype))
        kept, added = 1 - (1 - beta2) * keep, (1 - beta2) * keep
        self.second.mul_(kept.to(dtype)).addcmul_(gradients, gradients * added.to(dtype))
        if any(spec.weight_decay for spec in self.specs):
            shrink = (1 - rates * decay * keep).to(dtype)
            for place in self.adamw:
                if len(place.shape) >= 2:
                    weights[:, place.start : place.stop].mul_(shrink)
        size = self.second.sqrt().div_((1 - beta2**steps).sqrt().to(dtype)).add_(EPS)
        weights.addcmul_((self.first / size), (-rates * keep / (1 - beta1**steps)).to(dtype))

    def _muon(self, gradients: Tensor, rates: Tensor, decay: Tensor, keep: Tensor) -> None:
        """Muon; matrices of one shape or its transpose, of all members, go through the iteration as one batch."""
        dtype = gradients.dtype
        found = torch.where(keep > 0, gradients, self.momentum)
        self.momentum.lerp_(found, 1 - MOMENTUM)
        ahead = torch.lerp(found, self.momentum, MOMENTUM)
        if any(spec.weight_decay for spec in self.specs):
            self.weights[:, self.split :].mul_((1 - rates * decay * keep).to(dtype))
        groups: dict[tuple[int, int], list[_Place]] = {}
        for place in self.muon:
            rows, columns = place.shape
            groups.setdefault((min(rows, columns), max(rows, columns)), []).append(place)
        step = (-rates * keep).to(dtype).unsqueeze(-1)  # [M, 1, 1]
        for group in groups.values():
            pieces = [place.of(ahead, self.split) for place in group]
            tall = [place.shape[0] > place.shape[1] for place in group]
            whole = torch.cat([piece.mT if t else piece for piece, t in zip(pieces, tall, strict=True)])
            directions = orthogonalize(whole).to(dtype).split(len(self.states))
            for place, direction, transposed in zip(group, directions, tall, strict=True):
                rows, columns = place.shape
                change = direction.mT if transposed else direction
                place.of(self.weights).addcmul_(change, step * math.sqrt(max(1.0, rows / columns)))


def _answer(model: Any, inputs: Tensor) -> Tensor:
    """As `models.answer` does where all of a prompt is read."""
    return spread(model.spec, model(inputs), inputs.shape[1])


def _mapped_loss(task: Task, answers: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The loss of each member [M] in one call of the task's; answers [M, B, T, k]."""
    each = [prompt.tensors() for prompt in prompts]
    stacked = {name: torch.stack([tensors[name] for tensors in each]) for name in each[0]}

    def one(answer: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return task.loss(answer, prompts[0].with_tensors(tensors))

    found: Tensor = torch.vmap(one)(answers, stacked)
    return found


def _part(prompt: Prompt, i: int, parts: int) -> Prompt:
    size = prompt.batch // parts
    return prompt.rows(i * size, (i + 1) * size)


def _moved(tensor: Tensor, place: Tensor) -> Tensor:
    """`place` with the values of `tensor`; both of one shape."""
    return place.copy_(tensor)


def _words(kinds: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
