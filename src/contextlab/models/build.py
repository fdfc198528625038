"""Models by a spec, a mapping of its keys, or a preset's name."""

from __future__ import annotations

from typing import Any

from contextlab import registry
from contextlab.allocator import give_back
from contextlab.errors import InputError
from contextlab.models.draws import OwnDraws
from contextlab.models.room import require_room
from contextlab.models.spec import ModelSpec, check_layers
from contextlab.models.stack import Model
from contextlab.spec import describe


def build_model(spec: ModelSpec | dict[str, Any] | str, *, seed: int = 0, **options: Any) -> Model:
    """Build a model with freshly drawn parameters, or those that a construction writes down.

    spec: a ModelSpec, a mapping of its keys, or the name of a preset.
    seed: of the parameters; the same seed gives the same parameters, in whatever thread; no global generator is
        touched.
    options: changes to the spec (or the preset's options), for example `width=128`.
    """
    if isinstance(spec, str):
        resolved = preset(spec, **options)
    elif isinstance(spec, ModelSpec):
        resolved = ModelSpec.parse({**spec.model_dump(), **options}) if options else spec
    elif isinstance(spec, dict):
        resolved = ModelSpec.parse({**spec, **options})
    else:
        raise InputError(f"expected a ModelSpec, a mapping or a preset's name, got {describe(spec)}")
    require_room(resolved)
    with OwnDraws(seed):
        model = Model(resolved)
    if resolved.construction is not None:
        resolved.construction.made().write_into(model)
    return model


def empty_model(spec: ModelSpec) -> Model:
    """A model that a file is to be loaded into: as `build_model`'s, but nothing is computed for its linear forms."""
    require_room(spec)
    with OwnDraws(0):
        model = Model(spec, empty_forms=True)
    if spec.linear:
        give_back()  # what the blocks took while they were dense
    return model


def preset(name: str, **options: Any) -> ModelSpec:
    """The ModelSpec of a registered preset; options that the preset does not know change the spec itself."""
    entry = registry.lookup("model", name)
    own = {p.name for p in entry.parameters}
    fields = set(ModelSpec.model_fields)
    stray = [key for key in options if key not in own and key not in fields]
    if stray:
        entry.check({stray[0]: options[stray[0]]})  # raises, with the nearest name
    check_layers(options.get("depth", 1), options.get("loops", 1))  # before a preset makes a list of its layers
    spec = entry.build(**{key: value for key, value in options.items() if key in own})
    changes = {key: value for key, value in options.items() if key not in own}
    return ModelSpec.parse({**spec.model_dump(), **changes}) if changes else spec
