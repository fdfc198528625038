"""Sparse State Expansion token by token, its two layouts, and the loss that spreads tokens over partitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.linear.sse import SparseStateExpansion


def made(**options: Any) -> SparseStateExpansion:
    mixer = build_mixer("sse", width=12, **options).double()
    assert isinstance(mixer, SparseStateExpansion)
    with torch.no_grad():  # strong decays, so that a partition that decays unchosen is told from one that does not
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def recurrence(mixer: SparseStateExpansion, x: Tensor) -> Tensor:
    """x [T, D] -> y [T, D], with one matrix for each partition and head, of which unchosen ones are not touched."""
    H, K, V = mixer.heads, mixer.key, mixer.value
    count = mixer.partitions + mixer.always_on
    S = [[x.new_zeros(K, V) for _ in range(H)] for _ in range(count)]
    outputs = []
    for token in x:
        parts = mixer.in_proj(token).split([H * K, H * K, H * V, H * V, mixer.parts[2]])
        q, k, v, gate = F.silu(parts[0]), parts[1], F.silu(parts[2]), F.silu(parts[3])
        decay = torch.sigmoid(mixer.decay_proj(parts[4])) ** (1 / mixer.gate_scale)
        e = torch.softmax(mixer.class_proj(token), 0)
        chosen = sorted(range(mixer.partitions), key=lambda i: -e[i].item())[: mixer.top_k]
        gates = {i: e[i] for i in chosen}
        if mixer.always_on:
            gates[mixer.partitions] = torch.ones_like(e[0])
        heads = []
        for h in range(H):
            keys, out = k[h * K : (h + 1) * K], x.new_zeros(V)
            rows = sorted(range(K), key=lambda r: -keys[r].item())[: mixer.rows or K]
            total = sum(keys[r].exp() for r in rows)
            for i, w in gates.items():
                new = []
                for r in range(K):
                    row = S[i][h][r]
                    if r in rows:
                        row = decay[h * K + r] * row + w * keys[r].exp() / total * v[h * V : (h + 1) * V]
                    new.append(row)
                S[i][h] = torch.stack(new)
                out = out + w * K**-0.5 * S[i][h].T @ q[h * K : (h + 1) * K]
            out = out / (out.square().mean() + 1e-6).sqrt() * mixer.norm.weight
            heads.append(out * gate[h * V : (h + 1) * V])
        outputs.append(mixer.out_proj(torch.cat(heads)))
    return torch.stack(outputs)


@pytest.mark.parametrize("layout", ["packed", "masked"])
@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2, "partitions": 3},
        {"heads": 1, "partitions": 5, "top_k": 2, "key_dim": 4, "rows": 2, "gate_scale": 1.0},
        {"heads": 3, "partitions": 2, "always_on": False, "rows": 1, "gate_rank": 2, "gate_scale": 0.5},
    ],
)
def test_agrees_with_the_recurrence(options: dict[str, Any], layout: str) -> None:
    torch.manual_seed(0)
    mixer = made(**options, layout=layout)
    x = torch.randn(2, 40, 12, dtype=torch.float64, requires_grad=True)
    y = mixer(x)[0]
    expected = torch.stack([recurrence(mixer, row) for row in x])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    weight, wanted = torch.randn_like(y), [x, *mixer.parameters()]
    for got, due in zip(
        torch.autograd.grad((y * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, due, rtol=0, atol=1e-8)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 140),
    partitions=st.integers(1, 9),
    data=st.data(),
    seed=st.integers(0, 999),
)
def test_layouts_agree(batch: int, length: int, partitions: int, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    top_k = data.draw(st.integers(1, partitions))
    packed = made(partitions=partitions, top_k=top_k, heads=2)
    masked = made(partitions=partitions, top_k=top_k, heads=2, layout="masked")
    masked.load_state_dict(packed.state_dict())
    x = torch.randn(batch, length, 12, dtype=torch.float64)
    _, state = packed(torch.randn(batch, 20, 12, dtype=torch.float64))
    (y, after), (due, due_after) = packed(x, state), masked(x, state)
    torch.testing.assert_close(y, due, rtol=0, atol=1e-9)
    torch.testing.assert_close(after["matrix"], due_after["matrix"], rtol=0, atol=1e-9)


def test_what_is_not_chosen_is_not_touched() -> None:
    torch.manual_seed(0)
    mixer = made(partitions=4, top_k=1, heads=1, rows=3)
    _, state = mixer(torch.randn(1, 60, 12, dtype=torch.float64))
    x = torch.randn(1, 1, 12, dtype=torch.float64)
    _, after = mixer(x, state)
    changed = (after["matrix"] != state["matrix"]).any(-1)[0]  # [partitions + 1, rows]; the first is always on
    best = int(mixer.class_proj(x[0, 0]).argmax())
    assert changed.any(-1).tolist() == [True, *(i == best for i in range(4))]
    assert changed[0].sum() == changed[1 + best].sum() == 3


def test_loss_is_the_products_of_parts_and_gates_and_spreads_tokens() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64, 12, dtype=torch.float64)
    mask = torch.arange(64) >= torch.tensor([0, 5, 64, 30])[:, None]
    mixer, plain = made(top_k=2, balance=0.5), made(top_k=2, balance=0.0)
    plain.load_state_dict(mixer.state_dict())
    e = mixer.class_proj(x[mask]).softmax(-1)
    best = e.topk(2, -1).indices
    loss = sum((best == i).double().sum() / len(e) * e[:, i].mean() for i in range(4)) * 0.5 * 4 / 2

    def gradients(mixer: SparseStateExpansion) -> list[Tensor]:
        return list(torch.autograd.grad(mixer(x, None, mask, False)[0][mask].sum(), list(mixer.parameters())))

    due = torch.autograd.grad(loss, mixer.class_proj.weight)[0]
    for (name, _), got, without in zip(mixer.named_parameters(), gradients(mixer), gradients(plain), strict=True):
        extra = due if name == "class_proj.weight" else torch.zeros_like(got)
        torch.testing.assert_close(got - without, extra, rtol=0, atol=1e-12)
    assert due.abs().max() > 1e-4
    mixer.eval()
    torch.testing.assert_close(gradients(mixer), gradients(plain), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k 5 is more than the 4 partitions; the nearest is 4"),
        ({"rows": 9}, "rows 9 is more than the 3 rows of a partition; the nearest is 3"),
        ({"heads": 5}, "not divisible by 5 heads"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_mixer("sse", width=12, **options)
