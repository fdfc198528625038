"""What low-rank conversions share: ranks, layers, and the best factors for given inputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes, relative_error
from contextlab.convert.calibration import Calibration
from contextlab.convert.layers import chosen_layers, entries, passed_over, planned_layers, read_by_block
from contextlab.errors import InputError, at_most
from contextlab.mixers.forms.low_rank import LowRank
from contextlab.models import Model, ModelSpec
from contextlab.models.forms import with_forms, with_linear

RATIO = 0.5


@dataclass(frozen=True)
class Factored(Conversion):
    """Base of the conversions that store linear layers as products of two narrow matrices (the form `low_rank`).

    Layers that would take no fewer numbers so stay dense, and the lines say so; that all would is refused.

    rank: values between the two matrices.
    ratio: in place of a rank, the share of each layer's numbers that the two may take, below 1; default 0.5.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    """

    rank: PositiveInt | None = None
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    layers: str = "*"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.ratio is not None:
            raise InputError("rank and ratio: each says how large the factors are; give one of the two")

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """With an entry in `linear` for the layers that become narrow. Raises InputError where there is none."""
        found = planned_layers(spec, self.layers)
        ranks = self._ranks(found)
        if found and not ranks:
            name, layer = max(found.items(), key=lambda each: _most(each[1]))
            sizes = f"{layer.out_features} x {layer.in_features}"
            given = f"ratio {self.ratio or RATIO:g}" if self.rank is None else f"rank {self.rank}"
            raise InputError(
                f"{given}: two factors of it take fewer numbers in no layer; {at_most(_most(layer), 'no rank does')}, "
                f"in {name} ({sizes})"
            )
        linear = (*spec.linear, *entries("low_rank", _options(ranks), planned_layers(spec, "*")))
        return with_linear(spec, linear)

    def _ranks(self, layers: Mapping[str, nn.Linear]) -> dict[str, int]:
        """The rank of each layer that becomes narrow."""
        ranks = {name: self._rank(layer) for name, layer in layers.items()}
        return {name: rank for name, rank in ranks.items() if rank}

    def _rank(self, layer: nn.Linear) -> int:
        """The layer's rank; 0 where it stays dense."""
        dense, each = layer.in_features * layer.out_features, layer.in_features + layer.out_features
        ratio = RATIO if self.ratio is None else self.ratio
        rank = max(1, int(ratio * dense / each)) if self.rank is None else self.rank
        return rank if rank * each < dense else 0

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`: block by block, each by what the narrow layers before it give."""
        made, data = copied(model), None if data is None else data.onward()
        found = chosen_layers(made, self.layers)
        known, ranks = chosen_layers(made, "*"), self._ranks(found)
        forms: dict[str, LowRank] = {}
        lines = passed_over(made, self.layers)
        for names, moments in read_by_block(made, found, data):
            sizes = {} if data is None else self.sizes_of(data, made, names)
            for name in names:
                layer, before = found[name], found[name].weight.double().clone()
                size, after = module_nbytes(layer), module_nbytes(layer)
                did = "left dense: two factors would take no fewer numbers"
                if name in ranks:
                    root, inverse = self.root(before, moments.get(name), sizes.get(name))
                    up, down = factors(before, ranks[name], root, inverse)
                    forms[name] = _form(layer, up, down)
                    layer.weight.copy_(forms[name].dense())
                    did, after = f"rank {ranks[name]} of {min(before.shape)}", module_nbytes(forms[name])
                error, of = relative_error(before, layer.weight, moments.get(name))
                lines.append(Change(name, did, error, of, size, after))
        return Converted(with_forms(made, forms, entries("low_rank", _options(ranks), known)) if forms else made, lines)

    def sizes_of(self, data: Calibration, model: Model, names: list[str]) -> dict[str, Tensor]:
        """What a method reads of the layers' inputs beside their moments, name -> [I]; nothing unless it says so."""
        return {}

    @abstractmethod
    def root(self, weight: Tensor, moment: Tensor | None, sizes: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """S and its inverse: the factors are those with the least ||(W - U V) S||. None is the identity.

        weight: [O, I]. moment: [I, I], X^T X, where there are data. sizes: [I]. Returns [I, I] or [I] (a diagonal).
        """


def factors(
    weight: Tensor, rank: int, root: Tensor | None = None, inverse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """U [O, rank] and V [rank, I] with the least ||(W - U V) S||: the truncated SVD of W S, and S undone.

    weight: [O, I]. root, inverse: S and its (pseudo-)inverse, [I, I], or [I] of a diagonal one; None is the identity.
    """
    seen = weight if root is None else weight * root if root.ndim == 1 else weight @ root
    left, values, right = torch.linalg.svd(seen, full_matrices=False)
    half = values[:rank].sqrt()
    up, down = left[:, :rank] * half, half[:, None] * right[:rank]
    if inverse is not None:
        down = down * inverse if inverse.ndim == 1 else down @ inverse
    return up, down


def _most(layer: nn.Linear) -> int:
    """The largest rank whose factors take fewer numbers than the layer; 0 where none does."""
    return (layer.in_features * layer.out_features - 1) // (layer.in_features + layer.out_features)


def _options(ranks: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The form's options of each layer."""
    return {name: {"rank": rank} for name, rank in ranks.items()}


def _form(layer: nn.Linear, up: Tensor, down: Tensor) -> LowRank:
    form = LowRank.beside(layer.weight, layer.bias, rank=up.shape[1])
    form.up.copy_(up)
    form.down.copy_(down)
    return form
