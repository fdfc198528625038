"""What is written down on the way to an answer is worked out in whole numbers, exactly."""

from __future__ import annotations

import math

import torch

from contextlab.learners.arithmetic_scratchpads import root


def test_roots_are_exact_where_floats_are_not():
    """A square of more than 53 bits, less one, has as a float the root of the square."""
    squares = [n * n for n in (1, 94906267, 2**30, 3 * 10**9)]
    numbers = [square + step for square in squares for step in (-1, 0, 1)]
    assert any(int(math.sqrt(number)) != math.isqrt(number) for number in numbers)
    assert root(torch.tensor(numbers), 0).tolist() == list(map(math.isqrt, numbers))
    assert root(torch.tensor([2, 50]), 6).tolist() == [1414, 7071]  # of 0.000002 and 0.00005, to six places
