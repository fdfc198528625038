"""Take what flows through named places of a model, and put other values there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.inspect.edits import Edit, edit_of
from contextlab.inspect.layout import chosen
from contextlab.inspect.layout import sites as sites_of
from contextlab.inspect.taps import Handler, Taps, Value, joined
from contextlab.state import State


class Taken(Mapping[str, Any]):
    """What was taken, by the name of the place.

    A place's value is what flowed through it, [B, T, ...], of the text that was begun last: of pieces one after the
    other in time. Of a place "state" it is the last `State`. `calls` has what each call gave alone, of all texts.
    Values are part of the graph, where one is made. Of rows that are padded on the right they stand as the model reads
    them: with the padding on the left.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._calls: dict[str, list[Value]] = {name: [] for name in names}
        self._first = dict.fromkeys(self._calls, 0)

    def __getitem__(self, name: str) -> Value:
        if name not in self._calls:
            raise KeyError(name)
        return joined(name, self._calls[name][self._first[name] :])

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def calls(self, name: str) -> list[Value]:
        """What was taken at a place, call by call."""
        return list(self._calls[name])

    def _begun(self, read: int) -> None:
        if not read:
            self._first = {name: len(calls) for name, calls in self._calls.items()}

    def _taker(self, name: str) -> Handler:
        def take(value: Value, read: int) -> Value:
            self._calls[name].append(value)
            return value

        return take


@contextmanager
def capture(model: nn.Module, sites: str | Iterable[str]) -> Iterator[Taken]:
    """Within the `with` block, take what flows through places of a model of ours or of transformers.

    sites: names of places, or patterns: "blocks.*.output", "blocks.1.mixer.state"; see `contextlab.inspect.sites`.
    Capturing changes nothing that the model answers. Raises InputError where there is no such place, with the nearest.
    """
    found = chosen(model, sites)
    taken = Taken(found)
    with Taps(model, [(site, taken._taker(name)) for name, site in found.items()], taken._begun):
        yield taken


@contextmanager
def patch(model: nn.Module, edits: Mapping[str, Tensor | State | Edit | Callable[[Any], Any]]) -> Iterator[None]:
    """Within the `with` block, put other values into places of a model of ours or of transformers.

    edits: name of a place or a pattern -> the value that goes on in place of what flows there, of the same shape; or a
        function of that, which returns it; or either of them for some rows, places, heads or channels alone (`only`).
        A state that is put in is what is handed on, and what the next call goes on from.

    Gradients flow through what is put in, and through what functions make of what was there.
    Raises InputError where there is no such place (naming the nearest), where a value has another shape, and at the end
    of the block where a place of the text that was to be edited was never read.
    """
    handlers, made, known = [], [], sites_of(model)
    for name, value in edits.items():
        edit = edit_of(value)
        for site_name, site in chosen(model, name, known).items():
            reached = _Reached(site_name, edit)
            made.append(reached)
            handlers.append((site, reached))
    with Taps(model, handlers):
        yield
    for each in made:
        each.check()


class _Reached:
    """An edit at one place, and how far the texts reached."""

    def __init__(self, name: str, edit: Edit) -> None:
        self.name, self.edit, self.read = name, edit, 0

    def __call__(self, value: Value, read: int) -> Value:
        if isinstance(value, Tensor) and value.ndim > 1:
            self.read = max(self.read, read + value.shape[1])
        return self.edit(value, read, self.name)

    def check(self) -> None:
        """Raises InputError where a place in the text was not reached."""
        change = self.edit.change
        if self.read and isinstance(change, Tensor) and change.shape[1] > self.read:
            raise InputError(f"{self.name}: the value has {change.shape[1]} tokens, and {self.read} were read")
        late = [place for place in self.edit.places or () if place >= self.read]
        if late and self.read:
            raise InputError(f"{self.name}: place {late[0]} was never read; the text had {self.read} tokens, from 0")


def run_with_cache(
    model: nn.Module, inputs: Tensor, sites: str | Iterable[str] = "*", **given: Any
) -> tuple[Tensor, Taken]:
    """The model's predictions for inputs, and what flowed through places: all that are listed, or those asked for.

    inputs: [B, T] or [B, T, d]. given: as `Model.forward` takes it. Called as TransformerLens' method of this name is.
    """
    with capture(model, sites) as taken:
        return model(inputs, **given), taken


def states_after(model: Any, inputs: Tensor, places: Sequence[int], state: Any = None) -> list[Any]:
    """The model's states after the tokens at these places, counted from 0, in rising order.

    inputs: [B, T] or [B, T, d]. state: of what was read before; its tokens do not count. Returns a state a place.
    """
    found, begin = [], 0
    if list(places) != sorted(set(places)) or any(not 0 <= place < inputs.shape[1] for place in places):
        raise InputError(f"places: expected rising ones from 0 to {inputs.shape[1] - 1}, got {list(places)}")
    for place in places:
        _, state = model.read(inputs[:, begin : place + 1], state)
        found.append(state)
        begin = place + 1
    return found
