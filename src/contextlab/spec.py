"""The base of every spec: strict pydantic models whose errors are one line with the path of the key."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from contextlab.errors import InputError, nearest
from contextlab.memory import LARGEST_WHOLE

S = TypeVar("S", bound="Spec")
SMALLEST, LARGEST = 1e-30, 1e9
"""Sizes of a component's other numbers but 0: float32 holds them, and the product of two of the largest squared."""
FLOAT32 = 3e38
"""The largest of other numbers in specs: a learning rate may make a training diverge."""


class Spec(BaseModel):
    """A strict, immutable description; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def __init__(self, /, **data: Any) -> None:
        """Raises InputError with the key and what was expected, as `parse` does."""
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InputError(explain(error, type(self))) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined] # specs inside a spec keep their path

    @model_validator(mode="wrap")
    @classmethod
    def _numbers(cls, data: Any, handler: ModelWrapValidatorHandler[Spec]) -> Spec:
        """Hold numbers to what tensors can be made of, and refuse true and false in their place."""
        made = handler(data)
        if isinstance(data, Mapping):
            for name in data.keys() & made.model_fields_set:
                refuse_bools(name, data[name], getattr(made, name))
                refuse_extremes(name, getattr(made, name), FLOAT32)
        return made

    def _repr_html_(self) -> str:
        """In a notebook: what differs from the defaults, as YAML."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        text = yaml.safe_dump(data, sort_keys=False, width=100) if data else "all defaults"
        return f"<b>{type(self).__name__}</b><pre>{html.escape(text)}</pre>"

    @classmethod
    def parse(cls: type[S], data: Any, path: str = "") -> S:
        """Validate `data` (a mapping). Raises InputError with the key's path, what was expected, the nearest name."""
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise InputError(
                f"{path or cls.__name__}: expected a mapping of {cls.__name__}'s keys "
                f"({', '.join(cls.model_fields)}), got {describe(data)}"
            )
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise InputError(explain(error, cls, path)) from None
        except RecursionError:
            raise InputError(f"{path or cls.__name__}: nested too deeply, or in itself") from None


def refuse_extremes(name: str, value: Any, largest: float = LARGEST) -> None:
    """Refuse numbers that no tensor can be made of. value: any; lists and mappings are looked through.

    Raises InputError, the one place where sizes of all options and specs are bounded.
    """
    if value is None or isinstance(value, str):  # before Mapping, which takes long to ask for
        return
    if isinstance(value, int):
        if abs(value) > LARGEST_WHOLE:
            raise InputError(f"{name}: whole numbers are at most {LARGEST_WHOLE}, got {describe(value)}")
    elif isinstance(value, float):
        if value and not SMALLEST <= abs(value) <= largest:
            far = f"expected 0, or a number of size {SMALLEST:g} to {largest:g}"
            raise InputError(f"{name}: {far}, got {describe(value)}")
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_extremes(name, item, largest)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            refuse_extremes(f"{name}.{_shown(key)}", item, largest)


def refuse_counts(name: str, value: Any, most: int) -> None:
    """Refuse whole numbers above `most`; lists and mappings are looked through. Raises InputError."""
    if isinstance(value, int):
        if value > most:
            raise InputError(f"{name}: at most {most}, got {describe(value)}")
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_counts(name, item, most)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            refuse_counts(f"{name}.{_shown(key)}", item, most)


def refuse_bools(name: str, given: Any, made: Any) -> None:
    """Refuse true and false where a number is wanted, of which Python makes 1 and 0.

    given: a value as the user wrote it. made: what was made of it; lists and mappings are looked through.

    Raises InputError.
    """
    if given is None or isinstance(given, str):
        return
    if isinstance(given, bool):
        if isinstance(made, int | float) and not isinstance(made, bool):
            raise InputError(f"{name}: expected a number, got bool {given}")
    elif isinstance(given, list | tuple):
        if isinstance(made, list | tuple) and len(given) == len(made):
            for i, (one, other) in enumerate(zip(given, made, strict=True)):
                refuse_bools(f"{name}.{i}", one, other)
    elif not isinstance(given, int | float) and isinstance(given, Mapping) and isinstance(made, Mapping):
        for key in given.keys() & made.keys():
            refuse_bools(f"{name}.{_shown(key)}", given[key], made[key])


def describe(value: Any) -> str:
    """A short, one-line picture of a value for error messages, after its type."""
    return f"{type(value).__name__} {picture(value)}"


def picture(value: Any) -> str:
    """A short, one-line picture of a value for error messages."""
    huge = isinstance(value, int) and value.bit_length() > 1000  # Python writes no more than 4300 digits
    text = f"of {value.bit_length()} bits" if huge else repr(value).replace("\n", " ")
    return text[:60] + "..." if len(text) > 60 else text


def explain(error: ValidationError, model: type[BaseModel] | None = None, path: str = "") -> str:
    """The first fault of a pydantic error as one line: path, what was wrong, what was expected."""
    faults = error.errors(include_url=False)
    first = faults[0]
    if first["type"] == "missing":  # a key that is not known is likely the one that is missing, misspelt
        first = next((each for each in faults if each["type"] == "extra_forbidden"), first)
    location = [_shown(part) for part in first["loc"] if not _is_tag(part)]
    if first["type"] == "extra_forbidden" and _is_tag(first["loc"][-1]):
        location.append(repr(first["loc"][-1]))  # the user's own key, however odd
    where = ".".join(([path] if path else []) + location) or (model.__name__ if model else "input")
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        near = nearest(location[-1], known)
        hint = f"; did you mean {near!r}?" if near else ""
        return (
            f"{where}: unknown key{hint} (known: {', '.join(known)}){more}" if known else f"{where}: unknown key{more}"
        )
    if first["type"] == "missing":
        return f"{where}: required, but missing{more}"
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):  # our own validators already say it in full
        return f"{where}: {cause}{more}" if location or path else f"{cause}{more}"
    message = first["msg"]
    message = message[0].lower() + message[1:]
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        near = nearest(
            first["input"], [c.strip(" '") for c in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        )
        message += f"; did you mean {near!r}?" if near else ""
    return f"{where}: {message}, got {describe(first['input'])}{more}"


def _shown(part: Any) -> str:
    """A key for a message, on one line."""
    text = str(part)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _is_tag(part: Any) -> bool:
    """pydantic puts names of union members and validators into the location; they are no keys."""
    return isinstance(part, str) and ("[" in part or "(" in part)


def _fields_at(model: type[BaseModel] | None, location: Sequence[Any]) -> list[str]:
    """The field names of the (possibly nested) spec that `location` leads to."""
    current: Any = model
    for part in location:
        if current is None or _is_tag(part):
            continue
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if isinstance(current, type) and issubclass(current, BaseModel) else None
        current = _spec_inside(field.annotation) if field is not None else current
    if not (isinstance(current, type) and issubclass(current, BaseModel)):
        return []
    return [field.alias or name for name, field in current.model_fields.items()]


def _spec_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _spec_inside(argument)
        if found is not None:
            return found
    return None
