"""The one engine under `capture` and `patch`: functions that see what flows through places, and may replace it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.inspect.layout import STATE, Site, quiet
from contextlab.mixers.sites import Sited

Value = Any
"""A tensor [B, T, ...], or of place "state" a `State`."""
Handler = Callable[[Value, int], Value]
"""(value, tokens of the text that stand before it) -> what goes on."""


class Taps:
    """Within a `with` block, what flows through places is given to their handlers, and what these return goes on.

    model: whose readings begin a text, or go on with one. handlers: (site, handler).
    begun: told of each reading how many tokens stand before it, and its first layer.
    aloud: whether a reading that only finds places is one.
    Where several `with` blocks stand within one another, the outer ones come first.
    """

    def __init__(
        self,
        model: Any,
        handlers: Iterable[tuple[Site, Handler]],
        begun: Callable[[int, int], None] | None = None,
        aloud: bool = False,
    ) -> None:
        self._model, self._begun, self._aloud = model, begun, aloud
        self._counted = [_Counted(site, handler, aloud) for site, handler in handlers]
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Taps:
        before = self._model.heard

        def heard(read: int, first: int) -> None:
            if quiet() and not self._aloud:
                return
            if before is not None:
                before(read, first)
            for each in self._counted:
                each.begin(read, first)
            if self._begun is not None:
                self._begun(read, first)

        def undo() -> None:
            self._model.heard = before

        self._model.heard = heard
        self._undo.append(undo)
        try:
            for each in self._counted:
                self._undo.append(_attached(each.site, each))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        while self._undo:
            self._undo.pop()()


class _Counted:
    """A handler that is called for one use of a module in each reading, and told how many tokens came before."""

    def __init__(self, site: Site, handler: Handler, aloud: bool) -> None:
        self.site, self.handler, self.aloud = site, handler, aloud
        self.calls, self.read = 0, 0

    def begin(self, read: int, first: int) -> None:
        """A reading begins, after so many tokens, with this layer."""
        self.calls, self.read = sum(layer < first for layer in self.site.layers), read

    def __call__(self, value: Value) -> Value:
        if quiet() and not self.aloud:
            return value
        use, self.calls = self.calls, self.calls + 1
        if len(self.site.layers) > 1 and use != self.site.use:
            return value
        read = self.read
        if isinstance(value, Tensor) and value.ndim > 1:
            self.read += value.shape[1]
        return self.handler(value, read)


def _attached(site: Site, see: _Counted) -> Callable[[], None]:
    """Put it there; returns what takes it away."""
    module = site.module
    if site.point == "input":
        return module.register_forward_pre_hook(lambda _, a, k: _before(see, a, k), with_kwargs=True).remove
    if site.point == "output":
        return module.register_forward_hook(lambda _, a, output: _after(see, output, 0)).remove
    if site.point == STATE:
        return module.register_forward_hook(lambda _, a, output: _after(see, output, 1)).remove
    return _tapped(module, site.point, see)


def _before(see: _Counted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (see(args[0]), *args[1:]), kwargs
    first = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, first: see(kwargs[first])}


def _after(see: _Counted, output: Any, part: int) -> Any:
    if not isinstance(output, tuple):
        return see(output)
    if output[part] is None:  # no state is kept
        return output
    return (*output[:part], see(output[part]), *output[part + 1 :])


def _tapped(module: nn.Module, point: str, see: _Counted) -> Callable[[], None]:
    assert isinstance(module, Sited)
    before = module.tap

    def tap(name: str, value: Tensor) -> Tensor:
        value = value if before is None else before(name, value)
        return see(value) if name == point else value

    def undo() -> None:
        module.tap = before

    module.tap = tap
    return undo


def unkept(name: str) -> str:
    """Why there may be nothing at a place."""
    return "; a plain call keeps no state, `Model.read` does" if name.endswith(f".{STATE}") else ""


def joined(name: str, values: Sequence[Value]) -> Value:
    """What was taken at a place in one call or several: tensors one after the other in time, of states the last."""
    if not values:
        raise InputError(f"{name}: nothing was taken there yet{unkept(name)}")
    if len(values) == 1 or not isinstance(values[0], Tensor):
        return values[-1]
    if any(each.shape[:1] + each.shape[2:] != values[0].shape[:1] + values[0].shape[2:] for each in values):
        raise InputError(f"{name}: what was taken in several calls cannot be put together; `calls` gives each alone")
    return torch.cat(list(values), 1)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it no parameter takes a gradient; afterwards those do that did."""
    needed = [each.requires_grad for each in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, need in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(need)
