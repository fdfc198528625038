"""What a layer's state holds, in parts that can be measured alike for every mixer: matrices of heads, and vectors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from contextlab.evaluation.intervals import Z95, alike_half, share_bounds
from contextlab.inspect.capturing import capture, states_after
from contextlab.inspect.layout import STATE, Plan, sites
from contextlab.inspect.probe import Subject
from contextlab.mixers.base import Mixer, state_growth
from contextlab.state import State

RECENT = frozenset({"conv", "shift", "tokens", "past", "last", "recent", "waiting", "start", "count", "max", "has"})
"""Names of what a state keeps beside its memory: the last tokens as they came, and counts."""
SUMMARIES = frozenset({"compressed", "cores"})
"""Names of what stands beside keys and values and is made of them."""
UNNAMED = frozenset({"attended", "local", "memory", "layers"})
"""Fields whose name adds nothing to the names of what they hold."""


class Part(NamedTuple):
    """A part of a state.

    name: what it is called there. value: float, [B, H, n, D], a matrix for each head (of keys and values a row a
    token), or [B, D], a vector. tokens: whether its rows are tokens.
    """

    name: str
    value: Tensor
    tokens: bool = False

    @property
    def matrix(self) -> bool:
        return self.value.ndim == 4

    @property
    def words(self) -> str:
        """What it is, with its sizes."""
        if self.tokens:
            return f"{self.name} of {self.value.shape[-1]} numbers"
        if self.matrix:
            return f"{self.name} {self.value.shape[2]} x {self.value.shape[3]}"
        return f"{self.name} of {self.value.shape[1]} numbers"


def state_sites(model: nn.Module) -> dict[str, nn.Module]:
    """Site -> mixer, of the layers that keep a state which every token goes into."""
    known = sites(model, named=False)
    return {
        name: layer.mixer
        for layer in Plan(model).layers
        if (name := f"{layer.name}.mixer.{STATE}") in known
        and layer.mixer is not None
        and getattr(layer.block, "router", None) is None
    }


def keeps_its_size(mixer: nn.Module | None) -> bool:
    """Whether a mixer's state has a size that does not depend on the text, and is one."""
    return isinstance(mixer, Mixer) and state_growth(mixer) == "constant"


def no_states(subject: Subject) -> str:
    """Why nothing is told of a model's states; "" where it has some."""
    if subject.model.spec.pool is not None or not state_sites(subject.model):
        return "no layer of this model keeps a state that every token goes into"
    return ""


def states_over(
    model: nn.Module, inputs: Tensor, places: Sequence[int], names: Sequence[str]
) -> dict[str, list[State]]:
    """Site -> the layer's states after the tokens at rising places. inputs: [B, T] or [B, T, d]."""
    with capture(model, names) as taken:
        states_after(model, inputs, places)
    return {name: taken.calls(name) for name in names}


def parts(state: State, mixer: nn.Module | None = None) -> list[Part]:
    """The parts of a layer's state that hold its memory.

    Keys and values are one matrix a head, a token a row: of windows those that are still held. Other tensors of real
    numbers with two sides of at least three below the heads' are matrices (further sides are put to the heads'), the
    rest vectors. What a mixer keeps of its last tokens as they came (of a short convolution, of a segment that is not
    complete) is left out, unless it is all that there is.
    mixer: whose state it is; of a tensor [B, H, n] it tells whether H are its heads.
    """
    heads = getattr(mixer, "heads", None)
    everything = [part for name, value in _named(state) if (part := _part(name, value, heads)) is not None]
    memory = [part for part in everything if RECENT.isdisjoint(part.name.split("."))]
    return memory or everything


def _named(state: State, before: str = "") -> Iterator[tuple[str, Any]]:
    """(name, tensor) of all that a state holds; (name, (tensor,)) of rows that are tokens."""
    cached = getattr(state, "cached", None)
    if cached is not None:
        keys, values = cached()[:2]
        yield f"{before}keys", (keys.transpose(1, 2),)
        yield f"{before}values", (values.transpose(1, 2),)
        return
    for each in dataclasses.fields(state):
        if each.metadata.get("static"):
            continue
        inside, name = getattr(state, each.name), before if each.name in UNNAMED else f"{before}{each.name}"
        if isinstance(inside, Tensor) and each.name in ("keys", "values"):  # [B, T, H, D]
            yield name, (inside.transpose(1, 2),)
        elif each.name not in SUMMARIES:
            yield from _of(inside, name)


def _of(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, State):
        yield from _named(value, f"{name}." if name and not name.endswith(".") else name)
    elif isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _of(inner, f"{name}{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _of(inner, f"{name}{number}." if isinstance(inner, State) else f"{name}.{number}")


def _part(name: str, value: Any, heads: int | None) -> Part | None:
    tokens = isinstance(value, tuple)
    value = value[0] if tokens else value
    if not value.is_floating_point() or not value.numel():
        return None
    if tokens:
        return Part(name, value, True)
    if value.ndim > 4:  # [B, H, ..., K, V]
        value = value.flatten(1, -3)
    sides = value.shape[-2:]
    if value.ndim == 3 and value.shape[1] != heads and min(sides) > 2:
        return Part(name, value[:, None])
    if value.ndim == 4 and min(sides) > 2:
        return Part(name, value)
    return Part(name, value.reshape(len(value), -1))


def spread_places(length: int, count: int) -> list[int]:
    """So many places of a text, evenly, the last one included; in rising order."""
    return sorted(
        {round(place) for place in torch.linspace(length / count - 1, length - 1, count).clamp_min(0).tolist()}
    )


def mean_of(values: Tensor, bounds: tuple[float, float] | None = None) -> dict[str, Any]:
    """A mean over prompts with its 95% interval, as columns of a probe's row. values: [N], nan where there is none.

    bounds: between which all values lie; of (0, 1) the interval is Wilson's.
    """
    known = values[~values.isnan()].double()
    mean, count = known.mean().item(), len(known)
    if count < 2:
        return {"value": mean, "n": count}
    half = Z95 * known.std().item() / count**0.5
    if bounds == (0.0, 1.0):
        ends = share_bounds(*(np.array([each]) for each in (mean, half, count)))
        low, high = (float(end[0]) for end in ends)
    else:
        half = half or alike_half(mean, count, bounds)
        least, most = bounds or (-math.inf, math.inf)
        low, high = max(least, mean - half), min(most, mean + half)
    return {"value": mean, "ci_low": low, "ci_high": high, "n": count}
