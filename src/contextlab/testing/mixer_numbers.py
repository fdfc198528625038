"""Other laws of mixers: gradients, refusals, encoders, half precision, what they say of themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from contextlab import registry
from contextlab.mixers.base import Mixer, sequence_cost, token_cost
from contextlab.state import RecurrentState
from contextlab.testing.law import Component, close, law, refused, require, seed_cpu
from contextlab.testing.mixers import both_ways, causal, fresh
from contextlab.testing.options import a_case, hold_to_options
from contextlab.testing.readings import WIDTH, Reading, Readings, read


@law(
    "mixer",
    "gradients in pieces",
    "Gradients through a state that is handed on are those of reading whole.",
    holds_for=causal,
    share=0.25,
    reading=Readings(longest=80),
)
def gradients_in_pieces(component: Component, reading: Reading) -> None:
    """Of the inputs and of all parameters."""
    mixer = component.build().double()
    weight = torch.randn_like(reading.x) * reading.real[..., None]
    inputs = reading.x.clone().requires_grad_()
    wanted = [inputs, *mixer.parameters()]

    def gradients(y: Tensor) -> tuple[Tensor, ...]:  # zero for what so short a sequence does not use
        return torch.autograd.grad((y * weight).sum(), wanted, materialize_grads=True)

    whole = gradients(mixer(inputs, None, reading.mask)[0])
    pieces = gradients(read(mixer, Reading(inputs, reading.cuts, reading.mask))[0])
    for got, expected in zip(pieces, whole, strict=True):
        require(got.isfinite().all(), "gradients are not finite")
        close(got, expected, 1e-8, "gradients")


def hold_to_gradcheck(mixer: Mixer, padding: int) -> None:
    """Gradients of x against finite differences, float64."""
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) >= torch.tensor([padding, 0])[:, None] if padding else None

    def real_outputs(x: Tensor) -> Tensor:
        y = mixer(x, None, mask, False)[0]
        return y if mask is None else y[mask]

    require(torch.autograd.gradcheck(real_outputs, (x,), fast_mode=True), "gradcheck fails")


@law("mixer", "gradients", "Gradients are those of finite differences.")
def gradients(component: Component) -> None:
    """By torch.autograd.gradcheck."""
    hold_to_gradcheck(component.build().double(), 0)


@law("mixer", "gradients, padded", "Gradients are those of finite differences under left padding, too.")
def gradients_padded(component: Component) -> None:
    """Two tokens of the first row are padding."""
    hold_to_gradcheck(component.build().double(), 2)


@law("mixer", "parameters", "Every parameter has a gradient.")
def parameters(component: Component) -> None:
    """Over 80 tokens."""
    mixer = component.build().double()
    x = torch.randn(3, 80, WIDTH, dtype=torch.float64, requires_grad=True)  # for mixers without parameters
    mixer(x, keep_state=False)[0].square().sum().backward()
    unused = [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    require(not unused, f"without a gradient: {', '.join(unused)}")


@law("mixer", "flops", "flops grow with the length.")
def flops(component: Component) -> None:
    """From 16 to 32 tokens."""
    mixer = component.build()
    few, many = mixer.flops(16), mixer.flops(32)
    require(0 < few < many, f"flops(16) is {few}, flops(32) is {many}")


@law("mixer", "strange states", "States of another batch, mixer or option are refused.", holds_for=causal)
def strange_states(component: Component) -> None:
    """`Mixer.__call__` does so for all that `forward` hands on."""
    mixer, x = component.build(), torch.randn(2, 3, WIDTH)
    _, state = mixer(x)
    if state is None:
        raise AssertionError("no state was handed on")
    refused(lambda: mixer(torch.randn(3, 1, WIDTH), state), "the state has 2 rows, x has 3")
    copied = state.select(torch.tensor([1, 0]))  # comes from nowhere, so it is checked, and fits
    mixer(x, copied)
    other = RecurrentState({"another's": torch.zeros(2, 5)}, length=3)
    refused(lambda: mixer(x, other), "the state of another mixer")
    if any(isinstance(p, Tensor) and p.ndim > 1 for p in pytree.tree_leaves(copied)):
        wide = copied.map(lambda tensor: torch.cat([tensor] * 2, -1) if tensor.ndim > 1 else tensor)
        refused(lambda: mixer(x, wide), "the state of a mixer with other options")


@law("mixer", "strange inputs", "Inputs and masks of another shape are refused.")
def strange_inputs(component: Component) -> None:
    """`Mixer.__call__` does so."""
    mixer = component.build()
    refused(lambda: mixer(torch.randn(2, 3, WIDTH + 1)), "expected x [B, T, 24], got [2, 3, 25]")
    mask = torch.ones(3, 3, dtype=torch.bool)
    refused(lambda: mixer(torch.randn(2, 3, WIDTH), None, mask), "expected mask bool [2, 3], got bool [3, 3]")


@law(
    "mixer",
    "no state",
    "An encoder keeps no state; padding takes no gradient.",
    holds_for=both_ways,
    share=0.4,
    reading=Readings(),
)
def no_state(component: Component, reading: Reading) -> None:
    """Nor does it take one."""
    mixer, x = component.build().double(), reading.x.clone().requires_grad_()
    y, state = mixer(x, None, reading.mask)
    require(state is None, "a state was handed on")
    predicted = mixer.state_nbytes(x.shape[1], x.shape[0], x.dtype)
    require(predicted == 0, f"state_nbytes is {predicted}, expected 0")
    require(y.isfinite().all(), "outputs are not finite")
    gradient = torch.autograd.grad(y[reading.real].square().sum(), x)[0]
    require(gradient.isfinite().all(), "gradients are not finite")
    require(not gradient[~reading.real].any(), "padding has a gradient")


@law("mixer", "both ways", "An encoder reads both ways and refuses a state.", holds_for=both_ways)
def reads_both_ways(component: Component) -> None:
    """The first token sees the last, and the last the first."""
    mixer = component.build().double()
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    first, last = (torch.autograd.grad(mixer(x)[0][0, at].square().sum(), x)[0][0] for at in (0, 8))
    require(first[8].any(), "the first token does not see the last")
    require(last[0].any(), "the last token does not see the first")
    given = torch.randn(1, 2, WIDTH, dtype=torch.float64)
    refused(lambda: mixer(given, RecurrentState()), "reads both ways and takes no state")


def hold_to_half(component: Component, autocast: bool) -> None:
    """Outputs and gradients in bfloat16, against float32 with the same parameters."""
    seed_cpu(0)
    mixer, exact = component.build(noise=False), component.build(noise=False)
    exact.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 70, WIDTH).bfloat16()
    given = (x.float() if autocast else x).requires_grad_()
    if not autocast:
        mixer, exact = mixer.bfloat16(), exact.bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = mixer(given)
        if state is not None:
            more = mixer(given[:, :3], state)[0]
            require(more.isfinite().all(), "outputs from the state are not finite")
    y.float().square().sum().backward()
    require(given.grad is not None and given.grad.isfinite().all(), "gradients are not finite")
    if mixer.hard_choices:
        return  # choices that rounding tips over change the answer at once
    expected, _ = exact(x.float())
    error = float((y.detach().float() - expected.detach()).norm() / expected.detach().norm())
    require(error < 0.1, f"outputs are {error:.3g} of their norm off, allowed 0.1")


@law("mixer", "bfloat16", "In bfloat16 outputs and gradients are finite, and within a tenth of float32's.")
def bfloat16(component: Component) -> None:
    """Parameters and inputs alike."""
    hold_to_half(component, autocast=False)


@law("mixer", "autocast", "Under autocast outputs and gradients are finite, and within a tenth of float32's.")
def autocast(component: Component) -> None:
    """Parameters and inputs in float32."""
    hold_to_half(component, autocast=True)


def hold_to_zero(component: Component, dtype: torch.dtype, autocast: bool) -> None:
    """Outputs and gradients of rows that begin with tokens of zeros, and have some inside."""
    seed_cpu(0)
    mixer, exact = component.build(noise=False), component.build(noise=False)
    x = torch.randn(2, 12, WIDTH)
    x[0, :3], x[1, 6:8] = 0, 0
    x, weight = x.to(dtype).float(), torch.randn(2, 12, WIDTH)
    if not autocast:
        mixer = mixer.to(dtype)
    exact.load_state_dict(mixer.state_dict())

    def slopes(read: Mixer, given: Tensor, size: float) -> list[Tensor]:
        given = given.detach().requires_grad_()
        y = read(given)[0]
        require(y.isfinite().all(), "outputs are not finite")
        leaves = [given, *(p for p in read.parameters() if p.requires_grad)]
        found = torch.autograd.grad((y.float() * weight).sum() * size, leaves, allow_unused=True)
        return [each for each in found if each is not None]

    # Where slopes at zero are steep, as those of a normalisation, the loss is so small that the format holds them.
    largest = max(float(each.abs().nan_to_num(math.inf).max()) for each in slopes(exact, x, 1.0))
    if not math.isfinite(largest):
        return  # float32 does not hold them either
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = slopes(mixer, x if autocast else x.to(dtype), min(1.0, 100 / largest))
    require(all(each.isfinite().all() for each in found), "gradients are not finite")


@law("mixer", "zeros", "Tokens of zeros, as padding has, leave outputs and gradients finite in half precision.")
def zeros(component: Component) -> None:
    """In float16 and bfloat16, and under autocast to float16."""
    hold_to_zero(component, torch.float16, autocast=False)
    hold_to_zero(component, torch.float16, autocast=True)
    hold_to_zero(component, torch.bfloat16, autocast=False)


@law(
    "mixer", "large inputs", "Inputs of size 20 in half precision give what is finite wherever float32's outcome fits."
)
def large_inputs(component: Component) -> None:
    """Outputs, those read from the state, and gradients of a loss so small that the format holds them.

    In float16, and under autocast to float16 and to bfloat16.
    """
    seed_cpu(0)
    mixer, exact = component.build(noise=False).half(), component.build(noise=False)
    exact.load_state_dict(mixer.state_dict())
    x, weight = (20 * torch.randn(2, 24, WIDTH)).half(), torch.randn(2, 24, WIDTH)

    def answered(read: Mixer, given: Tensor, size: float, half: torch.dtype | None = None) -> dict[str, list[Tensor]]:
        given = given.detach().requires_grad_()
        with torch.autocast("cpu", half, enabled=half is not None):
            y, state = read(given)
            more = read(given[:, :2], state)[0] if state is not None else y
        leaves = [given, *(p for p in read.parameters() if p.requires_grad)]
        loss = (y.float() * weight).sum() * size
        gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return {"outputs": [y.detach(), more.detach()], "gradients": list(gradients)}

    largest = max(float(each.abs().nan_to_num(math.inf).max()) for each in answered(exact, x.float(), 1.0)["gradients"])
    if not math.isfinite(largest):
        return  # float32 does not hold them either
    size = min(1.0, 100 / max(largest, 1.0))
    expected = answered(exact, x.float(), size)
    found = {"float16": answered(mixer, x, size)}
    for dtype in (torch.float16, torch.bfloat16):
        found[f"autocast to {str(dtype).removeprefix('torch.')}"] = answered(exact, x.float(), size, dtype)
    for how, answers in found.items():
        for what, each in answers.items():
            for got, due in zip(each, expected[what], strict=True):
                fits = due.abs() < 60000  # float16 ends at 65504
                require(got[fits].isfinite().all(), f"{what} are not finite in {how} where float32's are")


@law("mixer", "description", "It says how it works: parallel_form is set, its costs are of a known order.")
def description(component: Component) -> None:
    """What `contextlab list mixers` prints."""
    mixer = component.build()
    require(mixer.parallel_form != "?", "parallel_form is not set; for example 'attention', 'chunks', 'scan' or 'loop'")
    growth = sequence_cost(mixer)
    require(growth in ("T", "T log T", "T^2"), f"flops grow as {growth}")
    token = token_cost(mixer)
    require(token in ("none", "1", "log T", "T"), f"a token costs {token}")


def marks(entry: registry.Entry, options: Mapping[str, Any]) -> Iterator[Any]:
    """What a mixer's options may change: its parameters, outputs, state and gradients, over 80 tokens."""
    seed_cpu(0)
    mixer = fresh(entry, options).double()
    yield {name: value.detach() for name, value in mixer.named_parameters()}
    yield mixer.flops(80)
    x = torch.randn(2, 80, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y, state = mixer(x)
    yield y.detach()
    yield [] if state is None else [tensor.detach() for tensor in state.tensors()]
    wanted = [x, *mixer.parameters()]
    trained = mixer(x, keep_state=False)[0]  # as training reads: terms that join the gradient do so here
    yield list(torch.autograd.grad(trained.square().sum(), wanted, materialize_grads=True))


@law("mixer", "options", "Every option counts: another value changes something, or is refused.", holds_for=a_case)
def options(component: Component) -> None:
    """Of parameters, outputs, state, gradients, operations."""
    entry = registry.lookup("mixer", component.name)
    hold_to_options(component, lambda options: marks(entry, options), "width")
