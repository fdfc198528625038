"""Adapters: how policies reach attention layers of other libraries' models, by a contract that anyone can fill."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies import Adapter, build_policy, register_adapter
from contextlab.policies.core import adapters
from contextlab.policies.core.adapters import OWN, Places, adapter_of
from contextlab.testing.policies import model, tokens


class Stranger(nn.Module):
    """Attention of another library: one head, no positions; it asks what an adapter put beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.asked = 4, False

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        x = x[:, :, None]
        return self.served.attend(x, x, x, state)  # type: ignore[union-attr, operator]


class StrangersAdapter(Adapter):
    def serves(self, model: nn.Module) -> bool:
        return isinstance(model, Stranger)

    def layers(self, model: nn.Module) -> list[tuple[nn.Module, KVLayer]]:
        return [(model, KVLayer(0, 1, 1, 1, 4, 4, 0.5))]

    @contextlib.contextmanager
    def attached(self, modules: list[nn.Module]) -> Any:
        modules[0].asked = True  # type: ignore[assignment]
        yield

    def applied(self, places: Places, state: Any, model: nn.Module) -> Any:
        raise InputError("apply: strangers keep no state")

    def states(self, places: Places, state: Any, model: nn.Module) -> Any:
        return [(places[0][1], state)]


def test_an_adapter_that_is_registered_serves_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = Stranger()
    adapter_of(stranger)  # whatever has waited registers itself now
    monkeypatch.setattr(adapters, "_adapters", list(adapters._adapters))
    with pytest.raises(InputError, match="needs a model with a KV state"):
        build_policy("h2o").layers(stranger)
    register_adapter(StrangersAdapter())
    policy = build_policy("h2o", budget="6tok", window=2)
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    with policy.attach(stranger), torch.no_grad():
        y, state = stranger(x)
    scores = (x @ x.mT * 0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(y[:, :, 0], scores.softmax(-1) @ x)
    assert stranger.asked
    [(served, left)] = policy.states(stranger, state)
    assert served.policy is policy
    assert left.slots.used == 6  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="strangers keep no state"):
        policy.apply(state, stranger)
    assert adapter_of(model()) is OWN


def test_what_a_policy_left_is_told_by_layer() -> None:
    reader, x = model(), tokens(2, 40)
    policy = build_policy("quest", budget="24tok", window=4, page=4)
    with policy.attach(reader), torch.no_grad():
        _, state = reader.read(x)
        _, state = reader.read(x[:, :1], state)
    left = policy.states(reader, state)
    assert [served.layer.index for served, _ in left] == [0, 1]
    assert [held for _, held in left] == list(state.layers)
    assert [policy.bytes_read(held) for _, held in left] == [held.read_nbytes for held in state.layers]
    assert all(policy.bytes_read(held) > 0 for _, held in left)
    with pytest.raises(InputError, match="expected a model of contextlab and the state that its `read` returned"):
        policy.states(reader, x)


def test_policies_import_no_other_library() -> None:
    """The adapter to transformers waits until someone imports that."""
    code = "import sys, contextlab.policies as p; assert 'transformers' not in sys.modules; p.build_policy('h2o')"
    subprocess.run([sys.executable, "-c", code], check=True)
