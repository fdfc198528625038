"""How layers divide one budget: each in proportion to its weight, none more than it can use nor less than it needs."""

from __future__ import annotations

from collections.abc import Sequence


def divided(total: float, weights: Sequence[float], least: Sequence[float], most: Sequence[float]) -> list[float]:
    """Parts of `total`, each its weight times one common factor, but at least `least` and at most `most`.

    What one cannot use goes to the others by their weights, as water that is poured into vessels joined at the bottom.
    Where `total` does not hold what all need, each has that; where all can use less than `total`, each has that.

    weights: above 0. least, most: of each, least no more than most.
    """
    edges = sorted({bound / weight for bounds in (least, most) for bound, weight in zip(bounds, weights, strict=True)})

    def at(factor: float) -> list[float]:
        return [min(max(factor * w, low), high) for w, low, high in zip(weights, least, most, strict=True)]

    low, high = 0, len(edges) - 1  # between two neighbouring edges the sum rises evenly
    if sum(at(edges[low])) >= total:
        return list(least)
    if sum(at(edges[high])) <= total:
        return list(most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(at(edges[middle])) <= total else (low, middle)
    before, after = sum(at(edges[low])), sum(at(edges[high]))
    return at(edges[low] + (edges[high] - edges[low]) * (total - before) / (after - before))


def rounded_down(parts: Sequence[float], total: int, most: Sequence[int]) -> list[int]:
    """Whole numbers no larger than the parts, and what rounding left of `total` given to the first that can use it."""
    whole = [int(part) for part in parts]
    left = min(total, sum(most)) - sum(whole)
    for i, limit in enumerate(most):
        if left > 0 and whole[i] < limit:
            whole[i], left = whole[i] + 1, left - 1
    return whole
