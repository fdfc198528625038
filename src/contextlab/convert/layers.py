"""The linear layers of a model that conversions change, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from contextlab.convert.base import Change, module_nbytes
from contextlab.convert.calibration import Calibration
from contextlab.errors import InputError, nearest
from contextlab.mixers.forms import LinearForm
from contextlab.models import LinearSpec, Model, ModelSpec
from contextlab.models.forms import ENDS, formed_layers, linear_layers, means, name_of_form
from contextlab.models.outline import without_memory


def chosen_layers(model: nn.Module, layers: str) -> dict[str, nn.Linear]:
    """The plain linear layers of mixers and MLPs whose names match a pattern such as "blocks.*.mlp.*".

    The read-in and the read-out are meant only by a pattern that begins with "read_". Raises InputError where no layer
    is meant.
    """
    known = linear_layers(model, ends=layers.startswith(ENDS))
    found = {name: layer for name, layer in known.items() if means(layers, name)}
    if not found and (others := _formed(model, layers)):
        kinds = ", ".join(dict.fromkeys(map(name_of_form, others.values())))
        raise InputError(
            f"layers: the {len(others)} that {layers[:80]!r} names are stored as {kinds} already, and only dense ones "
            "can be changed; leave this method or the one before it out, or give each layers=... of its own"
        )
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


def passed_over(model: nn.Module, layers: str) -> list[Change]:
    """A line for each layer that matches a pattern and has a form already, so that it stays as it is."""
    found = []
    for name, form in _formed(model, layers).items():
        size = module_nbytes(form)
        found.append(Change(name, f"left as it is: {name_of_form(form)} already", 0.0, "weights", size, size))
    return found


def _formed(model: nn.Module, layers: str) -> dict[str, LinearForm]:
    """The layers that a pattern means and that have a form."""
    known = formed_layers(model)
    return {name: form for name, form in known.items() if means(layers, name)}


def by_block(names: Iterable[str]) -> list[list[str]]:
    """The names in order, those of one block together: one pass over the data serves a block."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(".".join(name.split(".")[:2]), []).append(name)
    return list(blocks.values())


def read_by_block(
    model: nn.Module, names: Iterable[str], data: Calibration | None
) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """The names of one block after another, and X^T X [I, I] of their layers' inputs X; none without data.

    A block is read when its turn comes, so that it is given what the blocks before it, already changed, make.
    """
    onward = None if data is None else data.onward()
    for together in by_block(names):
        yield together, {} if onward is None else onward.inputs_of(model, together)


def entries(form: str, options: Mapping[str, Mapping[str, Any]], known: Iterable[str]) -> list[LinearSpec]:
    """What `ModelSpec.linear` says of layers that have a form: a pattern for like layers of all blocks, else names.

    options: the form's, by the layer's name. known: all linear layers, of which a pattern may mean no other.
    """
    found: list[LinearSpec] = []
    left = dict(options)
    while left:
        name, own = next(iter(left.items()))
        pattern = ".".join(["blocks", "*", *name.split(".")[2:]])
        meant = [each for each in known if fnmatchcase(each, pattern)]
        alike = name in meant and all(left.get(each) == own for each in meant)
        for each in meant if alike else [name]:
            del left[each]
        found.append(LinearSpec(layers=pattern if alike else name, form=form, options=dict(own)))
    return found
