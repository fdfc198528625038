"""What conversions to fewer bits share: which layers, which form, one block after another, and what is told."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from contextlab import registry
from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes, relative_error
from contextlab.convert.calibration import Calibration
from contextlab.convert.layers import chosen_layers, passed_over, planned_layers, read_by_block
from contextlab.errors import InputError, nearest_divisor
from contextlab.mixers.forms import LinearForm
from contextlab.models import LinearSpec, Model, ModelSpec
from contextlab.models.forms import with_forms, with_linear

Bits = Literal[2, 4, 8]
Rounded = Literal["int", "ternary", "binary", "fp8", "fp4", "mxfp4", "nvfp4"]


@dataclass(frozen=True)
class ToForm(Conversion):
    """Base of conversions that give linear layers another form (`contextlab list linears`).

    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    """

    layers: str = "*"

    @property
    def grouped(self) -> int | None:
        """Neighbouring inputs that are to share a scale; None where that is no option of the form."""
        return None

    @abstractmethod
    def form(self) -> tuple[str, dict[str, Any]]:
        """The form's name and options."""

    @abstractmethod
    def fill(self, form: Any, weight: Tensor, moment: Tensor | None) -> None:
        """Take a weight [O, I] into an empty form. moment: [I, I], X^T X of its inputs, where there are data."""

    def also(self, form: Any) -> str:
        """What a line tells of a form beside its name and its bits."""
        return ""

    @property
    def spec(self) -> LinearSpec:
        """What a model's spec gets."""
        name, options = self.form()
        return LinearSpec(layers=self.layers, form=name, options=options)

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Conversion.plan`: one more entry of `linear`. Raises InputError for a group that divides no layer.

        Not for the default one, which is to serve any model: where it divides no layer, the lines say what is done.
        """
        sizes = sorted({layer.in_features for layer in planned_layers(spec, self.layers).values()})
        if self.grouped is not None and self.grouped != _default_of(self, "group"):
            _require_fitting(self.grouped, sizes)
        return with_linear(spec, (*spec.linear, self.spec))

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
        did += _uneven(self.grouped, layer.in_features) + self.also(form)
        return Change(name, did, error, of, before, size)


@dataclass(frozen=True)
class ToRounded(ToForm):
    """Base of conversions that round to any of the formats.

    to: the format. bits, group, zero: of whole numbers (see `contextlab show linear int`); groups may end unevenly.
    latent: hold the weights, to be healed through the rounding, instead of their codes; the conversion `pack` packs.
    """

    to: Rounded = "int"
    bits: Bits = 4
    group: PositiveInt | None = 64
    zero: bool = False
    latent: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = [name for name in ("bits", "group", "zero") if getattr(self, name) != _default_of(self, name)]
        if self.to != "int" and changed:
            raise InputError(f"{changed[0]}: of whole numbers only; leave it out for {self.to}, or take to=int")

    @property
    def grouped(self) -> int | None:
        """See `ToForm.grouped`."""
        return self.group if self.to == "int" else None

    def rounded(self) -> tuple[str, dict[str, Any]]:
        """The format's name and options."""
        own: dict[str, Any] = {"bits": self.bits, "group": self.group, "zero": self.zero} if self.to == "int" else {}
        return self.to, {**own, "latent": True} if self.latent else own

    def within(self, name: str, **more: Any) -> tuple[str, dict[str, Any]]:
        """A form around that of the format: its name and options."""
        to, options = self.rounded()
        return name, {**more, "form": to, "options": options}


def _default_of(conversion: ToForm, option: str) -> Any:
    """An option's default; None where it has none of that name."""
    return next((each.default for each in dataclasses.fields(conversion) if each.name == option), None)


def _require_fitting(group: int, sizes: Sequence[int]) -> None:
    """Refuse a group that divides none of the layers' inputs, where any are known. Raises InputError."""
    if sizes and all(size % group for size in sizes):
        fits = min((nearest_divisor(size, group) for size in sizes), key=lambda each: abs(each - group))
        raise InputError(
            f"group {group}: divides the inputs of no layer ({', '.join(map(str, sizes))}); the nearest that does is "
            f"{fits}, and group=null is one scale for each output"
        )


def _uneven(group: int | None, inputs: int) -> str:
    """What a line tells of groups that do not divide a layer's inputs; "" where they do."""
    if group is None or inputs % group == 0:
        return ""
    return f", in one group of {inputs}" if group > inputs else f", the last group of {inputs % group}"
