"""The families of many models, and the colours by which figures tell them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

from contextlab.registry import registered

MANY = 12
"""Models from which on a figure is coloured by family."""
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#2E9FD6", "#7F5539", "#000000", "#6A3D9A",
    "#8C9A2B", "#B03060", "#888888",
)  # fmt: skip
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down")


def families(names: Sequence[str]) -> dict[str, str]:
    """The family of each of many models, by name; empty where they are few, or of one family as far as is known."""
    if len(names) <= MANY:
        return {}
    for room in ("mixers", "models"):
        import_module(f"contextlab.{room}")
    known = {entry.name: entry.family for kind in ("model", "mixer") for entry in registered(kind)}
    found = {name: known.get(name.rpartition(": ")[2]) or "other" for name in names}
    return found if len(set(found.values()) - {"other"}) > 1 else {}


def family_looks(family: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Family -> colour and marker, by name, "other" last."""
    order = sorted(set(family.values()), key=lambda each: (each == "other", each))
    return {
        each: (COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)])
        for i, each in enumerate(order)
    }
