"""A law of conversions: no option is cut in silence to what the model has."""

from __future__ import annotations

from typing import Any

from contextlab import registry
from contextlab.errors import InputError
from contextlab.testing.conversions import build, calibration, on_the_first_mixer, small_model
from contextlab.testing.law import Component, law, require
from contextlab.testing.options import alternatives, first_case

FAR = 6_000
"""More than anything that the small model of the laws has, in a number that can be waited for."""


def with_sizes(component: Component) -> bool:
    """Whether it has whole numbers among its options; in its first option case."""
    return bool(on_the_first_mixer(component) and first_case(component) and _sizes(component.name))


def _sizes(name: str) -> list[str]:
    """The options of a conversion that may be any whole number, but for seeds, which are no size."""
    entry = registry.lookup("conversion", name)
    fields = entry.options_model.model_fields
    counted = (each.name for each in entry.parameters if int in alternatives(fields[each.name].annotation))
    return [each for each in counted if each not in ("seed", "layers")]


@law(
    "conversion",
    "nothing cut in silence",
    "An option far larger than all that the model has is refused in one line, or what was done tells it.",
    holds_for=with_sizes,
)
def nothing_cut_in_silence(component: Component) -> None:
    """Each alone, beside the others of the case; also what belongs together, such as `decay` and `length`."""
    entry = registry.lookup("conversion", component.name)
    for name in _sizes(component.name):
        case = next((each for each in entry.cases if name in each), component.options)
        options: dict[str, Any] = {**case, name: FAR}
        try:
            lines = build(entry, options, component.beside)(small_model(component.beside), calibration()).lines
        except InputError as error:
            said = str(error)
            require(name in said or str(FAR) in said, f"{name}={FAR} is refused for another reason: {said}")
            require("\n" not in said, f"{name}={FAR} is refused in more than one line: {said}")
            continue
        told = " | ".join(dict.fromkeys(line.did for line in lines))
        require(str(FAR) in told, f"{name}={FAR} is neither refused nor told; what was done: {told}")
