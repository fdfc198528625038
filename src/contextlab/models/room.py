"""How much memory a model takes, by arithmetic on its spec, before a byte of it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from contextlab.errors import ContextlabError
from contextlab.memory import lack_of_memory, require_bytes
from contextlab.models.blocks import make_blocks
from contextlab.models.draws import OwnDraws
from contextlab.models.spec import LayerSpec, ModelSpec

SMALL = 1 << 26
"""Values. Where no two sizes of a spec come to so many, nothing is counted: counting takes 20 ms a kind of layer."""


def require_room(spec: ModelSpec) -> None:
    """Refuse a model whose parameters are larger than the memory that is free. Raises ResourceError."""
    name, largest = max(_numbers(spec.model_dump()), key=lambda pair: pair[1])
    if max(largest * spec.width * spec.depth, largest**2) >= SMALL:
        instead = f"make something smaller: the largest size given is {name}={largest:.15g}"
        require_bytes("the parameters of this model", parameter_bytes(spec), instead)


def require_room_for_tokens(spec: ModelSpec, length: int, batch: int = 1) -> None:
    """Refuse prompts that are larger, with the vectors of their tokens, than the memory that is free.

    length: tokens of each of `batch` prompts. Raises ResourceError.
    """
    read = 8 if spec.read_in == "token" else 4 * (spec.input_size or 0)
    size = batch * length * (read + 4 * spec.width + 4 * (spec.output_size or 0))
    require_bytes(f"{batch} x {length} tokens and their vectors", size, "give a smaller length or batch")


def require_room_for_training(spec: ModelSpec, length: int, batch: int, element_size: int = 4) -> None:
    """Refuse a training whose steps are known to need more memory than is free.

    What is counted is the least that the gradients need: each layer's input and each token's prediction, once; a step
    takes several times as much.

    length: tokens of each of the `batch` prompts that are read at once. element_size: bytes of a number inside the
    model. Raises ResourceError.
    """
    positions = length if spec.pool is None else 1
    inside = element_size * spec.width * (0 if spec.norm == "none" else spec.depth * spec.loops)
    size = batch * (length * inside + 4 * positions * (spec.output_size or 0))
    instead = "give a smaller train.batch, a larger train.accumulate, shorter prompts or a smaller model"
    require_bytes(f"a step on {batch} x {length} tokens: the layers' inputs and the predictions alone", size, instead)


def parameter_bytes(spec: ModelSpec) -> int:
    """Bytes of the parameters and buffers in float32, without the norms; a layer of each kind is counted once.

    The layers are made on PyTorch's meta device, which takes no memory. 0 for layers that cannot be made there.
    """
    kinds: dict[str, tuple[LayerSpec, int]] = {}
    for layer in spec.pattern():
        key = repr(layer)
        kinds[key] = layer, 1 if layer.share is not None else kinds.get(key, (layer, 0))[1] + 1
    total = 4 * spec.width * ((spec.input_size or 0) + (0 if spec.tied else (spec.output_size or 0)))
    if spec.position == "learned":
        total += 4 * spec.width * (spec.max_length or 0)
    for layer, count in kinds.values():
        alone = spec.model_copy(update={"depth": 1, "layers": (layer.model_copy(update={"kv": "own"}),)})
        total += count * _bytes(alone)
    return total


def _bytes(spec: ModelSpec) -> int:
    try:
        with OwnDraws(0), torch.device("meta"):  # without the draws torch would import its compiler
            blocks: nn.Module = make_blocks(spec)
    except ContextlabError:
        raise
    except Exception as error:  # a stranger's mixer that needs real numbers to be made; making it will tell
        if (lack := lack_of_memory(error)) is not None:  # more values than tensors can count
            raise lack from None
        return 0
    return sum(tensor.numel() * tensor.element_size() for tensor in (*blocks.parameters(), *blocks.buffers()))


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a tree of plain data, with the path of its key."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _numbers(item, f"{name}.{i}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
