"""The operands of the suite arithmetic are those of the authors' files."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from contextlab.experiments import load_recipe
from contextlab.tasks import Arithmetic
from contextlab.tasks.arithmetic import carries
from tests.tasks.published import Figure, hold

ADDITION: dict[str, Figure] = {
    "digits of the longer operand": (2.8805, 0.3573, 10_000),
    "first operand": (464.83, 310.7, 10_000),
    "second operand": (464.15, 308.6, 10_000),
    "carries": (1.5, 1.118, 10_000),
    "carries, longer operand of three digits": (1.5758, 1.133, 8917),
    "characters of a line": (10.989, 1.321, 10_000),
}
"""Mean, standard deviation and number in data/bal/train_3digit_10000.txt.

Of github.com/lee-ny/teaching_arithmetic at commit 7e489fa72963f3f335ea61f1a99e56343b6ae88e.
"""

MULTIPLICATION: dict[str, Figure] = {
    "first operand": (49.873, 28.41, 6872),
    "characters of a line": (9.4192, 0.959, 6872),
}
"""Of the lines of data/bal/train_multiplication_7000.txt whose longer operand has two digits."""


FUNCTIONS: dict[str, Figure] = {
    "operand, sine": (-0.0068631, 0.9179, 10_000),
    "result, sine": (-0.0049762, 0.7144, 10_000),
    "characters, sine": (12.78, 1.11, 10_000),
    "operand, square_root": (5.5057, 2.6, 10_000),
    "result, square_root": (2.2698, 0.5945, 10_000),
    "characters, square_root": (11.774, 0.5018, 10_000),
}
"""Of data/sin/train_sin_10000.txt and data/sqrt/train_sqrt_10000.txt; characters of both numbers together."""


def size(values: Tensor) -> Tensor:
    return 1 + sum((values >= 10**k).long() for k in range(1, 6))


def line(x: Tensor, y: Tensor, result: Tensor) -> Tensor:
    return size(x) + size(y) + size(result) + 2


def operands(name: str, count: int = 5000) -> tuple[Tensor, Tensor]:
    task = load_recipe("arithmetic").build_task(name)
    hidden = task.sample(count, torch.Generator().manual_seed(len(name))).hidden
    return hidden["x"][:, 0], hidden["y"][:, 0]


@pytest.mark.parametrize("name", ["addition_plain", "addition_reversed", "subtraction_plain"])
def test_operands_of_sums_are_those_of_the_authors_file(name: str) -> None:
    x, y = operands(name)
    longer = size(torch.maximum(x, y))
    found = {
        "digits of the longer operand": longer,
        "first operand": x,
        "second operand": y,
        "carries": carries(x, y, 3),
        "carries, longer operand of three digits": carries(x, y, 3)[longer == 3],
        "characters of a line": line(x, y, x + y),
    }
    assert list(found) == list(ADDITION)
    for key, own in found.items():
        hold(key, own, ADDITION[key])


def test_all_numbers_of_carries_are_equally_likely() -> None:
    """In the file, 2500 lines have 0, 1, 2 and 3 carries; of 20,000 of ours, a quarter each, within four errors."""
    for digits in (1, 2, 3, 5):
        hidden = Arithmetic(digits=digits).sample(20_000, torch.Generator().manual_seed(digits)).hidden
        count = torch.bincount(carries(hidden["x"][:, 0], hidden["y"][:, 0], digits), minlength=digits + 1)
        share = 1 / (digits + 1)
        held_out = (
            0.03 if digits < 3 else 0.01
        )  # a tenth of the few short pairs is not drawn: more or less of some kind
        assert (count / 20_000 - share).abs().max() < 4 * (share * (1 - share) / 20_000) ** 0.5 + held_out


def test_factors_of_two_digits_are_those_of_the_authors_file() -> None:
    x, y = operands("multiplication_plain")
    both = torch.maximum(x, y) >= 10
    hold("first operand", x[both], MULTIPLICATION["first operand"])
    hold("characters of a line", line(x, y, x * y)[both], MULTIPLICATION["characters of a line"])


@pytest.mark.parametrize("name", ["sine", "square_root"])
def test_functions_are_those_of_the_authors_files(name: str) -> None:
    task = load_recipe("arithmetic").build_task(name)
    prompt = task.sample(3000, torch.Generator().manual_seed(3))
    found = []
    for row in prompt.inputs.tolist():
        asked, result = re.findall(r"-?\d+\.\d+", "".join(map(task.symbol, row)))
        found.append((float(asked), float(result), len(asked) + len(result)))
    for what, own in zip(("operand", "result", "characters"), zip(*found, strict=True), strict=True):
        hold(what, torch.tensor(own), FUNCTIONS[f"{what}, {name}"])
