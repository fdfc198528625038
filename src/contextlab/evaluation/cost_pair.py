"""Two models in turns in one process: what the one takes in time of what the other takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from contextlab.errors import check_whole
from contextlab.evaluation.cost import DECODED, drawn_inputs, read_on, seconds_of

LEAST, MOST = 3, 25
"""Turns, whatever the time."""

Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Timed:
    """How long two models take for the same, by turns; each triple is first quartile, median, third quartile.

    what: "prefill", seconds to read `length` tokens at once; "decode", seconds a token after so many.
    batch: sequences at once. turns: how often each was timed.
    before, after: seconds. ratio: after over before in the same turn; below 1 is faster.
    """

    what: str
    length: int
    batch: int
    turns: int
    before: Quartiles
    after: Quartiles
    ratio: Quartiles


@torch.no_grad()
def time_pair(before: Any, after: Any, length: int = 256, *, seconds: float = 1.0, batch: int = 1) -> list[Timed]:
    """Time prefill and decoding of two models of the same sizes on one device, in turns, which one first alternating.

    before, after: models of ours, or adapters of transformers. length: tokens that are read, fewer where a model takes
        no more. seconds: how long to go on; there are at least `LEAST` turns, and `MOST` at most, after one that is
        not counted. batch: sequences at once.

    Returns prefill and decode; nothing of models that read whole sequences, or one token, only.
    """
    check_whole(length=(length, 1), batch=(batch, 1))
    models = (before, after)
    if any(getattr(model.spec, "reads_whole", False) for model in models):
        return []
    limits = [model.spec.max_length for model in models if _bounded(model)]
    decoded = min([DECODED, *(most // 2 for most in limits)])
    if not decoded:
        return []
    length = min([length, *(most - decoded for most in limits)])
    device = next(before.parameters()).device
    inputs = drawn_inputs(before, batch, length, device)
    modes = [model.training for model in models]
    prefill: list[list[float]] = [[], []]
    decode: list[list[float]] = [[], []]
    try:
        for model in models:
            model.eval()
            _turn(model, inputs, decoded, device)
        began, turn = time.perf_counter(), 0
        while turn < LEAST or (turn < MOST and time.perf_counter() - began < seconds):
            for place in (0, 1) if turn % 2 == 0 else (1, 0):
                read, step = _turn(models[place], inputs, decoded, device)
                prefill[place].append(read)
                decode[place].append(step)
            turn += 1
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    return [_timed(what, length, batch, *found) for what, found in (("prefill", prefill), ("decode", decode))]


def _bounded(model: Any) -> bool:
    """Whether a model reads only so many tokens."""
    return getattr(model.spec, "position", None) == "learned"


def _turn(model: Any, inputs: torch.Tensor, decoded: int, device: torch.device) -> tuple[float, float]:
    """Seconds of reading inputs [B, T] or [B, T, d], and of each token after them; the last token is what is read."""
    state: Any = None

    def reading() -> None:
        nonlocal state
        state = model.read(inputs)[1]

    read = seconds_of(reading, device)
    return read, seconds_of(lambda: read_on(model, inputs[:, -1:], state, decoded), device) / decoded


def _timed(what: str, length: int, batch: int, before: list[float], after: list[float]) -> Timed:
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    return Timed(what, length, batch, len(before), quartiles(before), quartiles(after), quartiles(ratios))


def quartiles(values: Sequence[float]) -> Quartiles:
    """First quartile, median and third quartile, of two values at least."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
