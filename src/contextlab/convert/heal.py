"""Healing: training after a conversion, in which weights that were set to zero stay zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.convert.layers import linear_layers
from contextlab.errors import InputError
from contextlab.models import Model
from contextlab.progress import Steps as Progress
from contextlab.prompt import Task
from contextlab.training import TrainResult, TrainSpec, train

RATE = 3e-4
"""Of AdamW: that of a fine-tuning, a third of what training starts with."""


def heal_spec(heal: int | Mapping[str, Any] | TrainSpec) -> TrainSpec:
    """How a model is healed: so many steps, or keys of a TrainSpec.

    Where they are not given, the optimiser is AdamW at a rate of `RATE`, warm for a tenth of the steps, and no
    checkpoints are written.
    """
    if isinstance(heal, TrainSpec):
        return heal
    keys = {"steps": heal} if isinstance(heal, int) else dict(heal)
    steps = keys.get("steps")
    warm = {"warmup": max(1, steps // 10)} if isinstance(steps, int) and not isinstance(steps, bool) else {}
    defaults = {"optimizer": "adamw", "learning_rate": RATE, "checkpoint_every": 0, **warm}
    return TrainSpec.parse({**defaults, **keys}, "heal")


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

    keep_zeros: whether weights of linear layers that are exactly zero stay so; of layers that have others.

    Raises InputError for Muon where zeros are to stay: its step moves all weights of a matrix together.
    """
    if keep_zeros and spec.optimizer == "muon":
        raise InputError("heal: optimizer 'muon' moves weights that are zero; use 'adamw' after a sparse method")
    with _zeros_kept(model) if keep_zeros else nullcontext():
        result = train(model, list(tasks), spec, seed=seed, progress=progress)
    model.eval()
    return result


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
