"""LoRA on layers that are stored as a form: the adapter stays beside it, as codes take no merged change (QLoRA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from contextlab.convert.base import Change, module_nbytes
from contextlab.convert.layers import entries
from contextlab.errors import InputError
from contextlab.mixers.forms.adapted import Adapted
from contextlab.models import LinearSpec, Model
from contextlab.models.forms import around_forms, formed_layers, linear_layers, name_of_form, spec_of
from contextlab.training import TrainSpec
from contextlab.training.adapters import adapter_targets, check_rank
from contextlab.training.freeze import matching
from contextlab.training.spec import LoraSpec

WHERE = "heal.lora"


def split_targets(model: nn.Module, lora: LoraSpec) -> tuple[list[str], list[str]]:
    """Names of the dense layers and of those with a form that get an adapter.

    Raises InputError as `adapter_targets` does, for DoRA where a layer has a form, and where a form has an adapter that
    is not the one that is asked for.
    """
    dense, forms = linear_layers(model, ends=True), formed_layers(model)
    targets = matching(lora.targets, [*dense, *forms], f"{WHERE}.targets", "linear layer")
    formed = [name for name in targets if name in forms]
    if not formed:
        return adapter_targets(model, lora, WHERE), []
    if lora.dora:
        kind = name_of_form(forms[formed[0]])
        raise InputError(f"{WHERE}.dora: needs dense layers, and {formed[0]} is stored as {kind}; leave dora out")
    check_rank(lora, [(dense | forms)[name] for name in targets], WHERE)
    for name in formed:
        form = forms[name]
        if isinstance(form, Adapted):
            _require_same(name, form, lora)
    return [name for name in targets if name in dense], formed


def put_beside(model: Model, training: TrainSpec, seed: int = 0) -> tuple[TrainSpec, list[Change]]:
    """Give a model, in place, the adapters that its healing asks for on layers with a form.

    A form that has one already keeps it, to be trained on.

    seed: of the matrices A. Returns the training of these adapters and of those on dense layers, and what was done to
    each layer. Nothing is changed where no layer with a form is meant.
    """
    lora = training.lora
    dense, formed = ([], []) if lora is None else split_targets(model, lora)
    if lora is None or not formed:
        return training, []
    forms, known = formed_layers(model), [*linear_layers(model, ends=True), *formed_layers(model)]
    generator = torch.Generator().manual_seed(seed)
    lines, made, options = [], {}, {}
    for name in formed:
        form, before = forms[name], module_nbytes(forms[name])
        if isinstance(form, Adapted):
            did = f"its adapter of rank {len(form.down)} trained on"
        else:
            options[name] = _options(spec_of(name, model.spec.linear), lora)
            made[name] = form = Adapted.around(form, generator, **options[name])
            did = f"an adapter of rank {len(form.down)} beside {options[name]['form']}"
        lines.append(Change(name, did, 0.0, "weights", before, module_nbytes(form)))
    around_forms(model, made, entries("adapted", options, known))
    return _trained(model, training, lora, dense, formed), lines


def _require_same(name: str, form: Adapted, lora: LoraSpec) -> None:
    """Raises InputError where the adapter that a layer has is not the one that is asked for."""
    given = {key: getattr(lora, key) for key in ("rank", "alpha") if key in lora.model_fields_set}
    rank = min(lora.rank, form.in_features, form.out_features)
    scale = 1.0 if lora.alpha is None else lora.alpha / lora.rank
    if ("rank" in given and rank != len(form.down)) or ("alpha" in given and scale != form.scale):
        own = f"rank {len(form.down)} that counts {form.scale:g} times"
        raise InputError(
            f"{WHERE}: {name} has an adapter of {own} already, which is trained on; leave rank and alpha out"
        )


def _options(stored: LinearSpec | None, lora: LoraSpec) -> dict[str, Any]:
    """Of the form around a layer that is stored so."""
    assert stored is not None
    alpha = {} if lora.alpha is None else {"alpha": lora.alpha}
    return {"rank": lora.rank, **alpha, "form": stored.form, "options": stored.options}


def _trained(model: Model, training: TrainSpec, lora: LoraSpec, dense: list[str], formed: list[str]) -> TrainSpec:
    """The same training of nothing but adapters and what `lora.also` names."""
    own = [f"{name}.{factor}" for name in formed for factor in ("up", "down")]
    keys = training.model_dump(exclude_unset=True)
    if dense:
        keys["lora"] = {**keys["lora"], "targets": dense, "also": [*lora.also, *own]}
        return TrainSpec.parse(keys, "heal")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    kept = {*own, *matching(lora.also, names, f"{WHERE}.also", "parameter")}
    del keys["lora"]
    return TrainSpec.parse({**keys, "freeze": [name for name in names if name not in kept]}, "heal")
