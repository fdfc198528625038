"""The laws of MLPs. Each is put to one of width 12 in every option case, in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from contextlab import registry
from contextlab.testing.law import Component, close, law, require, seed_cpu
from contextlab.testing.options import a_case, hold_to_options

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


def marks(entry: registry.Entry, options: Mapping[str, Any]) -> Iterator[Any]:
    """What an MLP's options may change: its parameters, outputs and, in training, gradients."""
    seed_cpu(0)
    mlp = entry.build(width=WIDTH, **options).double()
    yield {name: value.detach() for name, value in mlp.named_parameters()}
    x = torch.randn(2, 20, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = mlp(x)
    yield y.detach()
    yield list(torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()], materialize_grads=True))


@law("mlp", "options", "Every option counts: another value changes something, or is refused.", holds_for=a_case)
def options(component: Component) -> None:
    """Of parameters, outputs, gradients."""
    entry = registry.lookup("mlp", component.name)
    hold_to_options(component, lambda options: marks(entry, options), "width")
