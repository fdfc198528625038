"""Neighbouring blocks become one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor, nn

from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes
from contextlab.convert.calibration import Calibration
from contextlab.convert.depth.blocks import of_layers, set_blocks
from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec
from contextlab.models.stack import Within
from contextlab.registry import register


@register(
    "conversion",
    "merge_blocks",
    family="depth",
    papers=("2402.11187",),
    cases=({}, {"times": 2, "size": 2}),
)
@dataclass(frozen=True)
class MergeBlocks(Conversion):
    """Some neighbouring blocks become one, whose weights are the first's plus what each of the others differs by.

    theta_l + sum_k (theta_{l+k} - theta_l), the layer collapse of LaCo (2402.11187, eq. 2). Where: each time there
    where the last hidden vectors change least on the data, and each line's error is 1 - their mean cosine with those of
    the model as given. LaCo goes down from the top and merges wherever that is below a threshold; here the number of
    merges is given, so that it is known what comes out. Only blocks that are described alike and share nothing merge.

    times: merges.
    size: neighbours that become one; of two the upper one is left.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    nothing: ClassVar[Mapping[str, Any] | None] = {"times": 0}

    times: NonNegativeInt = 1
    size: Annotated[int, Field(ge=2)] = 3

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """With times x (size - 1) blocks less. Raises InputError where there are no such neighbours."""
        for done in range(self.times):
            where = _places(spec, self.size)
            if not where:
                most = next(size for size in range(spec.depth, 0, -1) if size == 1 or _places(spec, size))
                fits = f"give times={done}" if done else f"give size={most}" if most > 1 else "none can merge"
                raise InputError(
                    f"merge_blocks: size {self.size}, times {self.times}: the model, of {spec.depth} blocks by then, "
                    f"has at most {most} alike in a row; {fits}"
                )
            spec = _merged(spec, where[-1], self.size)
        return spec

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        assert data is not None
        made = copied(model)
        names, lines = [f"blocks.{i}" for i in range(model.spec.depth)], []
        for _ in range(self.times):
            blocks, spec = list(made.blocks), made.spec
            tried: dict[int, tuple[float, nn.Module]] = {}
            for at in _places(spec, self.size):
                one = collapsed(blocks[at : at + self.size])
                set_blocks(made, _merged(spec, at, self.size), [*blocks[:at], one, *blocks[at + self.size :]])
                tried[at] = 1 - likeness(model, made, data), one
            at = min(tried, key=lambda each: tried[each][0])
            error, one = tried[at]
            set_blocks(made, _merged(spec, at, self.size), [*blocks[:at], one, *blocks[at + self.size :]])
            gone = names[at + 1 : at + self.size]
            size = sum(module_nbytes(block) for block in blocks[at : at + self.size])
            lines.append(
                Change(names[at], f"merged with {', '.join(gone)}", error, "direction", size, module_nbytes(one))
            )
            del names[at + 1 : at + self.size]
        return Converted(made, lines)


def collapsed(blocks: list[nn.Module]) -> nn.Module:
    """One block, theta_0 + sum_k (theta_k - theta_0) of the blocks' floating-point tensors."""
    made = copy.deepcopy(blocks[0])
    own = made.state_dict()
    for name, tensor in blocks[0].state_dict().items():
        if tensor.is_floating_point():
            own[name].copy_(tensor + sum(block.state_dict()[name] - tensor for block in blocks[1:]))
    return made


@torch.no_grad()
def likeness(model: Model, other: Model, data: Calibration) -> float:
    """The mean cosine between the last hidden vectors of two models of one width, over the data's tokens."""
    total, count = 0.0, 0
    for prompt, _ in data.on(model):
        first, second = (_last(each, prompt.inputs) for each in (model, other))
        cosines = torch.cosine_similarity(first.double(), second.double(), dim=-1)
        total, count = total + float(cosines.sum()), count + cosines.numel()
    return total / count


def _last(model: Model, inputs: Tensor) -> Tensor:
    """[B, T, D], normed, of inputs [B, T] or [B, T, d]."""
    hidden: list[Tensor] = []
    model(inputs, within=Within(hidden=hidden))
    return hidden[-1]


def _places(spec: ModelSpec, size: int) -> list[int]:
    """Where so many blocks in a row are described alike, and neither share weights nor have to do with shared keys."""
    pattern = spec.pattern()
    sources = spec.sources()
    free = [
        layer.share is None and layer.kv == "own" and not any(s == i for j, s in enumerate(sources) if j != i)
        for i, layer in enumerate(pattern)
    ]
    return [
        at
        for at in range(spec.depth - size + 1)
        if all(free[at : at + size]) and all(each == pattern[at] for each in pattern[at : at + size])
    ]


def _merged(spec: ModelSpec, at: int, size: int) -> ModelSpec:
    pattern = spec.pattern()
    return of_layers(spec, [*pattern[: at + 1], *pattern[at + size :]])
