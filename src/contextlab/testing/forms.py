"""The laws of linear forms, and of what has linear layers: any of them may have any form."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from contextlab import registry
from contextlab.mixers.forms import LinearForm, RoundedForm
from contextlab.models.stacked import call_together, reasons_apart, untrained
from contextlab.testing.adapters import answers, linear_layers, replace
from contextlab.testing.law import Component, close, law, require
from contextlab.testing.mlps import WIDTH as MLP_WIDTH
from contextlab.testing.options import first_case

INPUTS, OUTPUTS = 23, 10
"""Sizes that no group and no byte divides."""


def cases(entry: registry.Entry) -> Iterator[Component]:
    """A registered form in each of its option cases; called with a weight [O, I], `build` gives the nearest to it."""
    for options in entry.cases:
        make = functools.partial(entry.factory.of, **options)  # type: ignore[attr-defined]
        yield Component("linear", entry.name, entry.factory, options, make)


def _nearest(component: Component, bias: bool = True, scale: float = 1.0) -> tuple[Tensor, LinearForm]:
    """A weight [O, I] in float64, and the form that is nearest to it, not in training."""
    weight = scale * torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    form = component.build(weight=weight, bias=torch.randn(OUTPUTS, dtype=torch.float64) if bias else None)
    return weight, form.eval()


@law("linear", "product", "It answers with the product of what `dense()` tells, for inputs of any leading shape.")
def product(component: Component) -> None:
    """Of its inputs as it reads them, rounded where it says so; int8 is given such as are round."""
    for bias in (True, False):
        _, form = _nearest(component, bias)
        for shape in ((), (3,), (2, 0), (2, 3)):
            x = torch.randint(-127, 128, (*shape, INPUTS), dtype=torch.float64)
            x[..., :1] = 127.0
            wanted = form.read(x) @ form.dense().T + (0 if form.bias is None else form.bias)
            close(form(x), wanted, 1e-9, f"outputs for inputs {list(x.shape)}")


@law("linear", "near", "It is near to the weight that it is made of, never further than zero would be.")
def near(component: Component) -> None:
    """Of a weight of usual numbers, and of one of zeros, which it keeps."""
    weight, form = _nearest(component, scale=0.1)
    error, size = float((form.dense().detach() - weight).norm()), float(weight.norm())
    require(error < 0.95 * size, f"it is {error / size:.2f} of the weight's size away from it")
    made = component.build(weight=torch.zeros(OUTPUTS, INPUTS), bias=None)
    require(not made.dense().any(), "a weight of zeros does not stay one")


@law("linear", "bytes", "It holds the bytes that it foretells, in every dtype, and nothing beside its tensors.")
def nbytes(component: Component) -> None:
    """In the dtypes of models, with and without bias."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for bias in (True, False):
            _, form = _nearest(component, bias)
            form = form.to(dtype)
            held = sum(each.numel() * each.element_size() for each in form.state_dict().values())
            told = type(form).nbytes(INPUTS, OUTPUTS, bias, dtype, **component.options)
            require(held == told, f"it holds {held} bytes in {dtype} and foretells {told}")


@law("linear", "file", "What its state_dict is loaded into answers the same, bit for bit.")
def file(component: Component) -> None:
    """Into an empty one, in float32."""
    weight, x = torch.randn(OUTPUTS, INPUTS), torch.randn(5, INPUTS)
    form = component.build(weight=weight, bias=torch.randn(OUTPUTS)).eval()
    again = type(form).empty(INPUTS, OUTPUTS, True, **component.options).eval()
    again.load_state_dict(form.state_dict())
    require(torch.equal(again(x), form(x)), "it answers otherwise after loading")
    once_more = component.build(weight=weight, bias=form.bias)
    same = all(
        torch.equal(a, b) for a, b in zip(form.state_dict().values(), once_more.state_dict().values(), strict=True)
    )
    require(same, "the same weight gives another form")


@law("linear", "gradients", "Gradients of inputs are those of the product; a latent weight's pass straight through.")
def gradients(component: Component) -> None:
    """In training, too, where rounding may be random; rounded gradients are near to it, whatever their size."""
    _, form = _nearest(component)
    tolerance = 1e-9
    x = torch.randn(4, INPUTS, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, OUTPUTS, dtype=torch.float64)
    for training in (False, True):
        form.train(training)
        form.zero_grad()
        if training and not form.exact_gradients:
            upstream, tolerance = 1e-6 * upstream, 0.3
        (gradient,) = torch.autograd.grad((form(x) * upstream).sum(), x)
        wanted = upstream @ form.dense().detach()
        close(gradient / wanted.abs().max(), wanted / wanted.abs().max(), tolerance, "gradients of inputs")
    if isinstance(form, RoundedForm) and form.latent:
        x = torch.randint(-127, 128, (4, INPUTS), dtype=torch.float64)
        x[:, 0] = 127.0
        (form(x) * upstream).sum().backward()
        own = form.weight.grad
        if own is None:
            raise AssertionError("the latent weight has no gradient")
        wanted = upstream.T @ form.read(x)
        close(own / wanted.abs().max(), wanted / wanted.abs().max(), tolerance, "gradients of the latent weight")


@law("linear", "packed", "Packed, a latent weight computes the same.")
def packed(component: Component) -> None:
    """When it is not being trained."""
    _, form = _nearest(component)
    if not isinstance(form, RoundedForm) or not form.latent:
        return
    packed_form = form.packed()
    require(not packed_form.latent, "it is still latent")
    close(packed_form.dense(), form.dense(), 1e-12, "weights")


@law("linear", "dtypes", "In half precision it is as in double, but for rounding.")
def dtypes(component: Component) -> None:
    """Codes are no floating numbers: casting the module leaves them as they are."""
    weight, form = _nearest(component)
    expected = form.dense().detach().clone()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        moved = form.to(dtype)
        y = moved(torch.randn(3, INPUTS, dtype=dtype))
        require(y.dtype == dtype, f"outputs have dtype {y.dtype}, expected {dtype}")
        require(y.isfinite().all(), f"outputs are not finite in {dtype}")
        if not any(isinstance(each, RoundedForm) and each.latent for each in form.modules()):
            close(moved.dense().double(), expected, 0.02, f"weights in {dtype}")
        form = component.build(weight=weight, bias=torch.randn(OUTPUTS, dtype=torch.float64)).eval()


@law("linear", "flops", "Its multiplications are those of PyTorch's counter.")
@torch.no_grad()
def flops(component: Component) -> None:
    """Of five tokens."""
    _, form = _nearest(component)
    with FlopCounterMode(display=False) as counter:
        form(torch.randn(5, INPUTS, dtype=torch.float64))
    counted, told = counter.get_total_flops(), 2 * 5 * form.multiplications
    require(told == counted, f"5 tokens take {counted} FLOPs, multiplications says {told}")


@law("linear", "together", "Several of a kind are computed as one program, or it declares why not (trains_alone).")
def together(component: Component) -> None:
    """Three forms of other weights, with gradients of what is trained."""
    forms = [_nearest(component)[1].train() for _ in range(3)]
    if reasons_apart(forms[0]):
        return
    x = torch.randn(3, 4, INPUTS, dtype=torch.float64)
    tensors = {
        name: torch.stack([dict(form.named_parameters())[name] for form in forms])
        for name, _ in forms[0].named_parameters()
    }
    y = call_together(forms[0], {**tensors, **untrained(forms)}, lambda form, x: form(x), x)
    for row, form in enumerate(forms):
        close(y[row], form(x[row]), 1e-9, f"outputs of form {row} among others")


def dealt(module: nn.Module, shift: int, kinds: list[tuple[str, dict[str, Any]]]) -> dict[str, LinearForm]:
    """Give every linear layer of a module a form, dealt in turn from `kinds`, from `shift` on: name -> form."""
    found = {}
    for place, (name, layer) in enumerate(linear_layers(module).items()):
        form, options = kinds[(place + shift) % len(kinds)]
        bias = None if layer.bias is None else layer.bias.detach()
        found[name] = registry.lookup("linear", form).factory.of(layer.weight.detach(), bias, **options)  # type: ignore[attr-defined]
        replace(module, name, found[name].eval())
    return found


def all_kinds() -> list[tuple[str, dict[str, Any]]]:
    """Every registered form with its first case, and with the first that is trained through its rounding."""
    found = []
    for entry in registry.entries("linear"):
        found.append((entry.name, dict(entry.cases[0])))
        found += [(entry.name, dict(case)) for case in entry.cases if case.get("latent")][:1]
    return found


Answer = Callable[[nn.Module], Tensor]


def hold_to_forms(component: Component, whole: Answer, pieces: Answer | None) -> None:
    """Each form on some linear layer, several at once: it answers as with dense layers of what the forms hold."""
    latent = [kind for kind in all_kinds() if kind[1].get("latent")]
    kinds = [kind for kind in all_kinds() if not kind[1].get("latent")] + [latent[0], latent[-1]]
    shift = 0
    while shift < len(kinds):
        module = component.build().double().eval()
        plain = copy.deepcopy(module)
        forms = dealt(module, shift, kinds)
        if not forms:
            return
        with torch.no_grad():
            for name, form in forms.items():
                plain.get_submodule(name).weight.copy_(form.dense())
            expected = whole(plain)
        y = whole(module)
        first = f"with forms dealt from {kinds[shift][0]} on"
        close(y, expected, 1e-7, f"outputs {first}")
        if pieces is not None:
            with torch.no_grad():
                close(pieces(module), expected, 1e-7, f"outputs in pieces {first}")
        if y.requires_grad:  # where all is packed, nothing is trained
            y.square().sum().backward()
        gradients = [each.grad for each in module.parameters() if each.grad is not None]
        require(all(each.isfinite().all() for each in gradients), f"gradients are not finite {first}")
        shift += len(forms)


def once(component: Component) -> bool:
    """The first option case of what is registered; other cases have like layers."""
    return first_case(component) or component.name not in registry.names(component.kind)


@law(
    "mixer",
    "linear forms",
    "With linear layers of any form it answers as with dense ones of their numbers.",
    holds_for=once,
)
def linear_forms(component: Component) -> None:
    """Forms are dealt to the layers in turn until each has been used, in float64."""
    hold_to_forms(component, *answers(component, torch.float64, length=24))


@law(
    "mlp",
    "linear forms",
    "With linear layers of any form it answers as with dense ones of their numbers.",
    holds_for=once,
)
def mlp_linear_forms(component: Component) -> None:
    """Forms are dealt to the layers in turn until each has been used, in float64."""
    x = torch.randn(2, 9, MLP_WIDTH, dtype=torch.float64)
    hold_to_forms(component, lambda mlp: mlp(x), None)
