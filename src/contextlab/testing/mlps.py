"""The laws of MLPs. Each is put to one of width 12 in every option case, in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from contextlab import registry
from contextlab.testing.law import Component, close, law, require

WIDTH = 12


def cases(entry: registry.Entry) -> Iterator[Component]:
    """A registered MLP in each of its option cases."""
    for options in entry.cases:
        make = functools.partial(entry.build, width=WIDTH, **options)
        yield Component("mlp", entry.name, entry.factory, options, make)


@law("mlp", "tokens apart", "A token's output depends on no other token.")
def tokens_apart(component: Component) -> None:
    """Each token of five alone, and another batch."""
    mlp, x = component.build().double().eval(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    y = mlp(x)
    require(y.shape == x.shape, f"outputs have shape {list(y.shape)}, expected {list(x.shape)}")
    for t in range(5):
        close(mlp(x[1:, t : t + 1]), y[1:, t : t + 1], 1e-12, f"outputs of token {t} alone")


@law("mlp", "gradients", "Gradients are those of finite differences.")
def gradients(component: Component) -> None:
    """By torch.autograd.gradcheck."""
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    require(torch.autograd.gradcheck(component.build().double().eval(), (x,)), "gradcheck fails")


@law("mlp", "flops", "flops are those of PyTorch's counter.")
def flops(component: Component) -> None:
    """Of nine tokens."""
    mlp = component.build().double().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mlp(torch.randn(1, 9, WIDTH, dtype=torch.float64))
    counted = counter.get_total_flops()
    require(mlp.flops(9) == counted, f"flops(9) is {mlp.flops(9)}, counted {counted}")
