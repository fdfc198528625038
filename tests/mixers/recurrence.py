"""Each causal mixer beside its paper's recurrence: a loop over tokens, written from the equations.

A reference takes the mixer, for its parameters, and one sequence x [T, width], and returns y [T, width]; `mixer.given`
are the options that the mixer was built with.
It calls neither the ops nor the mixers' own methods: a constant that changes there no longer agrees with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import contextlab.mixers  # noqa: F401  (registers every mixer)
from contextlab import registry

Reference = Callable[[Any, Tensor], Tensor]
REFERENCES: dict[str, Reference] = {}
WIDTH, LENGTH = 24, 19
TOLERANCE = {"mlstm": 1e-6}  # to its denominator 1e-6 is added, which no equation of the papers has


def recurrence(*names: str) -> Callable[[Reference], Reference]:
    """Decorator: the recurrence of these mixers."""

    def add(reference: Reference) -> Reference:
        REFERENCES.update(dict.fromkeys(names, reference))
        return reference

    return add


def every_case(*families: str) -> pytest.MarkDecorator:
    """Parametrise by name and options: every registered case of the families' mixers that have a recurrence."""
    found = [
        pytest.param(entry.name, options, id=f"{entry.name}-{i}")
        for entry in registry.entries("mixer")
        if entry.family in families and entry.name in REFERENCES
        for i, options in enumerate(entry.cases)
    ]
    return pytest.mark.parametrize(("name", "options"), found)


def agrees(name: str, options: Mapping[str, Any], length: int = LENGTH) -> None:
    """The mixer gives what its recurrence gives, with noise on every parameter, for two sequences."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # constants, too, are made with all their digits
    try:
        mixer = registry.lookup("mixer", name).build(width=WIDTH, **options).double().eval()
    finally:
        torch.set_default_dtype(usual)
    mixer.given = options
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        got, _ = mixer(x)
        expected = torch.stack([REFERENCES[name](mixer, row) for row in x])
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got, expected, atol=TOLERANCE.get(name, 1e-8) * scale, rtol=0)


# What many of the papers' layers are made of, one token or one vector at a time.


def convolved(layer: nn.Module | None, x: Tensor, activation: bool) -> Tensor:
    """A causal depthwise convolution of x [T, C], then SiLU: y_t = b + sum over i of w_i x_(t - i)."""
    if layer is None:
        return F.silu(x) if activation else x
    weight, bias = layer.weight, getattr(layer, "bias", None)  # [C, W], that of the token itself the last
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for i in range(min(weight.shape[1], t + 1)):
            y[t] += weight[:, -1 - i] * x[t - i]
    y = y if bias is None else y + bias
    return F.silu(y) if activation else y


def turned(x: Tensor, place: float, base: float = 10000.0, size: int | None = None) -> Tensor:
    """RoPE: dimensions 2j, 2j + 1 of x [..., D] as a complex number, times exp(i place base^(-2j / size))."""
    size = x.shape[-1] if size is None else size
    y = x.clone()
    for j in range(0, size, 2):
        angle = torch.tensor(place * base ** (-j / size), dtype=torch.float64)
        y[..., j] = x[..., j] * angle.cos() - x[..., j + 1] * angle.sin()
        y[..., j + 1] = x[..., j] * angle.sin() + x[..., j + 1] * angle.cos()
    return y


def rms(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square, along the last dimension."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def normed(x: Tensor, eps: float) -> Tensor:
    """x less its mean, over its standard deviation, along the last dimension."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


def unit(x: Tensor) -> Tensor:
    """x over its length, as the delta rule's layers take keys: x / sqrt(|x|^2 + 1e-6)."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """x W^T + b of a layer's parameters."""
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias
