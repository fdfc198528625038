"""Policies as they are written on the command line: `snapkv:window=8`, `h2o|quantize:bits=4`, `0-1=none; h2o`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from contextlab.errors import InputError
from contextlab.policies.core.base import Policy
from contextlab.policies.core.budget import Amount
from contextlab.policies.core.per_layer import PerLayer
from contextlab.registry import lookup

_LAYERS = re.compile(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*=(.*)", re.S)
_TEXT = re.compile(r"\*.*|\d+:\d+")
"""Values that are text, but not to YAML: there *.mlp.* refers to a name, and 2:4 is 124, a number of base 60."""
MOST_LAYERS = 10_000


def parse_options(text: str, what: str) -> tuple[str, dict[str, Any]]:
    """ "snapkv:window=8,kernel=3" -> the name and its options, values as YAML reads them.

    what: what is named, for messages.
    """
    name, colon, rest = text.strip().partition(":")
    name, options = name.strip(), {}
    if not name or (colon and not rest.strip()):
        raise InputError(f"{what}: expected NAME or NAME:option=value,..., got {text[:80]!r}")
    for part in re.split(r",(?=\s*\w+\s*=)", rest) if rest else []:  # a value such as [1, 2] holds commas of its own
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{what} {name}: expected option=value, got {part[:80]!r}")
        try:
            options[key.strip()] = value.strip() if _TEXT.fullmatch(value.strip()) else yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"{what} {name}: the value of {key.strip()} cannot be read: {value[:80]!r}") from None
    return name, options


def write_options(options: Mapping[str, Any]) -> str:
    """Options as `parse_options` reads them: `bits=4,group=null,weights=[0.5,0.5]`."""
    return ",".join(f"{name}={written(value)}" for name, value in options.items())


def written(value: Any) -> str:
    """A value of an option as a user would type it: `true`, `null`, `[1,2]`, `{heads: 4}`."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{written(key)}: {written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(written, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if not isinstance(value, str) or _read(text) == text else "'" + text.replace("'", "''") + "'"


def _read(text: str) -> Any:
    """The value that a text stands for; None where it cannot be read."""
    if _TEXT.fullmatch(text):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def parse_policy(text: str, budget: Amount = None) -> Policy:
    """The policy that a text describes: "NAME", "NAME:option=value,...", and several joined by "|".

    "0-1=none; 5=quantize:bits=4; h2o" gives layers policies of their own, and the rest the one without a number; "none"
    leaves layers alone (see `PerLayer`).

    budget: of the first part that takes one; a policy without a budget keeps what its options say.

    Raises InputError with the nearest name, or on impossible options.
    """
    if ";" in text or _LAYERS.match(text):
        policies: dict[int, Policy | None] = {}
        default: list[Policy | None] = []
        for layers, part in _by_layer(text):
            policy = None if part == "none" else parse_policy(part, budget)
            if taken := [layer for layer in layers if layer in policies]:
                raise InputError(f"policy {text[:80]!r}: layer {taken[0]} is given twice")
            policies |= dict.fromkeys(layers, policy)
            default += [] if layers else [policy]
        if len(default) > 1:
            raise InputError(f"policy {text[:80]!r}: two parts name no layers; at most one may, for all other layers")
        return PerLayer(policies, *default)
    parts = [parse_options(part, "policy") for part in text.split("|")]
    built: Policy | None = None
    for name, options in parts:
        entry = lookup("policy", name)
        if "budget" in options:
            raise InputError(f"policy {name}: budget is no option here; give it as --budget {options['budget']}")
        if budget is not None and "budget" in {each.name for each in entry.parameters}:
            options["budget"], budget = budget, None
        each: Policy = entry.build(**options)
        built = each if built is None else built | each
    assert built is not None
    return built


def takes_budget(text: str) -> bool:
    """Whether any part of a policy's text takes a budget."""
    each = [part for _, part in _by_layer(text) if part != "none"]
    names = (parse_options(part, "policy")[0] for one in each for part in one.split("|"))
    return any("budget" in {each.name for each in lookup("policy", name).parameters} for name in names)


def _by_layer(text: str) -> list[tuple[range, str]]:
    """The parts of a policy's text with their layers; an empty range is all others."""
    found = []
    for part in text.split(";"):
        match = _LAYERS.match(part)
        if match is None:
            found.append((range(0), part.strip()))
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < MOST_LAYERS:
            raise InputError(
                f"policy {part.strip()[:80]!r}: expected layers below {MOST_LAYERS} such as 2 or 0-3, the "
                "smaller number first"
            )
        found.append((range(first, last + 1), match[3].strip()))
    return found
