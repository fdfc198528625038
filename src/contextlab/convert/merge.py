"""`merge`: one model of several, or a deeper one of one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch

from contextlab.convert.base import Conversion
from contextlab.convert.calibration import Calibration
from contextlab.convert.methods import calibration_of, read_method, tasks_of
from contextlab.convert.saving import check_writable
from contextlab.convert.shrink import LENGTHS, Shrunk, Step, state_bytes
from contextlab.errors import InputError
from contextlab.models import Model
from contextlab.models.io import require_own
from contextlab.prompt import Task


def merge(
    models: Model | Sequence[Model],
    method: str | Conversion = "average",
    data: Calibration | Task | str | Sequence[Task | str] | None = None,
    *,
    base: Model | None = None,
    prompts: int = 64,
    seed: int = 0,
    transformers: bool = False,
    **options: Any,
) -> Shrunk:
    """Make one model of several of one spec, or a deeper one of one model.

    models: they are left as they are. method: of the family "merge", or of "growth" for one model, with options.
    data: tasks or text on which each model's loss is told. base: what the models were trained on from, for methods that
        want it. prompts, seed: of the data. options: of the method.
    transformers: refuse, before the work, what transformers could not hold (`Shrunk.save` writes it).

    Raises InputError on unknown methods and options, and models that do not fit together.
    """
    given = [models] if isinstance(models, torch.nn.Module) else list(models)
    if not given:
        raise InputError("merge: expected models, got none")
    for each in given:
        require_own(each, "merge")
    made = read_method(method, "merge", **options)
    if "models" in made.needs:
        made = dataclasses.replace(made, others=tuple(given[1:]), base=base)  # type: ignore[call-arg]
    elif made.family != "growth":
        raise InputError(f"merge: {made.name} makes one model smaller; use `contextlab shrink`")
    elif len(given) > 1 or base is not None:
        raise InputError(f"merge: {made.name} takes one model and no base; got {len(given)} models")
    planned = made.plan(given[0].spec)
    if transformers:
        check_writable(planned)
    read = calibration_of(data, tasks_of(data, given[0]), given[0], prompts, seed)
    began, before = time.perf_counter(), given[0].weight_nbytes
    found = made(given[0], read, torch.Generator().manual_seed(seed))
    step = Step(made.name, made.options, found.lines, before, found.model.weight_nbytes, time.perf_counter() - began)
    losses = {}
    if read is not None:
        read.check(given[0])
        losses = {f"model {i + 1}": read.loss(each) for i, each in enumerate(given)}
        losses["made"] = read.loss(found.model)
    state = state_bytes(given[0], found.model, LENGTHS)
    return Shrunk(found.model, [step], losses, "" if read is None else read.name, state=state)
