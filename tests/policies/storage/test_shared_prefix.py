"""A prefix shared by a batch: the same answers, held once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.policies import SharedPrefix, build_policy
from contextlab.policies.storage.shared_prefix import common_tokens
from contextlab.state import KVState
from contextlab.testing import policies as base


def rows_of(prefix: int, batch: int = 5, length: int = 40) -> Tensor:
    x = base.tokens(batch, length)
    x[:, :prefix] = x[:1, :prefix]
    x[:, prefix] = torch.arange(batch)  # from here on all differ
    return x


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
@pytest.mark.parametrize("pad", [0, 3])
def test_requests_of_one_prompt_are_answered_as_each_alone(position: str, pad: int) -> None:
    """Read the prompt once, repeat its state for the batch, go on with a piece and single tokens."""
    reader, x = base.model(position=position), rows_of(25)
    expected, _, _ = base.read(reader, x, [40])
    prompt = torch.cat((torch.zeros(1, pad, dtype=torch.int64), x[:1, :25]), 1)
    mask = torch.arange(25 + pad)[None] >= pad
    with SharedPrefix().attach(reader), torch.no_grad():
        y, state = reader.read(prompt, None, mask if pad else None)
        torch.testing.assert_close(y[:, pad:], expected[:1, :25], rtol=0, atol=1e-9)
        state, outputs = state.select(torch.zeros(5, dtype=torch.int64)), []
        for first, last in [(25, 33), *((t, t + 1) for t in range(33, 40))]:
            y, state = reader.read(x[:, first:last], state)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected[:, 25:], rtol=0, atol=1e-9)
    for layer in state.layers:
        once = KVState.bytes_at(25 + pad, 1, 2, 8, 8, torch.float64)
        assert layer.nbytes == once + KVState.bytes_at(15, 5, 2, 8, 8, torch.float64)
        assert (layer.prefix.length, layer.suffix.length, layer.length) == (25 + pad, 15, 40 + pad)


@pytest.mark.parametrize("pieces", [[40], [10, 10, 12], [30]])
def test_what_a_batch_has_in_common_is_found(pieces: list[int]) -> None:
    reader, x = base.model(), rows_of(25)
    expected, _, _ = base.read(reader, x, [40])
    with SharedPrefix().attach(reader):
        got, state, _ = base.read(reader, x, pieces)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert [layer.prefix.length for layer in state.layers] == [25, 25]


def test_a_state_read_without_it_is_shared_too() -> None:
    reader, x = base.model(), rows_of(25)
    expected, _, _ = base.read(reader, x, [40])
    with torch.no_grad():
        _, state = reader.read(x[:, :36])
        kept, outputs = SharedPrefix().apply(state, reader), []
        assert [layer.prefix.length for layer in kept.layers] == [25, 25]
        size = (2, 8, 8, torch.float64)
        assert kept.nbytes == 2 * (KVState.bytes_at(25, 1, *size) + KVState.bytes_at(11, 5, *size)) < state.nbytes
        with SharedPrefix().attach(reader):
            for t in range(36, 40):
                y, kept = reader.read(x[:, t : t + 1], kept)
                outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected[:, 36:], rtol=0, atol=1e-9)


def test_rows_are_picked_and_branches_do_not_meet() -> None:
    reader, x = base.model(), rows_of(20)
    with SharedPrefix().attach(reader), torch.no_grad():
        _, state = reader.read(x[:, :30])
        picked = state.select(torch.tensor([3, 3, 1]))
        y, on = reader.read(x[[3, 3, 1], 30:31], picked)
        first, _ = reader.read(x[:, 30:31], state)
        torch.testing.assert_close(y, first[[3, 3, 1]], rtol=0, atol=1e-12)
        _, one = reader.read(x[:1, :20])
        batch = one.select(torch.zeros(4, dtype=torch.int64))
        expected, _ = reader.read(x[:4, 20:24], batch)
        reader.read(x[2:3, 20:30], one)  # goes on in the buffer that the batch reads
        again, _ = reader.read(x[:4, 20:24], batch)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    assert on.layers[0].prefix.keys.data_ptr() == state.layers[0].prefix.keys.data_ptr()


def test_common_tokens() -> None:
    x = torch.zeros(3, 6, 2)
    assert common_tokens(x) == 6
    x[1, 4] = 1
    assert common_tokens(x, torch.zeros(3, 6, 1)) == 4
    y = torch.ones(3, 6, 1)
    y[0] += 1e-7  # rounding
    assert common_tokens(y) == 6
    y[2, 0] = 2
    assert common_tokens(x, y) == 0


def test_the_state_of_another_policy_is_refused() -> None:
    reader, x = base.model(), base.tokens()
    with build_policy("h2o", budget="24tok", window=4).attach(reader), torch.no_grad():
        _, state = reader.read(x)
    with SharedPrefix().attach(reader), pytest.raises(InputError, match="a SharedPrefixState, got KeptState"):
        reader.read(x[:, :1], state)
