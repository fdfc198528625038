"""Dispatch, with a stand-in for flash-linear-attention whose signatures are those of its release 0.6."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError, ResourceError
from contextlab.ops import backend, delta, linear


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "_forced", "auto")
    backend.load_fla.cache_clear()
    yield
    backend.load_fla.cache_clear()


def fake_fla(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Put the stand-in in sys.modules and pretend that CPU tensors are on CUDA. Returns the list of calls."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def gla(name: str) -> Any:
        def kernel(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            g: Tensor | None = None,
            g_gamma: Tensor | None = None,
            scale: float | None = None,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
        ) -> tuple[Tensor, Tensor | None]:
            calls.append((name, locals()))
            assert g is None or g_gamma is None  # the kernels take one of them
            o, last = linear.naive_simple_gla(q, k, v, g, g_gamma, scale, initial_state)
            return o, last if output_final_state else None

        return kernel

    def rule(name: str, gated: bool) -> Any:
        def kernel_gated(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            g: Tensor,
            beta: Tensor,
            scale: float | None = None,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
        ) -> tuple[Tensor, Tensor | None]:
            calls.append((name, locals()))
            o, last = delta.naive_gated_delta_rule(q, k, v, g, beta, scale, initial_state)
            return o, last if output_final_state else None

        def kernel(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            beta: Tensor,
            scale: float | None = None,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
        ) -> tuple[Tensor, Tensor | None]:
            calls.append((name, locals()))
            o, last = delta.naive_gated_delta_rule(q, k, v, None, beta, scale, initial_state)
            return o, last if output_final_state else None

        return kernel_gated if gated else kernel

    package = ModuleType("fla")
    package.__version__ = "0.6.0"  # type: ignore[attr-defined]
    modules = {"fla": package, "fla.ops": ModuleType("fla.ops")}
    kernels = {
        "simple_gla": {n: gla(n) for n in ("chunk_simple_gla", "fused_recurrent_simple_gla")},
        "gated_delta_rule": {n: rule(n, True) for n in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")},
        "delta_rule": {n: rule(n, False) for n in ("chunk_delta_rule", "fused_recurrent_delta_rule")},
    }
    for op, functions in kernels.items():
        module = ModuleType(f"fla.ops.{op}")
        vars(module).update(functions)
        modules[module.__name__] = module
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    real = backend._refusal
    monkeypatch.setattr(backend, "_refusal", lambda op, device, dtype, size: real(op, "cuda", dtype, size))
    return calls


def gla_inputs(length: int = 5) -> list[Tensor]:
    return [torch.randn(2, length, 1, 4), torch.randn(2, length, 1, 4), torch.randn(2, length, 2, 3)]


@pytest.mark.parametrize("length", [1, 5])
def test_simple_gla_reaches_the_kernels(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    q, k, v = gla_inputs(length)
    g, gamma, S = -torch.rand(2, length, 2), -torch.rand(2), torch.randn(2, 2, 4, 3)
    expected, expected_last = linear.naive_simple_gla(q, k, v, g, gamma, 0.3, S)
    calls = fake_fla(monkeypatch)
    o, last = linear.simple_gla(q, k, v, g, gamma, 0.3, S, True)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(last, expected_last)
    assert [name for name, _ in calls] == ["fused_recurrent_simple_gla" if length == 1 else "chunk_simple_gla"]
    linear.retention(v, v, v)
    assert calls[-1][1]["g_gamma"] is not None


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("length", [1, 5])
def test_delta_rule_reaches_the_kernels(monkeypatch: pytest.MonkeyPatch, length: int, gated: bool) -> None:
    dtype = torch.float32 if gated else torch.bfloat16  # its delta_rule refuses float32
    q, k, v = (torch.randn(2, length, 2, 4).to(dtype) for _ in range(3))
    beta, S = torch.rand(2, length, 2).to(dtype), torch.randn(2, 2, 4, 4).to(dtype)
    g = -torch.rand(2, length, 2) if gated else None
    expected, expected_last = delta.naive_gated_delta_rule(q, k, v, g, beta, 0.3, S)
    calls = fake_fla(monkeypatch)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            o, last = delta.gated_delta_rule(q, k, v, g, beta, 0.3, S, True)
        torch.testing.assert_close(o, expected)
        torch.testing.assert_close(last, expected_last)
        name = "gated_delta_rule" if gated else "delta_rule"
        # the one-token kernel of the gated rule has no backward
        assert calls[-1][0] == ("fused_recurrent_" if length == 1 and not grad else "chunk_") + name


def test_float64_and_wide_keys_fall_back_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_fla(monkeypatch)
    assert backend.choose("simple_gla", torch.zeros(1, 1, 1, 4)).name == "fla"
    chosen = backend.choose("simple_gla", torch.zeros(1, 1, 1, 4, dtype=torch.float64))
    assert (chosen.name, chosen.why) == ("torch", "flash-linear-attention's kernels do not take float64")
    assert "at most 256" in backend.choose("gated_delta_rule", torch.zeros(1, 1, 1, 257)).why
    linear.simple_gla(*(x.double() for x in gla_inputs()))
    assert not calls


def test_forcing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_fla(monkeypatch)
    with backend.use_backend("torch"):
        linear.simple_gla(*gla_inputs())
        assert not calls
        assert "forced" in backend.choose("simple_gla", torch.zeros(1, 1, 1, 4)).why
    linear.simple_gla(*gla_inputs())
    assert calls
    with (
        backend.use_backend("fla"),
        pytest.raises(ResourceError, match=r"simple_gla cannot use it: .*float64"),
    ):
        linear.simple_gla(*(x.double() for x in gla_inputs()))
    with pytest.raises(InputError, match="did you mean 'torch'"), backend.use_backend("toch"):
        pass
    monkeypatch.setattr(backend, "_forced", "flaa")  # as the environment variable would
    with pytest.raises(InputError, match=r"CONTEXTLAB_BACKEND: .*did you mean 'fla'"):
        backend.choose("simple_gla", torch.zeros(1, 1, 1, 4))


def test_reports_on_a_machine_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reports = {report.op: report for report in backend.backends()}
    assert set(reports) == set(backend.OPS)
    assert reports["gated_delta_rule"].to_dict() == {
        "op": "gated_delta_rule",
        "device": "cpu",
        "chosen": "torch",
        "why": "no CUDA device",
    }
    with backend.use_backend("fla"):
        assert {r.op: r.chosen for r in backend.backends()}["simple_gla"] == "none"


def test_reports_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_fla(monkeypatch)
    reports = {report.op: report for report in backend.backends()}
    assert (reports["simple_gla"].chosen, reports["simple_gla"].why) == (
        "fla",
        "flash-linear-attention 0.6.0",
    )
    assert "does not take float32" in reports["delta_rule"].why


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            ModuleNotFoundError("No module named 'fla'", name="fla"),
            "is not installed (pip install contextlab[fla])",
        ),
        (
            ModuleNotFoundError("No module named 'triton'", name="triton"),
            "ModuleNotFoundError: No module named 'triton'",
        ),
        (RuntimeError("no\ndriver"), "does not import: RuntimeError: no driver"),
    ],
)
def test_a_missing_or_broken_package_is_reported(monkeypatch: pytest.MonkeyPatch, error: Exception, why: str) -> None:
    fake_fla(monkeypatch)
    monkeypatch.delitem(sys.modules, "fla")
    real = builtins.__import__

    def refuse(name: str, *args: Any) -> ModuleType:
        if name == "fla":
            raise error
        return real(name)

    monkeypatch.setattr(backend.importlib, "import_module", refuse)
    report = {r.op: r for r in backend.backends()}["simple_gla"]
    assert report.chosen == "torch"
    assert why in report.why


def test_unknown_op() -> None:
    with pytest.raises(InputError, match="did you mean 'simple_gla'"):
        backend.choose("simple_gl", torch.zeros(1))
