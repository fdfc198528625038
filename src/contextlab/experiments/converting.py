"""Models of a recipe that are conversions of trained ones (`convert:`): planned from specs, then made."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from contextlab.convert.base import Change, Conversion
from contextlab.convert.conversion import differing, read_target
from contextlab.convert.methods import calibration_of
from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec, build_model
from contextlab.models.outline import without_memory
from contextlab.models.start_plan import Plan, block_of, saved_tensors
from contextlab.prompt import Task

PROMPTS = 64
"""Of each task, on which output projections are fitted and other conversions are calibrated."""


def converted_spec(text: str, source: ModelSpec) -> ModelSpec:
    """What a conversion makes of a model, found without weights. Raises InputError where it is none, or cannot be."""
    try:
        method = _method(text)
        return method.plan(source)
    except InputError as error:
        raise InputError(f"convert {text!r}: {error}") from None


def _method(text: str) -> Conversion:
    method = read_target(text)
    if method.places_by_data or getattr(method, "count", None) is not None:
        raise InputError("which layers it changes would be found by data; give it layers, such as layers=half")
    return method


def converted_model(
    text: str, source: Model, planned: ModelSpec, tasks: Sequence[Task], seed: int
) -> tuple[Model, list[Change]]:
    """The converted model, which is of the spec `planned`, and what was done to each layer.

    tasks: on whose prompts it is calibrated. seed: of these and of what is new.
    """
    method = _method(text)
    data = calibration_of(None, tasks, source, PROMPTS, seed)
    made = method(source, data, torch.Generator().manual_seed(seed))
    if made.model.spec != planned:
        raise InputError(f"convert {text!r}: made another model than its plan; use contextlab convert")
    return made.model, made.lines


def conversion_plan(text: str, spec: ModelSpec, source: ModelSpec) -> Plan:
    """What becomes of the tensors, no weights read: all but those of the converted layers' mixers are carried over."""
    own, theirs = (saved_tensors(without_memory(each) or build_model(each)) for each in (spec, source))
    changed = {f"blocks.{i}.mixer." for i in differing(source, spec)}

    def of_mixer(name: str) -> bool:
        return block_of(name) is not None and any(name.startswith(part) for part in changed)

    carried = {name: name for name in own if not of_mixer(name)}
    return Plan(
        carried,
        (),
        tuple(name for name in theirs if not of_mixer(name) and name not in carried),
        sizes=tuple({name: each.numel() for name, each in part.items()} for part in (own, theirs)),  # type: ignore[arg-type]
        converted=tuple(name for name in own if of_mixer(name)),
        by=text,
    )


def told(changes: Sequence[Change]) -> list[str]:
    """What was done to each layer, a line each."""
    return [
        f"{each.layer}: {each.did}" + (f" (error of {each.of} {each.error:.1%})" if each.error else "")
        for each in changes
    ]
