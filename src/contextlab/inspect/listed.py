"""The places of a model as a table: those that are alike in several layers stand in one row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from contextlab.inspect.layout import STATE, chosen, probed, read_some, sites
from contextlab.inspect.taps import Taps, Value
from contextlab.state import State

WHAT = {
    "embedded": "the tokens' vectors, as the read-in gives them",
    "final": "what the read-out reads",
    "logits": "the predictions",
    "input": "what the layer is given",
    "output": "the stream after the layer",
    "mixer.input": "what the mixer reads",
    "mixer.output": "what the mixer adds to the stream",
    "mlp.input": "what the MLP reads",
    "mlp.output": "what the MLP adds to the stream",
    "mlp.units": "the MLP's hidden units, after their activation",
    "state": "what the mixer remembers after the text",
    "q": "queries, as they are compared with keys",
    "k": "keys, as they are compared and held",
    "v": "values, as they are written",
    "g": "log decay",
    "beta": "how strongly a token is written",
    "momentum": "log decay of the momentum",
    "dt": "step sizes",
    "i": "input gate, before its exponential",
    "f": "forget gate, before its sigmoid",
    "heads": "the heads' answers",
}


class Row(NamedTuple):
    """Places of several layers that are alike.

    pattern: that finds them. layers: their numbers; none of places of the whole. shape: where B are rows and T tokens;
    of a state what it is of, and its bytes after four tokens of one row. what: in words.
    """

    pattern: str
    layers: tuple[int, ...]
    shape: str
    what: str


def listing(model: nn.Module, only: Iterable[str] = ("*",)) -> list[Row]:
    """The places of a model, in the order in which they are reached; those of layers that are alike together.

    only: patterns of those that are wanted. Raises InputError where one matches nothing.
    """
    shapes = _shapes(model)
    found: dict[tuple[str, str], list[int]] = {}
    for name in chosen(model, only):
        parts = name.split(".")
        layer = int(parts[1]) if parts[0] == "blocks" else None
        key = (".".join(parts[2:]) if layer is not None else name, shapes.get(name, "not reached"))
        found.setdefault(key, []).extend([layer] if layer is not None else [])
    count = 1 + max((n for layers in found.values() for n in layers), default=0)
    return [
        Row(_pattern(tail, layers, count), tuple(layers), shape, _what(tail)) for (tail, shape), layers in found.items()
    ]


def _pattern(tail: str, layers: list[int], count: int) -> str:
    if not layers:
        return tail
    return f"blocks.{layers[0] if len(layers) == 1 and count > 1 else '*'}.{tail}"


def _what(tail: str) -> str:
    return WHAT.get(tail) or WHAT.get(tail.rsplit(".", 1)[-1], "")


def _shapes(model: nn.Module) -> dict[str, str]:
    """Each place's shape in words, found by reading a few tokens; of states by reading them with a state."""
    found, length = dict[str, str](), probed(model)

    def see(name: str) -> Any:
        def handler(value: Value, read: int) -> Value:
            found[name] = _shape(value, length)
            return value

        return handler

    named = sites(model).items()
    with Taps(model, [(site, see(name)) for name, site in named], aloud=True):
        read_some(model)
        if any(site.point == STATE for _, site in named):
            read_some(model, keep_state=True)
    return found


def _shape(value: Value, length: int) -> str:
    if isinstance(value, State):
        return f"{type(value).__name__}, {value.nbytes} bytes"
    if not isinstance(value, Tensor):
        return type(value).__name__
    sizes = [str(size) for size in value.shape]
    tokens = ["T"] if value.shape[1] == length and value.ndim > 2 else sizes[1:2]
    return "[" + ", ".join(["B", *tokens, *sizes[2:]]) + "]"
