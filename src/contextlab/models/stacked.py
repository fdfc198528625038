"""Several modules of one form as one: their tensors stacked, and one call in the place of one each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from contextlab.errors import InputError, first_line
from contextlab.ops.backend import use_backend


def reasons_apart(module: nn.Module) -> list[str]:
    """Why several of a module cannot be called as one, by what its parts declare (`trains_alone`); none: they can."""
    found = {type(part).__name__: getattr(part, "trains_alone", "") for part in module.modules()}
    return [f"{name}: {why}" for name, why in found.items() if why]


def untrained(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """name -> [M, ...], the tensors in which M modules differ and that are not trained (random features, say)."""
    named = [
        dict(module.named_buffers()) | {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}
        for module in modules
    ]
    return {
        name: torch.stack([each[name] for each in named])
        for name, first in named[0].items()
        if not all(torch.equal(first, each[name]) for each in named[1:])
    }


def call_together(
    module: nn.Module, tensors: Mapping[str, Tensor], call: Callable[..., Tensor], *inputs: Tensor
) -> Tensor:
    """What M modules of one form answer, [M, ...]; gradients flow back to `tensors` and `inputs`.

    module: one of them; its own parameters and buffers stand where `tensors` has none.
    tensors: parameter's or buffer's name -> [M, ...], a row for each module.
    call: (module, *inputs of one) -> Tensor.
    inputs: [M, ...] each.

    Kernels of other packages do not take stacked tensors: all ops run in PyTorch. Raises InputError where PyTorch
    cannot map what the module does.
    """

    def one(own: dict[str, Tensor], *given: Tensor) -> Tensor:
        answered: Tensor = functional_call(_Called(module, call), {f"module.{n}": t for n, t in own.items()}, given)
        return answered

    with use_backend("torch"), _plain_errors(type(module).__name__):
        answers: Tensor = vmap(one)(dict(tensors), *inputs)
    return answers


class _Called(nn.Module):
    """A call of a module as a `forward`, which is what `functional_call` takes."""

    def __init__(self, module: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.module, *inputs)


_CANNOT = ("vmap", "functorch", "Batching rule", "not differentiable")


@contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    """PyTorch's refusal to map a module as an InputError; other faults as they are."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in _CANNOT):
            raise
        raise InputError(f"{name}: several cannot be computed as one: {first_line(error)[:200]}") from error
