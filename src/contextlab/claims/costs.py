"""Costs: what models take in time, by turns in one process, and in bytes, counted and really held."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import PositiveInt

from contextlab.claims.measures import Measure, built, measure, spec_of, told
from contextlab.errors import InputError
from contextlab.evaluation.cost import DECODED, drawn_inputs, read_on, seconds_of, static_cost
from contextlab.experiments import ExperimentSpec, Run
from contextlab.threads import torch_threads

What = Literal["prefill", "decode", "train"]
Models = dict[str, dict[str, Any]]
"""By name, each as in a recipe: {preset, options} or {spec}."""


class OfModels(Measure):
    """Base: of models that are not trained, at lengths."""

    models: Models
    lengths: tuple[int, ...]

    def names(self, spec: ExperimentSpec | None) -> Sequence[str]:
        if not self.models or not self.lengths:
            raise InputError(f"{'lengths' if self.models else 'models'}: expected at least one")
        for name, each in self.models.items():
            if spec_of(each, f"models.{name}").reads_whole and self.kind == "turns":
                raise InputError(f"models.{name}: reads whole prompts, and hands no state on")
        return list(self.models)


@measure("time")
@dataclass(frozen=True)
class Time(OfModels):
    """Seconds a token, of each model at each length, all of them in each turn; which is first goes round.

    On CPU they are seconds of processor time, which what else runs there does not add to.

    The metrics are prefill (reading so many tokens at once), decode (one by one after so many) and train (forward and
    backward, the mean of squared outputs as loss). One turn before the others is not counted.

    models: by name, as in a recipe.
    lengths: of the sequences.
    what: which of the metrics.
    turns: how often each is timed, at least six.
    tokens: of a batch, as many sequences as make it up; 0 for one sequence whatever its length.
    threads: of torch.
    """

    kind = "turns"

    models: Models
    lengths: tuple[PositiveInt, ...]
    what: tuple[What, ...] = ("prefill",)
    turns: PositiveInt = 15
    tokens: int = 0
    threads: PositiveInt = 1

    def rows(self, run: Run | None, device: torch.device) -> pd.DataFrame:
        models = built(self.models, device)
        todo = [(name, length, what) for what in self.what for length in self.lengths for name in models]

        def seconds(name: str, length: int, what: What) -> float:
            return TIMED[what](models[name], length, max(1, self.tokens // length), device)

        with torch_threads(self.threads):
            timed = by_turns(todo, seconds, self.turns)
        return told(
            {"model": name, "seed": turn, "metric": what, "length": length, "value": value}
            for turn, (name, length, what), value in timed
        )


@measure("size")
@dataclass(frozen=True)
class Size(OfModels):
    """What a model has and holds; the metrics are layers, parameters, flops (of reading a sequence) and state_bytes.

    The bytes are those of the state that the model holds after it has read so many tokens, in float32; they are the
    ones that it foretells, or there is an error. A model that reads whole prompts has none. Layers of a looped model
    are counted as often as they are done.

    models: by name, as in a recipe.
    lengths: of the context.
    """

    kind = "counted"

    models: Models
    lengths: tuple[PositiveInt, ...]

    @torch.no_grad()
    def rows(self, run: Run | None, device: torch.device) -> pd.DataFrame:
        found = []
        for name, model in built(self.models, device).items():
            for length in self.lengths:
                counts = dict(static_cost(model, length)[["metric", "value"]].itertuples(index=False))
                counts["layers"] = model.spec.depth * model.spec.loops
                if "state_bytes" in counts:
                    held = model.read(drawn_inputs(model, 1, length, device))[1].nbytes
                    if held != counts["state_bytes"]:
                        raise AssertionError(f"{name} holds {held} bytes, state_nbytes says {counts['state_bytes']}")
                found += [
                    {"model": name, "seed": 0, "metric": metric, "length": length, "value": float(value)}
                    for metric, value in counts.items()
                ]
        return told(found)


def taken(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a piece of work takes: on CPU of processor time, of all threads; elsewhere until it is done."""
    if device.type != "cpu":
        return seconds_of(work, device)
    began = time.process_time()
    work()
    return time.process_time() - began


def by_turns(
    todo: Sequence[tuple[Any, ...]], seconds: Callable[..., float], turns: int
) -> list[tuple[int, tuple[Any, ...], float]]:
    """(turn, what was timed, its seconds): all of `todo` in each turn, of which another one is first each time.

    seconds: times what it is given. One turn before the others is not counted.
    """
    found = []
    for turn in range(-1, turns):
        first = max(turn, 0) % len(todo)
        found += [(turn, each, seconds(*each)) for each in (*todo[first:], *todo[:first])]
    return found[len(todo) :]


def _prefill(model: Any, length: int, batch: int, device: torch.device) -> float:
    inputs = drawn_inputs(model, batch, length, device)
    with torch.no_grad():
        return taken(lambda: model.read(inputs), device) / (batch * length)


def _decode(model: Any, length: int, batch: int, device: torch.device) -> float:
    inputs = drawn_inputs(model, batch, length, device)
    with torch.no_grad():
        state = model.read(inputs)[1]
        return taken(lambda: read_on(model, inputs[:, -1:], state, DECODED), device) / (batch * DECODED)


def _train(model: Any, length: int, batch: int, device: torch.device) -> float:
    inputs = drawn_inputs(model, batch, length, device)

    def training() -> None:
        model.zero_grad()
        model(inputs).square().mean().backward()

    return taken(training, device) / (batch * length)


TIMED = {"prefill": _prefill, "decode": _decode, "train": _train}
