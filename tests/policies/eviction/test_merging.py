"""Merging against each definition in plain loops, token by token, and against what it is for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies import EvictionPolicy, build_policy
from contextlab.policies.core.slots import KeptState, Slots
from contextlab.policies.eviction.merging import dropped, most_alike

LAYER = KVLayer(0, 1, 4, 2, 8, 8, 8**-0.5)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state_of(tokens: int, pads: tuple[int, ...] = (0, 0), seed: int = 0) -> KeptState:
    """A state that holds `tokens` slots, `pads` of them in front without a token."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(pads)
    places = (torch.arange(tokens) - torch.tensor(pads)[:, None]).clamp_min(-1).int()
    slots = {
        "keys": drawn(batch, 2, tokens, 8, seed=seed),
        "values": drawn(batch, 2, tokens, 8, seed=seed + 1),
        "position": places[:, None].expand(-1, 2, -1),
    }
    mass = torch.rand(batch, 2, tokens, generator=generator)
    start = torch.tensor(pads)
    return KeptState(Slots.of(slots, tokens, tokens), start, mass, padded=any(pads), length=tokens)


def policy(name: str, **options: Any) -> EvictionPolicy:
    built = build_policy(name, **options)
    assert isinstance(built, EvictionPolicy)
    return built


def evicted(chosen: EvictionPolicy, state: KeptState, limit: int) -> tuple[KeptState, Tensor, Tensor]:
    """What an eviction leaves, and which slots it kept."""
    index, left = chosen.kept(LAYER, state, limit)
    return chosen._evict(LAYER, state, limit), index, left


def heads(state: KeptState, index: Tensor, left: Tensor) -> Any:
    """Each row and head: (row, head, kept slots, dropped slots, slots of the result)."""
    for row in range(len(index)):
        for head in range(2):
            count = int(left[row])
            kept = index[row, head, index.shape[2] - count :].tolist()
            there = (state.positions[row, head] >= 0).nonzero().flatten().tolist()
            gone = [slot for slot in there if slot not in kept]
            yield row, head, kept, gone, range(index.shape[2] - count, index.shape[2])


PADS = pytest.mark.parametrize("pads", [(0, 0), (0, 5), (3, 14)])


@PADS
def test_what_is_dropped_is_found(pads: tuple[int, ...]) -> None:
    state = state_of(20, pads)
    index, left = policy("h2o", window=3).kept(LAYER, state, 9)
    slots, real = dropped(state, index, left)
    for row, head, _, gone, _ in heads(state, index, left):
        assert sorted(slots[row, head, real[row, head]].tolist()) == gone


@PADS
@pytest.mark.parametrize(("by", "size"), [("recent", 1.0), ("recent", 1e-12), ("attention", 1e-12)])
def test_cam_is_its_definition(pads: tuple[int, ...], by: str, size: float) -> None:
    """Attention of dropped tokens that is far above, or far below, the others' leaves nothing to chance."""
    chosen = policy("cam", sinks=2, window=4, merge=3, by=by)
    state = state_of(20, pads)
    index, left = chosen.kept(LAYER, state, 9)
    slots, real = dropped(state, index, left)
    assert state.mass is not None
    high = torch.zeros_like(state.mass).scatter_add(2, slots, real.float()) > 0
    state.mass = torch.where(high, size, 0.01 + state.mass * 0.001)
    state.mass[..., -1] += 10  # of the last of the window, which no mean of three holds
    kept, index, left = evicted(chosen, state, 9)
    for row, head, stay, gone, into in heads(state, index, left):
        expected = {slot: state.slots["values"][row, head, slot].clone() for slot in stay}
        for slot in gone:
            following = [s for s in stay if s > slot][:3]
            a = float(state.mass[row, head, slot])
            mean = sum(float(state.mass[row, head, s]) for s in following) / 3
            if a / mean >= 1:
                for s in following:
                    expected[s] += state.slots["values"][row, head, slot] / 3
            assert not 1e-9 < a / mean < 1
        got = kept.slots["values"][row, head, list(into)]
        torch.testing.assert_close(got, torch.stack([expected[s] for s in stay]))
    torch.testing.assert_close(
        kept.slots["keys"], state.slots["keys"].gather(2, index[..., None].expand(-1, -1, -1, 8))
    )


def test_cam_merges_as_often_as_it_should_and_keeps_the_output_on_average() -> None:
    """Mean over many equal heads: what the next tokens' attention adds is what the dropped token's own would be."""
    one, trials = state_of(12), 4000
    layer = KVLayer(0, 1, trials, trials, 8, 8, 8**-0.5)
    slots = {name: one.slots[name][:1, :1].expand(-1, trials, *one.slots[name].shape[2:]) for name in one.slots.values}
    weight = (one.slots["keys"][0, 0] @ drawn(8, seed=5)).exp()
    weight[:2] = 0.0
    mass = weight.float().expand(1, trials, -1)
    state = KeptState(Slots.of(slots, 12, 12), torch.zeros(1, dtype=torch.int64), mass, length=12)
    chosen = policy("cam", sinks=0, window=8, merge=4)
    kept = chosen._evict(layer, state, 9)
    assert kept.positions[0, 0].tolist() == list(range(3, 12))
    own = one.slots["values"][0, 0]
    chance = min(1.0, float(weight[2] / weight[3:7].mean()))
    assert 0.05 < chance < 0.95
    for slot, got in zip(range(3, 12), kept.slots["values"][0].mean(0), strict=True):
        expected = own[slot] + (chance * own[2] / 4 if slot < 7 else 0)
        torch.testing.assert_close(got, expected, rtol=0, atol=4 * 0.5 * trials**-0.5 * float(own[2].abs().max()) / 4)
    added = weight[3:7].sum() * chance * own[2] / 4
    torch.testing.assert_close(added, weight[2] * own[2])


@PADS
def test_weighted_kv_is_its_definition(pads: tuple[int, ...]) -> None:
    chosen = policy("weighted_kv", sinks=2, window=4)
    state = state_of(20, pads)
    kept, index, left = evicted(chosen, state, 9)
    assert state.mass is not None
    for row, head, stay, gone, into in heads(state, index, left):
        last = int(state.positions[row, head].max())
        mean = [float(state.mass[row, head, s]) / (last - int(state.positions[row, head, s]) + 1) for s in range(20)]
        values = state.slots["values"][row, head]
        for slot, new in zip(stay, into, strict=True):
            run = [s for s in gone if s < slot and not any(s < other < slot for other in stay)]
            every = [*run, slot]
            expected = sum(mean[s] * values[s] for s in every) / sum(mean[s] for s in every)
            torch.testing.assert_close(kept.slots["values"][row, head, new], expected)
        worst = max((mean[s] for s in gone), default=0.0)
        free = [s for s in stay if 2 <= int(state.positions[row, head, s]) <= last - 4]
        assert all(mean[s] >= worst for s in free)


@PADS
def test_d2o_is_its_definition_over_several_evictions(pads: tuple[int, ...]) -> None:
    chosen = policy("d2o", sinks=1, window=4, memory=0.3)
    state = state_of(20, pads)
    threshold: dict[tuple[int, int], float] = {}
    joined = 0
    for limit in (14, 10, 9):
        kept, index, left = evicted(chosen, state, limit)
        for row, head, stay, gone, into in heads(state, index, left):
            keys, values = (state.slots[name][row, head] for name in ("keys", "values"))
            found = {}
            for slot in gone:
                cosine = [float(keys[slot] @ keys[s] / keys[slot].norm() / keys[s].norm()) for s in stay]
                found[slot] = (max(cosine), stay[cosine.index(max(cosine))])
            if gone:
                now = sum(u for u, _ in found.values()) / len(gone)
                before = threshold.get((row, head))
                threshold[row, head] = now if before is None else 0.3 * now + 0.7 * before
            for slot, new in zip(stay, into, strict=True):
                mine = [(u, s) for s, (u, near) in found.items() if near == slot and u >= threshold[row, head] - 1e-6]
                joined += len(mine)
                total = math.e + sum(math.exp(u) for u, _ in mine)
                for name, x in (("keys", keys), ("values", values)):
                    expected = (math.e * x[slot] + sum(math.exp(u) * x[s] for u, s in mine)) / total
                    torch.testing.assert_close(kept.slots[name][row, head, new], expected)
        state = kept
    assert joined > 3


def test_the_most_alike_are_found_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, among = drawn(2, 2, 30, 8), drawn(2, 2, 11, 8, seed=1)
    real = torch.ones(2, 2, 11, dtype=torch.bool)
    real[0, :, :4] = False
    cosine = torch.nn.functional.cosine_similarity(x[:, :, :, None], among[:, :, None], dim=-1)
    expected = cosine.masked_fill(~real[:, :, None], -2).max(3)
    monkeypatch.setattr("contextlab.policies.eviction.merging.SCORES", 200)
    value, index = most_alike(x, among, real)
    torch.testing.assert_close(value, expected.values)
    assert torch.equal(index, expected.indices)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cam", {"merge": 33}, r"merge: expected 1 to 32 \(window\), got 33"),
        ("cam", {"by": "norm"}, "by: input should be 'recent' or 'attention'"),
        ("cam", {"seed": -1}, "seed: expected a whole number"),
        ("d2o", {"memory": 1.5}, "memory: expected a part from 0 to 1"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_policy(name, **options)
