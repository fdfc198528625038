"""The indexes of selective reading, against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contextlab.errors import InputError
from contextlab.policies import build_policy
from contextlab.policies.reading.retrieval import LowRankKeys, Retrieval, TopK, halved
from contextlab.testing import policies as base
from tests.policies.reading.test_selective import by_hand, decode, layer_of, tensors


@pytest.mark.parametrize("prompt", [30, 60])
def test_topk_reads_the_best_keys(prompt: int) -> None:
    layer, (q, k, v) = layer_of(), tensors(61)
    got, state = decode(TopK("24tok", window=4), layer, q, k, v, prompt)
    expected = by_hand(TopK(window=4), layer, q, k, v, 20, lambda query, keys: query @ keys[0] * layer.scale)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert state.read_tokens == 24
    assert state.read_nbytes == 2 * 2 * 8 * (24 * 16 + 57 * 8)  # rows, heads, bytes: keys and values, and all keys
    assert list(state.tensors()) == list(state.kv.tensors())


def test_a_tree_parts_what_is_apart() -> None:
    """Four clusters far apart, mixed in order: each leaf is one of them, and what is held is what was given."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[30.0, 0, 0], [-30, 4, 0], [12, 20, 9], [-12, -20, -7]], dtype=torch.float64)
    which = torch.arange(4).repeat(8)[torch.randperm(32, generator=generator)]
    x = centres[which] + torch.randn(32, 3, generator=generator, dtype=torch.float64)
    order = halved(x, 2)
    assert sorted(order.tolist()) == list(range(32))
    assert all(len(set(leaf.tolist())) == 1 for leaf in which[order].view(4, 8))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    leaves = [{frozenset(leaf) for leaf in halved(y, 2).view(4, 8).tolist()} for y in (x, x @ turn)]
    assert leaves[0] == leaves[1]


def test_every_token_is_in_one_leaf() -> None:
    layer, (q, k, v) = layer_of(), tensors(70)
    policy = Retrieval("31tok", page=4, levels=2, window=4)
    _, state = decode(policy, layer, q, k, v, 33)
    order = state.summary["order"][:, :, :16]
    assert (order.flatten(2).sort(-1).values == torch.arange(64)).all()
    leaves = k.transpose(1, 2).gather(2, order.flatten(2).long()[..., None].expand(-1, -1, -1, 8)).unflatten(2, (16, 4))
    torch.testing.assert_close(state.summary["mean"][:, :, :16], leaves.mean(3))
    # The mean key of the leaves that are read fits best: by hand on the leaves as pages.
    wanted = (q[:, -1].unflatten(1, (2, 2)) @ leaves.mean(3).mT * layer.scale)[:, :, :, :16]
    wanted = (wanted - wanted.amax(-1, keepdim=True)).amax(2)
    assert state.read_tokens == 3 * 4 + 6
    chosen = policy._pages(layer, q[:, -1], state)
    assert chosen is not None
    assert chosen.sort(-1).values.tolist() == wanted.topk(3).indices.sort(-1).values.tolist()


def test_a_ball_bounds_what_its_keys_score() -> None:
    _, (q, k, _) = layer_of(), tensors(64)
    policy = Retrieval(page=4, levels=3, bound="ball")
    keys, queries = k.transpose(1, 2).unflatten(2, (2, 32)), q[:, :3].transpose(1, 2).unflatten(1, (2, 2)).flatten(2, 3)
    found = policy.summarise(keys)
    leaves = keys.gather(3, found["order"].view(2, 2, 2, 32).long()[..., None].expand(keys.shape)).reshape(
        2, 2, 16, 4, 8
    )
    real = torch.einsum("bhgd,bhptd->bhgpt", queries, leaves).amax(-1)
    bound = policy.relevance(queries, found)
    assert (bound >= real - 1e-12).all()
    assert (bound - real).min() < 1  # and not by much


def test_leaves_of_similar_keys_hold_more_of_the_attention_than_pages_of_the_text() -> None:
    """Keys of 32 clusters in random order: where neighbours in the text differ, the tree wins by far."""
    generator, layer = torch.Generator().manual_seed(1), layer_of(heads=2)
    centres = torch.randn(32, 8, generator=generator, dtype=torch.float64) * 3
    which = torch.randint(0, 32, (2, 600, 2), generator=generator)
    k = centres[which] + 0.3 * torch.randn(2, 600, 2, 8, generator=generator, dtype=torch.float64)
    q, _, v = tensors(600, layer=layer)
    q = centres[which.roll(1, 1)] + 0.1 * q
    full, _ = decode(build_policy("topk", budget="600tok"), layer, q, k, v, 599)
    lost = {}
    for name, options in (("retrieval", {"levels": 5}), ("block_topk", {}), ("topk", {})):
        more: dict[str, Any] = {"page": 8, **options} if name != "topk" else {}
        got, _ = decode(build_policy(name, budget="330tok", window=4, **more), layer, q, k, v, 599)
        lost[name] = float((got - full).norm() / full.norm())
    assert lost["topk"] < 0.05
    assert lost["retrieval"] < 0.5 * lost["block_topk"]


def test_low_rank_keys_are_the_best_of_their_rank() -> None:
    _, (q, k, _) = layer_of(), tensors(64)
    policy = LowRankKeys(rank=3, segment=16)
    keys, queries = k.transpose(1, 2).unflatten(2, (4, 16)), q[:, :5].transpose(1, 2)[:, :2]
    u, s, vt = torch.linalg.svd(keys, full_matrices=False)
    cut = ((u[..., :3] * s[..., None, :3]) @ vt[..., :3, :]).flatten(2, 3)
    torch.testing.assert_close(policy.relevance(queries, policy.summarise(keys)), queries @ cut.mT)


def test_low_rank_keys_of_full_rank_choose_as_topk() -> None:
    layer, (q, k, v) = layer_of(), tensors(64)
    got, _ = decode(LowRankKeys("20tok", rank=8, segment=8, window=1), layer, q, k, v, 40)
    expected = by_hand(TopK(window=8), layer, q, k, v, 12, lambda query, keys: query @ keys[0] * layer.scale)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("retrieval", {"levels": 0}, "levels: expected a whole number of at least 1"),
        ("retrieval", {"budget": "100tok"}, "raise it to 159tok"),
        ("low_rank_keys", {"rank": 9, "segment": 16}, "rank: expected at most 8, the size of a key, got 9"),
        ("low_rank_keys", {"rank": 9, "segment": 8}, "take at most 8"),
        ("low_rank_keys", {"budget": "5%"}, "lower rank or raise segment"),
        ("topk", {"budget": "10%"}, "give it in tokens"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), build_policy(name, **options).attach(base.model()):
        pass
