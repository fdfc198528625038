"""What every registered policy is held to, under each of the option cases it was registered with.

A new policy gets all of this with no new test code. `Forgetful` at the end shows that the laws can fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models import build_model
from contextlab.ops.kv import KVLayer
from contextlab.policies import Budget, EvictionPolicy, Seen, build_policy
from contextlab.testing import Component, LawBroken, laws, parametrize_with_laws
from contextlab.testing.policies import masked, model, read, tokens

LAWS = {law.name: law for law in laws("policy")}
padding = pytest.mark.parametrize("pads", [None, (0, 7)], ids=["", "padded"])


@parametrize_with_laws("policy")
def test_laws(law: Callable[[], None]) -> None:
    law()


@pytest.mark.parametrize(
    ("text", "kind", "amount", "shown"),
    [
        ("512tok", "tokens", 512, "512tok"), ("10%", "ratio", 0.1, "10%"), (0.25, "ratio", 0.25, "25%"),
        ("64MB", "bytes", 64e6, "64MB"), ("1.5GiB", "bytes", 1.5 * 2**30, "1.61061GB"), (None, "ratio", 1, "100%"),
    ],
)  # fmt: skip
def test_budgets_are_read(text: Any, kind: str, amount: float, shown: str) -> None:
    budget = Budget.of(text)
    assert (budget.kind, budget.amount, str(budget)) == (kind, amount, shown)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0%", "keeps nothing"), ("-5tok", "keeps nothing"), ("150%", "more than the full cache"),
        (64, "did you mean 64tok or 64%"), ("ten", "expected 512tok"), ("1.5tok", "whole number"), (True, "expected"),
        ("1..2MB", "expected 512tok"), ("nan%", "expected 512tok"),
    ],
)  # fmt: skip
def test_impossible_budgets_are_refused(text: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget.of(text)


def test_a_budget_that_does_not_hold_what_is_protected_is_refused() -> None:
    reader = model()
    with (
        pytest.raises(InputError, match="do not hold the 20 protected ones.*21tok"),
        build_policy("h2o", budget="20tok", window=20).attach(reader),
    ):
        pass
    policy = build_policy("h2o", budget="1kB", window=20)
    with policy.attach(reader), pytest.raises(InputError, match="it takes [0-9]+B"):
        read(reader, tokens(), [40])


def test_a_model_that_shares_keys_between_layers_is_refused() -> None:
    layers = ["attention", {"mixer": "attention", "kv": "shared"}]
    spec = {"width": 32, "depth": 2, "heads": 4, "layers": layers, "input_size": 4, "output_size": 4}
    reader = build_model({**spec, "read_in": "token"})
    with pytest.raises(InputError, match="share keys and values"), build_policy("h2o").attach(reader):
        pass


def test_a_needless_reposition_is_refused() -> None:
    reader = model(position="none")
    with pytest.raises(InputError, match="no rotary positions"), build_policy("h2o", reposition=True).attach(reader):
        pass


def test_a_state_without_its_policy_is_refused() -> None:
    reader, x = model(), tokens()
    with build_policy("h2o", budget="24tok", window=4).attach(reader), torch.no_grad():
        _, state = reader.read(x)
    with pytest.raises(InputError, match="KeptState was left by a policy"):
        reader.read(x[:, :1], state)


def test_a_state_is_compressed_after_reading() -> None:
    reader, x = model(), tokens()
    policy = build_policy("streaming_llm", budget="24tok", every=1)
    with torch.no_grad():
        _, state = reader.read(x[:, :40])
        kept = policy.apply(state, reader)
        with policy.attach(reader):
            reader.read(x[:, 40:41], kept)
    assert [layer.slots.used for layer in kept.layers] == [24, 24]
    assert kept.layers[0].positions[0, 0].tolist() == [0, 1, 2, 3, *range(20, 40)]
    with pytest.raises(InputError, match="attach the policy before reading"):
        build_policy("h2o", budget="40tok").apply(state, reader)


class Constant(EvictionPolicy):
    """Importance that a test hands in."""

    def __init__(self, importance: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.importance = importance

    def score(self, seen: Seen) -> Tensor:
        return self.importance.gather(2, seen.positions.clamp_min(0))


def test_the_kept_set_is_the_most_important_and_the_protected() -> None:
    reader, x = model(depth=1), tokens(1, 40)
    importance = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(0))
    with Constant(importance, budget="15tok", sinks=2, window=5).attach(reader), torch.no_grad():
        _, state = reader.read(x)
    for head in range(2):
        best = importance[0, head, 2:35].topk(8).indices + 2
        assert state.layers[0].positions[0, head].tolist() == sorted([0, 1, *best.tolist(), *range(35, 40)])


def test_repositioned_keys_stand_where_they_would_without_the_dropped_tokens() -> None:
    """What is read next is answered as if the dropped tokens had never been (one layer: its keys know no others)."""
    reader, x = model(depth=1), tokens(2, 40)
    pads = (0, 6)
    mask = masked(x, pads)
    importance = torch.zeros(2, 2, 60)
    importance[:, :, 11:17] = 1
    with Constant(importance, budget="13tok", sinks=2, window=4, every=1, reposition=True).attach(reader):
        _, state, _ = read(reader, x[:, :34], [30], mask)
        got, _ = reader.read(x[:, 34:35], state)
    for row, pad in enumerate(pads):
        kept = [0, 1, *range(11, 17), *range(34 - pad - 4, 34 - pad)]
        short = torch.cat((x[row, pad:34][kept], x[row, 34:35]))[None]
        expected, _, _ = read(reader, short, [len(kept) + 1])
        torch.testing.assert_close(got[row, -1], expected[0, -1], rtol=0, atol=1e-9)


def test_pyramids_share_the_same_total() -> None:
    policy = build_policy("snapkv", budget="100tok", pyramid=4.0, window=8)
    layers = [KVLayer(i, 5, 4, 4, 8, 8, 0.3) for i in range(5)]
    slots = [policy.slots(layer, 1000, 1, torch.float32) for layer in layers]
    assert slots == [176, 137, 100, 62, 25]  # 137.5 and 62.5 are due: what rounding leaves goes to the first


class Forgetful(EvictionPolicy):
    """Breaks its budget and writes into states that were handed on."""

    def score(self, seen: Seen) -> Tensor:
        return seen.positions.to(torch.float64)

    def attend(self, *arguments: Any, **options: Any) -> Any:
        y, state = super().attend(*arguments, **options)
        state.slots["keys"].mul_(1.01)
        return y, dataclasses.replace(state, start=torch.cat([state.start] * 5000)[: len(state.start)])


class Peeks(EvictionPolicy):
    """Lets the rows of a batch see each other."""

    def score(self, seen: Seen) -> Tensor:
        return seen.positions.to(torch.float64)

    def attend(self, layer: Any, q: Tensor, *arguments: Any, **options: Any) -> Any:
        y, state = super().attend(layer, q, *arguments, **options)
        return y + 1e-6 * q.mean(), state


class CountsPieces(EvictionPolicy):
    """Says that it does not depend on the pieces, and adds their length to its answer."""

    chunk_invariant = True

    def score(self, seen: Seen) -> Tensor:
        return seen.positions.to(torch.float64)

    def attend(self, layer: Any, q: Tensor, *arguments: Any, **options: Any) -> Any:
        y, state = super().attend(layer, q, *arguments, **options)
        return y + 1e-6 * q.shape[1], state


class Stays(EvictionPolicy):
    """Changes the model's weights, and takes any model, as often as one likes."""

    def score(self, seen: Seen) -> Tensor:
        return seen.positions.to(torch.float64)

    @contextlib.contextmanager
    def attach(self, model: Any) -> Any:
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        yield


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (Forgetful, "older states"),
        (Forgetful, "full budget"),
        (Forgetful, "full budget, padded"),
        (Forgetful, "budget of 50%"),
        (Forgetful, "budget of 50%, padded"),
        (Forgetful, "budget of 40kB"),
        (Peeks, "batch"),
        (CountsPieces, "pieces"),
        (Stays, "no trace"),
        (Stays, "no KV state"),
    ],
)
def test_each_law_can_fail(broken: Any, name: str) -> None:
    with pytest.raises(LawBroken):
        LAWS[name](Component("policy", "broken", broken, {"window": 4}))


@pytest.mark.parametrize("name", ["h2o", "quest", "ada_kv"])
def test_states_of_another_dtype_or_device_are_refused_in_one_line(name: str) -> None:
    reader, x = model(), tokens(1, 40)
    policy = build_policy(name, budget="90%")
    with torch.no_grad(), policy.attach(reader):
        _, state = reader.read(x)
        with pytest.raises(InputError, match=r"the state is of torch.float32.*state.to\(torch.float64\)"):
            reader.read(x[:, :1], state.to(torch.float32))
        with pytest.raises(InputError, match=r"the state is on meta, the tokens are on cpu; .*state.to\('cpu'\)"):
            reader.read(x[:, :1], state.to("meta"))
        reader.read(x[:, :1], state.to(torch.float32).to(torch.float64))
