"""Take what flows through named places of a model, and put other values there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from contextlab.errors import InputError, unknown
from contextlab.inspect.edits import Edit, edit_of, whole_numbers
from contextlab.inspect.layout import Site, chosen
from contextlab.inspect.layout import sites as sites_of
from contextlab.inspect.taps import Handler, Taps, Value, joined, unkept
from contextlab.spec import describe
from contextlab.state import State


class Taken(Mapping[str, Any]):
    """What was taken, by the name of the place.

    A place's value is what flowed through it, [B, T, ...], of the text that was begun last: of pieces one after the
    other in time; where a piece goes on from an earlier token, it takes the place of what followed that. Of a place
    "state" it is the last `State`. `calls` has what each call gave alone, of all texts. Places through which nothing
    flowed are left out of its names, and raise InputError when they are asked for.
    Values are part of the graph, where one is made. Of rows that are padded on the right they stand as the model reads
    them: with the padding on the left; in a plain call of a model of transformers with the padding on the right.
    Inside a layer that some tokens skip (`LayerSpec.skip`) only those that go through are there.
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self._sites = dict(sites)
        self._calls: dict[str, list[Value]] = {name: [] for name in sites}
        self._text: dict[str, list[tuple[int, Value]]] = {name: [] for name in sites}  # with the tokens before each

    def __getitem__(self, name: str) -> Value:
        if name not in self._calls:
            raise KeyError(name)
        values = [value for _, value in self._text[name]]
        if len(values) > 1 and self._sites[name].routed:
            raise InputError(f"{name}: tokens that skip the layer are not in it; `calls` gives each call alone")
        return joined(name, values)

    def __contains__(self, name: object) -> bool:
        return name in self._text and bool(self._text[name])

    def __iter__(self) -> Iterator[str]:
        return (name for name, values in self._text.items() if values)

    def __len__(self) -> int:
        return sum(map(bool, self._text.values()))

    def calls(self, name: str) -> list[Value]:
        """What was taken at a place, call by call."""
        if name not in self._calls:
            raise InputError(unknown("site", name, self._calls))
        return list(self._calls[name])

    def _begun(self, read: int, first: int) -> None:
        if not read and not first:
            self._text = {name: [] for name in self._calls}

    def _taker(self, name: str) -> Handler:
        def take(value: Value, read: int) -> Value:
            self._calls[name].append(value)
            text = self._text[name]
            while text and text[-1][0] >= read:  # a text that goes on from an earlier token than was read
                text.pop()
            if text and isinstance(text[-1][1], Tensor):
                text[-1] = text[-1][0], text[-1][1][:, : read - text[-1][0]]
            text.append((read, value))
            return value

        return take


@contextmanager
def capture(model: nn.Module, sites: str | Iterable[str]) -> Iterator[Taken]:
    """Within the `with` block, take what flows through places of a model of ours or of transformers.

    sites: names of places, or patterns: "blocks.*.output", "blocks.1.mixer.state"; see `contextlab.inspect.sites`.
    Capturing changes nothing that the model answers. Raises InputError where there is no such place, with the nearest.
    """
    with taking(model, chosen(model, sites)) as taken:
        yield taken


@contextmanager
def taking(model: nn.Module, sites: Mapping[str, Site]) -> Iterator[Taken]:
    """`capture` of places that are known."""
    taken = Taken(sites)
    with Taps(model, [(site, taken._taker(name)) for name, site in sites.items()], taken._begun):
        yield taken


@contextmanager
def patch(model: nn.Module, edits: Mapping[str, Tensor | State | Edit | Callable[[Any], Any]]) -> Iterator[None]:
    """Within the `with` block, put other values into places of a model of ours or of transformers.

    edits: name of a place or a pattern -> the value that goes on in place of what flows there, of the same shape; or a
        function of that, which returns it; or either of them for some rows, places, heads or channels alone (`only`).
        A state that is put in is what is handed on, and what the next call goes on from.

    Gradients flow through what is put in, and through what functions make of what was there.
    Raises InputError where there is no such place (naming the nearest), where a value has another shape, and at the end
    of the block where a model was read and an edit never took place, or a place of the text was never read.
    """
    if not isinstance(edits, Mapping):
        raise InputError(f"patch: expected a mapping of sites to what goes there, got {describe(edits)}")
    handlers, made, known = [], dict[str, list[_Reached]](), sites_of(model)
    for name, value in edits.items():
        edit = edit_of(value)
        for site_name, site in chosen(model, name, known).items():
            reached = _Reached(site_name, edit, site.routed)
            made.setdefault(name, []).append(reached)
            handlers.append((site, reached))
    readings: list[int] = []
    with Taps(model, handlers, lambda read, first: readings.append(read)):
        yield
    for name, each in made.items():
        if readings and not any(reached.called for reached in each):
            raise InputError(f"{name}: no reading came there, so nothing was put in{unkept(name)}")
        for reached in each:
            reached.check()


class _Reached:
    """An edit at one place, and how far the texts reached."""

    def __init__(self, name: str, edit: Edit, routed: bool) -> None:
        self.name, self.edit, self.read, self.called = name, edit, 0, False
        if routed and not (callable(edit.change) and edit.rows is None and edit.places is None):
            raise InputError(
                f"{name}: tokens that skip the layer are not there, so rows and places cannot be told; "
                "put in a function of all of it, or patch the layer's output"
            )

    def __call__(self, value: Value, read: int) -> Value:
        self.called = True
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
    if not isinstance(inputs, Tensor) or inputs.ndim < 2:
        raise InputError(f"states_after: expected inputs [B, T] or [B, T, d], got {describe(inputs)}")
    places = whole_numbers("places", places)
    if places != sorted(set(places)) or any(not 0 <= place < inputs.shape[1] for place in places):
        raise InputError(f"places: expected rising ones from 0 to {inputs.shape[1] - 1}, got {places}")
    for place in places:
        _, state = model.read(inputs[:, begin : place + 1], state)
        found.append(state)
        begin = place + 1
    return found
