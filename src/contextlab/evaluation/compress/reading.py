"""One pass of a model over prompts under a policy: what it predicts, what it holds, how long it takes."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contextlab.evaluation.compress.prompts import Drawn
from contextlab.evaluation.compress.settings import Setting, naming
from contextlab.evaluation.cost import PeakMemory
from contextlab.ops.kv import KVLayer
from contextlab.policies import Policy


@contextlib.contextmanager
def evaluating(models: Any) -> Iterator[None]:
    """The models in evaluation mode, and as they were before afterwards."""
    before = [(model, model.training) for model in models]
    for model, _ in before:
        model.eval()
    try:
        yield
    finally:
        for model, training in before:
            model.train(training)


class LayerReading(NamedTuple):
    """What a layer's policy left after a pass: bytes of one sequence, and those that its last token read (0: all)."""

    policy: Policy
    layer: KVLayer
    held_bytes: float
    read_bytes: float


@dataclass
class Reading:
    """One pass over prompts.

    logits: [B, t, V] of the question and what follows. prefill, decode: tokens a second. state_bytes: of one sequence.
    read_bytes: what its last token read of the keys and values, where a policy chooses that; 0 where none does.
    peak_bytes: what was taken beyond what the process held. layers: of those that a policy serves.
    """

    logits: Tensor
    prefill: float
    decode: float
    state_bytes: float
    read_bytes: float
    peak_bytes: float
    layers: list[LayerReading]


def read(setting: Setting, drawn: Drawn) -> Reading:
    """Read prompts up to the question, then the question, and the rest token by token."""
    model: Any = setting.model
    inputs, first, answer = drawn.prompt.inputs, drawn.question, drawn.answer
    last = inputs.shape[1]
    _release()
    watch = PeakMemory(inputs.device)
    policy = setting.policy(len(inputs))
    began = _now(inputs.device)
    if policy is not None:
        with naming(setting):
            policy.prepare(model, inputs, first)
    with naming(setting), contextlib.nullcontext() if policy is None else policy.attach(model):
        _, state = model.read(inputs[:, :first])
        middle, state_bytes, parts = _now(inputs.device), state.nbytes, []
        if answer > first:
            y, state = model.read(inputs[:, first:answer], state)
            parts.append(y)
            state_bytes = max(state_bytes, state.nbytes)
        after = _now(inputs.device)
        for t in range(answer, last):
            y, state = model.read(inputs[:, t : t + 1], state)
            parts.append(y)
        ended = _now(inputs.device)
        state_bytes = max(state_bytes, state.nbytes)
    peak, batch = watch.bytes(), len(inputs)
    left = [] if policy is None else policy.states(model, state)
    layers = [
        LayerReading(place.policy, place.layer, each.nbytes / batch, place.policy.bytes_read(each) / batch)
        for place, each in left
    ]
    return Reading(
        torch.cat(parts, 1),
        prefill=batch * first / (middle - began),
        decode=batch * (last - answer) / (ended - after),
        state_bytes=state_bytes / batch,
        read_bytes=sum(each.read_bytes for each in layers),
        peak_bytes=peak,
        layers=layers,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _release() -> None:
    """Give freed memory back to the system, so that the process' peak tells what is taken next (Linux with glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
