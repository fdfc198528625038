from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab.ops import dense as module
from contextlab.ops.backend import backends, use_backend
from contextlab.ops.dense import dense, onednn, rms_norm
from contextlab.testing.adapters import Int8

needs_onednn = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch has no oneDNN")


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN for products of every size, whatever the processor."""
    monkeypatch.setattr(module, "onednn", lambda: (True, "forced"))
    monkeypatch.setattr(module, "_FORWARD_FROM", 0)
    monkeypatch.setattr(module, "_WEIGHT_FROM", 0)


def gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    y = function(*inputs)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, inputs, weight)]


@needs_onednn
@pytest.mark.parametrize("shape", [(5,), (3, 7, 5), (2, 1, 3, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_through_onednn_is_the_linear_layer(forced: None, shape: tuple[int, ...], biased: bool) -> None:
    x = torch.randn(shape, requires_grad=True)
    parts = [torch.randn(4, 5, requires_grad=True)] + [torch.randn(4, requires_grad=True)] * biased
    if len(shape) == 1:
        x = x[None].detach().requires_grad_()
    for ours, theirs in zip(gradients(dense, x, *parts), gradients(F.linear, x, *parts), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_the_product_takes_views_and_expanded_gradients(forced: None) -> None:
    base, weight = torch.randn(6, 4, 10), torch.randn(3, 5, requires_grad=True)
    x = base.transpose(0, 1)[..., ::2].requires_grad_()
    ours = torch.autograd.grad(dense(x, weight).sum(), (x, weight))  # the sum's gradient is an expanded one
    theirs = torch.autograd.grad(F.linear(x, weight).sum(), (x, weight))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_the_product_is_differentiated_twice_and_mapped(forced: None) -> None:
    x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)

    def second(product):
        (slope,) = torch.autograd.grad(product(x, weight).square().sum(), weight, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (x, weight))

    torch.testing.assert_close(second(dense), second(F.linear), atol=1e-2, rtol=1e-4)
    many = torch.randn(3, 4, 5)
    mapped = torch.vmap(lambda w: torch.func.grad(lambda w: dense(x, w).square().sum())(w))(many)
    expected = torch.stack([torch.func.grad(lambda w: F.linear(x, w).square().sum())(w) for w in many])
    torch.testing.assert_close(mapped, expected, atol=1e-4, rtol=1e-4)


def test_small_products_and_other_dtypes_are_pytorchs() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        x, weight = torch.randn(3, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype)
        torch.testing.assert_close(dense(x, weight), F.linear(x, weight), rtol=0, atol=0)
    chosen, why = onednn()
    assert isinstance(chosen, bool)
    assert why


def test_rms_norm_is_pytorchs_and_its_gradients_are_right() -> None:
    x, weight = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight), F.rms_norm(x, (6,), weight))
    torch.testing.assert_close(rms_norm(x, weight, 0.1), F.rms_norm(x, (6,), weight, 0.1))
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, (6,)))
    x.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(rms_norm, (x, weight, 0.1))
    assert torch.autograd.gradgradcheck(rms_norm, (x, weight, 0.1))
    assert torch.autograd.gradcheck(rms_norm, (x[0, 0], weight))
    half = rms_norm(x.to(torch.bfloat16), weight.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16


def test_rms_norm_maps_over_models() -> None:
    x, weights = torch.randn(4, 6), torch.randn(3, 6)
    mapped = torch.vmap(lambda w: torch.func.grad(lambda w: rms_norm(x, w).square().sum())(w))(weights)
    expected = torch.stack([torch.func.grad(lambda w: F.rms_norm(x, (6,), w).square().sum())(w) for w in weights])
    torch.testing.assert_close(mapped, expected, atol=1e-4, rtol=1e-4)


@needs_onednn
def test_few_tokens_go_through_onednn_where_the_matrix_is_large(forced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FORWARD_FROM", 2**62)
    monkeypatch.setattr(module, "_READ_FROM", 20)
    calls = []
    monkeypatch.setattr(module, "_product", lambda *inputs: calls.append(1) or F.linear(*inputs))
    x, large, small = torch.randn(1, 1, 5), torch.randn(4, 5), torch.randn(3, 5)
    dense(x, large)
    assert not calls  # a Function's call would cost more than it gains
    with torch.no_grad():
        torch.testing.assert_close(dense(x, large), F.linear(x, large))
        assert len(calls) == 1
        dense(x, small)
        assert len(calls) == 1
        mapped = torch.vmap(lambda w: dense(x, w))(torch.stack((large, large)))
    torch.testing.assert_close(mapped[1], F.linear(x, large))


def test_onednn_is_taken_only_where_it_is_there_and_faster(monkeypatch):
    fits = {
        "torch.backends.mkldnn.is_available": lambda: True,
        "torch.backends.mkl.is_available": lambda: True,
        "torch.backends.cpu.get_cpu_capability": lambda: "AVX512",
        "contextlab.ops.backend._cpu_vendor": lambda: "AuthenticAMD",
    }
    others = {
        "torch.backends.mkldnn.is_available": (lambda: False, "this PyTorch carries no oneDNN"),
        "torch.backends.mkl.is_available": (lambda: False, "this PyTorch's products are not MKL's"),
        "torch.backends.cpu.get_cpu_capability": (lambda: "AVX2", "MKL is slow only on AMD processors"),
        "contextlab.ops.backend._cpu_vendor": (lambda: "GenuineIntel", "MKL is slow only on AMD processors"),
    }
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None, raising=False)
    for name in (None, *others):
        for each, answer in fits.items():
            monkeypatch.setattr(each, others[each][0] if each == name else answer)
        taken, why = module.onednn.__wrapped__()
        assert taken == (name is None)
        assert why.startswith(others[name][1] if name else "on AMD processors with AVX-512")


def test_other_kinds_of_tensors_and_use_backend_torch_go_to_pytorchs_own(
    forced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("oneDNN was asked")

    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    monkeypatch.setattr(module, "_product", refuse)
    with pytest.raises(AssertionError, match="oneDNN was asked"):
        dense(x, weight)
    eighth = Int8.of(weight)
    torch.testing.assert_close(dense(x, eighth), F.linear(x, eighth.dequantize()))
    with use_backend("torch"):
        torch.testing.assert_close(dense(x, weight), F.linear(x, weight))
        torch.testing.assert_close(module.product(x, weight), F.linear(x, weight))
        assert next(report for report in backends() if report.op == "dense").why.startswith("forced by use_backend")
