"""The kinds of component that have a name, and the rooms that register ours. Nothing heavy is imported here."""

from __future__ import annotations

KINDS = {
    "mixer": "mixers",
    "mlp": "mlps",
    "model": "models",
    "task": "tasks",
    "learner": "learners",
    "policy": "policies",
}
"""Each kind and its plural, in the order in which they are listed."""

ROOMS = {"mlp": "models"}
"""The room, a subpackage of contextlab, that registers our components of a kind, where it is not the plural."""


def room(kind: str) -> str:
    """The module whose import registers our components of a kind."""
    return f"contextlab.{ROOMS.get(kind, KINDS[kind])}"
