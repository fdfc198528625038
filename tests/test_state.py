from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from contextlab.state import KVState, RecurrentState, StackState, WindowState, own, tensor_bytes

lengths = st.lists(st.integers(1, 70), min_size=1, max_size=6)


def tokens(length: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, 3, 4), torch.randn(batch, length, 3, 5)


def fill(length: int, batch: int = 2) -> KVState:
    k, v = tokens(length, batch)
    with torch.no_grad():
        return KVState.empty(k, v).append(k, v)


def test_nbytes_counts_a_shared_storage_once_and_whole() -> None:
    buffer = torch.zeros(4, 10)
    state = RecurrentState({"a": buffer[:2], "b": buffer[2:]})
    assert state.nbytes == 160
    assert RecurrentState({"a": own(buffer[:2])}).nbytes == 80
    assert StackState([state, state]).nbytes == 160


def test_own_copies_only_what_needs_it() -> None:
    buffer = torch.zeros(4, 10)
    assert own(buffer) is buffer
    assert own(buffer[:2]).untyped_storage().nbytes() == 80
    assert own(buffer.T).is_contiguous()
    assert tensor_bytes(2, 3, dtype=torch.float64) == 48


def test_nested_states_map_and_keep_their_lengths() -> None:
    state = StackState([RecurrentState({"a": torch.ones(2, 3)}, length=5), fill(4)], length=5)
    doubled = state.map(lambda t: t * 2)
    assert isinstance(doubled.layers[0], RecurrentState)
    assert doubled.layers[0]["a"].eq(2).all()
    assert [each.length for each in doubled.layers] == [5, 4]
    assert state.to(torch.float16).nbytes < state.nbytes
    assert len(list(state.tensors())) == 4
    leaves = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    assert all(each is leaf for each, leaf in zip(state.tensors(), leaves, strict=True))


@given(lengths)
def test_capacity_depends_on_the_length_alone(pieces: list[int]) -> None:
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            state = KVState.empty(*tokens(1))
            for piece in pieces:
                state = state.append(*tokens(piece))
        assert state.length == sum(pieces)
        assert state.keys.shape[2] == KVState.capacity(sum(pieces))
        assert state.nbytes == KVState.bytes_at(sum(pieces), 2, 3, 4, 5, torch.float32)


def test_capacity_is_tight_and_grows_geometrically() -> None:
    room = [KVState.capacity(n) for n in range(20_000)]
    assert room[0] == 0
    assert room[1] == room[32] == 32
    assert all(n <= r <= max(n * 1.25 + 32, 32) for n, r in enumerate(room))
    assert len(set(room)) < 40  # so few copies until 20,000 tokens


@given(lengths, st.booleans())
def test_kv_state_holds_what_was_read(pieces: list[int], grad: bool) -> None:
    state, read = KVState.empty(*tokens(1)), []
    with torch.set_grad_enabled(grad):
        for piece in pieces:
            read.append(tokens(piece))
            state = state.append(*read[-1])
    for held, parts in zip(state.cached(), zip(*read, strict=True), strict=True):
        assert torch.equal(held, torch.cat(parts, 1))


def test_one_token_is_written_in_place() -> None:
    state = fill(40)
    with torch.no_grad():
        after = state.append(*tokens(1))
    assert after.keys.data_ptr() == state.keys.data_ptr()
    assert state.length == 40
    assert after.length == 41


@pytest.mark.parametrize(
    "share",
    [
        lambda s: s,
        lambda s: s.detach(),
        lambda s: s.to("cpu"),
        lambda s: pytree.tree_map(lambda x: x, s),
        lambda s: s.select(torch.arange(2)),
        lambda s: s.map(lambda t: t),
    ],
    ids=["itself", "detach", "to", "tree", "select", "map"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_branches_do_not_write_over_each_other(share: Any, grad: bool) -> None:
    state = fill(5)
    other = share(state)
    first, second, third = tokens(2), tokens(2), tokens(1)
    with torch.set_grad_enabled(grad):
        one = state.append(*first)
        two = other.append(*second)
        three = state.append(*third)
        four = one.append(*third)
    base = state.cached()
    for got, parts in ((one, [first]), (two, [second]), (three, [third]), (four, [first, third])):
        for i, held in enumerate(got.cached()):
            assert torch.equal(held, torch.cat([base[i], *(part[i] for part in parts)], 1))


@torch.no_grad()
def test_tokens_that_are_given_up_are_written_over() -> None:
    state = StackState([fill(5), RecurrentState({"a": torch.ones(2, 3)}, length=5)], length=5)
    first, last = state.layers
    assert isinstance(first, KVState)
    rest, other = tokens(3), tokens(2)
    longer = first.append(*rest)
    assert longer.keys is first.keys
    assert first.append(*other).keys is not first.keys, "a longer state is kept, so that the buffer is copied"
    cut = longer.cut(6)
    assert cut is not None
    assert cut.length == 6
    torch.testing.assert_close(cut.cached()[0], torch.cat([first.cached()[0], rest[0][:, :1]], 1))
    after = cut.append(*other)
    assert after.keys is first.keys
    torch.testing.assert_close(after.cached()[1][:, 5:], torch.cat([rest[1][:, :1], other[1]], 1))
    state.reclaim()
    assert first.append(*other).keys is first.keys, "also of a state within another"
    assert last.cut(4) is None


def test_gradients_flow_through_the_buffers_and_do_not_stop_later_decoding() -> None:
    k, v = (x.requires_grad_() for x in tokens(3))
    state = KVState.empty(k, v).append(k, v)
    loss = state.cached()[0].square().sum()
    with torch.no_grad():
        state.append(*tokens(1))
    loss.backward()
    assert torch.equal(k.grad, 2 * k)


def test_state_read_in_inference_mode_can_be_continued() -> None:
    with torch.inference_mode():
        state = KVState.empty(*tokens(1)).append(*tokens(4))
    with torch.no_grad():
        assert state.append(*tokens(1)).length == 5


def test_kv_positions_count_from_each_rows_first_token() -> None:
    k, v = tokens(4)
    mask = torch.tensor([[False, False, True, True], [True] * 4])
    state = KVState.empty(k, v)
    assert state.append(k, v).positions() is None
    state = state.append(k, v, mask)
    assert state.start.tolist() == [2, 0]
    positions = state.append(*tokens(1)).positions()
    assert positions is not None
    assert positions.tolist() == [[-2, -1, 0, 1, 2], [0, 1, 2, 3, 4]]


@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    window=st.integers(1, 7),
    sinks=st.integers(0, 4),
    pads=st.lists(st.integers(0, 12), min_size=2, max_size=2),
)
def test_window_state_holds_the_last_and_the_first_once(
    pieces: list[int], window: int, sinks: int, pads: list[int]
) -> None:
    total = sum(pieces)
    pads = [min(pad, total) for pad in pads]
    k, v = tokens(total)
    at = torch.arange(total) - torch.tensor(pads)[:, None]
    state = WindowState.empty(k, v, window, sinks)
    first = 0
    for piece in pieces:
        part = slice(first, first + piece)
        state = state.append(k[:, part], v[:, part], at[:, part], at[:, part] >= 0)
        first += piece
        assert state.nbytes == WindowState.bytes_for(window, sinks, 2, 3, 4, 5, torch.float32)
    assert state.start.tolist() == pads
    assert state.length == total
    for row, pad in enumerate(pads):
        real = range(total - pad)
        recent = {p for p in real if p >= total - pad - (window - 1)}
        expected = sorted(recent | {p for p in real if p < sinks})
        places = state.position[row]
        assert sorted(places[places >= 0].tolist()) == expected
        for slot, place in enumerate(places.tolist()):
            if place >= 0:
                assert torch.equal(state.keys[row, :, slot], k[row, pad + place])
                assert torch.equal(state.values[row, :, slot], v[row, pad + place])


@given(total=st.integers(0, 14), window=st.integers(1, 6), sinks=st.integers(0, 3))
def test_window_state_without_padding_gives_only_the_slots_in_use(total: int, window: int, sinks: int) -> None:
    k, v = tokens(max(total, 1))
    state = WindowState.empty(k, v, window, sinks)
    for t in range(total):
        part = slice(t, t + 1)
        state = state.append(k[:, part], v[:, part], torch.tensor([[t]]))
    keys, _, places = state.cached()
    recent = range(max(0, total - window + 1), total)
    expected = sorted({*recent, *range(min(sinks, total))})
    assert places.tolist() == [expected, expected]
    assert torch.equal(keys, k[:, expected])


def test_a_state_that_has_read_nothing_holds_nothing_but_its_rows_starts() -> None:
    empty = KVState.empty(torch.zeros(3, 5, 2, 4), torch.zeros(3, 5, 2, 6))
    assert empty.nbytes == 3 * 8
    assert [x.shape for x in empty.cached()] == [(3, 0, 2, 4), (3, 0, 2, 6)]
