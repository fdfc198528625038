"""Ada-KV: which tokens heads keep of a shared budget, and that nothing is held for the others.

The laws of every policy are in test_base.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab import registry
from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies import AdaKV, Seen, build_policy
from contextlab.testing.policies import masked, model, read, tokens


def scoring(importance: Tensor, **options: Any) -> AdaKV:
    """Ada-KV with the importance [B, Hkv, T] that a test hands in."""
    policy = AdaKV(of="key_norm", **options)

    def score(seen: Seen) -> Tensor:
        return importance.gather(2, seen.positions.clamp_min(0))

    policy.score = score  # type: ignore[method-assign]
    return policy


def chosen_across_heads(scores: Tensor, budget: int, floor: float) -> list[list[int]]:
    """kvpress's rule of Ada-KV for one row's scores [Hkv, T]: each head's floor first, then the best of all heads."""
    flat = [(float(s), h, t) for h, row in enumerate(scores) for t, s in enumerate(row)]
    safe = set()
    for head in range(len(scores)):
        own = sorted((x for x in flat if x[1] == head), reverse=True)
        safe |= {x[1:] for x in own[: int(floor * budget)]}
    rest = sorted((x for x in flat if x[1:] not in safe), reverse=True)
    kept = safe | {x[1:] for x in rest[: len(scores) * budget - len(safe)]}
    return [sorted(t for h, t in kept if h == head) for head in range(len(scores))]


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
def test_the_best_tokens_of_all_heads_are_kept(floor: float) -> None:
    reader, x = model(depth=1, kv_heads=4), tokens(2, 50)
    importance = torch.rand(2, 4, 50, generator=torch.Generator().manual_seed(1))
    importance[:, 0] *= 0.3
    importance[:, 3, -1] = importance[..., -1] = 9.0  # the window
    with scoring(importance, budget="10tok", sinks=0, window=1, page=1, floor=floor).attach(reader), torch.no_grad():
        _, state = reader.read(x)
    held = state.layers[0].places()
    assert held == [chosen_across_heads(row, 10, floor) for row in importance]
    assert (len({len(head) for head in held[0]}) > 1) == (floor < 1)


def test_pages_are_divided_by_their_mean_importance() -> None:
    """No other division of the same pages keeps more importance."""
    reader, x = model(depth=1), tokens(1, 40)
    importance = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(2)) ** torch.tensor([[[1.0], [4.0]]])
    with scoring(importance, budget="12tok", sinks=0, window=4, page=4, floor=0.0).attach(reader), torch.no_grad():
        _, state = reader.read(x)
    best = importance.clone()
    best[..., -4:] = 100
    total = {
        pages: sum(float(best[0, h].topk(4 * n).values.sum()) for h, n in enumerate((pages, 6 - pages)))
        for pages in range(1, 6)
    }
    sizes = [len(head) for head in state.layers[0].places()[0]]
    assert sum(sizes) == 24
    assert sizes[0] == 4 * max(total, key=lambda pages: total[pages])
    assert sizes[0] != sizes[1]


@pytest.mark.parametrize("pads", [None, (0, 7)], ids=["", "padded"])
@pytest.mark.parametrize(
    ("of", "position"), [("snapkv", "rope"), ("snapkv", "alibi"), ("h2o", "rope"), ("a2sf", "rope"), ("vatp", "none"),
                         ("keydiff", "rope"), ("expected_attention", "rope"), ("hash_evict", "rope")],
)  # fmt: skip
def test_an_even_division_is_the_policy_itself(of: str, position: str, pads: tuple[int, ...] | None) -> None:
    reader, x = model(position=position), tokens()
    own = build_policy(of, budget="24tok", window=5, every=3)
    with own.attach(reader):
        expected, before, _ = read(reader, x, [30, 12], masked(x, pads))
    with build_policy("ada_kv", of=of, budget="24tok", window=5, every=3, floor=1.0, page=1).attach(reader):
        got, state, _ = read(reader, x, [30, 12], masked(x, pads))
    real = torch.ones(x.shape, dtype=torch.bool) if pads is None else masked(x, pads)
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-9)
    places = before.layers[1].positions
    assert state.layers[1].places() == [[[p for p in head if p >= 0] for head in row] for row in places.tolist()]


def test_memory_is_really_free_and_heads_really_differ() -> None:
    reader, x = model(kv_heads=4), tokens(3, 60)
    with build_policy("ada_kv", of="h2o", budget="16tok", window=2, every=4, page=2, floor=0.0).attach(reader):
        _, state, _ = read(reader, x, [50])
    for layer in state.layers:
        counts = [[len(head) for head in row] for row in layer.places()]
        assert all(sum(row) <= 4 * 16 for row in counts)
        assert any(len(set(row)) > 1 for row in counts)
        slot = (8 + 8) * 8 + 4 + 4  # key, value, position, mass: bytes
        most = 3 * 4 * 16 * (slot + 2) + 3 * 8
        assert layer.nbytes <= most
        assert layer.pages["keys"].shape[1:3].numel() + 4 * layer.tail.used <= 4 * 16


def test_pages_grow_with_the_budget_and_always_hold_what_is_protected() -> None:
    policy = AdaKV(window=4)
    assert [policy._page_size(slots) for slots in (5, 31, 32, 100, 1000, 5000)] == [1, 1, 2, 4, 32, 64]
    for window in range(1, 60):
        policy = AdaKV(window=window)
        for slots in range(window, 400, 7):
            size = policy._page_size(slots)
            assert -(-window // size) <= slots // size
    layer = KVLayer(0, 1, 2, 2, 8, 8, 0.3)
    assert AdaKV(budget="10%", window=5, page=4).slots(layer, 20, 1, torch.float64) == 9  # two pages and a slot


@pytest.mark.parametrize(("first", "after"), [(40, 1), (15, 20)], ids=["at once", "when it is full"])
def test_a_state_is_compressed_after_reading(first: int, after: int) -> None:
    reader, x = model(), tokens()
    policy = build_policy("ada_kv", of="keydiff", budget="24tok", window=3)
    with torch.no_grad():
        _, state = reader.read(x[:, :first])
        kept = policy.apply(state, reader)
        with policy.attach(reader):
            _, read_so = reader.read(x[:, :first])
            for _ in range(2):
                got, kept = reader.read(x[:, first : first + after], kept)
                expected, read_so = reader.read(x[:, first : first + after], read_so)
    assert kept.layers[0].places() == read_so.layers[0].places()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for of in ("snapkv", "expected_attention"):
        with pytest.raises(InputError, match="attach the policy before reading"):
            build_policy("ada_kv", of=of, budget="40tok").apply(state, reader)


def test_rows_are_picked_gradients_flow_and_half_precision_serves() -> None:
    reader, x = model(), tokens()
    policy = build_policy("ada_kv", of="h2o", budget="16tok", window=3, page=2, floor=0.0)
    with policy.attach(reader), torch.no_grad():
        _, state, _ = read(reader, x, [50])
        alone, _ = reader.read(x[:1, :1], state.select(torch.tensor([1])))
        both, _ = reader.read(x[[0, 0], :1], state)
    torch.testing.assert_close(alone[0], both[1], rtol=0, atol=1e-12)
    with policy.attach(reader):
        _, state = reader.read(x[:, :30])
        _, state = reader.read(x[:, 30:31], state)
        y, _ = reader.read(x[:, 31:40], state)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in reader.parameters())
    half = model().bfloat16()
    with policy.attach(half):
        y, state, _ = read(half, x, [30, 7])
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    assert all(sum(map(len, row)) <= 2 * 16 for row in state.layers[0].places())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "snapvk"}, "snapkv"), ({"of": "streaming_llm"}, "does more than score.*h2o.*snapkv"),
        ({"of": "quantize"}, "does more than score"), ({"floor": 1.5}, "from 0 to 1"), ({"page": 0}, "at least 1"),
        ({"options": {"window": 3}}, "give window beside it"), ({"options": {"kernel": 2}}, "odd"),
        ({"options": {"kernle": 3}}, "kernel"), ({"options": {"reposition": True}}, "leave it out"),
        ({"budget": "9tok", "window": 6, "page": 5}, "do not hold the 10 protected ones"),
    ],
)  # fmt: skip
def test_what_is_impossible_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught, build_policy("ada_kv", **options).attach(model()):
        pass
    assert "\n" not in str(caught.value)


def test_it_is_neither_composed_nor_mixed_with_another_states() -> None:
    with pytest.raises(InputError, match="put snapkv on the left"):
        build_policy("ada_kv") | build_policy("quantize")
    reader, x = model(), tokens()
    with build_policy("h2o", budget="24tok", window=4).attach(reader), torch.no_grad():
        _, state = reader.read(x)
    with (
        build_policy("ada_kv", budget="24tok", window=4).attach(reader),
        pytest.raises(InputError, match="a PagedState, got KeptState"),
    ):
        reader.read(x[:, :1], state)


SCORES = [entry for entry in registry.entries("policy") if getattr(entry.factory, "only_scores", False)]


@pytest.mark.parametrize("pads", [(0, 0), (0, 5)], ids=["", "padded"])
@pytest.mark.parametrize("entry", SCORES, ids=lambda entry: entry.name)
def test_what_only_scores_keeps_the_same_where_heads_share_evenly(entry: registry.Entry, pads: tuple[int, int]) -> None:
    """So a policy that says that it only scores does nothing besides that AdaKV would not do."""
    reader, x = model(depth=1), tokens(2, 44)
    mask = masked(x, pads) if any(pads) and entry.name != "kvzip" else None  # which reads texts of one length
    options = {"window": 4, **{key: value for key, value in next(iter(entry.cases), {}).items() if key != "reposition"}}
    plain: Any = entry.build(**options)
    if plain.untrained:
        plain.train_on(reader, x, 4, steps=2)
    plain.prepare(reader, x, 36, mask)
    even = AdaKV("20tok", of=plain, floor=1.0, page=1, every=plain.every)
    answers, places = [], []
    for policy in (plain.with_budget("20tok"), even):
        with policy.attach(reader):
            y, state, _ = read(reader, x, [30], mask)
        answers.append(y if mask is None else y[mask])
        held = state.layers[0]
        places.append(held.places() if policy is even else held.positions.tolist())
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-9)
    assert places[1] == [[[place for place in head if place >= 0] for head in row] for row in places[0]]
