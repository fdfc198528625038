"""Feature maps against the kernels that they stand for."""

from __future__ import annotations

import math

import pytest
import torch

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.layers import elu1
from contextlab.mixers.linear.features import build_feature_map


def weights(name: str, q: torch.Tensor, k: torch.Tensor, **options) -> torch.Tensor:
    """phi(q_i) . phi(k_j) [H, T, T] of q, k [T, H, d]."""
    torch.manual_seed(0)
    options = {"features": None, "period": 64} | options
    phi = build_feature_map(name, q.shape[-1], q.shape[1], **options).double()
    places = torch.arange(len(q))
    with torch.no_grad():
        a, b = phi(q[None], places, True)[0], phi(k[None], places, False)[0]
    assert a.shape[-1] == phi.features
    return torch.einsum("ihf,jhf->hij", a, b)


@pytest.fixture
def qk() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, 3, 4, dtype=torch.float64, generator=generator)
    return q, k


def test_taylor_is_the_second_order_exponential(qk):
    s = torch.einsum("ihd,jhd->hij", *qk) / 2
    torch.testing.assert_close(weights("taylor", *qk), 1 + s + s.square() / 2)


def test_rebased_is_the_square_of_normalised_products(qk):
    q, k = (torch.nn.functional.layer_norm(x, (4,)) for x in qk)
    torch.testing.assert_close(weights("rebased", *qk), (torch.einsum("ihd,jhd->hij", q, k) / 2).square())


def test_hedgehog_starts_at_softmaxes_of_the_values(qk):
    q, k = (torch.cat((x.softmax(-1), (-x).softmax(-1)), -1) for x in qk)
    torch.testing.assert_close(weights("hedgehog", *qk), torch.einsum("ihd,jhd->hij", q, k))


def test_cosformer_weighs_by_distance(qk):
    distance = torch.arange(6)[:, None] - torch.arange(6)
    expected = torch.einsum("ihd,jhd->hij", qk[0].relu(), qk[1].relu()) * (math.pi * distance / 128).cos()
    torch.testing.assert_close(weights("cosformer", *qk), expected)


def test_performer_estimates_the_softmax(qk):
    qk = (qk[0] / 2, qk[1] / 2)  # the variance of the estimate grows with the exponential of the squared lengths
    expected = (torch.einsum("ihd,jhd->hij", *qk) / 2).softmax(-1)

    def error(features: int) -> float:
        found = weights("performer", *qk, features=features)
        return (found / found.sum(-1, keepdim=True) - expected).abs().mean().item()

    assert error(20_000) < 0.01
    assert error(20_000) < 0.2 * error(20)


def test_performer_draws_orthogonal_directions():
    torch.manual_seed(0)
    directions = build_feature_map("performer", 4, 2, 4, 1).directions
    products = directions @ directions.mT
    assert (products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_elu1_keeps_its_digits_far_below_zero(dtype):
    x = torch.tensor([-80.0, -20, -3, -1e-3, 0, 0.5, 9], dtype=dtype, requires_grad=True)
    wide = x.detach().double()
    expected = torch.where(wide > 0, wide + 1, wide.exp())
    y = elu1(x)
    torch.testing.assert_close(y.detach().double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(
        slope.double(), torch.where(wide > 0, 1, wide.exp()), rtol=4 * torch.finfo(dtype).eps, atol=0
    )


def test_options_that_contradict_each_other():
    with pytest.raises(InputError, match="performer's option"):
        build_mixer("linear_attention", width=16, feature_map="taylor", features=8)
    with pytest.raises(InputError, match="can be negative"):
        build_mixer("linear_attention", width=16, feature_map="identity")
