from __future__ import annotations

import math

import pytest
import torch

from contextlab import registry
from contextlab.errors import InputError
from contextlab.mixers.base import state_growth
from contextlab.mixers.static.hyena import Hyena
from contextlab.mixers.static.token_shift import TokenShift
from contextlab.ops.convolution import naive_causal_conv
from contextlab.ops.long_convolution import naive_long_convolution


def test_token_shift_interpolates_with_the_token_before() -> None:
    mixer = TokenShift(6).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    before = torch.cat((torch.zeros(2, 1, 6, dtype=torch.float64), x[:, :-1]), 1)
    share = mixer.shift[:, 0]
    assert (share[0], share[-1]) == (1, 0)  # at the start channels run from the token before to the token itself
    expected = ((1 - share) * x + share * before) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], expected)


def test_token_shift_keeps_the_mean_of_equal_tokens() -> None:
    mixer = TokenShift(6, size=4).double()
    torch.nn.init.normal_(mixer.shift)
    x = torch.randn(1, 1, 6, dtype=torch.float64).expand(1, 9, 6)
    torch.testing.assert_close(mixer(x)[0][:, 3:], mixer.out_proj(x)[:, 3:])


def hyena_by_its_definition(mixer: Hyena, x: torch.Tensor) -> torch.Tensor:
    """The recurrence, with sums for convolutions and the filters built lag by lag."""
    z = x @ mixer.in_proj.weight.T
    if mixer.conv is not None:
        z = naive_causal_conv(z, mixer.conv.weight)[0]
    value, *gates = z.split(mixer.width, -1)
    size = mixer.filter_length
    filters = torch.zeros(mixer.order - 1, mixer.width, size, dtype=x.dtype)
    for lag in range(size):
        angles = [2 * math.pi * k * lag / size for k in range(1, mixer.bands + 1)]
        features = [lag / size, *map(math.cos, angles), *map(math.sin, angles)]
        h = torch.tensor(features, dtype=x.dtype)
        for layer in (mixer.filter_in, *mixer.filter_inner):
            h = torch.sin(mixer.frequency * (layer.weight @ h + layer.bias))
        window = torch.exp(-mixer.rates * lag / size) + mixer.FLOOR
        filters[:, :, lag] = (mixer.filter_out.weight @ h).view(mixer.order - 1, -1) * window
    for n, gate in enumerate(gates[:-1]):
        value = gate * value
        value = naive_long_convolution(value, filters[n])[0] + mixer.skip[n] * value
    return (gates[-1] * value) @ mixer.out_proj.weight.T


@pytest.mark.parametrize(("order", "length", "size"), [(2, 12, 20), (3, 20, 7), (4, 9, 9)])
@torch.no_grad()
def test_hyena_by_its_definition(order: int, length: int, size: int) -> None:
    mixer = Hyena(6, order=order, filter_length=size, filter_width=10, bands=3).double()
    x = torch.randn(2, length, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], hyena_by_its_definition(mixer, x), atol=1e-11, rtol=0)


def test_hyena_forgets_beyond_its_filter_and_holds_no_more() -> None:
    mixer = Hyena(8, filter_length=16, short_conv=3).double()
    x = torch.randn(1, 60, 8, dtype=torch.float64, requires_grad=True)
    seen = torch.autograd.grad(mixer(x)[0][0, 50].sum(), x)[0][0].abs().sum(-1) > 1e-12
    assert seen[50 - 15 - 2 : 51].all()
    assert not seen[: 50 - 15 - 2].any()
    sizes = [mixer.state_nbytes(n) for n in (1, 8, 15, 16, 1000)]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3] == sizes[4]
    assert state_growth(mixer) == "constant"


@pytest.mark.parametrize("size", [64, 1024])
@torch.no_grad()
def test_hyena_starts_with_filters_of_norm_near_one(size: int) -> None:
    norms = Hyena(32, filter_length=size).filters(size).norm(dim=-1)
    assert 0.4 < norms.mean() < 1.5


def test_impossible_options_are_refused() -> None:
    for name, options in (("hyena", {"order": 1}), ("token_shift", {"size": 1})):
        with pytest.raises(InputError, match="greater than or equal to 2"):
            registry.lookup("mixer", name).build(width=8, **options)


@torch.no_grad()
def test_hyena_makes_its_filters_in_float32_at_least() -> None:
    mixer, x = Hyena(16, filter_length=64), torch.randn(2, 40, 16)
    expected = mixer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        filters, y = mixer.filters(64), mixer(x)[0]
    torch.testing.assert_close(filters, mixer.filters(64))
    torch.testing.assert_close(y.float(), expected, atol=0.02 * expected.abs().max().item(), rtol=0)
