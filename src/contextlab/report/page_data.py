"""What a page's script draws and hands out: figures and tables as one packed text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import pandas as pd

from contextlab.report.packing import Packed, pack
from contextlab.report.sections import Data, Drawn, drawn_figures
from contextlab.report.sketch import Sketch, rounded, template

DIGITS = 6
"""Significant digits of the numbers in figures."""
LONG = 200
"""Characters of a sentence that a report opens with."""
MOST_CSV = 60_000
"""Bytes that the CSV of all shots may take, packed; where it would take more it has the means over shots alone."""


class PageData:
    """The figures of a page as they are added, each known in the page by its place among them."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []
        self.templates: list[dict[str, Any]] = []
        self.rows: list[list[Any]] = []
        self.csv = ""
        self.every_shot = True

    def draw(self, data: Data) -> dict[str, list[Any]]:
        """The registered figures of a page's data, and a sentence for each that failed."""
        made = list(drawn_figures(data))
        return {
            "figures": [self._add(each) for each in made if isinstance(each, Drawn)],
            "failed": [each for each in made if isinstance(each, str)],
        }

    def hold(self, drawn: Sequence[Drawn]) -> dict[str, list[Any]]:
        """Figures that are of this page alone, as `draw` gives those that are registered."""
        return {"figures": [self._add(each) for each in drawn], "failed": []}

    def hold_csv(self, results: pd.DataFrame) -> None:
        """Hold the results for download, in seven digits: each shot where they are few enough."""
        self.csv = results.to_csv(index=False, float_format="%.7g")
        self.every_shot = pack(self.csv).packed <= MOST_CSV
        if not self.every_shot:
            self.csv = results[results["shot"].isna()].to_csv(index=False, float_format="%.7g")

    def packed(self) -> Packed:
        """All of it; see `packing.pack`."""
        return pack(json.dumps({key: value for key, value in vars(self).items() if key != "every_shot"}))

    def _add(self, drawn: Drawn) -> dict[str, Any]:
        spec = rounded(_spec(drawn), DIGITS)
        look = spec["layout"].pop("template", {})  # 7 KB in each, and the same in nearly all
        look = rounded(template(look), DIGITS) if isinstance(look, str) else look
        if look not in self.templates:
            self.templates.append(look)
        wide = (spec["layout"].pop("meta", None) or {}).get("wide", False)
        self.figures.append({**spec, "template": self.templates.index(look)})
        return {
            "title": drawn.title, "note": drawn.note, "switch": drawn.switch, "name": drawn.name,
            "at": len(self.figures) - 1, "wide": wide, "height": spec["layout"].get("height", 420),
        }  # fmt: skip


def first_figure(pages: Iterable[Mapping[str, list[dict[str, Any]]]], wanted: Iterable[str]) -> dict[str, Any] | None:
    """Take out of the pages' figures the one that answers most: the first of those wanted that the first page has.

    pages: as `PageData.draw` gives them. Where a page has none of those wanted it is its first figure; None where no
    page has any.
    """
    for page in pages:
        by_name = {each["name"]: each for each in reversed(page["figures"])}
        for name in (*wanted, *by_name):
            if name in by_name:
                page["figures"].remove(by_name[name])
                return by_name[name]
    return None


def first_sentences(sentences: list[str], tasks: list[str], most: int = 3) -> list[str]:
    """The sentences that answer first: of each task its first, in the order of the tasks; then what follows."""
    leads = [next((s for s in sentences if s.startswith(f"{task}: ")), None) for task in tasks]
    found = [sentence for sentence in leads if sentence is not None][:most]
    return found + [sentence for sentence in sentences if sentence not in found][: most - len(found)]


def folded(sentence: str) -> tuple[str, str]:
    """A sentence of many names in two parts, the second of which is shown when it is asked for; "" for none."""
    if len(sentence) <= LONG:
        return sentence, ""
    head = sentence[:LONG].rpartition(" ")[0]
    return head, sentence[len(head) :].strip()


def _spec(drawn: Drawn) -> dict[str, Any]:
    """A figure as JSON has it."""
    made = drawn.made
    spec = {"data": made.data, "layout": made.layout} if isinstance(made, Sketch) else json.loads(made.to_json())
    return cast(dict[str, Any], spec)
