"""The hybrid of softmax in a window and linear attention, against its definition written token by token."""

from __future__ import annotations

import pytest
import torch

from contextlab.ops import naive_window_linear_attention, window_linear_attention
from contextlab.ops.softmax import softmax_attention


def drawn(length, heads=4, groups=2):
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, length, n, 6, dtype=torch.float64) for n in (heads, groups, groups))
    features = [torch.rand(2, length, heads, 5, dtype=torch.float64) for _ in range(2)]
    return q, k, v, *features, torch.rand(heads, dtype=torch.float64) + 0.1


def behind(x, window):
    return torch.cat((x.new_zeros(len(x), window, *x.shape[2:]), x), 1)


def read(q, k, v, fq, fk, share, window):
    seen = torch.arange(window + q.shape[1])[None] >= window
    given = behind(k, window), behind(v, window), fq, behind(fk, window)[:, : q.shape[1]], share, seen
    return window_linear_attention(q, *given, output_final_state=True)


@pytest.mark.parametrize(("length", "window"), [(1, 3), (9, 1), (70, 8), (100, 64), (40, 40)])
def test_it_is_what_the_paper_defines(length, window):
    q, k, v, fq, fk, share = drawn(length)
    each = [x.repeat_interleave(2, 2) for x in (k, v)]
    expected = naive_window_linear_attention(q, *each, fq, fk, share, window)
    o, state = read(q, k, v, fq, fk, share, window)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    gone = max(0, length - window)
    wrote = torch.einsum("bthf,bthv->bhfv", fk[:, :gone], each[1][:, :gone])
    torch.testing.assert_close(state[..., :-1], wrote, rtol=0, atol=1e-12)
    torch.testing.assert_close(state[..., -1], fk[:, :gone].sum(1), rtol=0, atol=1e-12)


def test_within_the_window_it_is_softmax_attention():
    q, k, v, fq, fk, share = drawn(30)
    o, _ = read(q, k, v, fq, fk, share, 30)
    torch.testing.assert_close(o, softmax_attention(q, k, v), rtol=0, atol=1e-12)


def test_gradients():
    q, k, v, fq, fk, share = (x.requires_grad_() for x in drawn(7))
    assert torch.autograd.gradcheck(lambda *x: read(*x, 3)[0], (q, k, v, fq, fk, share), fast_mode=True)
