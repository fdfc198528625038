"""What was decided of the claims that come with contextlab, as it was published with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def verdicts() -> Mapping[str, Mapping[str, Any]]:
    """A claim's name -> the record of its verdict, as `claims.run_claim` gives it."""
    records = json.loads((files("contextlab.papers") / "verdicts.json").read_text(encoding="utf-8"))
    return {record["name"]: record for record in records}


def in_words(outcome: Mapping[str, Any]) -> dict[str, str]:
    """What was found of a quantity and asked of it: `found` 0.5, `interval` 0.25 to 0.75, `asked` at least 0.

    What must be told with it, such as trainings that did not reach what was asked, stands behind the interval.
    """
    value, low, high = (None if outcome[key] is None else f"{outcome[key]:.3g}" for key in ("value", "low", "high"))
    note = f"; {outcome['note']}" if "note" in outcome else ""
    asked = f"at least {outcome['at_least']:g}" if "at_least" in outcome else f"at most {outcome['at_most']:g}"
    return {"found": value or "?", "interval": f"{low or '?'} to {high or '?'}{note}", "asked": asked}


def verdicts_of(paper: str) -> list[Mapping[str, Any]]:
    """The verdicts on a paper's claims. paper: its id."""
    return [record for record in verdicts().values() if record["paper"] == paper]
