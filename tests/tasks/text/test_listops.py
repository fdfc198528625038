"""ListOps against a recursive evaluator and a recursive generator, after the published ones."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from contextlab import build_task
from contextlab.errors import InputError
from contextlab.learners import build_learner
from contextlab.prompt import Prompt
from contextlab.tasks.text.listops import SYMBOLS, _Forest

OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def value(symbols: list[str]) -> tuple[int, int]:
    """The value of the expression that `symbols` begins with, and how deep it is; takes it from the list."""
    symbol = symbols.pop(0)
    if symbol not in OPERATORS:
        return int(symbol), 1
    found = []
    while symbols[0] != "]":
        found.append(value(symbols))
    symbols.pop(0)
    assert len(found) >= 2
    return OPERATORS[symbol]([v for v, _ in found]), 1 + max(depth for _, depth in found)


def tree_size(draw: random.Random, depth: int, deepest: int, arguments: int, operators: list[int]) -> int:
    """Symbols of a tree drawn by recursion; counts its lists."""
    if depth == deepest or draw.random() > 0.25:
        return 1
    operators[0] += 1
    return 2 + sum(tree_size(draw, depth + 1, deepest, arguments, operators) for _ in range(draw.randint(2, arguments)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length": 12, "shortest": 4, "depth": 2, "arguments": 8},
        {"length": 300, "shortest": 100, "depth": 7, "arguments": 9},
    ],
)
def test_answers_are_those_of_the_recursive_evaluator(options: dict[str, int]) -> None:
    task = build_task("listops", **options)
    prompt = task.sample(200, generator())
    evaluator = task.learners()["evaluator"](prompt)
    for row in range(200):
        symbols = [SYMBOLS[i] for i in prompt.inputs[row].tolist()]
        end = symbols.index("=")
        assert set(symbols[end + 1 :]) <= {"_"}
        assert prompt.scored[row].nonzero().squeeze(1).tolist() == [end]
        assert task.shortest <= end <= task.length
        rest = symbols[:end]
        answer, depth = value(rest)
        assert not rest
        assert depth <= task.depth
        assert prompt.targets[row, end] == answer == evaluator[row, end].argmax()
    assert task.words(prompt).split("=")[1].startswith("[")


def test_sizes_of_trees_are_those_of_the_recursive_generator() -> None:
    """Chi-square over twelve ranges of sizes, 3,000 trees each; and the mean number of lists, within five errors."""
    draw, sizes, lists = random.Random(0), [], []
    while len(sizes) < 3000:
        operators = [0]
        size = tree_size(draw, 1, 5, 6, operators)
        if 10 <= size <= 80:
            sizes.append(size)
            lists.append(operators[0])
    task = build_task("listops", length=80, shortest=10, depth=5, arguments=6)
    prompt = task.sample(3000, generator(1))
    ours = prompt.scored.int().argmax(1).double()
    edges = torch.tensor([14, 17, 20, 23, 27, 31, 36, 42, 50, 60, 70])
    one = torch.bincount(torch.bucketize(torch.tensor(sizes).double(), edges), minlength=12).double()
    two = torch.bincount(torch.bucketize(ours, edges), minlength=12).double()
    assert ((one - two) ** 2 / (one + two)).sum() < 39  # the 99.99% quantile at 11 degrees of freedom is 37.4
    found = ((prompt.inputs >= 10) & (prompt.inputs < 14)).sum(1).double()
    theirs = torch.tensor(lists).double()
    assert (found.mean() - theirs.mean()).abs() < 5 * ((found.var() + theirs.var()) / 3000).sqrt()


def test_operators_and_digits_are_drawn_evenly() -> None:
    """Chi-square, 99.99% quantiles 21.1 and 33.7."""
    tokens = build_task("listops").sample(500, generator()).inputs
    for first, kinds, limit in ((10, 4, 21.1), (0, 10, 33.7)):
        counts = torch.bincount(tokens[(tokens >= first) & (tokens < first + kinds)] - first, minlength=kinds).double()
        expected = counts.sum() / kinds
        assert ((counts - expected) ** 2 / expected).sum() < limit


def test_the_evaluator_does_not_see_the_future() -> None:
    task = build_task("listops", length=30, shortest=4, depth=4)
    prompt = task.sample(20, generator())
    learner = task.learners()["evaluator"]
    answer = learner(prompt)
    changed = prompt.inputs.clone()
    at = prompt.scored.int().argmax(1)
    for row, t in enumerate(at.tolist()):
        changed[row, t + 1 :] = 3
    other = learner(Prompt(changed, prompt.targets, prompt.scored, prompt.shot))
    rows = torch.arange(20)
    torch.testing.assert_close(other[rows, at], answer[rows, at])


def test_long_lists_and_deep_trees_do_not_grow_without_end() -> None:
    for options in ({"arguments": 64}, {"depth": 20, "arguments": 32}):
        task = build_task("listops", **options)
        assert task.sample(4, torch.Generator().manual_seed(0)).scored.sum() == 4
        assert all(split.depth <= 20 for split in task.splits().values())
    with pytest.raises(InputError, match="or fewer arguments"):
        build_task("listops", arguments=10**5).sample(1, torch.Generator().manual_seed(0))


def test_trees_that_are_cut_short_leave_the_others_as_likely() -> None:
    whole, cut = (_Forest(40_000, 5, 6, most, torch.Generator().manual_seed(most), "cpu").size for most in (10**9, 40))
    assert cut.max() == 41
    for size in (4, 5, 6, 8, 12, 20, 30, 40):
        one, other = (whole == size).sum().item(), (cut == size).sum().item()
        assert abs(one - other) < 4 * (one + other) ** 0.5
    assert abs((whole > 40).sum() - (cut > 40).sum()) < 4 * (cut > 40).sum() ** 0.5 * 2**0.5


def test_splits_are_longer_and_deeper() -> None:
    splits = build_task("listops").splits()
    assert list(splits) == ["train", "length=240", "depth=8"]
    for task in splits.values():
        prompt = task.sample(8, generator())
        assert task.errors(task.learners()["evaluator"](prompt), prompt)["accuracy"][prompt.scored].min() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 10}, "length 10 is below shortest 20: choose at least 20"),
        ({"depth": 2, "arguments": 4}, "what depth 2 and 4 arguments can make: at most 6"),
        ({"depth": 1}, "greater than or equal to 2"),
        ({"arguments": 1}, "greater than or equal to 2"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task("listops", **options)


def test_ranges_that_no_tree_falls_in_are_refused() -> None:
    task = build_task("listops", length=5, shortest=5, depth=3, arguments=2)  # sizes are 4, 7 and 10
    with pytest.raises(InputError, match="choose a wider range"):
        task.sample(2, generator())


def test_the_evaluator_refuses_expressions_that_are_too_deep() -> None:
    prompt = build_task("listops").sample(50, generator())
    with pytest.raises(InputError, match="more than 1 lists are open"):
        build_learner("listops_evaluator", depth=1)(prompt)
