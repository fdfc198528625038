"""A model in outline: whole but without memory, or small with each kind of its layers once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from contextlab.errors import ContextlabError, InputError
from contextlab.models.draws import OwnDraws
from contextlab.models.spec import LayerSpec, ModelSpec
from contextlab.models.stack import Model


def without_memory(spec: ModelSpec) -> Model | None:
    """The model on PyTorch's meta device: its parameters and FLOPs can be counted, and nothing be read.

    None for one that cannot be made there. Raises InputError where it cannot be made at all.
    """
    return _outline(spec.model_dump_json())


@lru_cache(maxsize=128)  # the check and the estimate before a run ask for the same ones
def _outline(spec: str) -> Model | None:
    try:
        with OwnDraws(0), torch.device("meta"):
            return Model(ModelSpec.model_validate_json(spec), empty_forms=True)
    except ContextlabError:
        raise
    except Exception:  # a stranger's mixer that needs real numbers to be made
        return None


def weight_nbytes(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> int:
    """The exact `Model.weight_nbytes` of a spec in this dtype, without making it (tied weights once).

    Raises InputError where it cannot be made without memory; then only the model itself tells.
    """
    outline = without_memory(spec)
    if outline is None:
        raise InputError("weight_nbytes: a layer of this model cannot be made without memory; build it and ask it")
    held = {id(tensor): tensor for tensor in outline.state_dict(keep_vars=True).values()}
    return sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.element_size())
        for tensor in held.values()
    )


def one_of_each(spec: ModelSpec) -> ModelSpec:
    """The spec of a model that has the pattern of layers once, and of equal ones in a row the first; two loops.

    What a layer of it can read, a layer of the whole model can.
    """
    layers: list[LayerSpec] = []
    for layer in spec.pattern()[: len(spec.layers)]:
        if not layers or layer != layers[-1] or layer.share is not None:
            layers.append(layer)
    changes: dict[str, Any] = {"layers": tuple(layers), "depth": len(layers), "loops": min(spec.loops, 2), "linear": ()}
    changes["construction"] = None  # which writes down the weights of the whole model
    return spec.model_copy(update=changes)
