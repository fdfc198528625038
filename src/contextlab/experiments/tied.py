"""Fields of a sweep that follow a swept one: the sweep has one axis, and several values move along it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import PositiveFloat

from contextlab.errors import InputError, nearest
from contextlab.experiments.paths import flatten, has, overlap
from contextlab.experiments.values import Values, rounded
from contextlab.spec import Spec, describe

TIED = ("to", "times")
"""Keys of TiedSpec."""


class TiedSpec(Spec):
    """A field that follows a swept one.

    to: path of the swept field, a number. times: the field's value by the swept one's.
    """

    to: str
    times: PositiveFloat = 1.0

    def value(self, swept: float) -> float:
        """The field's value, whole where the swept one's is and the product is, too; else in six digits."""
        if isinstance(swept, int) and self.times.is_integer():
            return swept * int(self.times)  # exactly
        found = rounded(swept * self.times)
        return int(found) if isinstance(swept, int) and found.is_integer() else found


def check_ties(over: Mapping[str, Values], tied: Mapping[str, TiedSpec]) -> None:
    """Raises InputError where a field is tied to what is no swept number, or is set by another key, too."""
    for path, tie in tied.items():
        for how, others in (("swept", over), ("tied, too", {each for each in tied if each != path})):
            if found := next((each for each in others if overlap(path, each)), None):
                raise InputError(f"tied.{path}: {found} is {how}, and one would undo the other; expected one of them")
        if tie.to not in over:
            known = f"expected one of {', '.join(over)}" if over else "no field is swept"
            near = nearest(tie.to, over)
            known = f"did you mean {near!r}?" if near else known
            how = "tied itself, and no chain is followed" if tie.to in tied else "not swept"
            raise InputError(f"tied.{path}.to: {tie.to} is {how}; {known}")
        points = over[tie.to].points()
        for value in points or ():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"tied.{path}.to: {tie.to} has the value {describe(value)}, which is no number")


def own_ties(
    general: Mapping[str, TiedSpec], changes: Any, name: str, swept: Collection[str], knows: Callable[[str], bool]
) -> dict[str, Any]:
    """The ties of one model. changes: of its entry; null unties. swept: the paths of its sweep."""
    if not isinstance(changes, Mapping):
        raise InputError(
            f"models.{name}.sweep.tied: expected a mapping from paths to {{to: PATH, times: NUMBER}}, got "
            f"{describe(changes)}"
        )
    own = flatten(changes, leaves=TIED, where="tied")
    for path, tie in own.items():
        if tie is None and path not in general:
            near = nearest(path, general)
            hint = f"; did you mean {near!r}?" if near else ""
            raise InputError(f"models.{name}.sweep.tied.{path}: null unties a field, but it is not tied{hint}")
    kept: dict[str, Any] = {
        path: tie.model_dump() for path, tie in general.items() if tie.to in swept and has(path, knows)
    }
    return {path: tie for path, tie in {**kept, **own}.items() if tie is not None}
