"""Locret: what its heads learn, what is kept by them, and that they come back from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.files import write_json
from contextlab.policies import Locret, build_policy
from contextlab.policies.eviction.trained import greatest_logits
from contextlab.policies.eviction.two_pass import Recorder
from contextlab.testing.policies import masked, model, read, tokens


def trained(reader: Any, steps: int = 3, **options: Any) -> Locret:
    policy = Locret(hidden=16, **options)
    policy.fit(reader, tokens(8, 40, seed=9), 10, steps=steps, batch=4)
    return policy


def noted(reader: Any, x: Tensor) -> Recorder:
    recorder = Recorder()
    with recorder.attach(reader), torch.no_grad():
        reader.read(x)
    return recorder


def test_the_label_is_the_greatest_score_of_the_answers_queries() -> None:
    reader, x = model(), tokens(2, 20)
    recorder = noted(reader, x)
    for layer in recorder.layers(reader):
        seen = recorder.last[layer.index]
        got = greatest_logits(layer, seen, 6)
        assert got.shape == (2, 2, 14)
        for row, head, place in [(0, 0, 0), (1, 1, 13), (0, 1, 5)]:
            scores = [
                float(seen.q[row, t, h] @ seen.k[row, place, head]) * layer.scale
                for t in range(14, 20)
                for h in (2 * head, 2 * head + 1)
            ]
            assert float(got[row, head, place]) == pytest.approx(max(scores))


def test_heads_learn_what_they_are_shown() -> None:
    reader = model(seed=1, depth=1)
    policy = Locret(hidden=32)
    losses = policy.fit(reader, tokens(64, 40, seed=2), 12, steps=70, lr=8e-3)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    x = tokens(16, 40, seed=3)  # others than it was trained on
    with policy.attach(reader), torch.no_grad():
        _, state = reader.read(x)
    recorder = noted(reader, x)
    for layer in recorder.layers(reader):
        wanted = greatest_logits(layer, recorder.last[layer.index], 12).flatten().double()
        told = state.layers[layer.index].mass[..., :28].flatten().double()
        assert float(torch.corrcoef(torch.stack((wanted, told)))[0, 1]) > 0.5  # what the answer will be is chance


def test_the_same_seed_trains_the_same_heads_and_the_model_stays() -> None:
    reader = model()
    before = [p.clone() for p in reader.parameters()]
    one, two = trained(reader), trained(reader)
    for left, right in zip(one.heads, two.heads, strict=True):
        for a, b in zip(left.parameters(), right.parameters(), strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(p, q) for p, q in zip(before, reader.parameters(), strict=True))


@pytest.mark.parametrize("pads", [None, (0, 7)], ids=["", "padded"])
def test_it_keeps_the_laws(pads: tuple[int, ...] | None) -> None:
    """As test_base.py holds every policy to them that needs no training."""
    reader, x = model(), tokens()
    mask, policy = masked(x, pads), trained(reader)
    plain, _, _ = read(reader, x, [60], mask)
    with policy.attach(reader):
        got, _, _ = read(reader, x, [30, 12], mask)
    real = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(got[real], plain[real], rtol=0, atol=1e-9)
    full = 2 * 2 * 2 * (8 + 8) * 8
    for budget, allowed in (("50%", [full * n // 2 for n in (30, 40, *range(41, 61))]), ("40kB", [40_000] * 22)):
        with _with(policy, budget=budget, window=4).attach(reader):
            _, _, sizes = read(reader, x, [30, 10], mask)
        assert all(size <= most for size, most in zip(sizes, allowed, strict=True))
    few = _with(policy, budget="24tok", window=4)
    with few.attach(reader), torch.no_grad():
        together, state, _ = read(reader, x, [30, 10], mask)
        _, before, _ = read(reader, x[:, :33], [30], None if mask is None else mask[:, :33])
        first, _ = reader.read(x[:, 33:34], before)
        reader.read(x[:, 40:41], before)
        again, _ = reader.read(x[:, 33:34], before)
        torch.testing.assert_close(again, first, rtol=0, atol=0)
        for row, pad in enumerate(pads or (0, 0)):
            alone, _, _ = read(reader, x[row : row + 1, pad:], [30 - pad, 10])
            torch.testing.assert_close(together[row : row + 1, pad:], alone, rtol=0, atol=1e-9)
    assert max(layer.slots.used for layer in state.layers) <= 24


def _with(policy: Locret, **options: Any) -> Locret:
    other = Locret(hidden=policy.hidden, **options)
    other.heads = policy.heads
    return other


def test_a_tokens_score_never_changes_and_the_highest_are_kept() -> None:
    reader, x = model(), tokens()
    policy = trained(reader)
    with policy.attach(reader):
        _, whole, _ = read(reader, x, [60])
        _, pieces, _ = read(reader, x, [11, 30, 1])
    torch.testing.assert_close(pieces.layers[1].mass, whole.layers[1].mass)
    with _with(policy, budget="12tok", window=3).attach(reader), torch.no_grad():
        _, state = reader.read(x)
    # In the first layer equal tokens have equal scores; in the second what they have read tells them apart.
    best = whole.layers[1].mass.clone()
    best[..., 57:] = 1e9
    assert state.layers[1].positions.tolist() == best.topk(12).indices.sort(2).values.tolist()


def test_trained_heads_come_back_from_a_file(tmp_path: Path) -> None:
    reader, x = model(), tokens()
    policy = trained(reader, budget="24tok", window=4)
    policy.save(tmp_path)
    again = build_policy("locret", budget="24tok", window=4, weights=str(tmp_path))
    with policy.attach(reader):
        expected, _, _ = read(reader, x, [40])
    with again.attach(reader):
        got, _, _ = read(reader, x, [40])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    with (
        pytest.raises(InputError, match="heads are of another model: trained for 2 layers"),
        again.attach(model(depth=1)),
    ):
        pass
    with pytest.raises(InputError, match="no such file"):
        Locret(weights=tmp_path / "nowhere")
    write_json(tmp_path / "locret.json", {"policy": "locret", "layers": 3})
    with pytest.raises(InputError, match="layer 2 is not complete"):
        Locret(weights=tmp_path)
    write_json(tmp_path / "locret.json", [1])
    with pytest.raises(InputError, match="no retaining heads"):
        Locret(weights=tmp_path)


def test_untrained_heads_and_impossible_training_are_refused_in_one_line() -> None:
    reader, x = model(), tokens()
    with pytest.raises(InputError, match=r"untrained; train them with policy.fit.*weights=FOLDER"):
        build_policy("locret").attach(reader).__enter__()
    with pytest.raises(InputError, match="nothing to save"):
        Locret().save("anywhere")
    for answer in (0, 60):
        with pytest.raises(InputError, match="expected 1 to 59"):
            Locret().fit(reader, x, answer)
    with pytest.raises(InputError, match="steps"):
        Locret().fit(reader, x, 5, steps=0)
    with pytest.raises(InputError, match="hidden"):
        Locret(hidden=0)
    with trained(reader).attach(reader), torch.no_grad():
        pass
    with torch.no_grad():
        _, state = reader.read(x)
    with pytest.raises(InputError, match="attach the policy before reading"):
        trained(reader).apply(state, reader)
