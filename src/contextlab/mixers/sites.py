"""Places inside a layer that have a name: what flows through them can be taken or replaced (`contextlab.inspect`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Tap = Callable[[str, Tensor], Tensor]
"""(name, value) -> what goes on in its place; the value itself where it is only looked at."""


class Sited(nn.Module):
    """A module that lets its `tap`, where it has one, see and replace what flows through the places that it names."""

    tap: Tap | None = None

    def site(self, name: str, value: Tensor) -> Tensor:
        """What goes on at a place: `value` [B, T, ...], or what the tap puts there."""
        return value if self.tap is None else self.tap(name, value)

    def sites(self, **values: Tensor) -> tuple[Tensor, ...]:
        """The same of several places, in the order given. values: [B, T, ...] each."""
        return tuple(values.values() if self.tap is None else (self.tap(*each) for each in values.items()))


@contextmanager
def tapped(root: nn.Module, tap: Callable[[str, Sited], Tap]) -> Iterator[None]:
    """Within it the module and all parts of it that name places have taps, and afterwards those that they had.

    tap: of a part's path in the module, "" for the module itself, and the part.
    """
    parts = [(path, part) for path, part in root.named_modules() if isinstance(part, Sited)]
    before = [part.tap for _, part in parts]
    for path, part in parts:
        part.tap = tap(path, part)
    try:
        yield
    finally:
        for (_, part), had in zip(parts, before, strict=True):
            part.tap = had
