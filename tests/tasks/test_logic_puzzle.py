"""Logic-grid puzzles against plain Python that reads their words and tries every table."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from scipy import stats

from contextlab import build_task
from contextlab.errors import InputError
from contextlab.learners.logic_puzzle import BLANK, CLUES, VALUES, all_tables, members
from contextlab.tasks.logic_puzzle import LogicPuzzle, true_clues

Line = tuple[str, str, str]
Table = tuple[tuple[str, ...], ...]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read(task: LogicPuzzle, words: str) -> tuple[list[Line], Table]:
    """The clues, and the rows of the table, from the printed puzzle."""
    lines = words.splitlines()
    clues = [tuple(line.split()) for line in lines[: -task.houses]]
    rows = []
    for number, line in enumerate(lines[-task.houses :], 1):
        house, cells = line.split(": ")
        assert house == f"house-{number}"
        rows.append(tuple(cell.strip("[]") for cell in cells.split()))
    assert all(len(clue) == 3 for clue in clues)
    return clues, tuple(rows)


def puzzles(task: LogicPuzzle, count: int, seed: int = 0) -> list[tuple[list[Line], Table]]:
    prompt = task.sample(count, generator(seed))
    return [read(task, task.words(prompt, row)) for row in range(count)]


def every(houses: int, attributes: int) -> list[Table]:
    columns = [itertools.permutations(VALUES[a][:houses]) for a in range(attributes)]
    return [tuple(zip(*table, strict=True)) for table in itertools.product(*columns)]


def true(clue: Line, table: Table) -> bool:
    """What the paper's clues say, in plain Python."""
    item, how, other = clue
    house = {cell: number for number, row in enumerate(table, 1) for cell in row}
    first = house[item]
    if how == "in":
        return f"house-{first}" == other
    if how == "with":
        return first == house[other]
    if how == "directly-left-of":
        return first + 1 == house[other]
    assert how == "beside"
    return abs(first - house[other]) == 1


SIZES = [
    {"houses": 2, "attributes": 2},
    {"houses": 3, "attributes": 2},
    {"houses": 3, "attributes": 3},
    {"houses": 2, "attributes": 5},
    {"houses": 4, "attributes": 2},
    {"houses": 3, "attributes": 2, "clues": ("found_at",)},
    {"houses": 3, "attributes": 3, "clues": ("direct_left",)},
    {"houses": 3, "attributes": 3, "clues": ("same_house", "direct_left")},
    {"houses": 3, "attributes": 3, "clues": ("besides", "direct_left")},
    {"houses": 3, "attributes": 3, "clues": ("besides", "found_at"), "part": "test"},
]


@pytest.mark.parametrize("options", SIZES, ids=lambda options: "-".join(map(str, options.values())))
def test_one_table_fits_and_every_clue_is_needed(options: dict) -> None:
    task = build_task("logic_puzzle", **options)
    tables = every(task.houses, task.attributes)
    words = dict(zip(CLUES, ("in", "with", "directly-left-of", "beside"), strict=True))
    for clues, table in puzzles(task, 40):
        assert {how for _, how, _ in clues} <= {words[each] for each in task.clues}
        assert [each for each in tables if all(true(clue, each) for clue in clues)] == [table]
        for i in range(len(clues)):
            rest = clues[:i] + clues[i + 1 :]
            assert sum(all(true(clue, each) for clue in rest) for each in tables) > 1


def test_larger_puzzles_have_one_table_too() -> None:
    """By the solver's own bits, which the tests of the learner hold to plain Python: all tables of 4 x 3 and 4 x 4."""
    for attributes in (3, 4):
        task = build_task("logic_puzzle", attributes=attributes)
        prompt = task.sample(30, generator(1))
        solver = task.learners()["puzzle_posterior"]
        left = solver.agreeing(prompt.inputs[:, : 3 * task.slots].unflatten(1, (-1, 3)))
        row, table = members(left)
        assert row.tolist() == list(range(30))
        values = all_tables(task.houses, attributes)[table].long() + 6 * torch.arange(attributes).unsqueeze(1)
        assert torch.equal(values.mT.flatten(1), prompt.targets[:, task.problem - 1 :])


def test_tokens_are_blanks_clues_and_the_table() -> None:
    task = build_task("logic_puzzle", houses=3, attributes=3)
    prompt = task.sample(50, generator(2))
    whole = torch.cat([prompt.inputs, prompt.targets[:, -1:]], 1)
    assert torch.equal(prompt.inputs[:, 1:], prompt.targets[:, :-1])
    assert prompt.scored.sum(1).eq(9).all()
    assert prompt.scored[:, task.problem - 1 :].all()
    for row, (clues, table) in enumerate(puzzles(task, 50, seed=2)):
        shown = [task.symbol(token) for token in whole[row].tolist()]
        blanks = 3 * (task.slots - len(clues))
        assert shown[:blanks] == ["."] * blanks
        assert shown[blanks : task.problem - 1] == [word for clue in clues for word in clue]
        assert shown[task.problem - 1 :] == ["=", *(cell for cells in table for cell in cells)]
    assert torch.equal(task.facets(prompt)["clues"][:, 0], (prompt.inputs[:, : task.problem - 1] != BLANK).sum(1) // 3)


def test_puzzles_with_too_many_clues_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    task = build_task("logic_puzzle", houses=3, attributes=3)
    assert {len(clues) for clues, _ in puzzles(task, 200)} == {4, 5, 6}
    monkeypatch.setattr(LogicPuzzle, "slots", 4)
    tables = every(3, 3)
    for clues, table in puzzles(task, 40):
        assert len(clues) == 4
        assert [each for each in tables if all(true(clue, each) for clue in clues)] == [table]


def test_symmetric_clues_do_not_tell_which_is_left() -> None:
    left = Counter()
    for clues, table in puzzles(build_task("logic_puzzle", houses=3, attributes=3), 1500, seed=3):
        house = {cell: number for number, row in enumerate(table) for cell in row}
        attribute = {value: a for a, values in enumerate(VALUES) for value in values}
        left.update(("beside", house[a] < house[b]) for a, how, b in clues if how == "beside")
        left.update(("with", attribute[a] < attribute[b]) for a, how, b in clues if how == "with")
    for how in ("beside", "with"):
        assert stats.binomtest(left[how, True], left[how, True] + left[how, False]).pvalue > 1e-4


def tables_of(offers: list[list[int]], houses: int, attributes: int) -> list[set[int]]:
    """Numbers of the tables that fit each clue of kind and numbers."""
    orders = list(itertools.permutations(range(houses)))
    where = []  # of each table, the house of each item
    for number in range(len(orders) ** attributes):
        table = [orders[number // len(orders) ** a % len(orders)] for a in range(attributes)]
        where.append([row.index(value) for row in table for value in range(houses)])
    fits = []
    for kind, first, second in offers:
        found = set()
        for number, house in enumerate(where):
            gap = (second if kind == 0 else house[second]) - house[first]
            if (gap == 0, gap == 0, gap == 1, abs(gap) == 1)[kind]:
                found.add(number)
        fits.append(found)
    return fits


def test_clues_are_left_out_one_after_another_in_the_order_given() -> None:
    """The pass over bits, against one that tries every table, for random orders of all true clues."""
    task = build_task("logic_puzzle", houses=3, attributes=2)
    offers = true_clues(CLUES, 3, 2)
    order = torch.rand(40, len(offers), generator=generator(4)).argsort(1)
    found = task._needed(order, offers)
    fits = tables_of(offers.tolist(), 3, 2)
    for row, tried in zip(found.tolist(), order.tolist(), strict=True):
        kept = set(range(len(offers)))
        for clue in tried:
            if set.intersection(*(fits[each] for each in kept - {clue})) == {0}:
                kept.remove(clue)
        assert [i for i, needed in enumerate(row) if needed] == sorted(kept)


def test_true_clues_are_all_that_hold_in_table_0() -> None:
    for houses, attributes in ((2, 2), (3, 3), (4, 2)):
        item = {(a, h): a * houses + h for a in range(attributes) for h in range(houses)}
        expected = {(0, item[a, h], h) for a, h in item}
        for (a, h), (b, k) in itertools.product(item, repeat=2):
            if h == k and a < b:
                expected.add((1, item[a, h], item[b, k]))
            if k == h + 1:
                expected |= {(2, item[a, h], item[b, k]), (3, item[a, h], item[b, k])}
        offers = list(map(tuple, true_clues(CLUES, houses, attributes).tolist()))
        assert len(offers) == len(set(offers))
        assert set(offers) == expected


def test_clues_are_offered_and_tried_as_in_the_papers_code() -> None:
    """Two houses with two attributes: how often which kinds are left, by summing over all orders in plain Python."""
    offers = true_clues(CLUES, 2, 2).tolist()
    fits = tables_of(offers, 2, 2)
    rate = [{"found_at": 0.75, "same_house": 0.75, "direct_left": 1.0, "besides": 1.2}[CLUES[o[0]]] for o in offers]
    pairs = [(i, i + 1) for i, offer in enumerate(offers) if CLUES[offer[0]] == "direct_left"]
    assert all(offers[i][1:] == offers[j][1:] for i, j in pairs)
    expected: Counter[tuple[int, ...]] = Counter()
    for rivals in itertools.product(*pairs):  # of a pair of neighbours, one kind is not offered
        offered = frozenset(range(len(offers))) - set(rivals)
        states = {(offered, offered): 0.5 ** len(pairs)}
        for _ in offered:
            after: Counter[tuple[frozenset[int], frozenset[int]]] = Counter()
            for (rest, untried), chance in states.items():
                total = sum(rate[each] for each in untried)
                for clue in untried:
                    fewer = rest - {clue}
                    single = bool(fewer) and set.intersection(*(fits[each] for each in fewer)) == {0}
                    after[fewer if single else rest, untried - {clue}] += chance * rate[clue] / total
            states = after
        for (rest, _), chance in states.items():
            expected[tuple(sorted(offers[each][0] for each in rest))] += chance
    assert sum(expected.values()) == pytest.approx(1)
    task = build_task("logic_puzzle", houses=2, attributes=2)
    prompt = task.sample(20_000, generator(5))
    kinds = prompt.inputs[:, 1 : 3 * task.slots : 3].sub(42).tolist()
    drawn = Counter(tuple(sorted(kind for kind in row if kind < 4)) for row in kinds)
    assert set(drawn) <= set(expected)
    seen = [drawn[key] for key in expected]
    assert stats.chisquare(seen, [20_000 * chance for chance in expected.values()]).pvalue > 1e-4


def test_tables_of_train_and_test_are_disjoint_and_even() -> None:
    for houses, attributes in ((2, 2), (3, 2)):
        task = build_task("logic_puzzle", houses=houses, attributes=attributes)
        seen = {}
        for split in ("train", "new problems"):
            prompt = task.splits()[split].sample(4000, generator(6))
            drawn = Counter(map(tuple, prompt.targets[:, task.problem - 1 :].tolist()))
            assert stats.chisquare(list(drawn.values())).pvalue > 1e-4
            seen[split] = set(drawn)
        assert seen["train"].isdisjoint(seen["new problems"])
        assert len(seen["train"] | seen["new problems"]) == math.factorial(houses) ** attributes
        assert len(seen["new problems"]) == math.factorial(houses) ** (attributes - 1)


def test_clues_left_out_are_of_the_same_puzzle() -> None:
    task = build_task("logic_puzzle", houses=3, attributes=2)
    tables = every(3, 2)
    for (clues, table), (fewer, same) in zip(puzzles(task, 60), puzzles(task.replace(left_out=2), 60), strict=True):
        assert same == table
        assert fewer == clues[:-2]  # in their random order
        assert sum(all(true(clue, each) for clue in fewer) for each in tables) > 1


def steps(task: LogicPuzzle, clues: list[Line], table: Table) -> list[int]:
    """The greedy elimination of the paper's code, with sets: the step that settles each cell, house by house."""
    tables = every(task.houses, task.attributes)

    def settled(chosen: tuple[int, ...]) -> set[tuple[int, int]]:
        left = [each for each in tables if all(true(clues[i], each) for i in chosen)]
        cells = itertools.product(range(task.houses), range(task.attributes))
        return {(h, a) for h, a in cells if len({each[h][a] for each in left}) == 1}

    taken: tuple[int, ...] = ()
    depth = dict.fromkeys(itertools.product(range(task.houses), range(task.attributes)), 0)
    for step in itertools.count(1):
        rest = [i for i in range(len(clues)) if i not in taken]
        before = settled(taken)
        for size in range(1, len(rest) + 1):
            choices = sorted(itertools.combinations(rest, size), key=lambda more: sum(2**i for i in more))
            best = max(choices, key=lambda more: len(settled(taken + more)))  # the first of the best
            if settled(taken + best) > before:
                break
        else:
            return list(depth.values())
        taken += best
        for cell in settled(taken) - before:
            depth[cell] = step
    raise AssertionError


@pytest.mark.parametrize("options", [{"houses": 3, "attributes": 2}, {"houses": 2, "attributes": 4}, {"left_out": 1}])
def test_depth_is_the_step_of_the_greedy_elimination(options: dict) -> None:
    task = build_task("logic_puzzle", **{"houses": 3, "attributes": 3, **options})
    prompt = task.sample(25, generator(7))
    depth = task.facets(prompt)["depth"]
    assert depth.shape == prompt.inputs.shape
    assert depth[:, : task.problem - 1].eq(0).all()
    for row, (clues, table) in enumerate(puzzles(task, 25, seed=7)):
        assert depth[row, task.problem - 1 :].tolist() == steps(task, clues, table)
    assert depth.max() > 2
    assert (depth[:, task.problem - 1 :] == 0).any() == bool(task.left_out)


def test_solved_is_the_whole_table() -> None:
    task = build_task("logic_puzzle", houses=3, attributes=2)
    prompt = task.sample(4, generator(8))
    answer = task.learners()["puzzle_posterior"](prompt)
    assert task.errors(answer, prompt)["solved"].eq(1).all()
    answer[1, -1] = answer[1, -1].roll(1)
    errors = task.errors(answer, prompt)
    assert errors["solved"][:, -1].tolist() == [1, 0, 1, 1]
    assert errors["accuracy"][1, prompt.scored[1]].sum() == 5
    assert task.chance() == {
        "accuracy": pytest.approx(1 / 6),
        "cross_entropy": pytest.approx(math.log(6)),
        "solved": pytest.approx(1 / 36),
    }


def test_sizes_share_their_ids() -> None:
    task = build_task("logic_puzzle", houses=2, attributes=2)
    splits = task.splits()
    assert list(splits) == ["train", "new problems", "houses=3", "attributes=3", "left_out=1"]
    assert {split.input_size for split in splits.values()} == {task.input_size}
    assert "houses=5" not in build_task("logic_puzzle").splits()  # 1,728,000 tables


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"houses": 5}, "attributes 3 are too many for houses 5: more than 524288 tables; at most 2"),
        ({"houses": 6, "attributes": 6}, "at most 2"),
        ({"houses": 7}, "less than or equal to 6"),
        ({"attributes": 1}, "greater than or equal to 2"),
        ({"clues": ("same_house", "besides")}, "add 'found_at' or 'direct_left'"),
        ({"clues": ()}, "add 'found_at' or 'direct_left'"),
        ({"clues": ("found_in",)}, "did you mean 'found_at'"),
        ({"houses": 2, "attributes": 2, "left_out": 3}, "at most 2"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task("logic_puzzle", **options)
