"""Linear forms in a model: which layers can have one, and how they are put in their places."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from contextlab import registry
from contextlab.errors import InputError, nearest
from contextlab.mixers.forms import LinearForm, RoundedForm
from contextlab.mixers.layers import Linear
from contextlab.models.spec import LinearSpec, ModelSpec

if TYPE_CHECKING:
    from contextlab.models.stack import Model

ENDS = "read_"
"""How the names of the read-in and the read-out begin, which are meant only where they are named."""
TRAINING = ("latent", "rounding", "gradients")
"""Options of forms that are of their training alone."""


def linear_layers(model: nn.Module, ends: bool = False) -> dict[str, nn.Linear]:
    """The linear layers of a model that a form can stand in for, by name: those of mixers and MLPs, of every kind.

    Not among them are embeddings, norms, convolutions, recurrent kernels, stacks of experts and matrices that have a
    form already.

    ends: with the read-in and the read-out, where they are linear layers with a weight of their own.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and type(layer) in (Linear, nn.Linear)
        and type(layer.weight) in (Tensor, nn.Parameter)
        and layer.weight.numel()
        and uses[id(layer.weight)] == 1
        and (name.startswith("blocks.") or (ends and name.startswith(ENDS)))
    }


def with_linear(spec: ModelSpec, entries: Iterable[LinearSpec]) -> ModelSpec:
    """The spec with these entries as its `linear`. Raises InputError where they cannot be."""
    return ModelSpec.parse({**spec.model_dump(), "linear": [each.model_dump() for each in entries]})


def place_forms(model: Model, empty: bool) -> None:
    """Put the forms of `model.spec.linear` into a model whose layers are dense.

    empty: leave them without numbers; else each is the nearest to its dense layer. Raises InputError where an entry
    names no layer.
    """
    if not model.spec.linear:
        return
    layers = linear_layers(model, ends=True)
    _require_layers(model.spec.linear, layers.keys() | formed_layers(model).keys())
    _place(model, layers, model.spec.linear, empty)


class EmptyForms:
    """Puts empty forms into one block after another as they are made, so that no two are dense at once.

    specs: `ModelSpec.linear`.
    """

    def __init__(self, specs: Iterable[LinearSpec]) -> None:
        self.specs = tuple(specs)
        self.dense: set[int] = set()  # layers of blocks before; a block that stands in two places has its first name

    def __call__(self, number: int, block: nn.Module) -> None:
        """Of the block, which is to be the model's block of this number."""
        above = nn.Module()
        above.blocks = nn.ModuleDict({str(number): block})
        layers = {name: each for name, each in linear_layers(above).items() if id(each) not in self.dense}
        _place(above, layers, self.specs, empty=True)
        self.dense |= {id(each) for each in linear_layers(above).values()}


def _place(model: nn.Module, layers: Mapping[str, nn.Linear], specs: Iterable[LinearSpec], empty: bool) -> None:
    """Put the forms that the specs name into the places of these layers of a model."""
    specs, forms = tuple(specs), {}
    for name, layer in layers.items():
        wanted = spec_of(name, specs)
        if wanted is not None:
            lazy = empty or layer.weight.is_meta
            forms[id(layer)] = _empty(wanted, layer, layer.weight.device) if lazy else _nearest(wanted, layer)
    _put(model, forms)


def formed(model: Model, specs: Iterable[LinearSpec]) -> Model:
    """The same model, changed in place: a dense one gets the forms that are nearest to its layers.

    specs: the entries of its `ModelSpec.linear` from then on. Raises InputError where one names no layer.
    """
    model.spec = with_linear(model.spec, specs)
    place_forms(model, empty=False)
    return model


def around_forms(model: Model, forms: Mapping[str, LinearForm], specs: Iterable[LinearSpec]) -> None:
    """Put forms around those that a model has, in place.

    forms: by the names that `formed_layers` gives. specs: what `ModelSpec.linear` gets before the entries that it has,
        of which the first that means a layer counts.
    """
    model.spec = with_linear(model.spec, (*specs, *model.spec.linear))
    before = formed_layers(model)
    _put(model, {id(before[name]): form for name, form in forms.items()})


def with_forms(model: Model, forms: Mapping[str, LinearForm], specs: Iterable[LinearSpec]) -> Model:
    """A new model with these forms in the places of linear layers of their names; the old one is as it was.

    forms: by the names that `linear_layers` gives. specs: what `ModelSpec.linear` gets after the entries that it has;
        they must describe the forms, so that the model can be saved and loaded.

    Raises InputError where a name is no linear layer of the model, a form has another size than its layer, or the
    specs do not describe the forms.
    """
    layers = linear_layers(model, ends=True)
    for name, form in forms.items():
        if name not in layers:
            near = nearest(name, layers)
            raise InputError(f"with_forms: {name!r} is no linear layer of the model; " + _instead(near, layers))
        sizes = layers[name].in_features, layers[name].out_features
        if (form.in_features, form.out_features) != sizes:
            raise InputError(f"with_forms: {name} maps {sizes[0]} to {sizes[1]}, its form {form.in_features} to "
                             f"{form.out_features}")  # fmt: skip
    linear = (*model.spec.linear, *specs)
    _require_layers(linear, layers.keys() | formed_layers(model).keys())
    spec = with_linear(model.spec, linear)
    for name, layer in layers.items():
        _require_described(name, layer, forms.get(name), spec_of(name, linear))
    memo: dict[int, object] = {id(layers[name]): form for name, form in forms.items()}
    memo[id(model.spec)] = spec
    made: Model = copy.deepcopy(model, memo)  # the layers that are replaced are not copied
    return made


def pack_forms(model: Model) -> Model:
    """A new model whose latent weights are packed: it answers as the old one does when it is not being trained.

    What is trained no further then takes no more than its codes; the old model is as it was. Raises InputError where
    there is nothing to pack.
    """
    latent = [module for module in model.modules() if isinstance(module, RoundedForm) and module.latent]
    if not latent:
        raise InputError("pack_forms: no linear layer of the model has a latent weight; it is as small as it gets")
    memo: dict[int, object] = {id(form): form.packed() for form in latent}
    memo[id(model.spec)] = packed_spec(model.spec)
    made: Model = copy.deepcopy(model, memo)
    return made


def packed_spec(spec: ModelSpec) -> ModelSpec:
    """The spec of what `pack_forms` gives; the same where nothing is latent."""
    linear = [{**each.model_dump(), "options": _not_of_training(each.options)} for each in spec.linear]
    return ModelSpec.parse({**spec.model_dump(), "linear": linear}) if linear else spec


def _not_of_training(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a form, and of those within it, but for `TRAINING`."""
    return {
        name: _not_of_training(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if name not in TRAINING
    }


def spec_of(name: str, specs: Iterable[LinearSpec]) -> LinearSpec | None:
    """The entry that says how the layer of this name is stored; None where it is dense."""
    found = next((each for each in specs if means(each.layers, name)), None)
    return None if found is None or found.form == "dense" else found


def name_of_form(form: LinearForm) -> str:
    """As it is registered."""
    entry = registry.entry_of("linear", form)
    return type(form).__name__ if entry is None else entry.name


def means(layers: str, name: str) -> bool:
    """Whether a pattern means the layer of this name; the read-in and the read-out only where it begins with theirs."""
    return fnmatchcase(name, layers) and (not name.startswith(ENDS) or layers.startswith(ENDS))


def _require_layers(specs: Iterable[LinearSpec], names: Iterable[str]) -> None:
    known = list(names)
    for each in specs:
        if not any(means(each.layers, name) for name in known):
            near = nearest(each.layers, known)
            raise InputError(f"linear: {each.layers!r} names no linear layer of this model; " + _instead(near, known))


def _instead(near: str | None, known: Iterable[str]) -> str:
    if near is not None:
        return f"did you mean {near!r}?"
    shown = sorted(known)
    return f"expected one of {', '.join(shown[:6])}{', ...' if len(shown) > 6 else ''}" if shown else "it has none"


def formed_layers(model: nn.Module) -> dict[str, LinearForm]:
    """The layers that have a form, by name; not the forms that stand within another."""
    found: dict[str, LinearForm] = {}
    within = None
    for name, module in model.named_modules():  # what stands within a module comes right after it
        if isinstance(module, LinearForm) and not (within and name.startswith(within)):
            found[name], within = module, f"{name}."
    return found


def _parts(spec: LinearSpec) -> tuple[type[LinearForm], dict[str, Any]]:
    """The form's class and its options, as their types have them."""
    entry = registry.lookup("linear", spec.form)
    options = entry.check(spec.options, path="options", given=("inputs", "outputs", "bias"))
    return entry.factory, options  # type: ignore[return-value] # what is registered is a class of forms


def _empty(spec: LinearSpec, layer: nn.Linear, device: torch.device) -> LinearForm:
    kind, options = _parts(spec)
    with device:
        form = kind.empty(layer.in_features, layer.out_features, layer.bias is not None, **options)
    return form.to(layer.weight.dtype)


def _nearest(spec: LinearSpec, layer: nn.Linear) -> LinearForm:
    kind, options = _parts(spec)
    return kind.of(layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), **options)


def _require_described(name: str, layer: nn.Linear, form: LinearForm | None, spec: LinearSpec | None) -> None:
    if form is None or spec is None:
        if (form is None) != (spec is None):
            told = "dense" if spec is None else spec.form
            raise InputError(f"with_forms: the specs say that {name} is {told}, but it is given "
                             f"{'no form' if form is None else type(form).__name__}")  # fmt: skip
        return
    due = _empty(spec, layer, torch.device("meta"))
    if type(form) is not type(due) or _shapes(form) != _shapes(due):
        raise InputError(f"with_forms: the form of {name} is not the {spec.form} that the specs describe")


def _shapes(form: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in form.state_dict().items()}


def _put(model: nn.Module, forms: Mapping[int, LinearForm]) -> None:
    """Put forms in the place of the modules with these ids, wherever these stand."""
    for parent, name, child in list(_children(model)):
        if id(child) in forms:
            setattr(parent, name, forms[id(child)])


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child
