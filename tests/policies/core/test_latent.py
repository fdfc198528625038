"""Layers whose keys are the values, too: multi-head latent attention, where one latent of both is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab import registry
from contextlab.errors import InputError
from contextlab.models import build_model
from contextlab.testing import policies as laws

APART = {"cam", "weighted_kv", "dmc", "low_rank", "chai"}
"""Policies that do to values what they do not do to keys."""
POLICIES = sorted(entry.name for entry in registry.entries("policy"))
HELD = [
    entry.name
    for entry in registry.entries("policy")
    if entry.name not in APART and entry.factory.bounds == "held" and "budget" in {p.name for p in entry.parameters}
]
"""Those whose budget is of what they hold."""
RANK, ROPE = 12, 4
TOKEN = 2 * (RANK + ROPE) * 8  # bytes that two layers hold of a token


def latent_model(depth: int = 2, **options: Any) -> Any:
    """float64."""
    mixer = {"mixer": "mla", "options": {"rank": RANK, "rope_dim": ROPE, "head_dim": 8, **options}}
    spec = {"width": 32, "position": "none", "depth": depth, "heads": 4, "mlp_ratio": 1, "layers": [mixer]}
    spec |= {"input_size": laws.SIZE, "output_size": laws.SIZE, "read_in": "token"}
    return build_model(spec, seed=0).double()


def built(name: str, reader: Any, x: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    entry = registry.lookup("policy", name)
    known = {each.name for each in entry.parameters}
    given = {**(entry.cases[0] if entry.cases else {}), **options}
    if "window" in known:
        given.setdefault("window", 4)
    policy = entry.build(**{k: v for k, v in given.items() if k in known})
    if policy.untrained and name not in APART:
        policy.train_on(reader, laws.tokens(2, 24), 4, steps=2)
    policy.prepare(reader, x, 30, mask)
    return policy


@pytest.mark.parametrize("pads", [None, (0, 7)])
@pytest.mark.parametrize("name", sorted(set(POLICIES) - APART))
def test_a_policy_with_room_for_all_changes_nothing(name: str, pads: tuple[int, ...] | None) -> None:
    reader, x = latent_model(), laws.tokens(2, 40)
    mask = laws.masked(x, pads)
    with torch.no_grad():
        expected, _, _ = laws.read(reader, x, [40], mask)
    # To choose among all keys takes all that there is, so that topk has no part below 100%.
    budget = "64tok" if name == "topk" else "100%"
    policy = built(name, reader, x, None if name == "kvzip" else mask, budget=budget)
    if name == "kvzip" and pads is not None:
        pytest.skip("it reads texts of one length only")
    with policy.attach(reader), torch.no_grad():
        got, _, _ = laws.read(reader, x, [30], mask)
    real = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    if not policy.lossless:
        real = real & (torch.arange(40) < 30)
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted(APART))
def test_a_policy_that_parts_values_from_keys_is_refused(name: str) -> None:
    reader = latent_model()
    with pytest.raises(InputError, match="keeps keys and values as one latent; take a policy"):
        built(name, reader, laws.tokens()).layers(reader)


@pytest.mark.parametrize("name", HELD)
def test_a_budget_is_of_what_the_model_holds(name: str) -> None:
    reader, x = latent_model(), laws.tokens(2, 200)
    policy = built(name, reader, x, budget="60%")
    policy.prepare(reader, x, 200)
    with policy.attach(reader), torch.no_grad():
        _, state = reader.read(x)
    asked = 0.6 * 2 * 200 * TOKEN
    assert asked - max(0.01 * asked, 2 * 2 * (TOKEN // 2 + 8)) <= state.nbytes <= asked
    for layer in state.layers:
        values = getattr(getattr(layer, "slots", None), "values", {}).get("values")
        assert values is None or values.shape[-1] == 0  # held once


def test_what_stands_before_the_weights_counts() -> None:
    """An adapter's layer is called, its weight not read: the map into the latent's space is that of the call."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    reader, x = latent_model(), laws.tokens(2, 20)
    for block in reader.blocks:
        block.mixer.kv_up = Doubled(block.mixer.kv_up)
    with torch.no_grad():
        expected, _, _ = laws.read(reader, x, [20])
        with registry.lookup("policy", "h2o").build(window=4).attach(reader):
            got, _, _ = laws.read(reader, x, [12])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
