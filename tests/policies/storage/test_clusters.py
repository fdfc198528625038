"""Clustered heads against the definition head by head, and where nothing may be lost."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models import build_model
from contextlab.ops.kv import KVLayer
from contextlab.policies import build_policy
from contextlab.policies.storage.clusters import CHAI, ClusteredState, alike

SIZE = 20


def model(**options: Any) -> Any:
    layer = {"mixer": "attention", "options": options}
    spec = {"width": 32, "depth": 2, "heads": 4, "mlp_ratio": 1, "layers": [layer]}
    return build_model({**spec, "input_size": SIZE, "output_size": SIZE, "read_in": "token"}, seed=0).double()


def tokens(batch: int = 2, length: int = 30) -> Tensor:
    return torch.randint(0, SIZE, (batch, length), generator=torch.Generator().manual_seed(0))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
@torch.no_grad()
def test_heads_that_are_alike_lose_nothing(position: str) -> None:
    """Heads 0 and 2, and 1 and 3, ask and are asked the same: two of them stand for all."""
    reader, x = model(position=position), tokens()
    for block in reader.blocks:
        weight = block.mixer.qkv_proj.weight.view(3, 4, 8, 32)
        weight[:2, 2:] = weight[:2, :2]
        if block.mixer.slopes is not None:
            block.mixer.slopes[2:] = block.mixer.slopes[:2]
    expected, full = reader.read(x)
    with CHAI(clusters=2).attach(reader):
        got, state = reader.read(x[:, :20])
        for t in range(20, 30):
            y, state = reader.read(x[:, t : t + 1], state)
            got = torch.cat((got, y), 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    for held, due in zip(state.layers, full.layers, strict=True):
        assert torch.equal(held.cluster[:, :2], held.cluster[:, 2:])
        assert not (held.cluster[:, 0] == held.cluster[:, 1]).any()
        assert held.kv.keys.shape[1] == 2
        assert 2 * held.kv.keys.nbytes == due.keys.nbytes  # freed, not masked
        assert held.early is None


@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.25, 0.1, 0.01, 0.3, 0.2], dtype=torch.float64)])
def test_it_is_its_definition(slopes: Tensor | None) -> None:
    layer = KVLayer(0, 1, 6, 3, 8, 5, 0.4, slopes)
    q, k, v = drawn(2, 20, 6, 8), drawn(2, 20, 3, 8, seed=1), drawn(2, 20, 3, 5, seed=2)
    pads = (0, 4)
    mask = torch.arange(20) >= torch.tensor(pads)[:, None]
    y, state = CHAI(clusters=2, tokens=6).attend(layer, q, k, v, None, mask)
    assert isinstance(state, ClusteredState)
    assert state.cluster is not None
    assert state.head is not None
    for row, start in enumerate(pads):
        for head, t in product(range(6), range(start, 20)):
            asks = head if t - start < 6 else int(state.head[row, state.cluster[row, head // 2]]) * 2 + head % 2
            score = k[row, start : t + 1, asks // 2] @ q[row, t, asks] * 0.4
            if slopes is not None:
                score = score - slopes[asks] * (t - torch.arange(start, t + 1))
            torch.testing.assert_close(y[row, t, head], score.softmax(0) @ v[row, start : t + 1, head // 2])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_clusters_are_the_best_there_are(count: int) -> None:
    """Vectors around as many directions: every other partition has a larger error; each row for itself."""
    generator = torch.Generator().manual_seed(1)
    directions = drawn(4, count, 12)
    member = torch.stack([torch.randperm(6, generator=generator) % count for _ in range(4)])
    x = directions.gather(1, member[..., None].expand(-1, -1, 12)) + 0.2 * drawn(4, 6, 12, seed=3)
    x = x * 3 + 1  # neither size nor mean matters to a correlation
    cluster, head = alike(x, count)
    unit = torch.nn.functional.normalize(x - x.mean(-1, keepdim=True), dim=-1)

    def error(row: int, labels: Tensor) -> float:
        groups = [unit[row, labels == c] for c in range(count)]
        return sum(float((g - g.mean(0)).square().sum()) for g in groups if len(g))

    for row in range(4):
        least = min(error(row, torch.tensor(labels)) for labels in product(range(count), repeat=6))
        assert error(row, cluster[row]) == pytest.approx(least)
        for c in range(count):
            group = (cluster[row] == c).nonzero().flatten()
            away = (unit[row] - unit[row, group].mean(0)).norm(dim=-1)
            assert cluster[row, head[row, c]] == c
            assert away[head[row, c]] <= away[group].min() + 1e-3  # a pair is as far from its centre, both of it


def test_impossible_options_are_refused() -> None:
    reader = model(kv_heads=2)
    for options, message in (
        ({"clusters": 2}, "clusters: expected fewer than the 2 key heads of layer 0, got 2; take 1"),
        ({"clusters": [1]}, "expected one number for each of the 2 layers"),
    ):
        with pytest.raises(InputError, match=message), build_policy("chai", **options).attach(reader):
            pass
    with pytest.raises(InputError, match="tokens: expected a whole number of at least 1"):
        CHAI(tokens=0)
    with pytest.raises(InputError, match="layer 0 has one key head"), CHAI().attach(model(kv_heads=1)):
        pass
    with torch.no_grad():
        _, state = reader.read(tokens())
    with pytest.raises(InputError, match="attach it before reading"):
        CHAI().apply(state, reader)
