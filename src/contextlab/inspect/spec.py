"""InspectSpec: which probes a recipe puts to its trained models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, model_validator

from contextlab.errors import InputError
from contextlab.inspect.looking import named_probes
from contextlab.spec import Spec


class InspectSpec(Spec):
    """What is looked at inside trained models; see `contextlab.inspect.look`.

    probes: such as "heads", "linear:what=weights". What one cannot be put to is left out, and the page says so.
    models: of the results; all where none is named. tasks: of the experiment; all where none is named.
    seed: of the prompts.
    """

    probes: Annotated[tuple[str, ...], Field(min_length=1)]
    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _known(self) -> InspectSpec:
        if len(set(self.probes)) < len(self.probes):
            twice = next(each for each in self.probes if self.probes.count(each) > 1)
            raise InputError(f"probes: {twice!r} stands there twice; expected each once")
        try:
            named_probes(self.probes)
        except InputError as error:
            raise InputError(f"probes: {error}") from None
        return self
