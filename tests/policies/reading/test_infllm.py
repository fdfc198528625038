"""InfLLM against its definition written out token by token, and the laws of every policy in its other forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies import Policy, build_policy
from contextlab.policies.reading.infllm import BlockState, InfLLM
from contextlab.testing import policies as base
from tests.policies.reading import test_selective as selective

DIM = 8


def turned(x: Tensor, steps: Tensor) -> Tensor:
    """x [B, T, H, D], rotated by steps [B or 1, T, H or 1] more."""
    angle = steps[..., None] * 100.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


ROTARY = KVLayer(0, 1, 4, 2, DIM, DIM, DIM**-0.5, None, turned)


def placed(x: Tensor, place: int) -> Tensor:
    """A vector [D] rotated to a place."""
    return turned(x[None, None, None], torch.tensor([[[place]]]))[0, 0, 0]


def naive(policy: InfLLM, layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, pieces: list[range], pages: int) -> Tensor:
    """Answers [T, H, V] of the pieces' queries, each piece choosing `pages` blocks. q, k, v: [T, H, D], not rotated."""
    window, page, shared = policy.window, policy.page, layer.heads // layer.kv_heads

    def product(query: Tensor, key: Tensor, distance: int) -> Tensor:
        if layer.turn is None:
            return query @ key
        return placed(query, min(distance, window)) @ key  # nothing stands further away than the window

    y = torch.zeros(len(q), layer.heads, v.shape[-1], dtype=v.dtype)
    for piece in pieces:
        blocks = max(0, piece[0] + 1 - window - policy.ahead) // page  # that left the window of the one that chooses
        for h in range(layer.kv_heads):
            own = range(h * shared, (h + 1) * shared)
            represent = []
            for b in range(blocks):
                tokens = list(range(b * page, (b + 1) * page))
                score = [
                    sum(float(product(q[m + j, g], k[m, h], j)) for j in range(1, window + 1) for g in own) / window
                    for m in tokens
                ]
                represent.append(sorted(tokens, key=lambda m: -score[m - tokens[0]])[: policy.representatives])
            wants = [piece[0] - 1] if policy.ahead else list(piece)
            wanted = torch.zeros(shared, blocks, dtype=q.dtype)
            for i, g in enumerate(own):
                for b in range(blocks):
                    wanted[i, b] = sum(product(q[t, g], k[m, h], window) for t in wants for m in represent[b])
            best = (wanted - wanted.amax(1, keepdim=True)).amax(0) if blocks else wanted[0]
            best[: -(-policy.sinks // page)] = torch.inf
            chosen = [
                m for b in best.topk(min(pages, blocks)).indices.tolist() for m in range(b * page, (b + 1) * page)
            ]
            for t in piece:
                read = chosen + list(range(blocks * page, t + 1))
                for g in own:
                    weights = torch.stack([product(q[t, g], k[m, h], t - m) for m in read]) * layer.scale
                    y[t, g] = weights.softmax(0) @ v[read, h]
    return y


@pytest.mark.parametrize("options", [{}, {"sinks": 6}, {"ahead": True}, {"representatives": 1}, {"representatives": 4}])
@pytest.mark.parametrize("layer", [ROTARY, dataclasses.replace(ROTARY, turn=None)], ids=["rotary", "plain"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_it_reads_the_blocks_of_the_best_representatives(
    options: dict[str, Any], layer: KVLayer, chunk: int | None
) -> None:
    q, k, v = (x[:1] for x in selective.tensors(47))
    policy = InfLLM("27tok", **{"window": 6, "page": 4, "representatives": 2, "sinks": 0, "chunk": chunk, **options})
    places = torch.arange(47)[None, :, None]
    rotated = (q, k) if layer.turn is None else (turned(q, places), turned(k, places))
    outputs, state = [], None
    with torch.no_grad():
        for first, last in [(0, 40), *((t, t + 1) for t in range(40, 47))]:
            y, state = policy.attend(layer, *(x[:, first:last] for x in (*rotated, v)), state)
            outputs.append(y[0])
    pieces = [range(t, t + 1) for t in range(40, 47)]
    if chunk is not None:
        pieces = [range(t, t + 5) for t in range(0, 40, 5)] + pieces
    count = (27 - policy.latest) // 4
    expected = naive(policy, layer, q[0], k[0], v[0], pieces, count)
    of = torch.tensor([t for piece in pieces for t in piece])
    torch.testing.assert_close(torch.cat(outputs)[of], expected[of], rtol=0, atol=1e-11)
    assert isinstance(state, BlockState)
    assert state.read_tokens == count * 4 + 47 - (47 - 6 - policy.ahead) // 4 * 4
    assert state.read_nbytes == 2 * 8 * (state.read_tokens * 2 * DIM + (47 - 6 - policy.ahead) // 4 * DIM)
    assert state.scores is not None
    assert state.scores.shape == (1, 2, policy.latest)


def test_a_full_budget_reads_everything_where_it_stands_and_less_never_from_beyond_the_window() -> None:
    """Blocks that all fit are read at clipped distances, too; the answer is then that of one clipped softmax."""
    q, k, v = (x[:1] for x in selective.tensors(30))
    places = torch.arange(30)[None, :, None]
    got, _ = selective.decode(
        InfLLM("40tok", window=6, page=4, sinks=0), ROTARY, turned(q, places), turned(k, places), v, 29
    )
    for g in range(4):
        scores = torch.stack([placed(q[0, 29, g], min(29 - m, 6)) @ k[0, m, g // 2] for m in range(30)])
        torch.testing.assert_close(got[0, 0, g], (scores * ROTARY.scale).softmax(0) @ v[0, :, g // 2])
    full, _ = selective.decode(InfLLM(window=6, page=4), ROTARY, turned(q, places), turned(k, places), v, 29)
    for g in range(4):
        scores = torch.stack([placed(q[0, 29, g], 29 - m) @ k[0, m, g // 2] for m in range(30)])
        torch.testing.assert_close(full[0, 0, g], (scores * ROTARY.scale).softmax(0) @ v[0, :, g // 2])


FORMS = [
    {"representatives": 2},
    {"representatives": 2, "ahead": True},
    {"representatives": 3, "chunk": 3},
    {"representatives": 2, "chunk": 7, "sinks": 5, "ahead": True},
]


@pytest.fixture(params=FORMS, ids=str)
def build(request: Any) -> Callable[..., Policy]:
    return lambda **more: build_policy("infllm", **{"window": 4, "page": 4, **request.param, **more})


@pytest.mark.parametrize("pads", [None, (0, 7)])
@pytest.mark.parametrize("budget", ["24tok", "60%", "60kB"])
def test_no_decoded_token_reads_more_than_the_budget(
    build: Callable[..., Policy], budget: str, pads: tuple[int, ...] | None
) -> None:
    if getattr(build(), "chunk", None) is None:
        selective.test_no_token_reads_more_than_the_budget(build, budget, pads)
        return
    reader, x = base.model(), base.tokens(length=90)
    mask, state, token = base.masked(x, pads), None, 2 * 2 * (8 + 8) * 8
    with build(budget=budget).attach(reader), torch.no_grad():
        for first, last in [(0, 70), *((t, t + 1) for t in range(70, 90))]:
            _, state = reader.read(x[:, first:last], state, None if mask is None else mask[:, first:last])
            reads = [layer.read_nbytes for layer in state.layers]
            assert all(0 < layer.read_tokens < layer.length for layer in state.layers)
            if first and budget == "24tok":
                assert all(layer.read_tokens <= 24 for layer in state.layers)
            elif first:
                assert sum(reads) <= (60_000 if budget == "60kB" else 2 * token * last * 6 // 10)


@pytest.mark.parametrize("pads", [None, (0, 7)])
def test_other_forms_change_nothing_with_a_full_budget(
    build: Callable[..., Policy], pads: tuple[int, ...] | None
) -> None:
    base.hold_to_full_budget(build, pads)


@pytest.mark.parametrize(
    "law",
    [
        base.hold_to_older_states,
        base.hold_to_batch,
        base.hold_to_pieces,
        base.hold_to_no_trace,
        selective.test_alibi_is_as_without_pages,
        selective.test_alibi_distances_of_what_is_read_are_true,
        selective.test_offloaded_is_the_same_and_counted,
        selective.test_modes_of_autograd_mix,
    ],
)
def test_other_forms_keep_the_laws(build: Callable[..., Policy], law: Callable[..., None]) -> None:
    law(build)


@pytest.mark.parametrize("prompt", [12, 40])
def test_rows_that_are_all_padded_are_read_as_alone(build: Callable[..., Policy], prompt: int) -> None:
    reader, x, pads = base.model(), base.tokens(2, prompt + 15), (9, 11)
    with build(budget="24tok").attach(reader):
        together, _, _ = base.read(reader, x, [prompt], base.masked(x, pads))
        for row, pad in enumerate(pads):
            alone, _, _ = base.read(reader, x[row : row + 1, pad:], [prompt - pad])
            torch.testing.assert_close(together[row : row + 1, pad:], alone, rtol=0, atol=1e-9)


def test_gradients_pass_through_chunks() -> None:
    reader, x = base.model(), base.tokens(2, 30)
    with build_policy("infllm", budget="24tok", window=4, page=4, chunk=7).attach(reader):
        y, _ = reader.read(x)
        with torch.no_grad():
            same, _ = reader.read(x)
    torch.testing.assert_close(y.detach(), same, rtol=0, atol=1e-12)
    y.sum().backward()
    assert all(p.grad is not None for name, p in reader.named_parameters() if "qkv" in name)


def test_a_distant_sentence_is_found_by_its_representative() -> None:
    """One key of a block is what later queries ask for; the others, unlike it, hide it in the block's mean."""
    generator = torch.Generator().manual_seed(0)
    sought = torch.nn.functional.normalize(torch.randn(DIM, dtype=torch.float64, generator=generator), dim=0)
    q, k, v = (torch.randn(1, 200, 1, DIM, dtype=torch.float64, generator=generator) for _ in range(3))
    q = 0.1 * q + 3 * sought
    k -= (k @ sought)[..., None] * sought  # nothing else is what they ask for ..
    k[:, 32:48] -= 2 * sought  # .. and the neighbours are the opposite
    k[:, 47] += 22 * sought
    layer = KVLayer(0, 1, 1, 1, DIM, DIM, 1.0)
    full = v[:, 47, 0]
    by_one, _ = selective.decode(InfLLM("96tok", window=32, page=16, representatives=1, sinks=0), layer, q, k, v, 199)
    by_mean, _ = selective.decode(InfLLM("96tok", window=32, page=16, representatives=16, sinks=0), layer, q, k, v, 199)
    torch.testing.assert_close(by_one[0, 0], full, rtol=0, atol=1e-6)
    assert (by_mean[0, 0] - full).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page": 4, "representatives": 5}, "representatives: 5 of a block of 4 tokens; take at most 4 or raise page"),
        ({"representatives": 0}, "representatives: expected a whole number of at least 1, got 0"),
        ({"chunk": 0}, "chunk: expected a whole number of at least 1, got 0"),
        ({"budget": "50tok"}, "raise it to 95tok or lower page"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), build_policy("infllm", **options).attach(base.model()):
        pass


def test_a_state_without_the_queries_is_refused() -> None:
    reader, x = base.model(), base.tokens()
    with torch.no_grad():
        _, state = reader.read(x)
    with pytest.raises(InputError, match="attach the policy before reading, or take representatives=page"):
        build_policy("infllm", budget="24tok", window=4, page=4, representatives=2).apply(state, reader)
