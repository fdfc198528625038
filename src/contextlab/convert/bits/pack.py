"""Latent weights become their codes: the end of a training through the rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from contextlab.convert.base import Change, Conversion, Converted, module_nbytes
from contextlab.convert.calibration import Calibration
from contextlab.errors import InputError
from contextlab.mixers.forms import RoundedForm
from contextlab.models import Model, ModelSpec, pack_forms
from contextlab.models.forms import packed_spec
from contextlab.registry import register


@register("conversion", "pack", family="bits", papers=("2402.17764",), cases=())
@dataclass(frozen=True)
class Pack(Conversion):
    """Weights that were trained through their rounding (`latent: true`) are stored as codes: it answers as before.

    What is trained no further then takes the bytes of its format, 1.6 bits a number where it is ternary.
    """

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """The spec without what is of training alone. Raises InputError where nothing is latent."""
        planned = packed_spec(spec)
        if planned == spec:
            raise InputError("pack: no linear layer of the model has a latent weight; it is as small as it gets")
        return planned

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        made = pack_forms(model).eval()
        lines = []
        for name, before in model.named_modules():
            if isinstance(before, RoundedForm) and before.latent:
                sizes = [module_nbytes(form) for form in (before, made.get_submodule(name))]
                lines.append(Change(name, "packed", 0.0, "weights", *sizes))
        return Converted(made, lines)
