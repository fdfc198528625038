"""Probe: a measurement of the mechanism inside a trained model, registered by name, with one form of table for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pandas as pd
import torch

from contextlab import registry
from contextlab.errors import InputError
from contextlab.evaluation.results import table
from contextlab.inspect.probing import fresh_model
from contextlab.models import Model
from contextlab.policies.core.parse import parse_options
from contextlab.prompt import Prompt, Task
from contextlab.words import listed

COLUMNS = ("site", "layer", "head", "place", "at", "what", "measure", "value", "ci_low", "ci_high", "control", "n")
Row = dict[str, Any]
"""A row of a table, by column."""


@dataclass
class Subject:
    """What a probe is put to: a trained model, and the task whose prompts it reads.

    seed: of all prompts and of whatever else is drawn. checkpoints: of the training, by the step; what probes of the
    dynamics read. name: of the model.
    """

    model: Model
    task: Task
    seed: int = 0
    checkpoints: Mapping[int, Callable[[], Model]] = field(default_factory=dict)
    name: str = "the model"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def generator(self, draw: int = 0) -> torch.Generator:
        """What draws from the seed; draws of other numbers are other ones."""
        return torch.Generator(self.device).manual_seed(1_000_003 * (self.seed + 1) + draw)

    def prompts(self, count: int, draw: int = 0) -> Prompt:
        """Prompts of the task, in the model's precision; the same for all probes that ask for as many."""
        return self.task.sample(count, self.generator(draw), self.device).to(self.dtype)

    def untrained(self) -> Model:
        """A model of the same form with fresh weights: what is found in it was not learned."""
        return fresh_model(self.model, self.seed + 1)

    def require_fitting(self) -> None:
        """Raises InputError where the model does not read the task's prompts."""
        spec, task = self.model.spec, self.task
        for what, has, needs in (
            ("tokens", (spec.read_in, spec.input_size), (task.read_in, task.input_size)),
            ("answers", spec.output_size, task.output_size),
        ):
            if has != needs:
                raise InputError(
                    f"{self.name} has {what} of {_sizes(has)}, and the task's are of {_sizes(needs)}; take its own task"
                )


def _sizes(size: Any) -> str:
    if not isinstance(size, tuple):
        return f"{size} numbers"
    return f"{size[1]} kinds" if size[0] == "token" else f"{size[1]} numbers"


@dataclass(frozen=True)
class Drawing:
    """How a probe's table is drawn.

    form: "lines" have the column `x` along, the value up, and a line a model; "map" has `x` along, the column `y` up,
        and the value as colour, a figure a model. "layer.head" is both of these columns, as in 1.2.
    figures: columns; each of their values has a figure of its own.
    measures: those that are drawn; () for all.
    bounds: between which values lie, and colours go; None: from what there is.
    note: under the figures.
    """

    form: Literal["lines", "map"]
    x: str
    y: str = "layer"
    figures: tuple[str, ...] = ("what", "measure")
    measures: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Probe(ABC):
    """A measurement of the mechanism inside a trained model. Subclasses are frozen dataclasses of their options.

    It changes nothing: of what it trains, reads or patches, nothing stays in the model.
    """

    drawing: ClassVar[Drawing]

    def __post_init__(self) -> None:
        registry.check_fields("probe", self)

    def refusal(self, subject: Subject) -> str:
        """Why it cannot be put to this model and task, in a few words; "" where it can."""
        return ""

    @abstractmethod
    def measure(self, subject: Subject) -> pd.DataFrame:
        """A tidy table with the columns `COLUMNS`, made by `probe_table`; see there.

        Raises InputError where it cannot be measured.
        """

    @abstractmethod
    def words(self, rows: list[Row]) -> list[str]:
        """What the rows of one model and task say, in whole sentences, the answer first.

        rows: with the seeds put together (`over_seeds`), so that each has `seeds`, too; what is missing is None.
        """


def probe_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A table of a probe; what a row does not have is missing, and `layer` is read off a site "blocks.N....".

    site: a place of the model, as `contextlab.inspect.sites` names it. layer, head, place: numbers, of a token's place
    in the prompt. at: along what a curve is drawn, such as a dose or a step of the training. what: of which the probe
    tells (a score of heads, a thing read off, a learner). measure: in what the value is ("share", "r2", "effect").
    value with its 95% interval. control: what the same measurement gives where there is nothing to be found. n:
    prompts, or whatever the interval is over.
    """
    found = []
    for row in rows:
        if lacking := set(row) - set(COLUMNS):
            raise ValueError(f"a probe's row has the columns {COLUMNS}, not {sorted(lacking)}")
        site = str(row.get("site", ""))
        layer = {"layer": int(site.split(".")[1])} if site.startswith("blocks.") else {}
        found.append({**layer, **row})
    return table(found, COLUMNS)


def parse_probe(text: str) -> Probe:
    """The probe that a text describes: "NAME" or "NAME:option=value,...".

    Raises InputError with the nearest name, or on impossible options.
    """
    name, options = parse_options(text, "probe")
    built: Probe = registry.lookup("probe", name).build(**options)
    return built


def records(found: pd.DataFrame) -> list[Row]:
    """A table's rows, what is missing as None."""
    plain = found.astype(object).where(found.notna(), None)
    return [{str(name): value for name, value in row.items()} for row in plain.to_dict("records")]


def by(rows: Iterable[Row], *names: str) -> dict[Any, list[Row]]:
    """Rows by what they have in a column, or in several, in the order in which it comes first."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row[names[0]] if len(names) == 1 else tuple(row[name] for name in names), []).append(row)
    return found


def largest(rows: Iterable[Row]) -> Row:
    """The row of the largest value."""
    return max(rows, key=lambda row: row["value"])


def shown(row: Row, digits: int = 2) -> str:
    """A row's value with its interval, as sentences have it: 0.93 [0.91, 0.94]."""
    value, low, high = (_fixed(row[name], digits) for name in ("value", "ci_low", "ci_high"))
    return value if row["ci_low"] is None else f"{value} [{low}, {high}]"


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # never -0.00


def in_percent(row: Row) -> Row:
    """A row whose value and interval are shares, in per cent."""
    return {**row, **{name: None if row[name] is None else 100 * row[name] for name in ("value", "ci_low", "ci_high")}}


def beside(rows: Iterable[Row], controls: Iterable[Row]) -> Iterator[Row]:
    """Rows of a table, each with the value of the like row of another measurement as its control."""

    def key(row: Row) -> tuple[object, ...]:
        return tuple(row.get(name) for name in ("site", "what", "place", "measure", "head"))

    known = {key(row): row["value"] for row in controls}
    return ({**row, "control": known.get(key(row))} for row in rows)


def over_control(row: Row) -> bool:
    """Whether a value is told apart from what the control gives."""
    low = row["value"] if row["ci_low"] is None else row["ci_low"]
    return row["control"] is None or low > row["control"]


def some(values: Sequence[str], most: int = 3) -> str:
    """What is listed, in words: the first few by name, and how many more there are."""
    more = len(values) - most
    return listed([*values[:most], f"{more} more"] if more > 1 else list(values))
