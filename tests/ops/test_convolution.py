from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops.convolution import causal_conv, naive_causal_conv


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 12), size=st.integers(1, 5), bias=st.booleans(), state=st.booleans())
def test_agrees_with_the_recurrence(length: int, size: int, bias: bool, state: bool) -> None:
    x, weight = draw(2, length, 3), draw(3, size)
    b = draw(3) if bias else None
    before = draw(2, size - 1, 3) if state else None
    y, after = causal_conv(x, weight, b, before, output_final_state=True)
    expected, last = naive_causal_conv(x, weight, b, before)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after, last)


def test_agrees_with_conv1d() -> None:
    x, weight, bias = draw(2, 9, 3), draw(3, 4), draw(3)
    expected = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=3).mT
    torch.testing.assert_close(causal_conv(x, weight, bias, activation="silu")[0], F.silu(expected))


@pytest.mark.parametrize("length", [1, 6])
def test_gradients(length: int) -> None:
    inputs = [x.requires_grad_() for x in (draw(2, length, 3), draw(3, 4), draw(3), draw(2, 3, 3))]
    assert torch.autograd.gradcheck(lambda *a: causal_conv(*a, output_final_state=True), inputs)


def test_final_state_holds_no_larger_buffer() -> None:
    after = causal_conv(draw(2, 50, 3), draw(3, 4), output_final_state=True)[1]
    assert after is not None
    assert after.untyped_storage().nbytes() == 2 * 3 * 3 * 8


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(InputError, match="weight has 4 channels, x has 3"):
        causal_conv(draw(1, 2, 3), draw(4, 2))
