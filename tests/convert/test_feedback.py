"""The error-feedback solver against optimal brain surgery written step by step, and against all roundings of a row."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from contextlab.convert.feedback import feedback
from contextlab.errors import InputError

GRID = 0.5


def rounded(place: int, free: Tensor, pivots: Tensor) -> Tensor:
    return (free[:, 0] / GRID).round() * GRID


def drawn(outputs: int, inputs: int, rows: int = 40) -> tuple[Tensor, Tensor]:
    """A weight [O, I], and inputs [rows, I] whose neighbours are alike."""
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    x = x + 0.8 * x.roll(1, 1)
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x


def surgery(weight: Tensor, hessian: Tensor, order: list[int]) -> Tensor:
    """Optimal brain quantisation (2208.11580, eq. 2 and 3) in a given order, one row and one inverse at a time."""
    found = weight.clone()
    for row in found:
        free = list(order)
        for place in order:
            inverse = hessian[free][:, free].inverse()
            at = free.index(place)
            change = (row[place] - (row[place] / GRID).round() * GRID) / inverse[at, at]
            for other, column in enumerate(free):
                row[column] -= change * inverse[other, at]
            free.remove(place)
    return found


@pytest.mark.parametrize("block", [1, 3, 128])
@pytest.mark.parametrize("order", ["natural", "activations"])
def test_it_is_optimal_brain_surgery_in_that_order(block: int, order: str) -> None:
    weight, x = drawn(3, 7)
    x = x * torch.tensor([1.0, 3, 2, 0.5, 1, 4, 1], dtype=torch.float64)
    hessian = x.T @ x
    places = list(range(7)) if order == "natural" else hessian.diagonal().argsort(descending=True).tolist()
    found = feedback(weight, hessian, rounded, damping=0.0, block=block, order=order)
    torch.testing.assert_close(found, surgery(weight, hessian, places), rtol=0, atol=1e-9)


def test_it_is_near_the_best_of_all_roundings_of_a_row() -> None:
    """Of 30 rows of 4 weights: never better than the best of 2^4 x 2^4 roundings, and better than to the nearest."""
    ours, best, nearest = 0.0, 0.0, 0.0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
        x = x + 0.9 * x[:, :1]
        row = torch.randn(1, 4, generator=generator, dtype=torch.float64)

        def error(values: Tensor, row: Tensor = row, x: Tensor = x) -> float:
            return float(((row - values) @ x.T).square().sum())

        low = (row / GRID).floor() * GRID
        steps = torch.tensor(list(itertools.product((-GRID, 0.0, GRID, 2 * GRID), repeat=4)), dtype=torch.float64)
        least = min(error(low + step) for step in steps)
        got = error(feedback(row, x.T @ x, rounded, damping=0.0))
        assert got >= least - 1e-9
        ours, best, nearest = ours + got, best + least, nearest + error((row / GRID).round() * GRID)
    assert best < ours < 0.75 * nearest


def test_independent_inputs_are_rounded_to_the_nearest() -> None:
    weight, _ = drawn(3, 6)
    found = feedback(weight, torch.eye(6, dtype=torch.float64), rounded)
    assert torch.equal(found, (weight / GRID).round() * GRID)


def test_a_rule_sees_the_columns_of_its_block_and_may_choose_for_several() -> None:
    """n:m sparsity by what a zero costs: of each two neighbours one stays, chosen from what is given."""
    weight, x = drawn(4, 8)
    stays: dict[int, Tensor] = {}

    def one_of_two(place: int, free: Tensor, pivots: Tensor) -> Tensor:
        if place % 2 == 0:
            cost = (free[:, :2] / pivots[:2]).square()
            stays[place], stays[place + 1] = cost[:, 0] >= cost[:, 1], cost[:, 0] < cost[:, 1]
        return free[:, 0] * stays[place]

    found = feedback(weight, x.T @ x, one_of_two, block=4)
    assert ((found == 0).reshape(4, 4, 2).sum(2) == 1).all()
    plain = weight * torch.stack([stays[i] for i in range(8)], 1)
    assert ((weight - found) @ x.T).norm() < 0.9 * ((weight - plain) @ x.T).norm()


def test_inputs_that_are_always_zero_have_no_say() -> None:
    weight, x = drawn(3, 6)
    x[:, 2] = 0
    found = feedback(weight, x.T @ x, rounded)
    assert found.isfinite().all()
    assert (found[:, 2] == 0).all()
    rest = [0, 1, 3, 4, 5]
    alone = feedback(weight[:, rest], x[:, rest].T @ x[:, rest], rounded)
    assert torch.equal(found[:, rest], alone)
    assert (feedback(weight, torch.zeros(6, 6), rounded) == 0).all()


def test_what_cannot_be_solved_is_told() -> None:
    weight, x = drawn(3, 6, rows=2)
    with pytest.raises(InputError, match=r"hessian: expected \[6, 6\] for a weight \[3, 6\], got \[3, 3\]"):
        feedback(weight, torch.eye(3), rounded)
    with pytest.raises(InputError, match="damping: the hessian cannot be inverted with 0 of its diagonal added"):
        feedback(weight, -torch.ones(6, 6) + torch.eye(6), rounded, damping=0.0)
    with pytest.raises(InputError, match="hessian: it is not finite"):
        feedback(weight, torch.full((6, 6), torch.nan), rounded)
    assert feedback(weight.float(), x.T @ x, rounded).dtype == torch.float32
