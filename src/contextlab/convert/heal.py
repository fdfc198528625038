"""Healing: training after a conversion, of all weights or of adapters; weights that were set to zero stay zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.convert.beside import split_targets
from contextlab.convert.layers import linear_layers
from contextlab.errors import InputError, unknown
from contextlab.models import Model, ModelSpec
from contextlab.models.outline import without_memory
from contextlab.policies.core.parse import parse_options
from contextlab.progress import Steps as Progress
from contextlab.prompt import Task
from contextlab.training import TrainResult, TrainSpec, train
from contextlab.training.adapters import adapter_targets, require_peft
from contextlab.training.layer_skip import check_layer_skip

RATE = 3e-4
"""Of AdamW: that of a fine-tuning, a third of what training starts with."""
ADAPTER_RATE = 3e-3
"""The same of adapters, which take ten times as much."""
FULL = "full"
WAYS = (FULL, "lora", "ia3", "layer_skip")


def heal_spec(heal: int | Mapping[str, Any] | TrainSpec) -> TrainSpec:
    """How a model is healed: so many steps, or keys of a TrainSpec.

    Where they are not given, the optimiser is AdamW at a rate of `RATE` (of adapters, keys `lora` and `ia3`,
    `ADAPTER_RATE`), warm for a tenth of the steps, and no checkpoints are written.
    """
    if isinstance(heal, TrainSpec):
        return heal
    keys = {"steps": heal} if isinstance(heal, int) else dict(heal)
    steps = keys.get("steps")
    warm = {"warmup": max(1, steps // 10)} if isinstance(steps, int) and not isinstance(steps, bool) else {}
    rate = RATE if keys.get("lora") is None and keys.get("ia3") is None else ADAPTER_RATE
    defaults = {"optimizer": "adamw", "learning_rate": rate, "checkpoint_every": 0, **warm}
    return TrainSpec.parse({**defaults, **keys}, "heal")


def heal_with(text: str) -> dict[str, Any]:
    """Keys of a TrainSpec for how is trained: "full" (all weights), "lora:rank=8,...", "ia3:..." or "layer_skip:...".

    Raises InputError for another name; what the options may be `heal_spec` says.
    """
    name, options = parse_options(text, "heal-with")
    if name not in WAYS:
        raise InputError(f"heal-with: {unknown('way to heal', name, WAYS)}")
    if name == FULL and options:
        raise InputError(f"heal-with: {FULL!r} trains all weights and has no options; leave out {', '.join(options)}")
    return {} if name == FULL else {name: options}


def check_healing(spec: ModelSpec, training: TrainSpec, keep_zeros: bool = False) -> None:
    """Raises InputError where adapters have no place in a model of this spec, or zeros cannot stay: before minutes of
    work."""
    if keep_zeros:
        training = _keeping_zeros(training)
    check_layer_skip(spec, training.layer_skip)
    model = None if training.adapter is None else without_memory(spec)
    if model is None or training.adapter is None:
        return
    where = f"heal.{training.adapter.kind}"
    if training.lora is not None:
        dense, _ = split_targets(model, training.lora)
        if dense:  # adapters beside a form are ours
            require_peft(where)
        return
    adapter_targets(model, training.adapter, where)
    require_peft(where)


def heal_model(
    model: Model,
    tasks: Sequence[Task],
    spec: TrainSpec,
    *,
    keep_zeros: bool = False,
    seed: int = 0,
    progress: Progress | bool | None = False,
) -> TrainResult:
    """Train a converted model, in place, on the tasks; it is in evaluation mode afterwards.

    spec: of adapters on layers with a form, what `beside.put_beside` gave.
    keep_zeros: whether weights of linear layers that are exactly zero stay so; of layers that have others. LoRA's
        change is masked (`LoraSpec.keep_zeros`), factors of IA3 leave zeros as they are.

    Raises InputError for Muon where zeros are to stay: its step moves all weights of a matrix together; and for DoRA.
    """
    if keep_zeros:
        spec = _keeping_zeros(spec)
    with _zeros_kept(model) if keep_zeros else nullcontext():
        result = train(model, list(tasks), spec, seed=seed, progress=progress)
    model.eval()
    return result


def _keeping_zeros(spec: TrainSpec) -> TrainSpec:
    """The same training, in which zeros stay as they are. Raises InputError where they cannot."""
    if spec.optimizer == "muon":
        raise InputError("heal: optimizer 'muon' moves weights that are zero; use 'adamw' after a sparse method")
    if spec.lora is None:
        return spec
    keys = spec.model_dump(exclude_unset=True)
    return TrainSpec.parse({**keys, "lora": {**keys["lora"], "keep_zeros": True}}, "heal")


@contextmanager
def _zeros_kept(model: nn.Module) -> Iterator[None]:
    """Within it the gradients of zeros are zero, so that AdamW, which steps each weight by its own, leaves them.

    By hooks on the parameters: one on a layer, or a parametrization, would change how mixers call it.
    """
    hooks = []
    for layer in linear_layers(model).values():
        stays = layer.weight.detach() != 0
        if stays.any() and not stays.all():
            hooks.append(layer.weight.register_hook(_masked(stays)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _masked(stays: Tensor) -> Any:
    def hook(gradient: Tensor) -> Tensor:
        return torch.where(stays, gradient, 0.0)

    return hook
