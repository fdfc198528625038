"""What a preset is: a row of data from which a registered function and its documentation are made."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any, Literal  # noqa: F401  (options' types are read here)

from pydantic import NonNegativeInt, PositiveInt  # noqa: F401

from contextlab.errors import InputError
from contextlab.models.spec import MOST_LAYERS, ModelSpec
from contextlab.registry import register

COUNT = "NonNegativeInt"
COUNTED = {"depth", "group", "every", "sharing", "largest"}
"""Options that say how many layers there are."""


@dataclass(frozen=True)
class Option:
    """An option of a preset: what it means, its default, its type as it is written."""

    help: str
    default: Any = 4
    type: str = "PositiveInt"


WIDTH = Option("size of a token's vector.", 64)
DEPTH = Option("number of blocks.")
HEADS = Option("attention heads.")


@dataclass(frozen=True)
class Preset:
    """A named model.

    doc: its first sentence, and after an empty line what else there is to say.
    fields: what its ModelSpec says beside width, depth and heads, which are the options of these names where it has
        such. "$window" stands for the option `window`. Where arithmetic is needed, a function of the options that
        returns the fields.
    """

    name: str
    family: str
    papers: tuple[str, ...]
    doc: str
    options: Mapping[str, Option]
    fields: Mapping[str, Any] | Callable[..., Mapping[str, Any]]

    def spec(self, **options: Any) -> ModelSpec:
        """The ModelSpec at these options, all of which are given. Raises InputError where they do not fit."""
        for name in COUNTED & options.keys():  # before lists of that length are made
            if options[name] > MOST_LAYERS:
                raise InputError(f"{name}: a model has at most {MOST_LAYERS} layers, got {options[name]}")
        own = {key: options[key] for key in ("width", "depth", "heads") if key in options}
        made = self.fields(**options) if callable(self.fields) else _filled(self.fields, options)
        return ModelSpec.parse({**own, **made})

    def function(self) -> Callable[..., ModelSpec]:
        """The preset as a function with named, typed and documented options."""
        signature = Signature(
            [
                Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=option.default, annotation=option.type)
                for name, option in self.options.items()
            ],
            return_annotation="ModelSpec",
        )

        def build(*values: Any, **options: Any) -> ModelSpec:
            given = signature.bind(*values, **options)
            given.apply_defaults()
            return self.spec(**given.arguments)

        build.__name__ = build.__qualname__ = self.name
        build.__annotations__ = {name: option.type for name, option in self.options.items()} | {"return": "ModelSpec"}
        build.__signature__ = signature  # type: ignore[attr-defined]
        told = [f"{name}: {option.help}" for name, option in self.options.items()]
        paragraphs = [textwrap.fill(paragraph, 116) for paragraph in self.doc.split("\n\n")]
        options = "\n".join(textwrap.fill(line, 116, subsequent_indent="    ") for line in told)
        build.__doc__ = "\n\n".join([*paragraphs, options])
        return build


def register_presets(rows: Iterable[Preset]) -> None:
    """Make models known by the rows' names."""
    for row in rows:
        register("model", row.name, papers=row.papers, family=row.family)(row.function())


def _filled(template: Any, options: Mapping[str, Any]) -> Any:
    """The template with the options' values in the place of their names."""
    if isinstance(template, str) and template.startswith("$"):
        return options[template[1:]]
    if isinstance(template, Mapping):
        return {key: _filled(value, options) for key, value in template.items()}
    return [_filled(value, options) for value in template] if isinstance(template, list | tuple) else template
