from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops.position import alibi_slopes
from contextlab.ops.softmax import naive_softmax_attention, softmax_attention


def tensors(batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int = 4, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    values = draw(batch, keys, kv_heads, dim + 1)  # V differs from D
    return draw(batch, queries, heads, dim), draw(batch, keys, kv_heads, dim), values


@st.composite
def arguments(draw: st.DrawFn) -> tuple[Any, dict[str, Any]]:
    batch, keys = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    causal = draw(st.booleans())
    queries = draw(st.integers(1, keys if causal else 9))
    kv_heads, shared = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    options: dict[str, Any] = {"causal": causal}
    if causal and draw(st.booleans()):
        options |= {"window": draw(st.integers(1, 10)), "sinks": draw(st.integers(0, 3))}
    if draw(st.booleans()):
        options["slopes"] = alibi_slopes(kv_heads * shared)
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(0.01, 3))
    if draw(st.booleans()):
        options["cap"] = draw(st.floats(0.1, 3))
    if draw(st.booleans()) and queries <= keys:
        rows = draw(st.sampled_from([1, batch]))
        padding = torch.tensor(draw(st.lists(st.integers(0, keys), min_size=rows, max_size=rows)))
        options["k_position"] = torch.arange(keys) - padding[:, None]
        options["q_position"] = options["k_position"][:, keys - queries :]
    seed = draw(st.integers(0, 2**31))
    return tensors(batch, queries, keys, kv_heads * shared, kv_heads, seed=seed), options


@given(arguments())
def test_agrees_with_the_definition(given_: tuple[Any, dict[str, Any]]) -> None:
    qkv, options = given_
    for grad in (False, True):
        q, k, v = (x.clone().requires_grad_(grad) for x in qkv)
        expected = naive_softmax_attention(q, k, v, **options)
        got = softmax_attention(q, k, v, **options)
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=0)
        if grad:
            weight = torch.randn_like(expected)
            wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v), allow_unused=True)
            found = torch.autograd.grad((got * weight).sum(), (q, k, v))
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 40},
        {"window": 40, "sinks": 3},
        {"window": 40, "sinks": 3, "sink": torch.tensor([0.5, -1.0])},
        {"window": 130, "slopes": True},
        {"slopes": True},
        {"padded": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("past", [0, 200])
def test_chunks_of_queries_change_nothing(options: dict[str, Any], past: int) -> None:
    queries = 300 if "window" in options else 1030
    q, k, v = tensors(1, queries, queries + past, 2, 1)
    options = dict(options)
    if options.pop("slopes", False):
        options["slopes"] = alibi_slopes(2)
    k_at = torch.arange(queries + past)[None]
    if options.pop("padded", False):
        k_at = k_at - 10
        options |= {"q_position": k_at[:, past:], "k_position": k_at}
    distance = k_at[0, past:, None] - k_at[0]
    sees = (distance >= 0) & (k_at >= 0)
    if "window" in options:
        sees &= (distance < options["window"]) | (k_at < options.get("sinks", 0))
    bias = torch.zeros(2, *sees.shape, dtype=q.dtype)
    if "slopes" in options:
        bias = -options["slopes"][:, None, None] * distance
    bias = bias.masked_fill(~sees, -torch.inf)
    scores = torch.einsum("bihd,bjd->bhij", q, k[:, :, 0]) / 2 + bias
    if "sink" in options:
        column = options["sink"].to(scores).view(1, 2, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : queries + past]
    expected = torch.einsum("bhij,bjd->bihd", weights, v[:, :, 0])
    torch.testing.assert_close(softmax_attention(q, k, v, **options), expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("slopes", [None, alibi_slopes(2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients(dtype: torch.dtype, slopes: Any) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors(2, 6, 6, 2, 2))
    at = torch.arange(6) - torch.tensor([[6], [3]])
    y = softmax_attention(q, k, v, slopes=slopes, q_position=at, k_position=at)
    assert (y[at < 0] == 0).all()
    for gradient in torch.autograd.grad(y.square().sum(), (q, k, v)):
        assert gradient.isfinite().all()
        assert (gradient[at < 0] == 0).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 2, "sinks": 1}, {"slopes": alibi_slopes(4)}, {"causal": False}, {"sink": torch.arange(4.0) - 1}],
    ids=str,
)
def test_gradcheck(options: dict[str, Any]) -> None:
    qkv = tuple(x.requires_grad_() for x in tensors(2, 4, 4, 4, 2, dim=3))
    assert torch.autograd.gradcheck(lambda q, k, v: softmax_attention(q, k, v, **options), qkv)


def test_agrees_with_torch_multihead_attention() -> None:
    module = torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    forbidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected, _ = module(x, x, x, attn_mask=forbidden, need_weights=False)
    q, k, v = F.linear(x, module.in_proj_weight).view(2, 7, 3, 3, 4).unbind(2)
    y = module.out_proj(softmax_attention(q, k, v).flatten(2))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window needs"),
        ({"window": 2, "causal": False}, "window needs"),
        ({"sinks": -1}, "sinks"),
        ({"slopes": torch.ones(3)}, "slopes: expected"),
        ({"q_position": torch.zeros(1, 4)}, "both"),
        ({"q_position": torch.zeros(1, 4), "k_position": torch.zeros(3, 5)}, "k_position: expected"),
    ],
    ids=str,
)
def test_refuses_impossible_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        softmax_attention(*tensors(2, 4, 5, 4, 2), **change)


def test_refuses_impossible_shapes() -> None:
    q, k, v = tensors(2, 4, 5, 4, 2)
    with pytest.raises(InputError, match="multiple"):
        softmax_attention(q[:, :, :3], k, v)
    with pytest.raises(InputError, match="as many keys"):
        softmax_attention(q, k[:, :3], v[:, :3])
    with pytest.raises(InputError, match="expected q"):
        softmax_attention(q, k[:, :3], v)


def test_short_sequences_on_many_threads_are_the_same() -> None:
    q, k, v = (torch.randn(2, 9, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(2, 9, 3, 4, dtype=torch.float64)

    def answers(threads: int) -> list[torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = softmax_attention(q, k, v, scale=0.3)
            return [y, *torch.autograd.grad(y, (q, k, v), weight)]
        finally:
            torch.set_num_threads(before)

    torch.testing.assert_close(answers(2), answers(1), atol=1e-12, rtol=0)
    torch.testing.assert_close(answers(2)[0], naive_softmax_attention(q, k, v, scale=0.3), atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [1, 40, 300])
@pytest.mark.parametrize("kind", ["causal", "window", "grouped", "padded", "alibi"])
def test_gradients_of_vast_scores_are_those_of_float64(kind: str, length: int) -> None:
    """Of 1e9, where a kernel that makes its weights again as exp of a difference gives NaN or anything."""
    generator = torch.Generator().manual_seed(0)
    kv_heads = 1 if kind == "grouped" else 2
    q, k, v = (torch.randn(1, length, heads, 6, generator=generator) for heads in (2, kv_heads, kv_heads))
    at = torch.arange(length)[None] - 3
    options = {
        "window": {"window": 8},
        "padded": {"q_position": at, "k_position": at},
        "alibi": {"slopes": torch.ones(2)},
    }
    # Whole numbers, of which float32 holds every product and sum: the scores are the same in both dtypes.
    q, k = (q * 1e4).round() * 4, (k * 10).round() * 1000

    def slopes(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = softmax_attention(*leaves, scale=1.0, **options.get(kind, {}))
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    for got, due in zip(slopes(torch.float32), slopes(torch.float64), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), due, rtol=1e-4, atol=1e-4 * float(due.abs().max()))
