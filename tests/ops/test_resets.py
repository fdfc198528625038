"""A decay of any size, -inf too, is right: what is read later loses no digits, and gradients stay finite.

Each op that takes log decays is held, in float32, to its recurrence in float64, which multiplies by exp(decay).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.ops.delta import gated_delta_rule, naive_gated_delta_rule
from contextlab.ops.dplr import dplr_delta_rule, kda, naive_dplr_delta_rule, naive_kda
from contextlab.ops.gla import gla, naive_gla, naive_rwkv6, rwkv6
from contextlab.ops.linear import naive_simple_gla, simple_gla
from contextlab.ops.mesa import mesa, naive_mesa
from contextlab.ops.mlstm import mlstm, naive_mlstm
from contextlab.ops.scan import linear_scan, naive_linear_scan
from contextlab.ops.titans import naive_titans, titans

B, T, H, K, V = 1, 40, 2, 4, 3
RESETS = (-1e3, -1e4, -1e6, -1e9, -math.inf)


class Case:
    """One op with its recurrence. inputs: by name, in float64; `decay` names the log decays among them."""

    def __init__(self, op: Callable[..., Any], naive: Callable[..., Any], decay: str, **inputs: Tensor) -> None:
        # Several chunks, so that states are handed on, where an op has chunks.
        chunks = {"chunk_size": 16} if "chunk_size" in inspect.signature(op).parameters else {}
        self.op, self.naive, self.decay, self.inputs = partial(op, **chunks), naive, decay, inputs

    def with_resets(self, value: float, every: int) -> dict[str, Tensor]:
        """Inputs in which every so many tokens the decay is `value`."""
        inputs = {name: x.clone() for name, x in self.inputs.items()}
        inputs[self.decay][:, every::every] = value
        return inputs


def case(name: str) -> Case:
    random = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(B, T, H, *shape, generator=random, dtype=torch.float64)  # noqa: E731
    q, v = draw(K), draw(V)
    k = F.normalize(draw(K), dim=-1)
    g, channels, beta = -0.1 * draw().abs(), -0.1 * draw(K).abs(), draw().sigmoid()
    if name == "simple_gla":
        return Case(simple_gla, naive_simple_gla, "g", q=q, k=k, v=v, g=g)
    if name == "gated_delta_rule":
        return Case(gated_delta_rule, naive_gated_delta_rule, "g", q=q, k=k, v=v, g=g, beta=beta)
    if name == "mesa":
        ridge = torch.ones(H, K, dtype=torch.float64)
        return Case(mesa, naive_mesa, "g", q=q, k=k, v=v, g=g, beta=beta, ridge=ridge)
    if name == "mlstm":
        return Case(mlstm, naive_mlstm, "f", q=q, k=k, v=v, i=draw(), f=draw() + 4)
    if name == "titans":
        return Case(titans, naive_titans, "g", q=q, k=k, v=v, theta=0.3 * beta, m=g - 2, g=g)
    if name == "titans, momentum":
        return Case(titans, naive_titans, "m", q=q, k=k, v=v, theta=0.3 * beta, m=g - 2, g=g)
    if name == "gla":
        return Case(gla, naive_gla, "g", q=q, k=k, v=v, g=channels)
    if name == "rwkv6":
        return Case(rwkv6, naive_rwkv6, "w", r=q, k=k, v=v, w=channels, u=draw(K)[0, 0])
    if name == "kda":
        return Case(kda, naive_kda, "g", q=q, k=k, v=v, g=channels, beta=beta)
    if name == "dplr_delta_rule":
        a, b = -k, k * beta.unsqueeze(-1)
        return Case(dplr_delta_rule, naive_dplr_delta_rule, "g", q=q, k=k, v=v, a=a, b=b, g=channels)
    return Case(linear_scan, naive_linear_scan, "g", x=v, g=-0.1 * draw(V).abs())


NAMES = ("simple_gla", "gated_delta_rule", "mesa", "mlstm", "titans", "titans, momentum", "gla", "rwkv6", "kda")
NAMES += ("dplr_delta_rule", "linear_scan")


def results(function: Callable[..., Any], inputs: dict[str, Tensor], **more: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs with final states, and the gradients of all inputs for fixed weights of the outputs."""
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    found = function(**inputs, **more)
    outputs: list[Tensor] = []
    stack = [found]
    while stack:
        top = stack.pop()
        outputs.append(top) if isinstance(top, Tensor) else stack.extend(top)
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in outputs)
    assert isinstance(loss, Tensor)
    return outputs, list(torch.autograd.grad(loss, list(inputs.values())))


@pytest.mark.parametrize("value", RESETS)
@pytest.mark.parametrize("name", NAMES)
def test_resets_cost_no_digits(name: str, value: float) -> None:
    chosen = case(name)
    more = {} if name == "linear_scan" else {"output_final_state": True}
    inputs = chosen.with_resets(value, 7)
    expected, slopes = results(chosen.naive, inputs)
    got, found = results(chosen.op, {k: x.float() for k, x in inputs.items()}, **more)
    for y, truth in zip(got, expected, strict=True):
        assert (y.double() - truth).abs().max() < 2e-5 * truth.abs().max()
    for (key, _), y, truth in zip(inputs.items(), found, slopes, strict=True):
        assert (y.double() - truth).abs().max() < 2e-4 * max(1.0, float(truth.abs().max())), key


@pytest.mark.parametrize("name", NAMES)
def test_after_a_reset_nothing_before_counts(name: str) -> None:
    chosen, at = case(name), 21
    inputs = chosen.with_resets(-math.inf, at)
    inputs[chosen.decay][:, at + 1 :] = chosen.inputs[chosen.decay][:, at + 1 :]
    if name.startswith("titans"):  # momentum is carried apart, and a step is taken where the memory was before
        inputs["m"][:, at], inputs["g"][:, at], inputs["theta"][:, at] = -math.inf, -math.inf, 0
    if name == "dplr_delta_rule":  # `a` reads the state before its decay
        inputs["b"][:, at] = 0
    o = chosen.op(**inputs)[0][:, at:]
    alone = chosen.op(**{k: x[:, at:] if x.ndim > 2 else x for k, x in inputs.items()})[0]
    if name == "rwkv6":  # a token reads the state before its own decay
        o, alone = o[:, 1:], alone[:, 1:]
    torch.testing.assert_close(o, alone, rtol=1e-10, atol=1e-11)
