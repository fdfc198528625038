"""The linear layers of a model that conversions change, by name."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from contextlab.errors import InputError, nearest
from contextlab.mixers.layers import is_plain
from contextlab.models import Model, ModelSpec
from contextlab.models.outline import without_memory


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain linear layers of a model's mixers and MLPs, by name, each once; not those of read-in and read-out."""
    found = model.named_modules()
    return {
        name: layer
        for name, layer in found
        if name.startswith("blocks.") and isinstance(layer, nn.Linear) and is_plain(layer) and layer.weight.numel()
    }


def chosen_layers(model: nn.Module, layers: str) -> dict[str, nn.Linear]:
    """Those whose names match a pattern such as "blocks.*.mlp.*". Raises InputError where none does."""
    known = linear_layers(model)
    found = {name: layer for name, layer in known.items() if fnmatchcase(name, layers)}
    if not found:
        near = nearest(layers, known)
        hint = f"; did you mean {near!r}?" if near else ""
        few = ", ".join(repr(name) for name in list(known)[:2])
        some = f" (there are {len(known)}: {few}, ...)" if known else " (the model has none that is plain)"
        raise InputError(f"layers: no linear layer is called {layers[:80]!r}{hint}{some}")
    return found


def planned_layers(spec: ModelSpec, layers: str) -> Mapping[str, nn.Linear]:
    """The same of a spec, without memory; nothing for a model that cannot be made without it."""
    model: Model | None = without_memory(spec)
    return {} if model is None else chosen_layers(model, layers)
