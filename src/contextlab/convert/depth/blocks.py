"""Blocks of a model taken out, merged or repeated: the spec, and the model that has them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.convert.base import copied
from contextlab.convert.calibration import Calibration
from contextlab.errors import InputError
from contextlab.models import LayerSpec, Model, ModelSpec
from contextlab.models.answer import answer
from contextlab.models.changes import shortest_pattern


def of_layers(spec: ModelSpec, layers: Sequence[LayerSpec]) -> ModelSpec:
    """The spec with these layers in place of its own, as a pattern that repeats where it is one.

    Raises InputError where forms of linear layers are given by the number of their block.
    """
    for each in getattr(spec, "linear", ()):
        if re.search(r"blocks\.\d", each.layers):
            raise InputError(
                f"linear: {each.layers!r} names a block by number; change blocks before layers are stored otherwise"
            )
    pattern = shortest_pattern(layers)
    return ModelSpec.parse(
        {**spec.model_dump(), "layers": [layer.model_dump() for layer in pattern], "depth": len(layers)}
    )


def of_blocks(model: Model, spec: ModelSpec, order: Sequence[int]) -> Model:
    """A new model of this spec, whose blocks are those of `model` of these numbers, each of its own.

    A number that comes again is a block with the same weights, and weights of its own; one that layers share stays
    shared.
    """
    made = copied(model)
    blocks: list[nn.Module] = []
    pattern = model.spec.pattern()
    for place, number in enumerate(order):
        again = number in order[:place] and pattern[number].share is None
        blocks.append(copied(model).blocks[number] if again else made.blocks[number])
    set_blocks(made, spec, blocks)
    return made


def set_blocks(model: Model, spec: ModelSpec, blocks: Sequence[nn.Module]) -> None:
    """Make a model, in place, that of a spec which differs in its layers alone, with these blocks."""
    model.blocks = nn.ModuleList(blocks)
    model.spec = spec
    model._sources = spec.sources()
    model._read_above = {source for i, source in enumerate(model._sources) if source != i}


def may_go(spec: ModelSpec) -> list[int]:
    """The numbers of the blocks that others can do without: those whose keys no later block reads."""
    read = {source for i, source in enumerate(spec.sources()) if source != i}
    return [i for i in range(spec.depth) if i not in read]


def check_count(spec: ModelSpec, count: int, what: str = "count") -> None:
    """Refuse to take out so many blocks that none, or not enough that may go, are left. Raises InputError."""
    most = min(spec.depth - 1, len(may_go(spec)))
    if count > most:
        raise InputError(f"{what}: of {spec.depth} blocks at most {most} can go, got {count}")


def influences(model: Model, data: Calibration) -> list[float]:
    """How far each block turns the stream: 1 - the mean over tokens of cos(before, after) (2403.03853, eq. 1).

    Of a block that is applied many times (looped or shared) over all its times.
    """
    return list(turns(model, data, dict(enumerate(model.blocks))).values())


@torch.no_grad()
def read_watched(model: Model, data: Calibration, watchers: Iterable[tuple[nn.Module, Any]]) -> None:
    """Read the data with forward hooks on parts of a model. watchers: part and hook, (part, given, got) -> None."""
    hooks = [part.register_forward_hook(note) for part, note in watchers]
    try:
        for prompt, _ in data.on(model):
            answer(model, prompt)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def turns(model: Model, data: Calibration, parts: Mapping[int, nn.Module]) -> dict[int, float]:
    """How far each part turns what it is given first: 1 - the mean over tokens of cos(before, after), by its number.

    parts: modules of the model that give a tensor, or one first of several. One that is called many times, or stands
    under several numbers, is told over all its calls.
    """
    sums: dict[int, list[float]] = {}

    def note(part: nn.Module, given: tuple[Tensor, ...], got: Any) -> None:
        after = got if isinstance(got, Tensor) else got[0]
        cosines = torch.cosine_similarity(given[0].double(), after.double(), dim=-1)
        total = sums.setdefault(id(part), [0.0, 0.0])
        total[0] += float(cosines.sum())
        total[1] += cosines.numel()

    read_watched(model, data, [(part, note) for part in {id(each): each for each in parts.values()}.values()])
    return {number: 1 - sums[id(part)][0] / sums[id(part)][1] for number, part in parts.items()}
