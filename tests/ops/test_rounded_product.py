"""Products of which every factor is rounded: number by number, on average, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import contextlab.mixers  # noqa: F401  (registers every form)
from contextlab import registry
from contextlab.errors import InputError
from contextlab.mixers.forms import LinearForm
from contextlab.ops.rounding import E2M1, noise_of

WHOLE = {"latent": True, "activations": True, "gradients": True}
FLOATS = ("fp8", "fp4", "mxfp4", "nvfp4")


def made(name: str, weight: Tensor, **options) -> LinearForm:
    return registry.lookup("linear", name).factory.of(weight, **{**WHOLE, **options}).train()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def level(size: float, noise: float | None) -> float:
    """A size in E2M1: the nearest, of two that with an even code; or up with a probability of its place between two."""
    size = min(size, 6.0)
    low = max(i for i, each in enumerate(E2M1) if each <= size)
    high = min(low + 1, 7)
    if noise is not None:
        return E2M1[high] if high > low and noise < (size - E2M1[low]) / (E2M1[high] - E2M1[low]) else E2M1[low]
    return E2M1[min((low, high), key=lambda i: (abs(size - E2M1[i]), i % 2))]


def by_hand(rows: Tensor, noise: Tensor | None) -> Tensor:
    """NVFP4 of each row by itself, number by number."""
    found = torch.zeros_like(rows)
    for r, row in enumerate(rows):
        for_all = max(abs(x) for x in row.tolist()) / (6 * 448)
        for at in range(0, len(row), 16):
            block = row[at : at + 16].tolist()
            scale = max(abs(x) for x in block) / 6 / for_all
            scale = float(torch.tensor(scale).to(torch.float8_e4m3fn).to(torch.float64)) * for_all
            for i, x in enumerate(block, at):
                found[r, i] = (
                    math.copysign(level(abs(x) / scale, None if noise is None else float(noise[r, i])), x) * scale
                )
    return found


def test_each_factor_of_each_product_is_rounded_along_what_is_summed() -> None:
    weight, x, upstream = drawn(18, 35), drawn(2, 10, 35), drawn(2, 10, 18)
    form = made("nvfp4", weight, seed=3)
    x.requires_grad_()
    y = form(x)
    y.backward(upstream)
    rows, drows = x.detach().flatten(0, 1), upstream.flatten(0, 1)
    stored = form.eval().dense().detach()  # of a weight the scale for all is one
    torch.testing.assert_close(y.detach().flatten(0, 1), by_hand(rows, None) @ stored.T, rtol=0, atol=1e-9)
    noises = {which: noise_of(each, 12 + which) for which, each in ((1, drows), (2, drows.T), (3, rows.T))}
    dx = by_hand(drows, noises[1]) @ by_hand(weight.T, None).T
    torch.testing.assert_close(x.grad.flatten(0, 1), dx, rtol=0, atol=1e-9)
    dweight = by_hand(drows.T, noises[2]) @ by_hand(rows.T, noises[3]).T
    torch.testing.assert_close(form.weight.grad, dweight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FLOATS)
def test_the_gradient_of_a_weight_is_right_on_average(name: str) -> None:
    x, upstream = drawn(40, 8), drawn(40, 5)
    found = []
    for seed in range(200):
        form = made(name, drawn(5, 8), seed=seed)
        form(x).backward(upstream)
        found.append(form.weight.grad)
    each = torch.stack(found)
    error, off = each.std(0) / math.sqrt(len(found)), each.mean(0) - upstream.T @ x
    largest = x.abs().amax() * upstream.abs().amax()
    if name == "mxfp4":  # what is beyond 6 of its steps becomes 6: a little less than the truth
        assert off.abs().max() < 0.1 * (upstream.T @ x).abs().max()
    else:
        assert (off.abs() < 5 * error + 1e-9 * largest).all()
    assert each.std(0).min() > 0


@pytest.mark.parametrize("name", FLOATS)
def test_no_token_tells_of_another(name: str) -> None:
    x = drawn(2, 9, 20) * torch.logspace(0, 4, 9, dtype=torch.float64)[:, None]
    for form in (made(name, drawn(6, 20)), made(name, drawn(6, 20), latent=False, gradients=False)):
        whole = form(x)
        for t in range(9):
            torch.testing.assert_close(form(x[1, t]), whole[1, t], rtol=0, atol=1e-9 * float(x.abs().max()))


@pytest.mark.parametrize("name", FLOATS)
def test_what_is_not_finite_is_seen_to_be(name: str) -> None:
    form = made(name, drawn(6, 20))
    for bad in (math.inf, math.nan):
        x = drawn(3, 20)
        x[1, 4] = bad
        y = form(x.requires_grad_())
        assert y[0].isfinite().all()
        assert not y[1].isfinite().any()
        upstream = torch.ones_like(y)
        upstream[2, 3] = bad
        (dx,) = torch.autograd.grad(y, x, upstream)
        assert not dx[2].isfinite().any()
    assert form(torch.zeros(0, 20, dtype=torch.float64)).shape == (0, 6)


def test_a_layer_learns_in_four_bits() -> None:
    truth, x = drawn(6, 20), drawn(64, 20)
    form = made("nvfp4", torch.zeros(6, 20, dtype=torch.float64))
    form.weight.data.copy_(0.1 * drawn(6, 20))
    optimiser = torch.optim.Adam(form.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        optimiser.zero_grad()
        loss = (form(x) - x @ truth.T).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


def test_gradients_alone_are_refused() -> None:
    with pytest.raises(InputError, match="gradients: .*add latent: true and activations: true"):
        registry.lookup("linear", "fp4").build(inputs=3, outputs=2, bias=False, gradients=True, latent=True)
