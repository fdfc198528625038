"""Means over the positions of a long prompt of a quantity that changes more and more slowly with the position."""

from __future__ import annotations

from collections.abc import Callable

EACH, OF_A_STRIDE = 256, 64
"""Places at the beginning that are all looked at; and how many at each later distance, which then doubles."""


def strides(count: int) -> list[int]:
    """Powers of two that lead from place 0 to place count - 1: 1 at first, then ever longer ones."""
    found, at, stride = [], 0, 1
    while at < count - 1:
        if at >= EACH and (at - EACH) // stride >= OF_A_STRIDE:
            stride *= 2
        while stride > count - 1 - at:
            stride //= 2
        found.append(stride)
        at += stride
    return found


def mean_of(value: Callable[[int], float], count: int) -> float:
    """The mean of value(0), ..., value(count - 1): exact for some hundred, else linear between places."""
    before = total = value(0)
    at = 0
    for stride in strides(count):
        at += stride
        here = value(at)
        total += before * (stride - 1) / 2 + here * (stride + 1) / 2
        before = here
    return total / count
