"""The laws of every registered linear form; and forms that break one each, which must be caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import contextlab.mixers  # noqa: F401  (registers every form)
from contextlab.mixers.forms import LinearForm
from contextlab.mixers.forms.integer import Integers
from contextlab.testing import Component, LawBroken, laws, parametrize_with_laws


@parametrize_with_laws("linear")
def test_laws(law: Callable[[], None]) -> None:
    law()


class Whole(LinearForm):
    """The weight itself: keeps every law; its children break one each."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.kept = nn.Parameter(torch.zeros(outputs, inputs))

    def assign(self, weight: Tensor) -> None:
        self.kept.data.copy_(weight)

    def dense(self) -> Tensor:
        return self.kept * 1


class WithoutBias(Whole):
    """Leaves out its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T


class Elsewhere(Whole):
    """Takes another weight."""

    def assign(self, weight: Tensor) -> None:
        super().assign(-weight)


class Miscounts(Whole):
    """Foretells no bias."""

    @classmethod
    def nbytes(cls, inputs: int, outputs: int, bias: bool, dtype: torch.dtype = torch.float32, **options: Any) -> int:
        return inputs * outputs * dtype.itemsize


class KeepsAside(Whole):
    """Holds what no file has."""

    factor = 1.0

    def assign(self, weight: Tensor) -> None:
        super().assign(weight / 2)
        self.factor = 2.0

    def dense(self) -> Tensor:
        return self.kept * self.factor


class Detaches(Whole):
    """Gives inputs no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach() + 0 * x)


class Shifts(Integers):
    """Packs another number than it computes with while it is latent."""

    def dense(self) -> Tensor:
        return super().dense() * (1.01 if self.latent else 1)


class Wide(Whole):
    """Answers in float32, whatever it is asked in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float() if x.dtype != torch.float64 else super().forward(x)


class Multiplies(Whole):
    """Takes more than it says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * super().forward(x)


class Looks(Whole):
    """Looks at its inputs' numbers before it answers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.detach().sum()) < 1e9 else x[..., :1]


BROKEN: list[tuple[type[LinearForm], str]] = [
    (WithoutBias, "product"),
    (Elsewhere, "near"),
    (Miscounts, "bytes"),
    (KeepsAside, "file"),
    (Detaches, "gradients"),
    (Shifts, "packed"),
    (Wide, "dtypes"),
    (Multiplies, "flops"),
    (Looks, "together"),
]


def component(form: type[LinearForm], **options: Any) -> Component:
    def make(weight: Tensor, bias: Tensor | None) -> LinearForm:
        return form.of(weight, bias, **options)

    return Component("linear", form.__name__, form, options, make)


def test_the_form_that_the_broken_ones_are_made_of_keeps_every_law() -> None:
    for law in laws("linear"):
        law(component(Whole))


@pytest.mark.parametrize(("form", "name"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_each_law_can_fail(form: type[LinearForm], name: str) -> None:
    (law,) = (each for each in laws("linear") if each.name == name)
    with pytest.raises(LawBroken):
        law(component(form, **({"latent": True} if form is Shifts else {})))


def test_every_law_has_a_form_that_breaks_it() -> None:
    assert {name for _, name in BROKEN} == {law.name for law in laws("linear")}
