"""Gates at extreme inputs, against float64; and the mixers whose gates these are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab.mixers import build_mixer
from contextlab.mixers.gates import bounded_forget, exp_of_decay, root_of_rest, softplus_power
from contextlab.mixers.linear.features import Performer
from contextlab.ops.contextual import cope_attention, naive_cope_attention

FAR = [-600.0, -100.0, -40.0, -20.5, -19.5, -17.0, -3.0, -1e-3, 0.0, 1e-3, 2.0, 17.0, 40.0, 100.0, 600.0]


@pytest.mark.parametrize("bound", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_forget_gate_with_a_lower_bound(bound, dtype):
    x = torch.tensor(FAR).to(dtype).requires_grad_()
    write, log_f = bounded_forget(x, bound)
    gradient = torch.autograd.grad(log_f.sum(), x)[0]
    exact = x.detach().double().requires_grad_()
    expected_write = (1 - bound) * torch.sigmoid(-exact)
    if bound:  # each is exact where it is taken
        shut = (bound + (1 - bound) * exact.sigmoid()).log()
        expected = torch.where(expected_write > 0.5, shut, torch.log1p(-expected_write))
    else:
        expected = F.logsigmoid(exact)
    close = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-13
    torch.testing.assert_close(write.double(), expected_write, rtol=4 * close, atol=1e-38)
    torch.testing.assert_close(log_f.double(), expected, rtol=4 * close, atol=1e-38)
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(expected.sum(), exact)[0], rtol=8 * close, atol=4 * close
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_powers_of_softplus(dtype):
    x = torch.tensor(FAR).to(dtype).requires_grad_()
    power = torch.full_like(x, 0.25)
    y = softplus_power(x, power)
    gradient = torch.autograd.grad(y.sum(), x)[0]
    exact = x.detach().double().requires_grad_()  # in which softplus(-600) is not zero
    expected = F.softplus(exact, threshold=1e9).clamp_min(1e-300) ** 0.25
    expected = torch.where(exact < -30, (exact / 4).exp(), torch.log1p(exact.clamp(-30, 700).exp()) ** 0.25)
    close = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
    tiny = torch.finfo(dtype).tiny
    torch.testing.assert_close(y.double(), expected, rtol=16 * close, atol=tiny)
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(expected.sum(), exact)[0], rtol=16 * close, atol=max(tiny, close / 8)
    )


def test_the_root_of_what_decay_leaves_has_a_gradient_where_nothing_decays():
    log_decay = torch.tensor([0.0, -1e-30, -1e-7, -1.0, -300.0], requires_grad=True)
    y = root_of_rest(log_decay)
    exact = (-torch.expm1(2 * log_decay.detach().double())).sqrt()
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-18)
    gradient = torch.autograd.grad(y.sum(), log_decay)[0]
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[3:].double(), -torch.exp(2 * log_decay[3:].double()) / exact[3:])


def test_a_rate_of_decay_overflows_nowhere_and_changes_no_decay():
    z = torch.tensor([-5.0, 2.0, 8.0, 9.0, 11.5, 90.0, 800.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = z.to(dtype).requires_grad_()
        rate = exp_of_decay(x)
        assert rate.isfinite().all()
        assert torch.autograd.grad((-rate).exp().sum(), x)[0].isfinite().all()
        exact = (-x.detach().double().exp()).exp()
        torch.testing.assert_close((-rate.double()).exp(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("name", "options"), [("hgrn", {}), ("hgrn2", {}), ("hgrn2", {"lower_bound": 0.4}), ("rg_lru", {}), ("rodimus", {})]
)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 300.0), (torch.bfloat16, 60.0)], ids=["float32", "bfloat16"]
)
def test_gates_that_are_shut_or_open_to_the_end_have_finite_gradients(name, options, dtype, size):
    torch.manual_seed(0)
    mixer = build_mixer(name, width=24, **options).to(dtype)
    x = (size * torch.randn(2, 14, 24)).to(dtype).requires_grad_()
    y = mixer(x)[0]
    assert y.isfinite().all()
    found = torch.autograd.grad(y.float().sum() * 1e-3, [x, *mixer.parameters()])
    assert all(each.isfinite().all() for each in found)


def test_rwkv6_in_float16_forgets_at_once_where_its_rates_outgrow_the_format():
    torch.manual_seed(0)
    mixer = build_mixer("rwkv6", width=24).half()
    with torch.no_grad():
        mixer.decay.fill_(12)
    x = torch.randn(2, 9, 24).half().requires_grad_()
    y = mixer(x)[0]
    exact = build_mixer("rwkv6", width=24).double()
    exact.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(y.double(), exact(x.double())[0], rtol=0.02, atol=0.02)
    found = torch.autograd.grad(y.float().sum(), [x, *mixer.parameters()])
    assert all(each.isfinite().all() for each in found)


def test_contextual_positions_keep_their_digits_in_bfloat16():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 400, 1, 8).bfloat16() for _ in range(3))
    embedding = torch.randn(300, 8).cumsum(0).mul(0.3).bfloat16()
    expected = cope_attention(*(x.double() for x in (q, k, v, embedding)))
    error = (cope_attention(q, k, v, embedding).double() - expected).norm() / expected.norm()
    assert error < 0.02, float(error)
    few = [x[:, :6].double() for x in (q, k, v)]
    torch.testing.assert_close(expected[:, :6], naive_cope_attention(*few, embedding.double()))


@pytest.mark.parametrize("autocast", [False, True])
def test_performers_exponents_keep_their_digits_in_bfloat16(autocast):
    torch.manual_seed(0)
    feature, places = Performer(16, 2, 32), torch.arange(5)
    x = (4 * torch.randn(1, 5, 2, 16)).bfloat16()
    expected = Performer(16, 2, 32)
    expected.load_state_dict(feature.state_dict())
    expected.directions = feature.directions.bfloat16().double() if not autocast else feature.directions.double()
    feature = feature if autocast else feature.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = feature(x, places, True)
    torch.testing.assert_close(y.double(), expected(x.double(), places, True), rtol=0.01, atol=1e-30)
