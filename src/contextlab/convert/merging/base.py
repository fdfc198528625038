"""What merging shares: several models of one spec, tensor by tensor, and how far the result is from the first."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from contextlab.convert.base import Change, Conversion, Converted, copied, relative_error
from contextlab.convert.calibration import Calibration
from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec
from contextlab.models.forms import formed_layers, name_of_form
from contextlab.models.io import require_own
from contextlab.spec import picture
from contextlab.training.checkpoint import differences

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Merge(Conversion):
    """Base of the conversions that make one model of several: of the one given and `others`, all of one spec.

    others: the other models.
    base: the model that all were trained on from, where the method wants it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"models"})
    wants_base: ClassVar[bool] = False
    most: ClassVar[int | None] = None
    """Models in all, where a method takes no more."""

    others: tuple[Any, ...] = ()
    base: Any = None

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """The same spec. Raises InputError where the models are not of one spec, or too few or too many."""
        if not self.others or len(self.others) + 1 > (self.most or len(self.others) + 1):
            wanted = "at least 2" if self.most is None else f"{self.most}"
            raise InputError(f"{self.name}: merges {wanted} models, got {len(self.others) + 1}")
        if self.wants_base and self.base is None:
            raise InputError(f"{self.name}: needs the model that all were trained on from (--base MODEL)")
        if self.base is not None and not self.wants_base:
            raise InputError(f"{self.name}: takes no base; leave it out, or choose task_arithmetic or ties")
        for number, other in enumerate((*self.others, *filter(None, (self.base,)))):
            require_own(other, self.name)
            found = differences(spec.model_dump(mode="json"), other.spec.model_dump(mode="json"))
            if found:
                which = "the base" if number == len(self.others) else f"model {number + 2}"
                where, first, here = found[0]
                raise InputError(
                    f"{self.name}: models are to be of one spec; {where} is {picture(first)}, in {which} it is "
                    f"{picture(here)}"
                )
            for layer, form in formed_layers(other).items():
                if not form.holds_weight:
                    raise InputError(
                        f"{self.name}: {layer} is stored as {name_of_form(form)}, in which weights cannot be merged; "
                        "merge the models that were shrunk, and shrink what comes out"
                    )
        return spec

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`: floating-point tensors are merged, in float64; others, such as the numbers of
        places, are the first model's."""
        made = copied(model)
        names = [name for name, tensor in made.named_parameters()]
        names += [n for n, t in made.named_buffers() if t.is_floating_point() and n in made.state_dict()]
        given = [_tensors(each, names) for each in (model, *self.others)]
        merged = self.merged(given, None if self.base is None else _tensors(self.base, names))
        own = made.state_dict()
        lines = []
        for name in names:
            before = given[0][name]
            own[name].copy_(merged[name])
            error, of = relative_error(before.reshape(1, -1), own[name].double().reshape(1, -1))
            size = own[name].nbytes
            lines.append(Change(name, "merged", error, of, size, size))
        return Converted(made, lines)

    @abstractmethod
    def merged(self, models: Sequence[Tensors], base: Tensors | None) -> Tensors:
        """The merged tensors, by name, each of the shape of its own. models, base: the same names, all float64."""


def _tensors(model: Model, names: Sequence[str]) -> Tensors:
    own = model.state_dict()
    return {name: own[name].double() for name in names}
