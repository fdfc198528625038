"""What conversions to fewer bits share: which layers, which form, one block after another, and what is told."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from contextlab import registry
from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes, relative_error
from contextlab.convert.calibration import Calibration
from contextlab.convert.layers import chosen_layers, passed_over, planned_layers, read_by_block
from contextlab.errors import InputError
from contextlab.mixers.forms import LinearForm
from contextlab.models import LinearSpec, Model, ModelSpec, with_forms

Bits = Literal[2, 4, 8]
Rounded = Literal["int", "ternary", "binary", "fp8", "fp4", "mxfp4", "nvfp4"]


@dataclass(frozen=True)
class ToForm(Conversion):
    """Base of conversions that give linear layers another form (`contextlab list linears`).

    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    """

    layers: str = "*"

    @abstractmethod
    def form(self) -> tuple[str, dict[str, Any]]:
        """The form's name and options."""

    @abstractmethod
    def fill(self, form: Any, weight: Tensor, moment: Tensor | None) -> None:
        """Take a weight [O, I] into an empty form. moment: [I, I], X^T X of its inputs, where there are data."""

    @property
    def spec(self) -> LinearSpec:
        """What a model's spec gets."""
        name, options = self.form()
        return LinearSpec(layers=self.layers, form=name, options=options)

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Conversion.plan`: the same with one more entry of `linear`."""
        planned_layers(spec, self.layers)
        linear = [each.model_dump() for each in (*spec.linear, self.spec)]
        return ModelSpec.parse({**spec.model_dump(), "linear": linear})

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`: block by block, each by what the blocks before it, rounded, give it."""
        made = copied(model)
        found = chosen_layers(made, self.layers)
        forms: dict[str, LinearForm] = {}
        lines = passed_over(made, self.layers)
        for names, moments in read_by_block(made, found, data):
            for name in names:
                layer = found[name]
                forms[name] = self._made(layer, moments.get(name))
                after = forms[name].dense()
                error, of = relative_error(layer.weight, after, moments.get(name))
                lines.append(self._line(name, layer, forms[name], error, of))
                layer.weight.copy_(after)
        return Converted(with_forms(made, forms, (self.spec,)), lines)

    def _made(self, layer: nn.Linear, moment: Tensor | None) -> LinearForm:
        name, options = self.form()
        kind: type[LinearForm] = registry.lookup("linear", name).factory  # type: ignore[assignment]
        form = kind.beside(layer.weight, layer.bias, **options).eval()
        self.fill(form, layer.weight, moment)
        return form

    def _line(self, name: str, layer: nn.Linear, form: LinearForm, error: float, of: str) -> Change:
        before, size = module_nbytes(layer), module_nbytes(form)
        own = before - layer.weight.nbytes
        did = f"{self.form()[0]}, {8 * (size - own) / layer.weight.numel():.3g} bits a weight"
        return Change(name, did, error, of, before, size)


@dataclass(frozen=True)
class ToRounded(ToForm):
    """Base of conversions that round to any of the formats.

    to: the format. bits, group, zero: of whole numbers (see `contextlab show linear int`).
    latent: hold the weights, to be healed through the rounding, instead of their codes; the conversion `pack` packs.
    """

    to: Rounded = "int"
    bits: Bits = 4
    group: PositiveInt | None = 64
    zero: bool = False
    latent: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = {each.name: each.default for each in dataclasses.fields(self)}
        changed = [name for name in ("bits", "group", "zero") if getattr(self, name) != plain[name]]
        if self.to != "int" and changed:
            raise InputError(f"{changed[0]}: of whole numbers only; leave it out for {self.to}, or take to=int")

    def rounded(self) -> tuple[str, dict[str, Any]]:
        """The format's name and options."""
        own: dict[str, Any] = {"bits": self.bits, "group": self.group, "zero": self.zero} if self.to == "int" else {}
        return self.to, {**own, "latent": True} if self.latent else own

    def within(self, name: str, **more: Any) -> tuple[str, dict[str, Any]]:
        """A form around that of the format: its name and options."""
        to, options = self.rounded()
        return name, {**more, "form": to, "options": options}
