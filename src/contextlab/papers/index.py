"""What the index says of each paper, read from the YAML files beside this one: one file an area."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from contextlab.errors import InputError, first_line, nearest, unknown
from contextlab.spec import explain

Status = Literal["reproduced", "contradicted", "implemented", "partly", "planned", "out of scope"]
STATUSES: Mapping[Status, str] = {
    "reproduced": "a claim of it was tested here and holds",
    "contradicted": "a claim of it was tested here and fails",
    "implemented": "it runs by name",
    "partly": "some of it runs; what is missing is told",
    "planned": "nothing of it runs yet",
    "out of scope": "it will not be built here; the reason is told",
}
ARXIV = re.compile(r"\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7}")
ELSEWHERE = re.compile(r"doi:10\.\d{4,9}/\S+|openreview:[\w-]+|url:https://\S+")
LAST_YEAR = 2100


class Paper(BaseModel):
    """A paper of the index.

    id: its number on arXiv, without a version; `doi:`, `openreview:` or `url:` and an address of one that is not there.
    name: what it is called for short, such as the method's name. authors: as in BibTeX, "A and B and others".
    contributes: what it adds, in one sentence. claim: its headline result, with its figures.
    components: what runs here by name and points to it, as "kind name". run: commands that show it, or names of
    what does it in Python, such as contextlab.policies.compress_prompt.
    missing: what does not run here, of one that runs in part. reason: why it is out of scope.
    rows: its places in the lists of abstracts that the library grew from. area: the file that it stands in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: str = Field(min_length=1)
    title: str = Field(min_length=1)
    authors: str = Field(min_length=1)
    year: int = Field(ge=1900, le=LAST_YEAR)
    contributes: str = Field(min_length=1)
    claim: str = Field(min_length=1)
    status: Status
    components: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    missing: str = ""
    reason: str = ""
    rows: tuple[str, ...] = ()
    area: str = ""

    @field_validator("id")
    @classmethod
    def _well_formed(cls, value: str) -> str:
        if not ARXIV.fullmatch(value) and not ELSEWHERE.fullmatch(value):
            raise InputError(f"expected an arXiv id such as 1706.03762, doi:, openreview: or url:, got {value!r}")
        return value

    @model_validator(mode="after")
    def _status_fits(self) -> Paper:
        runs = bool(self.components or self.run)
        if runs and self.status in ("planned", "out of scope"):
            raise InputError(f"status: {self.status}, though components or run say what runs")
        if not runs and self.status not in ("planned", "out of scope"):
            raise InputError(f"status: {self.status}, though neither components nor run say what runs")
        if self.status == "partly" and not self.missing:
            raise InputError("missing: expected what does not run here, of a paper of status partly")
        if self.missing and self.status not in ("partly", "reproduced", "contradicted"):
            raise InputError(f"missing: it is for papers that run in part, where this one is {self.status}")
        if bool(self.reason) != (self.status == "out of scope"):
            raise InputError("reason: it is for papers that are out of scope, which must have it")
        month = re.fullmatch(r"(\d\d)(\d\d)\.\d{4,5}", self.id)
        if month and (2000 + int(month[1]) != self.year or not 1 <= int(month[2]) <= 12):
            raise InputError(f"year: {self.year}, where {self.id} is of {month[2]}/20{month[1]}")
        return self

    @property
    def url(self) -> str:
        """Where it can be read."""
        scheme, colon, rest = self.id.partition(":")
        if not colon:
            return f"https://arxiv.org/abs/{self.id}"
        bases = {"doi": "https://doi.org/", "openreview": "https://openreview.net/forum?id=", "url": ""}
        return bases[scheme] + rest

    @property
    def commands(self) -> tuple[str, ...]:
        """What to run to see it: what `run` says, then what shows each of its components."""
        told = (each if " " in each else f"python -m pydoc {each}" for each in self.run)
        return (*told, *(f"contextlab show {each}" for each in self.components))

    def told(self) -> dict[str, Any]:
        """All that is known of it, as plain data; what is empty is left out."""
        whole = {**self.model_dump(mode="json"), "url": self.url, "commands": list(self.commands)}
        return {key: value for key, value in whole.items() if value}


@dataclass(frozen=True)
class Area:
    """Papers of one subject, in the order in which they are best read.

    name: as in the file's name. title: its heading. about: what the papers of the area are about, in paragraphs.
    """

    name: str
    title: str
    about: str
    papers: tuple[Paper, ...]


def read_area(text: str, source: str) -> Area:
    """The area that a YAML text describes. source: the file's name, for messages and for the area's.

    Raises InputError that names the file, the paper and the key.
    """
    name = source.rsplit("/", 1)[-1].removesuffix(".yaml")
    try:
        value = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {first_line(error)}") from None
    keys = {"title": str, "about": str, "papers": list}
    if not isinstance(value, dict) or set(value) != set(keys):
        raise InputError(f"{source}: expected a mapping of {', '.join(keys)}")
    for key, kind in keys.items():
        if not isinstance(value[key], kind) or not value[key]:
            raise InputError(f"{source}: {key}: expected {'text' if kind is str else 'a list of papers'}")
    found = []
    for place, each in enumerate(value["papers"]):
        which = each.get("id", place) if isinstance(each, dict) else place
        try:
            found.append(Paper.model_validate({**each, "area": name} if isinstance(each, dict) else each))
        except ValidationError as error:
            raise InputError(f"{source}: paper {which}: {explain(error, Paper)}") from None
    return Area(name, value["title"].strip(), value["about"].strip(), tuple(found))


@cache
def areas() -> tuple[Area, ...]:
    """All areas, sorted by title. Raises InputError where a file is malformed or a paper stands twice."""
    folder = files("contextlab.papers")
    found = [
        read_area(each.read_text(encoding="utf-8"), f"papers/{each.name}")
        for each in folder.iterdir()
        if each.name.endswith(".yaml")
    ]
    counts = Counter(paper.id for area in found for paper in area.papers)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        where = [f"papers/{area.name}.yaml" for area in found for paper in area.papers if paper.id == twice[0]]
        raise InputError(f"{twice[0]} stands twice, in {' and '.join(where)}; remove one of them")
    return tuple(sorted(found, key=lambda area: area.title.lower()))


def papers(*, area: str | None = None, status: str | None = None, since: int | None = None) -> list[Paper]:
    """The papers of the index, area by area, those that all conditions hold for.

    area: name of an area. status: one of `STATUSES`. since: first year.

    Raises InputError with the nearest name where there is no such area or status.
    """
    if area is not None:
        require_known("area", area, [each.name for each in areas()])
    if status is not None:
        require_known("status", status, STATUSES)
    return [
        paper
        for each in areas()
        if area in (None, each.name)
        for paper in each.papers
        if status in (None, paper.status) and (since is None or paper.year >= since)
    ]


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raises InputError with the nearest name where `name` is none of `known`."""
    if name not in set(known):
        raise InputError(unknown(what, name, list(known)))


def find(text: str) -> Paper:
    """The paper that `text` names: an id, with or without a version, an address on arXiv, a row, a name or a title.

    Raises InputError where none or several are meant, with the nearest.
    """
    wanted = plain_id(text)
    known = papers()
    lowered = wanted.lower()
    exact = [each for each in known if lowered in (each.id.lower(), each.name.lower(), each.title.lower(), *each.rows)]
    found = exact or [each for each in known if len(lowered) > 2 and _holds(each, lowered)]
    if len(found) == 1:
        return found[0]
    if found:
        listed = "; ".join(f"{each.id} {each.name}" for each in found[:6])
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise InputError(f"{text!r} may be {len(found)} papers: {listed}{more}; give the id of one")
    close = nearest(lowered, [each.id for each in known]) or nearest(lowered, [each.name.lower() for each in known])
    if close is None:
        raise InputError(f"no paper {text!r} in the index; contextlab papers search TEXT looks for words")
    paper = next(each for each in known if close in (each.id, each.name.lower()))
    raise InputError(f"no paper {text!r} in the index; did you mean {paper.id} ({paper.name})?")


def plain_id(text: str) -> str:
    """An arXiv id without what people write around it: address, `arXiv:`, version."""
    wanted = re.sub(r"^(https?://)?(www\.)?arxiv\.org/(abs|pdf|html)/", "", text.strip())
    wanted = re.sub(r"^arxiv:\s*", "", wanted, flags=re.IGNORECASE).removesuffix(".pdf")
    return re.sub(r"v\d+$", "", wanted) if ARXIV.match(wanted) else wanted


def _holds(paper: Paper, lowered: str) -> bool:
    """Whether an id starts so, or a name or title has these words."""
    if lowered[0].isdigit():
        return paper.id.startswith(lowered)
    word = re.compile(rf"\b{re.escape(lowered)}\b")
    return bool(word.search(paper.name.lower()) or word.search(paper.title.lower()))
