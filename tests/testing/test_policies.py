"""Laws of policies can be broken: policies that break one each are found out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab import registry
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


@pytest.mark.parametrize(
    ("name", "policy", "said"),
    [
        ("options", Late, "patience"),
        ("no trace", ChangesAtFirst, "outputs after it was detached"),
        ("no trace", ChangesWhileReading, "outputs after it was detached"),
    ],
)
def test_a_policy_that_breaks_a_law_is_found_out(name: str, policy: type[KeyNorm], said: str, monkeypatch) -> None:
    monkeypatch.setitem(registry._entries["policy"], "broken", registry.Entry("policy", "broken", policy))
    with pytest.raises(LawBroken, match=said):
        next(law for law in laws("policy") if law.name == name)(components("policy", "broken")[0])
