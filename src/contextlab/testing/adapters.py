"""The laws of linear layers under other people's hands: adapters (LoRA) take their places, int8 takes their weights'.

Whoever reads a layer's `weight` in place of calling the layer leaves out what an adapter adds, without a word, and
takes apart what a quantized tensor cannot take apart. The laws' own adapter and tensor offer no more than those of
peft and torchao do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.testing.law import Component, close, law, require
from contextlab.testing.mixers import causal
from contextlab.testing.mlps import WIDTH as MLP_WIDTH
from contextlab.testing.readings import PIECE_SIZES, PIECES, Reading, read
from contextlab.testing.readings import WIDTH as MIXER_WIDTH

LENGTH = 80


class Lora(nn.Module):
    """W x + B A x, seen from outside as peft's layer is: `weight` is W's alone.

    base: the layer in whose place it stands. rank: rows of A and columns of B.
    """

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        like = base.weight
        self.A = nn.Parameter(torch.randn(rank, base.in_features, dtype=like.dtype) * base.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=like.dtype))

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs], of the layer below."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """[outputs] or None, of the layer below."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        return self.base_layer(x) + F.linear(F.linear(x, self.A), self.B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The layer below, with B A added to its weight."""
        self.base_layer.weight += self.B @ self.A
        return self.base_layer


class Int8(Tensor):
    """A matrix [O, I] in int8 with one scale a row, which `torch.nn.functional.linear` takes and nothing else does."""

    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Int8:
        made: Int8 = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)
        made.numbers, made.scale = numbers, scale
        return made

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        """The nearest to a matrix [O, I]."""
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-9) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantize(self) -> Tensor:
        """[O, I] in the scale's dtype."""
        return self.numbers.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The product is of the numbers times the scale."""
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dequantize(), *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What a Parameter is made by; all else is refused."""
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise TypeError(f"a weight in int8 was given to {function}; only the layer's own product takes it")


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` within a module, by name, that has numbers; those of a layer itself are its own."""
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    return {name: layer for name, layer in found.items() if layer.weight.numel()}


def replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the submodule of that name."""
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)


Answer = Callable[[nn.Module], Tensor]


def hold_to_adapters(module: nn.Module, whole: Answer, pieces: Answer | None = None) -> None:
    """LoRA on every linear layer of a float64 module. whole, pieces: what the module answers, in both ways."""
    plain = whole(module).detach()
    adapters = {name: Lora(layer) for name, layer in linear_layers(module).items()}
    if not adapters:
        return
    for name, adapter in adapters.items():
        replace(module, name, adapter)
    with torch.no_grad():
        close(whole(module), plain, 1e-9, "outputs with B = 0")
    for adapter in adapters.values():
        nn.init.normal_(adapter.B, std=0.3)
    adapted = whole(module)
    require(not torch.allclose(adapted, plain), "outputs are the same with LoRA as without")
    adapted.square().sum().backward()
    for part in ("A", "B"):
        idle = [name for name, a in adapters.items() if (g := getattr(a, part).grad) is None or not g.abs().sum() > 0]
        require(not idle, f"LoRA does nothing at {', '.join(idle)}: its {part} has no gradient")
    with torch.no_grad():
        if pieces is not None:
            close(pieces(module), adapted, 1e-7, "outputs in pieces, with LoRA,")
        for name, adapter in adapters.items():
            replace(module, name, adapter.merged())
        close(whole(module), adapted, 1e-9, "outputs after merging")


@torch.no_grad()
def hold_to_int8(module: nn.Module, answer: Answer) -> None:
    """Weights in int8 in every linear layer of a float32 module, against the same numbers in float32."""
    tensors = {name: Int8.of(layer.weight) for name, layer in linear_layers(module).items()}
    if not tensors:
        return
    for name, tensor in tensors.items():
        module.get_submodule(name).weight = nn.Parameter(tensor.dequantize(), requires_grad=False)
    expected = answer(module)
    for name, tensor in tensors.items():
        module.get_submodule(name).weight = nn.Parameter(tensor, requires_grad=False)
    close(answer(module), expected, 1e-3, "outputs with weights in int8")


def answers(component: Component, dtype: torch.dtype, length: int = LENGTH) -> tuple[Answer, Answer | None]:
    """What a mixer answers, read whole and, where it keeps a state, in pieces, of which one is a token."""
    steps = [size for name in PIECE_SIZES if isinstance(size := component.options.get(name), int)]
    x = torch.randn(2, min([length, *(PIECES * size for size in steps)]), MIXER_WIDTH, dtype=dtype)
    cut = x.shape[1] * 2 // 3

    def whole(module: nn.Module) -> Tensor:
        y: Tensor = module(x, None, None, False)[0]
        return y

    def pieces(module: nn.Module) -> Tensor:
        return read(module, Reading(x, [cut, cut + 1], None))[0]  # type: ignore[arg-type]

    return whole, pieces if causal(component) else None


@law("mixer", "adapters", "LoRA on each linear layer acts and learns; merged, it answers the same.")
def adapters(component: Component) -> None:
    """Whole and in pieces, in float64."""
    hold_to_adapters(component.build().double(), *answers(component, torch.float64))


@law("mixer", "int8", "With int8 weights in its linear layers it answers as with the same numbers in float32.")
def int8(component: Component) -> None:
    """In pieces, without gradients."""
    whole, pieces = answers(component, torch.float32)
    hold_to_int8(component.build(), pieces or whole)


@law("mlp", "adapters", "LoRA on each linear layer acts and learns; merged, it answers the same.")
def mlp_adapters(component: Component) -> None:
    """In float64."""
    x = torch.randn(2, 20, MLP_WIDTH, dtype=torch.float64)
    hold_to_adapters(component.build().double().eval(), lambda mlp: mlp(x))


@law("mlp", "int8", "With int8 weights in its linear layers it answers as with the same numbers in float32.")
def mlp_int8(component: Component) -> None:
    """Without gradients."""
    x = torch.randn(2, 20, MLP_WIDTH)
    hold_to_int8(component.build().eval(), lambda mlp: mlp(x))
