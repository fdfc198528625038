"""What selective reading is held to beyond the laws of every policy: what it reads, chooses and holds where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.ops.softmax import naive_softmax_attention
from contextlab.policies import build_policy
from contextlab.policies.reading.by_page import BlockTopK, Quest
from contextlab.state import KVState
from contextlab.testing import components
from contextlab.testing import policies as base
from tests.policies.core.test_base import padding

readers = [pytest.param(c.build, id=c.label) for c in components("policy") if c.factory.bounds == "read"]  # type: ignore[attr-defined]
every = pytest.mark.parametrize("build", readers)


@every
@pytest.mark.parametrize("budget", ["24tok", "60%", "60kB"])
@padding
def test_no_token_reads_more_than_the_budget(build: base.Build, budget: str, pads: tuple[int, ...] | None) -> None:
    reader, x = base.model(), base.tokens(length=90)
    mask, state, token = base.masked(x, pads), None, 2 * 2 * (8 + 8) * 8  # bytes of one token in a layer, both rows
    with build(budget=budget).attach(reader), torch.no_grad():
        for first, last in [(0, 70), *((t, t + 1) for t in range(70, 90))]:
            _, state = reader.read(x[:, first:last], state, None if mask is None else mask[:, first:last])
            reads = [layer.read_nbytes for layer in state.layers]
            assert all(0 < layer.read_tokens <= layer.length for layer in state.layers)
            if first == 0:
                assert reads == [token * last] * 2
            elif budget == "24tok":
                assert all(layer.read_tokens <= 24 for layer in state.layers)
            else:
                assert sum(reads) <= (60_000 if budget == "60kB" else 2 * token * last * 6 // 10)


def layer_of(heads: int = 4, kv_heads: int = 2, dim: int = 8, slopes: Tensor | None = None) -> KVLayer:
    return KVLayer(0, 1, heads, kv_heads, dim, dim, dim**-0.5, slopes)


def tensors(length: int, seed: int = 0, layer: KVLayer | None = None) -> tuple[Tensor, Tensor, Tensor]:
    layer = layer or layer_of()
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, length, heads, layer.key_dim, dtype=torch.float64, generator=generator)
        for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
    )
    return q, k, v


def decode(policy: Any, layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> tuple[Tensor, Any]:
    """The last token's answer after a prompt and single tokens."""
    with torch.no_grad():
        y, state = policy.attend(layer, q[:, :prompt], k[:, :prompt], v[:, :prompt], None)
        for t in range(prompt, q.shape[1]):
            y, state = policy.attend(layer, q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state)
    return y, state


def by_hand(policy: Any, layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, count: int, scores: Any) -> Tensor:
    """The last token's answer over the `count` pages that each key head's queries want most, and the latest tokens.

    scores: (query [D], keys of a page [page, D]) -> what the page is worth.
    """
    batch, length, heads, _ = q.shape
    page, shared = policy.page, heads // layer.kv_heads
    full = (length - policy.window) // page
    out = torch.zeros(batch, 1, heads, v.shape[-1], dtype=q.dtype)
    for b in range(batch):
        for h in range(layer.kv_heads):
            own = range(h * shared, (h + 1) * shared)
            table = torch.tensor(
                [[float(scores(q[b, -1, g], k[b, p * page : (p + 1) * page, h])) for p in range(full)] for g in own]
            )
            wanted = (table - table.max(1, keepdim=True).values).max(0).values
            pages = sorted(wanted.topk(count).indices.tolist())
            at = [p * page + i for p in pages for i in range(page)] + list(range(full * page, length))
            for g in own:
                weights = (k[b, at, h] @ q[b, -1, g] * layer.scale).softmax(0)
                out[b, 0, g] = weights @ v[b, at, h]
    return out


@pytest.mark.parametrize("prompt", [30, 77])
def test_quest_reads_the_pages_of_the_highest_upper_bound(prompt: int) -> None:
    layer, (q, k, v) = layer_of(), tensors(78)
    policy = Quest(budget="31tok", page=4, window=5)
    got, state = decode(policy, layer, q, k, v, prompt)

    def bound(query: Tensor, keys: Tensor) -> Tensor:
        return torch.maximum(query * keys.min(0).values, query * keys.max(0).values).sum()

    torch.testing.assert_close(got, by_hand(policy, layer, q, k, v, (31 - 8) // 4, bound), rtol=0, atol=1e-12)
    assert state.read_tokens == 5 * 4 + 78 - 72
    bounds = policy.relevance(torch.randn(2, 2, 3, 8).double(), {n: x[:, :, :18] for n, x in state.summary.items()})
    assert bounds.shape == (2, 2, 3, 18)


def test_the_upper_bound_of_quest_is_one() -> None:
    policy, generator = Quest(page=4), torch.Generator().manual_seed(3)
    keys, q = (torch.randn(1, 2, *shape, 8, generator=generator).double() for shape in ((9, 4), (3,)))
    real = torch.einsum("bhgd,bhptd->bhgpt", q, keys).amax(-1)
    assert (policy.relevance(q, policy.summarise(keys)) >= real - 1e-12).all()
    torch.testing.assert_close(policy.relevance(q, policy.summarise(keys[:, :, :, :1])), q @ keys[:, :, :, 0].mT)


def test_block_topk_reads_the_blocks_whose_mean_key_fits_best() -> None:
    layer, (q, k, v) = layer_of(), tensors(61)
    policy = build_policy("block_topk", budget="24tok", page=4, window=3)
    got, _ = decode(policy, layer, q, k, v, 40)
    expected = by_hand(policy, layer, q, k, v, (24 - 6) // 4, lambda query, keys: query @ keys.mean(0))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@every
def test_what_needs_no_choice_is_exact(build: base.Build) -> None:
    """Where few tokens carry all of the attention and fit the budget, nothing is lost (one head a key head)."""
    layer = layer_of(heads=2)
    q, k, v = tensors(80, layer=layer)
    k, q = k * 0.01, q / q.norm(dim=-1, keepdim=True)
    k[:, 33] = 200 * q[:, -1]
    q[:, -2] = q[:, -1]  # for those that choose ahead
    got, _ = decode(build(budget="24tok"), layer, q, k, v, 60)
    expected = naive_softmax_attention(q[:, -1:], k, v, scale=layer.scale)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@every
def test_alibi_is_as_without_pages(build: base.Build) -> None:
    reader, x = base.model(position="alibi"), base.tokens()
    expected, _, _ = base.read(reader, x, [50])
    with build(budget="100%").attach(reader):
        got, _, _ = base.read(reader, x, [30, 12])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@every
def test_alibi_distances_of_what_is_read_are_true(build: base.Build) -> None:
    """Slopes so steep that only the latest tokens count: read all or some, the answer is the same."""
    layer = layer_of(heads=2, slopes=torch.tensor([5.0, 9.0], dtype=torch.float64))
    q, k, v = tensors(50, layer=layer)
    for pads in (None, (0, 6)):
        mask = base.masked(torch.zeros(2, 50), pads)
        with torch.no_grad():
            policy = build(budget="24tok")
            _, state = policy.attend(
                layer, q[:, :49], k[:, :49], v[:, :49], None, None if mask is None else mask[:, :49]
            )
            got, _ = policy.attend(layer, q[:, 49:], k[:, 49:], v[:, 49:], state)
        expected = naive_softmax_attention(q, k, v, scale=layer.scale, slopes=layer.slopes)[:, -1:]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@every
def test_a_state_read_without_it_is_continued_the_same(build: base.Build) -> None:
    reader, x = base.model(), base.tokens()
    policy = build(budget="24tok")
    if getattr(policy, "ahead", False):
        pytest.skip("the query that chooses the next token's pages is not in the state")
    with policy.attach(reader):
        expected, _, _ = base.read(reader, x, [40])
    with torch.no_grad():
        _, state = reader.read(x[:, :40])
        state, outputs = policy.apply(state, reader), []
        with policy.attach(reader):
            for t in range(40, 60):
                y, state = reader.read(x[:, t : t + 1], state)
                outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected[:, 40:], rtol=0, atol=1e-9)


@every
def test_offloaded_is_the_same_and_counted(build: base.Build) -> None:
    reader, x = base.model(), base.tokens()
    if not build(offload=True).offload:  # type: ignore[attr-defined]
        pytest.skip("reads all keys, so that nothing is offloaded")
    with build(budget="24tok").attach(reader):
        expected, whole, _ = base.read(reader, x, [40])
    with build(budget="24tok", offload=True).attach(reader):
        got, state, _ = base.read(reader, x, [40])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for held, off in zip(whole.layers, state.layers, strict=True):
        assert held.offloaded_nbytes == 0
        assert off.offloaded_nbytes == KVState.bytes_at(60, 2, 2, 8, 8, torch.float64)
        assert off.resident_nbytes == held.nbytes - off.offloaded_nbytes > 0


@every
def test_modes_of_autograd_mix(build: base.Build) -> None:
    """A state made in inference mode goes on outside of it, and gradients pass through what is read."""
    reader, x = base.model(), base.tokens()
    with build(budget="24tok").attach(reader):
        expected, _, _ = base.read(reader, x[:, :43], [40])
        with torch.inference_mode():
            _, state = reader.read(x[:, :40])
            _, state = reader.read(x[:, 40:41], state)
        with torch.no_grad():
            y, state = reader.read(x[:, 41:42], state)
        torch.testing.assert_close(y, expected[:, 41:42], rtol=0, atol=1e-12)
        with torch.enable_grad():
            y, _ = reader.read(x[:, 42:43], state)
        torch.testing.assert_close(y, expected[:, 42:], rtol=0, atol=1e-12)
        y.sum().backward()
    assert all(p.grad is not None for name, p in reader.named_parameters() if "qkv" in name)


def test_first_layers_can_be_left_alone() -> None:
    reader, x = base.model(), base.tokens()
    with build_policy("quest", budget="24tok", page=4, window=4, skip=1).attach(reader):
        _, state, _ = base.read(reader, x, [40])
    assert isinstance(state.layers[0], KVState)
    assert state.layers[1].read_tokens <= 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page": 0}, "page: expected a whole number of at least 1, got 0"),
        ({"window": 1.5}, "window"),
        ({"budget": "20tok"}, "raise it to 47tok or lower page"),
        ({"budget": "5%", "page": 16}, "to choose the pages takes 6.25% .* raise page to 40"),
        ({"skip": 2}, "skip: 2 leaves none of the 2 layers; lower it to 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), build_policy("quest", **options).attach(base.model()):
        pass


def test_a_budget_of_bytes_that_a_long_context_outgrows_is_refused() -> None:
    reader, x = base.model(), base.tokens()
    policy = build_policy("quest", budget="9kB", page=4, window=4)
    with policy.attach(reader), pytest.raises(InputError, match="is too small for 41 tokens in 2 rows"):
        base.read(reader, x, [40])


def test_the_default_page_leaves_half_of_the_budget_to_tokens() -> None:
    assert [Quest(budget).page for budget in (None, "10%", "2%")] == [16, 32, 128]
    assert BlockTopK("2%").page == 64
