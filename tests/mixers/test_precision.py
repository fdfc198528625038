"""Half precision: every mixer runs in bfloat16 and under autocast, and its memory keeps float32 where it sums."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import contextlab.mixers  # noqa: F401  (registers every mixer)
from contextlab import registry
from contextlab.mixers.layers import Linear, project_wide
from contextlab.ops import gla, simple_gla, titans
from contextlab.ops.precision import wide_einsum
from contextlab.testing import laws
from contextlab.testing.mixers import cases

OPTIONS = {"parallel": {"mixers": ["attention", "mamba2"]}}
LAWS = {law.name: law for law in laws("mixer")}
NAMES = [entry.name for entry in registry.entries("mixer") if entry.factory.__module__.startswith("contextlab.")]


@pytest.mark.parametrize("law", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_every_mixer_runs_in_half_precision(name: str, law: str) -> None:
    """With its defaults; tests/mixers/test_laws.py has the cases."""
    plain = dataclasses.replace(registry.lookup("mixer", name), cases=(OPTIONS.get(name, {}),))
    LAWS[law](next(cases(plain)))


def test_recurrences_do_not_lose_digits_under_autocast() -> None:
    q, k, v = torch.randn(3, 1, 300, 2, 8).unbind()
    k, gate = torch.nn.functional.normalize(k, dim=-1), -torch.rand(1, 300, 2) / 50
    for op, more in (
        (simple_gla, (gate,)),
        (gla, (gate.unsqueeze(-1).expand(-1, -1, -1, 8),)),
        (titans, (gate.exp() / 2, gate - 1, gate)),
    ):
        expected = op(q, k, v, *more)[0]
        with torch.autocast("cpu", torch.bfloat16):
            got = op(q, k, v, *more)[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_round_what_is_read_from_a_state(dtype: torch.dtype) -> None:
    q, memory = torch.randn(2, 5, 3, 8), 1e5 * torch.randn(2, 3, 8, 4)
    with torch.autocast("cpu", dtype):
        got = wide_einsum("bthk,bhkv->bthv", q, memory)
    assert got.equal(torch.einsum("bthk,bhkv->bthv", q, memory))


@pytest.mark.parametrize("given", [torch.float32, torch.float16])
def test_a_projection_holds_sums_that_float16_does_not(given: torch.dtype) -> None:
    """In float16, and where autocast computes in it: to float16's digits of what float32 gives."""
    layer, y = Linear(16, 4), 1e6 * torch.randn(3, 7, 16)
    with torch.no_grad():
        layer.weight.mul_(0.01)
    expected = layer(y)
    with torch.autocast("cpu", torch.float16, enabled=given == torch.float32):
        got = project_wide(y, layer.to(given), given)
    assert got.dtype == given
    torch.testing.assert_close(got.float(), expected, rtol=3e-3, atol=30)
