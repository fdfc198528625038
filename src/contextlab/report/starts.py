"""What models started and learned from, as a table; read from the records of their trainings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def starts_table(records: Sequence[Mapping[str, Any]], several_runs: bool = False) -> list[dict[str, str]]:
    """A row for each step of each model's way from a trained one: what it started from, what was carried over, new and
    dropped, and what it learned from. Every cell is text.

    records: one mapping a training; those that started fresh and learned from no teacher are left out, and of several
    seeds the first is told. A model that started from one which itself did is told back to the first.
    """
    rows, seen = [], set()
    for record in records:
        key = (record.get("run"), record["task"], record["model"])
        if key in seen or not (record.get("start") or record.get("distill")):
            continue
        seen.add(key)
        who = {
            **({"run": str(record["run"])} if several_runs and "run" in record else {}),
            "task": str(record["task"]),
            "model": str(record["model"]),
        }
        for start, taught in _way(record):
            rows.append({**who, "from": _name(start["from"]) if start else "fresh", "what became of it": _told(start),
                         "learned from": _teacher(taught)})  # fmt: skip
    return rows


def _way(record: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]]:
    """Start and teacher of each training on the way, the first one first."""
    start = record.get("start")
    if start and start.get("before"):
        yield from _way(start["before"])
    if start or record.get("distill"):
        yield start, record.get("distill")


def _told(start: Mapping[str, Any] | None) -> str:
    return "" if start is None else "; ".join(start["told"])


def _teacher(taught: Mapping[str, Any] | None) -> str:
    if taught is None:
        return ""
    return str(taught["told"]).replace(str(taught["teacher"]), _name(str(taught["teacher"])))


def _name(source: str) -> str:
    """The end of where a source lies, by which a reader knows it: runs/cheap/base:softmax as base:softmax."""
    return Path(source).name or source
