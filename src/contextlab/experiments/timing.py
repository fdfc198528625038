"""Work that is timed in part, and scaled to the whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from contextlab.models import Model
from contextlab.prompt import Prompt
from contextlab.training import TrainSpec, TrainState, train_step
from contextlab.training.step import loss_and_gradients

S = TypeVar("S")

MOST_REPEATS = 5
"""Of what is timed, within its share."""
FIRST_LENGTH, FASTER = 128, 8
"""Tokens that a model is timed on first, and how many times as much work the next timing may be."""


def timed(
    call: Callable[[S], object],
    sizes: Sequence[S],
    work: Callable[[S], float],
    seconds: float,
    overhead: float = 0.0,
    rate: float = math.inf,
) -> float:
    """Seconds that call(sizes[-1]) takes.

    sizes: from the smallest to the whole; the largest that takes `seconds` or less is timed, and scaled by its work.
    overhead: seconds that a call takes without any work; they are not scaled.
    rate: work a second at best.
    """

    def scaled(took: float, at: S, to: S) -> float:
        return overhead + max(took - overhead, work(at) / rate) * work(to) / work(at)

    spent = 0.0
    for i, size in enumerate(sizes):
        took = clock(call, size)
        spent += took
        if i + 1 < len(sizes) and scaled(took, size, sizes[i + 1]) > seconds:
            break
    again: list[float] = []
    while spent + took <= seconds and len(again) < MOST_REPEATS:
        again.append(clock(call, size))
        spent += again[-1]
    best = sum(again) / len(again) if again else took  # the first call is left out: it has more to do
    return best if size == sizes[-1] else scaled(best, size, sizes[-1])


def flops_a_second() -> float:
    """What this process can do at best, by a product of matrices."""
    matrix = torch.ones(512, 512)
    took = min(clock(lambda each: each @ each, matrix) for _ in range(4))
    return float(2 * 512**3 / took)


def clock(call: Callable[[S], object], size: S) -> float:
    """Seconds that call(size) takes, at least a nanosecond."""
    began = time.perf_counter()
    call(size)
    return max(time.perf_counter() - began, 1e-9)


@dataclass
class _Part:
    """A part of a task's prompts, in the place of the task, for `train_step`."""

    inputs: Tensor

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Prompt:
        there = self.inputs.to(device)
        none = torch.zeros(there.shape[:2], dtype=torch.int64, device=device)
        return Prompt(there, none, none.bool(), none)

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        return prediction.float().square().mean()


def learning_seconds(
    model: Model, whole: Model, inputs: Tensor, train: TrainSpec, seconds: float, rate: float = math.inf
) -> float:
    """Seconds to find the gradients of a batch of prompts like this one, [1, T] or [1, T, d].

    model: which is timed; its first call, which has more to do, has been made. whole: by whose FLOPs that is scaled.
    seconds: to be timed in. rate: FLOPs a second at best.
    """
    params = TrainState.start(model.train(), train).params
    device = next(model.parameters()).device
    length = inputs.shape[1]
    lengths = [n for n in (FIRST_LENGTH * FASTER**i for i in range(16)) if n < length]
    sizes = [(1, n) for n in [*lengths, length]] + [(n, length) for n in numbers(train.batch)[1:]]

    def learn(size: tuple[int, int]) -> None:
        count, tokens = size
        task = _Part(inputs[:, :tokens].repeat_interleave(count, 0))
        alone = train.model_copy(update={"batch": count, "accumulate": 1})
        prompt = task.sample(count, torch.Generator(), device)
        loss_and_gradients(model, task, alone, params, prompt)[0].item()  # type: ignore[arg-type]

    overhead = clock(learn, (1, min(2, length)))
    # Gradients take twice what the prediction takes.
    took = timed(learn, sizes, lambda size: float(max(1, 3 * size[0] * model.flops(size[1]))), seconds, overhead, rate)
    return took * whole.flops(length) / max(1, model.flops(length))


def updating_seconds(model: Model, whole: Model, inputs: Tensor, train: TrainSpec, seconds: float) -> float:
    """Seconds that a step takes however few tokens it reads; arguments are those of `learning_seconds`.

    inputs: [B, T] or [B, T, d].
    """
    alone = train.model_copy(update={"batch": 1, "accumulate": 1})
    state, task = TrainState.start(model.train(), alone), _Part(inputs[:, :2])
    took = timed(lambda size: train_step(model, task, alone, state).loss.item(), [1], float, seconds)  # type: ignore[arg-type]
    return took * whole.parameter_count / model.parameter_count


def numbers(most: int) -> list[int]:
    """1, 8, 64, ..., most."""
    return [*(FASTER**i for i in range(16) if FASTER**i < most), most]
