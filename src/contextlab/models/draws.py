"""Random numbers of one's own: what a block of code draws, without the generators that all threads share."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OwnDraws(TorchDispatchMode):
    """Within `with OwnDraws(seed):` this thread's tensors are drawn as after `torch.manual_seed(seed)`.

    No global generator is read or set, and what other threads draw meanwhile changes nothing: forking and seeding the
    global generator, in place of this, would be undone by another thread that draws, and undo what that thread drew.
    Ops that are given a generator keep it. Each device has a generator of its own.

    seed: as `torch.manual_seed` takes it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to keep Dynamo out of here is to import it, a second at the first model that a process builds."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every op that draws is given this block's generator."""
        kwargs = kwargs or {}
        if (made := _without_numbers(function, args, kwargs)) is not None:
            return made
        drawing = _with_generator(function)
        if drawing is None:
            return function(*args, **kwargs)
        names = [argument.name for argument in drawing._schema.arguments]
        given = dict(zip((n for n in names if n != "generator" or function is drawing), args, strict=False))
        given |= kwargs
        if given.get("generator") is None:
            device = given.get("device") or next(
                (each.device for each in given.values() if isinstance(each, torch.Tensor)), torch.device("cpu")
            )
            given["generator"] = self._generator(torch.device(device))
        positional = [given.pop(a.name) for a in drawing._schema.arguments if not a.kwarg_only and a.name in given]
        return drawing(*positional, **given)

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if device.type == "meta":
            return None  # nothing is drawn there
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


@cache
def _with_generator(function: Any) -> Any:
    """The overload of an op that takes a generator; None for an op that draws nothing.

    Attention and recurrent kernels are among these: they draw for dropout only, and none of ours has any.
    """
    if torch.Tag.nondeterministic_seeded not in function.tags:
        return None
    own = [argument.name for argument in function._schema.arguments]
    if "generator" in own:
        return function
    for name in function.overloadpacket.overloads():
        other = getattr(function.overloadpacket, name)
        names = [argument.name for argument in other._schema.arguments]
        if "generator" in names and [each for each in names if each != "generator"] == own:
            return other
    return None


def _without_numbers(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What an op makes on the meta device, in shape and dtype. None elsewhere, and where torch's own way is as good.

    For many ops that way begins with importing torch's compiler: a second or two, and 75 MB.
    """
    tensors = [each for each in args if isinstance(each, torch.Tensor)]
    made = None
    if any(each.is_meta for each in tensors):
        drawn, pointwise = (tag in function.tags for tag in (torch.Tag.nondeterministic_seeded, torch.Tag.pointwise))
        if function._schema.name.endswith("_") and (drawn or pointwise):
            made = args[0]
        elif pointwise:
            shape = np.broadcast_shapes(*(tuple(each.shape) for each in tensors))  # torch's own takes sympy along
            few = [_few(each) if isinstance(each, torch.Tensor) else each for each in args]
            made = torch.empty(shape, dtype=function(*few, **kwargs).dtype, device="meta")
    elif not tensors and torch.device(kwargs.get("device") or "cpu").type == "meta":
        if function is torch.ops.aten.randn.default:
            made = torch.empty(args[0], dtype=kwargs.get("dtype"), device="meta")
        elif function.overloadpacket in (torch.ops.aten.arange, torch.ops.aten.linspace):
            made = torch.empty_like(function(*args, **{**kwargs, "device": "cpu"}), device="meta")
    return made


def _few(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU of the same dtype and as many dimensions, as small as can be."""
    return torch.ones((0,) * tensor.ndim, dtype=tensor.dtype, device="cpu")
