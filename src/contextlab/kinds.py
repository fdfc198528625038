"""The kinds of component that have a name, and the rooms that register ours. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Literal

Kind = Literal["mixer", "mlp", "model", "task", "learner", "policy", "conversion", "linear", "probe", "figure"]

Page = Literal["task", "overview", "cost", "compress"]

PAGES: dict[str, str] = {
    "task": "each task's section of a report",
    "overview": "the head of a report on several tasks",
    "cost": "the page of `contextlab cost`",
    "compress": "the page of `contextlab compress`, which a run with the key `compress` has too",
}
"""Where a figure can be drawn."""

KINDS: dict[str, str] = {
    "mixer": "mixers",
    "mlp": "mlps",
    "model": "models",
    "task": "tasks",
    "learner": "learners",
    "policy": "policies",
    "conversion": "conversions",
    "linear": "linears",
    "probe": "probes",
    "figure": "figures",
}
"""Each kind and its plural, in the order in which they are listed."""

ROOMS: dict[str, str] = {
    "mlp": "models",
    "conversion": "convert",
    "linear": "mixers.forms",
    "probe": "inspect.probes",
    "figure": "report",
}
"""The room, a subpackage of contextlab, that registers our components of a kind, where it is not the plural."""

MORE_ROOMS: dict[str, tuple[str, ...]] = {
    "model": ("contextlab.constructions",),
    "probe": ("contextlab.inspect.probes",),
}
"""Rooms that are imported when the registry is asked for one of a kind: those above its own that register more of it,
and those for which nobody who wants none of it should wait."""

MARKS: dict[str, tuple[str, str]] = {
    "mixer": ("parallel_form", "contextlab.Mixer"),
    "task": ("presets", "contextlab.Task"),
    "policy": ("bounds", "contextlab.policies.Policy"),
    "conversion": ("nothing", "contextlab.convert.Conversion"),
    "linear": ("nbytes", "contextlab.mixers.forms.LinearForm"),
    "probe": ("drawing", "contextlab.inspect.Probe"),
}
"""An attribute that every class of a kind has from its base, and that base: what else is registered is refused."""


def room(kind: str) -> str:
    """The module whose import registers our components of a kind."""
    return f"contextlab.{ROOMS.get(kind, KINDS[kind])}"
