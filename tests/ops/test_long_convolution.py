from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab.errors import InputError
from contextlab.ops.convolution import causal_conv
from contextlab.ops.long_convolution import fast_size, long_convolution, naive_long_convolution


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(length=st.integers(1, 20), size=st.integers(1, 24), held=st.none() | st.integers(0, 23))
def test_agrees_with_the_definition(length: int, size: int, held: int | None) -> None:
    x, filters = draw(2, length, 3), draw(3, size)
    before = None if held is None else draw(2, min(held, size - 1), 3)
    y, after = long_convolution(x, filters, before, output_final_state=True)
    expected, last = naive_long_convolution(x, filters, before)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(after, last)


@settings(deadline=None, max_examples=25)
@given(cut=st.integers(1, 29), size=st.integers(1, 40))
def test_pieces_agree_with_the_whole(cut: int, size: int) -> None:
    x, filters = draw(2, 30, 3), draw(3, size)
    first, state = long_convolution(x[:, :cut], filters, None, True)
    second, last = long_convolution(x[:, cut:], filters, state, True)
    whole, expected = long_convolution(x, filters, None, True)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(last, expected)


def test_agrees_with_the_short_convolution() -> None:
    x, weight = draw(2, 9, 3), draw(3, 4)
    torch.testing.assert_close(long_convolution(x, weight.flip(1))[0], causal_conv(x, weight)[0])


@pytest.mark.parametrize("length", [1, 6])
def test_gradients(length: int) -> None:
    inputs = [x.requires_grad_() for x in (draw(2, length, 3), draw(3, 5), draw(2, 4, 3))]
    assert torch.autograd.gradcheck(lambda *a: long_convolution(*a, output_final_state=True), inputs)


def test_half_precision_is_summed_in_float32() -> None:
    x, filters = draw(1, 300, 4), draw(4, 300) / 300**0.5
    got = long_convolution(x.bfloat16(), filters.bfloat16())[0]
    assert got.dtype == torch.bfloat16
    expected = long_convolution(x.bfloat16().double(), filters.bfloat16().double())[0]
    torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=1e-2)


def test_final_state_holds_no_larger_buffer() -> None:
    after = long_convolution(draw(2, 50, 3), draw(3, 4), output_final_state=True)[1]
    assert after is not None
    assert after.untyped_storage().nbytes() == 2 * 3 * 3 * 8


def test_sizes_are_fast_and_large_enough() -> None:
    for least in range(1, 200):
        size = fast_size(least)
        assert least <= size < 2 * least
        assert (size // 3 if size % 3 == 0 else size).bit_count() == 1


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected filters \[3, L\], got \[4, 2\]"):
        long_convolution(draw(1, 2, 3), draw(4, 2))
