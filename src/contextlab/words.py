"""Sizes and counts as people read them."""

from __future__ import annotations


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
