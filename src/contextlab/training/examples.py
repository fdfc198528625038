"""A finite training set: prompts that are drawn once and shown again, in another order each epoch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.memory import require_room
from contextlab.prompt import Prompt, Task
from contextlab.training.distributed import Workers, seeded
from contextlab.training.schedule import Turns
from contextlab.training.spec import TrainSpec

CHUNK = 256
"""Prompts that are drawn at once. A part of what fixes each of them: another number gives other sets."""
ON_DEVICE = 1 << 30
"""Bytes of a set that is kept on the GPU; a larger one stays in memory, and each batch is copied."""


def draw_examples(task: Task, count: int, seed: int = 0) -> Prompt:
    """The training set of a task: `count` prompts [count, T, ...], on the CPU.

    Prompt i is fixed by the task, the seed and i: it is row i % CHUNK of draw i // CHUNK. So a larger set begins with
    the smaller ones, and every device and process has the same.

    Raises ResourceError where they do not fit into memory, and InputError where the task's draws differ in shape.
    """
    drawn: list[Prompt] = []
    for start in range(0, count, CHUNK):
        prompt = task.sample(CHUNK, seeded(f"examples of {type(task).__name__}", seed, start // CHUNK))
        if not drawn:
            require_examples(count, prompt.nbytes / CHUNK)
        drawn.append(prompt)
        _require_same_form(task, drawn[0], prompt)
    return Prompt.join(drawn).rows(0, count)


def require_examples(count: int, each: float) -> None:
    """Refuse a set that is larger than the memory that is free. each: bytes of a prompt. Raises ResourceError."""
    require_room("train.examples", count, 2 * each)  # as draws, and as one


def _require_same_form(task: Task, first: Prompt, other: Prompt) -> None:
    name = type(task).__name__
    if first.length != other.length:
        raise InputError(
            f"train.examples: prompts of {name} have {first.length} tokens in one draw and {other.length} in another; "
            "expected one length; leave examples out"
        )
    if first.at is not None and (other.at is None or not torch.equal(first.at, other.at)):
        raise InputError(
            f"train.examples: the examples of {name} stand at other places in each draw; leave examples out"
        )


def fingerprints(inputs: Tensor) -> Tensor:
    """A whole number for each prompt's inputs, [B] int64: the same for the same inputs, else another.

    inputs: [B, T] int64 or [B, T, d] float. Two different prompts share one with a probability of about 2^-60.
    """
    bits = inputs.contiguous().view(torch.int32) if inputs.dtype == torch.float32 else inputs
    bits = bits.view(torch.int64) if bits.dtype == torch.float64 else bits
    bits = bits.flatten(1).to(torch.int64)
    bits = bits * 0x1E3779B97F4A7C15  # products and sums of int64 wrap around
    bits = bits ^ (bits >> 32)  # numbers that differ in high bits alone, as x and -x do, now differ in low ones, too
    odd = torch.randint(1 << 62, (bits.shape[1],), generator=torch.Generator().manual_seed(bits.shape[1])) * 2 + 1
    return (bits * odd.to(bits.device)).sum(1)


class Examples:
    """The prompts of each step of a training, from a fixed set of each task.

    An epoch shows each prompt of a set once, in an order of its own. A batch begins where the last one of its task
    ended, so that it may hold the end of an epoch and the beginning of the next. All of this follows from the seed and
    the step alone: a resumed training shows the same, and several processes each have their part of the same batch.

    turns: the tasks, and which of them a step is for.
    spec: examples, the number of prompts in each task's set, and batch are read.
    seed: of the sets and their orders.
    team: which processes share a batch.

    Raises as `draw_examples` does.
    """

    def __init__(self, turns: Turns, spec: TrainSpec, seed: int, team: Workers) -> None:
        assert spec.examples is not None
        self.turns, self.size, self.batch, self.seed, self.team = turns, spec.examples, spec.batch, seed, team
        self.sets = [draw_examples(each.task, self.size, seed) for each in turns.tasks]
        if sum(each.nbytes for each in self.sets) <= ON_DEVICE:
            self.sets = [each.to(team.device) for each in self.sets]
        self._orders: dict[int, tuple[int, Tensor]] = {}  # of each task: the last epoch asked for, and its order

    def __call__(self, step: int) -> Prompt:
        """This process' part of the prompts of a step, counted from 0: [batch / processes, T, ...]."""
        which, turn = self.turns.turn(step)
        share = self.batch // self.team.count
        chosen = self.indices(which, turn)[self.team.rank * share : (self.team.rank + 1) * share]
        found = self.sets[which]
        return found.take(chosen.to(found.inputs.device)).to(self.team.device)

    def indices(self, which: int, turn: int) -> Tensor:
        """Which prompts of a task's set are its `turn`-th batch (from 0), [batch] int64."""
        at, parts, missing = turn * self.batch, [], self.batch
        while missing:
            epoch, first = divmod(at, self.size)
            parts.append(self._order(which, epoch)[first : first + missing])
            at, missing = at + len(parts[-1]), missing - len(parts[-1])
        return torch.cat(parts)

    def _order(self, which: int, epoch: int) -> Tensor:
        if self._orders.get(which, (-1,))[0] != epoch:
            order = torch.randperm(self.size, generator=seeded("order", self.seed, which, epoch))
            self._orders[which] = (epoch, order)
        return self._orders[which][1]


def without_known(known: Tensor) -> Callable[[Prompt], Prompt]:
    """A function that leaves out of prompts those with one of these fingerprints [N] int64."""

    def apart(prompt: Prompt) -> Prompt:
        seen = torch.isin(fingerprints(prompt.inputs), known.to(prompt.inputs.device))
        return prompt.take((~seen).nonzero().squeeze(1)) if bool(seen.any()) else prompt

    return apart
