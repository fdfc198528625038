"""How layers divide a budget: against the definition, and what of it every policy holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contextlab.errors import InputError
from contextlab.models import build_model
from contextlab.policies import build_policy
from contextlab.policies.core.division import divided, rounded_down
from contextlab.testing import policies as laws

WEIGHTS, LEAST, MOST = [1.9, 1.3, 0.7, 0.1], [3.0, 3.0, 5.0, 3.0], [20.0, 20.0, 9.0, 20.0]


@pytest.mark.parametrize("total", [1.0, 14.0, 15.0, 23.7, 40.0, 60.0, 68.9, 69.0, 100.0])
def test_parts_are_weights_times_one_factor_within_bounds_and_add_up(total: float) -> None:
    parts = divided(total, WEIGHTS, LEAST, MOST)
    assert sum(parts) == pytest.approx(min(max(total, sum(LEAST)), sum(MOST)), abs=1e-9)
    free = [part / w for part, w, low, high in zip(parts, WEIGHTS, LEAST, MOST, strict=True) if low < part < high]
    factor = free[0] if free else None
    assert free == pytest.approx([factor] * len(free))
    for part, weight, low, high in zip(parts, WEIGHTS, LEAST, MOST, strict=True):
        assert low <= part <= high
        if factor is not None:
            assert part == pytest.approx(min(max(factor * weight, low), high))


def test_rounding_loses_no_token() -> None:
    assert rounded_down([3.9, 2.6, 1.5], 8, [4, 9, 9]) == [4, 3, 1]
    assert rounded_down([2.0, 2.0], 9, [2, 2]) == [2, 2]


def slots(name: str, budget: str, length: int, **options: Any) -> list[int]:
    """Of each layer of a model of six."""
    policy: Any = build_policy(name, budget=budget, **options)
    return [policy.slots(layer, length, 1, torch.float64) for layer in policy.layers(laws.model(depth=6))]


@pytest.mark.parametrize("budget", ["75%", "90%", "115kB", "138kB"])
def test_what_the_first_layers_cannot_use_goes_to_the_others(budget: str) -> None:
    # Six weights from 1.95 to 0.05; without handing on, six layers would hold 66.7% and 73.2%.
    kv, full = 2, 6 * 100 * 2 * (8 + 8) * 8  # key heads, and bytes of all that is read
    asked = {"115kB": 115_000, "138kB": 138_000}.get(budget, full * float(budget.rstrip("%kB")) / 100)
    found = slots("pyramid_kv", budget, 100, window=8)
    assert found == sorted(found, reverse=True), found
    assert found[:2] == [100, 100]
    assert found[-1] < 100
    each = kv * ((8 + 8) * 8 + 4)
    queries = 8 * 4 * 8 * 8 + 8  # those that judge, and the row's start
    assert asked - 6 * each < sum(found) * each + 6 * queries <= asked


def test_a_budget_in_tokens_is_divided_without_loss() -> None:
    # The same at any length, so that no row depends on the padding of its batch.
    found = slots("pyramid_kv", "75tok", 100, window=8)
    assert found == slots("pyramid_kv", "75tok", 1000, window=8) == slots("pyramid_kv", "75tok", 20, window=8)
    assert found == sorted(found, reverse=True)
    assert (sum(found), found[-1]) == (6 * 75, 9)  # 8 + 1; its weight alone gives it 3


def test_each_layer_has_its_window() -> None:
    for budget in ("24tok", "24%"):
        found = slots("pyramid_kv", budget, 100, window=8)
        assert found[-1] == 9  # 8 + 1; its weight alone gives it 1
        assert sum(found) == 6 * 24 or budget == "24%"
    with pytest.raises(InputError, match="8 tokens do not hold the 8 protected"):
        slots("pyramid_kv", "8tok", 100, window=8)
    with pytest.raises(InputError, match="does not hold the 8 protected tokens"):
        slots("pyramid_kv", "1kB", 100, window=8)


@pytest.mark.parametrize("budget", ["90kB", "60%", "90%"])
@pytest.mark.parametrize("name", ["pyramid_kv", "ada_kv"])
def test_what_a_layer_was_lent_it_gives_back(name: str, budget: str) -> None:
    # While few tokens were read the first layers use little; the last then hold more than their own part.
    reader, x = laws.model(depth=6), laws.tokens(1, 120)
    options: dict[str, Any] = {"of": "snapkv", "options": {"pyramid": 20.0}} if name == "ada_kv" else {}
    policy = build_policy(name, budget=budget, window=8, **options)
    with policy.attach(reader):
        _, state, sizes = laws.read(reader, x, [70, 10, 5])
    for size, length in zip(sizes, [70, 80, *range(85, 121)], strict=True):
        allowed = 90_000 if budget == "90kB" else 6 * length * 2 * (8 + 8) * 8 * float(budget[:-1]) / 100
        assert size <= allowed, length
        assert size >= 0.8 * min(allowed, 6 * length * 2 * (8 + 8) * 8), length
    if name == "pyramid_kv":
        held = [layer.slots.used for layer in state.layers]
        assert held == sorted(held, reverse=True)
        assert min(held) >= 9


def looped(loops: int = 3) -> Any:
    """Two layers that are run so often, each time with a state of its own."""
    layer = {"mixer": "attention", "options": {"kv_heads": 2}}
    spec = {"width": 32, "position": "rope", "depth": 2, "loops": loops, "heads": 4, "mlp_ratio": 1, "layers": [layer]}
    ends = {"input_size": laws.SIZE, "output_size": laws.SIZE, "read_in": "token"}
    return build_model({**spec, **ends}, seed=0).double()


@pytest.mark.parametrize("name", ["h2o", "pyramid_kv", "ada_kv", "dmc"])
def test_bytes_are_divided_among_the_states_of_a_looped_model(name: str) -> None:
    reader, x = looped(), laws.tokens(1, 100)
    options = {} if name == "dmc" else {"window": 4}
    policy = build_policy(name, budget="40kB", **options)
    if policy.untrained:
        policy.train_on(reader, laws.tokens(2, 24), 4, steps=2)
    with policy.attach(reader), torch.no_grad():
        _, state = reader.read(x)
    assert len(state.layers) == 6
    assert 36_000 < state.nbytes <= 40_000


@pytest.mark.parametrize("name", ["oracle", "kvzip"])
def test_what_watches_each_layer_once_is_refused_by_a_looped_model(name: str) -> None:
    reader, policy = looped(), build_policy(name, window=4)
    policy.prepare(reader, laws.tokens(1, 40), 40)
    with pytest.raises(InputError, match="this model runs them 3 times"):
        policy.layers(reader)


@pytest.mark.parametrize("name", ["key_norm", "ada_kv"])
def test_only_a_token_that_is_read_alone_is_given_room_to_grow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy: Any = build_policy(name, budget="90%")
    asked: list[tuple[int, bool]] = []
    own = policy.slots

    def slots(layer: Any, length: int, batch: int, dtype: torch.dtype, decoding: bool = False) -> int:
        asked.append((length, decoding))
        answer: int = own(layer, length, batch, dtype, decoding)
        return answer

    monkeypatch.setattr(policy, "slots", slots)
    reader, x = laws.model(depth=1), laws.tokens(2, 14)
    with policy.attach(reader):
        laws.read(reader, x, [9, 2])
    # Before the first piece a state is made, of no token.
    assert asked[-5:] == [(9, False), (11, False), (12, True), (13, True), (14, True)]
