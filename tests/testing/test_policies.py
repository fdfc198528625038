"""Laws of policies can be broken: policies that break one each are found out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab import registry
from contextlab.policies.core.budget import OPEN
from contextlab.policies.eviction.by_key import KeyNorm
from contextlab.testing import LawBroken, components, laws


@dataclass(eq=False)
class Late(KeyNorm):
    """Its option is read nowhere."""

    patience: int = 1


@torch.no_grad()
def change(model: Any) -> None:
    for parameter in model.parameters():
        parameter.add_(0.01)


@dataclass(eq=False)
class ChangesAtFirst(KeyNorm):
    """It changes the model once it is attached."""

    def attach(self, model: Any) -> Any:
        change(model)
        return super().attach(model)


@dataclass(eq=False)
class ChangesWhileReading(KeyNorm):
    """It changes the model once it has read."""

    def attach(self, model: Any) -> Any:
        self._model = model
        return super().attach(model)

    def score(self, seen: Any) -> Tensor:
        change(self._model)
        return super().score(seen)


@dataclass(eq=False)
class Blurs(KeyNorm):
    """It answers a little beside what is right."""

    def attend(self, layer: Any, q: Tensor, *rest: Any, **more: Any) -> Any:
        y, state = super().attend(layer, q, *rest, **more)
        return y * 1.001, state


@dataclass(eq=False)
class Keeps(KeyNorm):
    """It keeps everything, whatever its budget."""

    def slots(self, *asked: Any, **more: Any) -> int:
        return OPEN


@dataclass(eq=False)
class Wastes(KeyNorm):
    """It keeps a token in ten less than it may."""

    def slots(self, *asked: Any, **more: Any) -> int:
        return super().slots(*asked, **more) * 9 // 10


@dataclass(eq=False)
class WritesOver(KeyNorm):
    """It changes the state that it reads on from."""

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, state: Any, *rest: Any, **more: Any) -> Any:
        answered = super().attend(layer, q, k, v, state, *rest, **more)
        if state is not None and not torch.is_grad_enabled():
            state.slots["values"].mul_(0.9)
        return answered


@dataclass(eq=False)
class MixesRows(KeyNorm):
    """It lets each row see the mean of all."""

    def attend(self, layer: Any, q: Tensor, *rest: Any, **more: Any) -> Any:
        y, state = super().attend(layer, q, *rest, **more)
        return y + 1e-4 * y.mean(0), state


@dataclass(eq=False)
class ClaimsToo(KeyNorm):
    """It says that pieces do not matter, and drops tokens after each."""

    @property
    def chunk_invariant(self) -> bool:
        return True


@dataclass(eq=False)
class TakesAny(KeyNorm):
    """It is attached to whatever it is given."""

    def attach(self, model: Any) -> Any:
        return contextlib.nullcontext(model)


BROKEN = [
    ("full budget", Blurs, "outputs differ"),
    ("full budget, padded", Blurs, "outputs differ"),
    *(
        (f"budget of {budget}{padded}", Keeps, "hold")
        for budget in ("24tok", "50%", "40kB")
        for padded in ("", ", padded")
    ),
    ("budget used", Wastes, "expected .* or more"),
    ("older states", WritesOver, "outputs from an older state differ"),
    ("trees", WritesOver, "outputs of a"),
    ("batch", MixesRows, "outputs of row"),
    ("pieces", ClaimsToo, "outputs in pieces differ"),
    ("no KV state", TakesAny, "it is not refused"),
    ("options", Late, "patience"),
    ("no trace", ChangesAtFirst, "outputs after it was detached"),
    ("no trace", ChangesWhileReading, "outputs after it was detached"),
]


def test_each_law_of_policies_has_one_that_breaks_it() -> None:
    assert {law.name for law in laws("policy")} == {name for name, _, _ in BROKEN}


@pytest.mark.parametrize(("name", "policy", "said"), BROKEN)
def test_a_policy_that_breaks_a_law_is_found_out(name: str, policy: type[KeyNorm], said: str, monkeypatch) -> None:
    monkeypatch.setitem(registry._entries["policy"], "broken", registry.Entry("policy", "broken", policy))
    with pytest.raises(LawBroken, match=said):
        next(law for law in laws("policy") if law.name == name)(components("policy", "broken")[0])
