"""What sparse conversions share: which layers, how many weights, the pattern, and how errors are told."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes, relative_error
from contextlab.convert.calibration import Calibration
from contextlab.convert.layers import chosen_layers, entries, passed_over, planned_layers, read_by_block
from contextlab.convert.sparse.masks import Scope, largest, n_of_m, read_pattern
from contextlab.errors import InputError, nearest_divisor
from contextlab.mixers.forms import LinearForm
from contextlab.mixers.forms.sparse import SparseForm
from contextlab.models import Model, ModelSpec
from contextlab.models.forms import with_forms, with_linear

Share = Annotated[float, Field(ge=0, lt=1)]
HALF = 0.5


@dataclass(frozen=True)
class Sparse(Conversion):
    """Base of conversions that set weights of linear layers to zero.

    share: of the weights that become zero; default 0.5, or what the pattern says.
    pattern: n:m, such as 2:4: n of each m neighbours in a row stay. Layers whose inputs are no multiple of m are left
        dense, and the lines say so.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    packed: store the numbers that are left and a bit for each place (the form `sparse`), where that takes fewer bytes;
        else zeros are stored, too.
    """

    nothing: ClassVar[Mapping[str, Any] | None] = {"share": 0.0}

    share: Share | None = None
    pattern: str | None = None
    layers: str = "*"
    packed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None:
            n, m = read_pattern(self.pattern)
            if self.share is not None:
                raise InputError(f"share: pattern {self.pattern} says it already, {1 - n / m:.3g}; give one of the two")

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """The same spec, with entries of `linear` where layers are packed.

        Raises InputError where no layer is meant, or the pattern fits none.
        """
        found = planned_layers(spec, self.layers)
        if found and not any(self._fits(layer) for layer in found.values()):
            sizes = sorted({layer.in_features for layer in found.values()})
            n, m = self._pattern
            fits = min((nearest_divisor(size, m) for size in sizes), key=lambda each: abs(each - m))
            raise InputError(
                f"pattern {self.pattern}: {m} divides the inputs of no layer ({', '.join(map(str, sizes))}); the "
                f"nearest pattern is {min(n, fits)}:{fits}"
            )
        packed = self._packed(found)
        linear = (*spec.linear, *entries("sparse", packed, planned_layers(spec, "*"))) if packed else spec.linear
        return with_linear(spec, linear)

    def _packed(self, layers: Mapping[str, nn.Linear]) -> dict[str, dict[str, int]]:
        """The form's options of each layer that is packed."""
        found = {}
        for name, layer in layers.items() if self.packed else ():
            outputs, inputs = layer.out_features, layer.in_features
            kept = max(1, self.kept(outputs, inputs)) if self._fits(layer) else outputs * inputs
            if SparseForm.nbytes(inputs, outputs, False, kept=kept) < 4 * outputs * inputs:
                found[name] = {"kept": kept}
        return found

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`: layer by layer, each by what the layers before it, thinned, give it."""
        made = copied(model)
        found = chosen_layers(made, self.layers)
        known, packed = chosen_layers(made, "*"), self._packed(found)
        forms: dict[str, LinearForm] = {}
        lines = passed_over(made, self.layers)
        for names, moments in read_by_block(made, found, data):
            for name in names:
                layer, before = found[name], found[name].weight.clone()
                if self._fits(layer):
                    layer.weight.copy_(self.thinned(before, moments.get(name)))
                    did = f"{float((layer.weight == 0).float().mean()):.3g} of the weights are zero"
                else:
                    did = f"left dense: {layer.in_features} inputs are no multiple of {self._pattern[1]}"
                error, of = relative_error(before, layer.weight, moments.get(name))
                size = after = module_nbytes(layer)
                if name in packed:
                    forms[name] = SparseForm.of(layer.weight, layer.bias, **packed[name])
                    did, after = f"{did}, packed", module_nbytes(forms[name])
                lines.append(Change(name, did, error, of, size, after))
        return Converted(with_forms(made, forms, entries("sparse", packed, known)) if forms else made, lines)

    @abstractmethod
    def kept(self, outputs: int, inputs: int) -> int:
        """How many weights of a layer of these sizes stay."""

    @abstractmethod
    def thinned(self, weight: Tensor, moment: Tensor | None) -> Tensor:
        """The layer's new weight, [O, I] as the old one. moment: [I, I], X^T X of its inputs, where there are data."""

    @property
    def _share(self) -> float:
        return HALF if self.share is None else self.share

    @property
    def _pattern(self) -> tuple[int, int]:
        return (1, 1) if self.pattern is None else read_pattern(self.pattern)

    def _fits(self, layer: nn.Linear) -> bool:
        return layer.in_features % self._pattern[1] == 0


@dataclass(frozen=True)
class Scored(Sparse):
    """Base of those that keep the weights with the largest scores as they are.

    share: of the weights that become zero; default 0.5, or what the pattern says.
    pattern: n:m, such as 2:4: n of each m neighbours in a row stay.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    packed: store the numbers that are left and a bit for each place.
    """

    @abstractmethod
    def scores(self, weight: Tensor, moment: Tensor | None) -> Tensor:
        """What each weight is worth, [O, I] as the weight; moment: [I, I] as for `thinned`."""

    def thinned(self, weight: Tensor, moment: Tensor | None) -> Tensor:
        """See `Sparse.thinned`, [O, I]."""
        scores = self.scores(weight, moment)
        if self.pattern is not None:
            return torch.where(n_of_m(scores, *self._pattern), weight, 0.0)
        return torch.where(largest(scores, self._share, self._scope), weight, 0.0)

    def kept(self, outputs: int, inputs: int) -> int:
        """See `Sparse.kept`."""
        if self.pattern is not None:
            return outputs * inputs * self._pattern[0] // self._pattern[1]
        groups, size = (1, outputs * inputs) if self._scope == "layer" else (outputs, inputs)
        return groups * (size - round(self._share * size))

    @property
    def _scope(self) -> Scope:
        """What the share is of: each row (an output's weights), or the layer."""
        return "row"
