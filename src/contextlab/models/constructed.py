"""Weights that are written down: what a ModelSpec says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from contextlab import registry
from contextlab.errors import InputError, unknown
from contextlab.spec import Spec

if TYPE_CHECKING:
    from contextlab.models.spec import ModelSpec


class ConstructionSpec(Spec):
    """The construction that writes a fresh model's weights down (`contextlab.constructions`).

    name: of a model that is one (`contextlab list models --family construction`).
    options: its own.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    def made(self) -> Any:
        """The `constructions.Construction`. Raises InputError where there is none, or it has no such options."""
        entry = registry.lookup("model", self.name)
        make = getattr(entry.factory, "construction", None)
        if make is None:
            known = [each.name for each in registry.entries("model") if hasattr(each.factory, "construction")]
            raise InputError(f"construction: {unknown('construction', self.name, known)}")
        return make(**entry.check(self.options, path="construction.options"))

    def check(self, spec: ModelSpec) -> None:
        """Raises InputError where `spec` says otherwise than the construction, whose weights would not fit it."""
        made = type(spec).parse(self.made().fields())
        for name in type(spec).model_fields:
            given, wanted = getattr(spec, name), getattr(made, name)
            if name != "construction" and given != wanted:
                raise InputError(
                    f"{name}: the weights of {self.name!r} are written for {_short(wanted)}, got {_short(given)}; "
                    f"leave {name} out, or give construction: null, with which the weights are drawn"
                )


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 60 else told[:57] + "..."
