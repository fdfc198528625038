"""Sizes and counts as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def bytes_in_words(size: float) -> str:
    """4096 -> 4 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} EiB"


def count_in_words(count: float) -> str:
    """213_000 -> 213 k."""
    for unit in ("", " k", " M"):
        if abs(count) < 999.5:  # what rounds to 1000 belongs to the next unit
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} G"


def counted(count: int, what: str) -> str:
    """1, "step" -> 1 step; 2000, "step" -> 2,000 steps."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """a, b and c; "" of none."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A record's nested keys as `a.b`, each with its value in words."""
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            rows += [(f"{prefix}{key}", ", ".join(f"{k}: {v}" for k, v in each.items())) for each in value]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((f"{prefix}{key}", text or "none"))
    return rows
