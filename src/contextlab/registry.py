"""Everything that has a name: mixers, tasks, policies, figures and others. One decorator line registers each.

```python
@register("mixer", "attention", papers=("1706.03762",), cases=({}, {"kv_heads": 1}))
class Attention(Mixer): ...
```
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from contextlab.errors import InputError, nearest, unknown
from contextlab.kinds import KINDS, MARKS, MORE_ROOMS, PAGES, Kind, Page
from contextlab.spec import describe, explain, refuse_bools, refuse_counts, refuse_extremes

MOST = {"task": 1 << 17, "mixer": 1 << 24, "mlp": 1 << 24, "linear": 1 << 24}
"""Of the whole numbers among a component's options. A task's say how many examples, tokens, nodes a prompt is drawn
from, in part one after another; the longest prompts of the papers have so many tokens (RULER, 2404.06654). Those of
mixers and MLPs are sizes of tensors and modules."""
UNCOUNTED = ("seed", "pool", "vocabulary")
"""Parts of names of options that may be larger: they make no prompt longer. A task names others in `unbounded`."""
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Parameter:
    """One option of a component, as `contextlab show` prints it. `help` is its line in the docstring."""

    name: str
    type: str
    default: Any
    required: bool
    help: str = ""


@dataclass(frozen=True)
class Entry:
    """A registered component: its factory, its papers (arXiv ids), the option cases its laws are tested on, its family.

    family: the kin it is listed with, such as "linear" of a mixer; "" where none is declared.
    page: of a figure, where it is drawn: one of `kinds.PAGES`. replaces: whether it stands in another figure's place.
    """

    kind: str
    name: str
    factory: Callable[..., Any]
    papers: tuple[str, ...] = ()
    cases: tuple[Mapping[str, Any], ...] = field(default=({},))
    family: str = ""
    page: str = ""
    replaces: bool = False

    @property
    def doc(self) -> str:
        """The whole docstring of the factory."""
        return inspect.getdoc(self.factory) or ""

    @property
    def summary(self) -> str:
        """The docstring's first sentence-line."""
        return self.doc.split("\n", 1)[0].strip()

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.factory)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The options with their types, defaults and help."""
        bases = reversed(self.factory.__mro__) if inspect.isclass(self.factory) else ()
        from_docs = {
            name: text for base in bases for name, text in _parameter_docs(inspect.cleandoc(base.__doc__ or "")).items()
        } | _parameter_docs(self.doc)
        shown = []
        for parameter in self._options:
            required = parameter.default is inspect.Parameter.empty
            annotation = "" if parameter.annotation is inspect.Parameter.empty else parameter.annotation
            shown.append(
                Parameter(
                    parameter.name,
                    annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation)),
                    None if required else parameter.default,
                    required,
                    from_docs.get(parameter.name, ""),
                )
            )
        return tuple(shown)

    @property
    def required(self) -> tuple[str, ...]:
        """The names of the options that have no default."""
        return tuple(option.name for option in self._options if option.default is inspect.Parameter.empty)

    @cached_property
    def options_model(self) -> type[BaseModel]:
        """A pydantic model of the options, from the factory's annotations (so that specs can check them early)."""
        return self._model_without(frozenset())

    def _require_fitting_overrides(self) -> None:
        """Raises InputError on a class with a method, in the place of its base's, that cannot be called as that is."""
        mark, _ = MARKS.get(self.kind, ("", ""))
        if not mark or not inspect.isclass(self.factory):
            return
        base = [each for each in self.factory.__mro__ if hasattr(each, mark)][-1]
        for name, theirs in vars(base).items():
            ours = getattr(self.factory, name)
            if name.startswith("_") or not inspect.isfunction(theirs) or not inspect.isfunction(ours) or ours is theirs:
                continue
            wanted, given = inspect.signature(theirs).parameters, inspect.signature(ours)
            named = {each: each for each, option in wanted.items() if option.kind is option.KEYWORD_ONLY}
            positional = [each for each in wanted if each not in named]
            try:
                bound = given.bind(*positional, **named).arguments
            except TypeError:
                fits = False
            else:  # each must arrive under the name that it has in the base, as callers may name it, or among the rest
                fits = all(key == value for key, value in bound.items() if isinstance(value, str))
            if not fits:
                raise InputError(
                    f"{self.kind} {self.name!r}: {name} takes ({', '.join(given.parameters)}); expected what "
                    f"{base.__name__}.{name} takes, ({', '.join(wanted)}), as it is called in its place"
                )

    @cached_property
    def _models(self) -> dict[frozenset[str], type[BaseModel]]:
        return {}

    def _model_without(self, elsewhere: frozenset[str]) -> type[BaseModel]:
        """The model of the options but those that are given elsewhere."""
        if elsewhere in self._models:
            return self._models[elsewhere]
        self._require_fitting_overrides()
        target: Any = self.factory
        if inspect.isclass(target):
            owner = next(each for each in target.__mro__ if "__init__" in vars(each))
            # Of a dataclass its fields tell the types, each base's in its own module.
            target = owner if "__dataclass_fields__" in vars(owner) else owner.__init__  # type: ignore[misc]
        hints = get_type_hints(target, include_extras=True)
        fields: dict[str, Any] = {}
        for parameter in self._options:
            if parameter.name in elsewhere:
                continue
            required = parameter.default is inspect.Parameter.empty
            fields[parameter.name] = (hints.get(parameter.name, Any), ... if required else parameter.default)
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
        self._models[elsewhere] = create_model(f"{self.name}_options", __config__=config, **fields)
        return self._models[elsewhere]

    @cached_property
    def _options(self) -> tuple[inspect.Parameter, ...]:
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        made = {}  # what a dataclass makes anew for each, such as {}; its signature has a mark in their places
        if dataclasses.is_dataclass(self.factory):
            every = dataclasses.fields(self.factory)
            made = {
                each.name: each.default_factory for each in every if each.default_factory is not dataclasses.MISSING
            }
        return tuple(
            p.replace(default=made[p.name]()) if p.name in made else p
            for p in self.signature.parameters.values()
            if p.kind in kinds and p.name != "self"
        )

    def check(self, options: Mapping[str, Any], *, path: str = "", given: Iterable[str] = ()) -> dict[str, Any]:
        """Validated copies of `options`. Raises InputError that names the key's path and the nearest valid name.

        given: names of required parameters that the caller supplies elsewhere, so that they may be missing here.
        """
        known = [p.name for p in self._options]
        prefix = f"{path}." if path else ""
        if not isinstance(options, Mapping):
            whose = f"{self.kind} {self.name!r}'s options"
            raise InputError(f"{path or 'options'}: expected a mapping of {whose}, got {describe(options)}")
        for name in options:
            if name not in known:
                at = f"{path}: " if path else ""
                raise InputError(f"{at}{unknown('option', name, known, f'{self.kind} {self.name!r}')}")
        elsewhere = frozenset(given).difference(options)
        model = self._model_without(elsewhere) if elsewhere else self.options_model
        try:
            checked = model.model_validate(dict(options))
        except ValidationError as error:
            fault = error.errors()[0]
            if fault["type"] == "missing":
                lacking = str(fault["loc"][0])
                like = next((f", such as {case[lacking]}" for case in self.cases if lacking in case), "")
                raise InputError(f"{prefix}{lacking}: {self.kind} {self.name!r} requires it{like}") from None
            raise InputError(f"{self.kind} {self.name!r}: {explain(error, None, path)}") from None
        found = {name: getattr(checked, name) for name in options}
        uncounted = (*UNCOUNTED, *getattr(self.factory, "unbounded", ()))
        for name, value in found.items():
            if value is None or isinstance(value, bool | str):  # most are; no number is made of them
                continue
            where = f"{self.kind} {self.name!r}: {prefix}{name}"
            refuse_bools(where, options[name], value)
            refuse_extremes(where, value)
            if self.kind in MOST and not any(word in name for word in uncounted):
                refuse_counts(where, value, MOST[self.kind])
        return found

    def build(self, **options: Any) -> Any:
        """Make the component. Raises InputError on unknown, missing, ill-typed or impossible options."""
        return self.factory(**self.check(options))


_entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}


def register(
    kind: Kind,
    name: str,
    *,
    papers: Iterable[str] = (),
    cases: Iterable[Mapping[str, Any]] = ({},),
    family: str = "",
    page: Page | None = None,
    replace: bool = False,
) -> Callable[[F], F]:
    """Decorator: make a class or function known as `kind` `name`.

    papers: arXiv ids. cases: option sets under which the kind's laws are tested (and `show` gives examples).
    family: the kin it is listed with; it is declared here, not read off a file's name.
    page: of a figure, where it is drawn (see `kinds.PAGES`); default each task's section of the report.
    replace: whether it is drawn in the place of the figure that has this name; of figures only.

    Raises InputError on an unknown kind, where the name is another component's, and on a mixer, task or policy that is
    no class derived from its base.
    """
    if kind not in _entries:
        raise InputError(unknown("kind", kind, _entries))
    if page is not None and page not in PAGES:
        raise InputError(f"figure {name!r}: {unknown('page', page, PAGES)}")
    if kind != "figure" and (page or replace):
        raise InputError(f"{kind} {name!r}: only figures take page and replace; expected neither")

    def add(factory: F) -> F:
        mark, base = MARKS.get(kind, ("", ""))
        if mark and not hasattr(factory, mark):
            raise InputError(f"{kind} {name!r}: expected a class derived from {base}, got {factory!r}"[:300])
        known = _entries[kind]
        where = (page or "task") if kind == "figure" else ""
        entry = Entry(kind, name, factory, tuple(papers), tuple(cases), family, where, replace)
        existing = known.get(name)
        if existing is not None and existing.replaces and not replace:
            known[name] = known.pop(name)  # a plugin came first: its figure takes this one's place in the order
            return factory
        if replace and known and existing is None:
            raise InputError(f"there is no figure to replace: {unknown('figure', name, known)}")
        same = existing is None or _home(existing.factory) == _home(factory)
        if existing is not None and not same and not (replace and not existing.replaces):
            owner = f"{existing.factory.__module__}.{existing.factory.__qualname__}"
            raise InputError(f"{kind} {name!r} is registered already, by {owner}; take another name")
        known[name] = entry
        return factory

    return add


def check_fields(kind: str, component: object) -> None:
    """Hold a registered dataclass's fields to their annotations, as `Entry.build` does; others are left alone.

    Raises InputError.
    """
    entry = entry_of(kind, component)
    if entry is not None:
        entry.check({option.name: getattr(component, option.name) for option in entry._options})


def entry_of(kind: str, component: object) -> Entry | None:
    """What a component's class is registered as; None where it is not."""
    return next((entry for entry in _entries[kind].values() if entry.factory is type(component)), None)


def _home(factory: Callable[..., Any]) -> tuple[str, str]:
    """Where a component is defined; what is imported again, by another module's name, too, is still the same."""
    module = sys.modules.get(factory.__module__)
    return getattr(module, "__file__", None) or factory.__module__, factory.__qualname__


def kinds() -> list[str]:
    """The kinds of component that the registry holds."""
    return list(_entries)


def names(kind: str) -> list[str]:
    """All registered names of a kind, sorted."""
    return sorted(_known(kind))


def _known(kind: str) -> dict[str, Entry]:
    if kind not in _entries:
        raise InputError(unknown("kind", kind, _entries))
    for room in MORE_ROOMS.get(kind, ()):
        import_module(room)
    return _entries[kind]


def lookup(kind: str, name: str) -> Entry:
    """The entry called `name`. Raises InputError with the nearest valid name."""
    known = _known(kind)
    if name not in known:
        own = "" if nearest(name, known) else "; one of your own is found where --plugin names its file"
        raise InputError(unknown(kind, name, known) + own)
    return known[name]


def entries(kind: str) -> list[Entry]:
    """All entries of a kind, sorted by name."""
    return [_entries[kind][name] for name in names(kind)]


def registered(kind: str) -> list[Entry]:
    """All entries of a kind in the order in which they were registered."""
    names(kind)
    return list(_entries[kind].values())


def _parameter_docs(doc: str) -> dict[str, str]:
    """`name: text` lines of a docstring, continuation lines joined (indented deeper than the name's line)."""
    found: dict[str, str] = {}
    current, depth = None, 0
    for line in doc.splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        head, colon, text = stripped.partition(":")
        if colon and head.isidentifier() and head == head.lower():
            current, depth = head, indent
            found[current] = text.strip()
        elif current and stripped and indent > depth:
            found[current] += " " + stripped
        else:
            current = None
    return found
