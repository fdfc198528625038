"""What a model that starts from another changes of that one's blocks: some removed, some with other mixers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import Field, NonNegativeInt, model_validator

from contextlab import registry
from contextlab.errors import InputError
from contextlab.models.spec import LayerSpec, ModelSpec
from contextlab.spec import Spec, describe


class ReplaceSpec(Spec):
    """Other mixers in some blocks of a model.

    layers: numbers of blocks of the model as it is, "0,2" or [0, 2]; "all"; or "half": every second one, 0, 2, 4, ...
    mixer: registered name; None leaves each block its own, with other options.
    options: of the mixer. What the block says now of options that the mixer has, too, stays unless it is named here.
    """

    layers: str | tuple[NonNegativeInt, ...] = "all"
    mixer: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _something(self) -> ReplaceSpec:
        if self.mixer is None and not self.options:
            raise InputError("replace: expected mixer (a registered name) or options of the mixers there, or both")
        if not self.layers:
            raise InputError("replace.layers: expected all, half or numbers such as 0,2, got none")
        if self.mixer is not None:
            registry.lookup("mixer", self.mixer)
        return self


def chosen_layers(wanted: str | Sequence[int], depth: int) -> list[int]:
    """The numbers of the layers that are meant, in order: "all", "half" (0, 2, 4, ...), "0,2" or [0, 2].

    depth: how many there are. Raises InputError for a word that is none of these, or a layer that is not there.
    """
    if wanted == "all":
        return list(range(depth))
    if wanted == "half":
        return list(range(0, depth, 2))
    parts = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        raise InputError(f"layers: expected all, half or numbers such as 0,2, got {describe(wanted)}") from None
    for number in numbers:
        if not 0 <= number < depth:
            raise InputError(f"layers: {number} is not among the {depth} layers; expected 0 to {depth - 1}")
    return sorted(set(numbers))


def changed_blocks(
    spec: ModelSpec, replace: Sequence[ReplaceSpec] = (), remove: Collection[int] = ()
) -> tuple[ModelSpec, list[int]]:
    """The spec without some of its blocks and with other mixers in some; and which blocks stay, in order.

    remove: numbers of blocks, counted from 0 in the spec as it is, as are those of `replace`.

    Raises InputError for a block that is not there, that is removed and replaced, or where none would be left.
    """
    pattern: list[LayerSpec] = spec.pattern()
    for number in remove:
        if not 0 <= number < spec.depth:
            raise InputError(f"remove: {number} is not among the {spec.depth} blocks; expected 0 to {spec.depth - 1}")
    kept = [number for number in range(spec.depth) if number not in set(remove)]
    if not kept:
        raise InputError(f"remove: all {spec.depth} blocks; at least one must stay")
    numbered = next((each.layers for each in spec.linear if re.search(r"blocks\.\d", each.layers)), None)
    if remove and numbered is not None:
        raise InputError(
            f"remove: the form of {numbered!r} is given by a block's number, which would be another's then"
        )
    for each in replace:
        try:
            numbers = chosen_layers(each.layers, spec.depth)
        except InputError as error:
            raise InputError(f"replace.{error}") from None
        if each.layers not in ("all", "half") and (both := [number for number in numbers if number not in kept]):
            raise InputError(f"replace.layers: block {both[0]} is removed; leave it out here or there")
        for number in numbers:
            pattern[number] = _replaced(pattern[number], each)
    layers = shortest_pattern([pattern[number] for number in kept])
    data = [layer.model_dump() for layer in layers]
    return ModelSpec.parse({**spec.model_dump(), "layers": data, "depth": len(kept)}), kept


def _replaced(layer: LayerSpec, by: ReplaceSpec) -> LayerSpec:
    mixer = by.mixer or layer.mixer
    known = {parameter.name for parameter in registry.lookup("mixer", mixer).parameters}
    stay = {name: value for name, value in layer.options.items() if name in known}
    data = {**layer.model_dump(), "mixer": mixer, "options": {**stay, **by.options}}
    if mixer != "attention":
        data["kv"] = "own"  # no other mixer reads another's keys
    return LayerSpec.parse(data, "replace")


def shortest_pattern(layers: Sequence[LayerSpec]) -> list[LayerSpec]:
    """The shortest beginning of a list of layers that, repeated, gives the whole list."""
    for size in range(1, len(layers)):
        if all(layer == layers[i % size] for i, layer in enumerate(layers)):
            return list(layers[:size])
    return list(layers)
