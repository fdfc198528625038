"""Composed problems against Python's own arithmetic, brute force, and look-up in loops."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from scipy import stats

from contextlab import build_task
from contextlab.errors import InputError
from contextlab.tasks.multi_hop import paths


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(task, count: int, seed: int = 0) -> list[list[str]]:
    """Whole sequences (the prompt and its last target) as symbols."""
    prompt = task.sample(count, generator(seed))
    whole = torch.cat([prompt.inputs, prompt.targets[:, -1:]], 1)
    assert torch.equal(prompt.inputs[:, 1:], prompt.targets[:, :-1])
    return [[task.symbol(token) for token in row] for row in whole.tolist()]


@pytest.mark.parametrize(("digits", "second"), [(1, 1), (3, 2), (2, 3), (12, 12)])
def test_long_multiplication_is_what_python_multiplies(digits: int, second: int) -> None:
    task = build_task("long_multiplication", digits=digits, second_digits=second)
    short = task.replace(form="answer")
    for row, brief in zip(rows(task, 50), rows(short, 50), strict=True):
        text = "".join(row)
        problem, solution = text.split("=")
        a, b = problem.split("*")
        assert len(a) == digits
        assert len(b) == second
        assert a[0] != "0" or digits == 1
        assert b[0] != "0" or second == 1
        partial, product = solution.split(":")
        assert int(product[::-1]) == int(a) * int(b)
        assert [int(line[::-1]) for line in partial.split("+")] == [int(a) * int(digit) for digit in reversed(b)]
        assert "".join(brief) == f"{problem}={product}"


def test_depth_counts_digits_that_need_one_another() -> None:
    task = build_task("long_multiplication", digits=2)
    prompt = task.sample(3, generator())
    depth = task.facets(prompt)["depth"]
    assert depth.shape == prompt.inputs.shape
    #  = 1 2 3 + 1 2 3 : 2 3 4 5
    assert depth[0, prompt.scored[0]].tolist() == [1, 2, 3, 1, 1, 2, 3, 1, 2, 3, 4, 5]


def test_solved_is_the_whole_solution_and_accuracy_each_token() -> None:
    task = build_task("long_multiplication", digits=2)
    prompt = task.sample(4, generator())
    answer = task.learners()["evaluator"](prompt)
    assert task.errors(answer, prompt)["solved"].min() == 1
    last = prompt.length - 1
    answer[1, last] = answer[1, last].roll(1)
    errors = task.errors(answer, prompt)
    assert errors["solved"][:, last].tolist() == [1, 0, 1, 1]
    assert errors["accuracy"][1, prompt.scored[1]].sum() == prompt.scored[1].sum() - 1


def solutions(values: list[int]) -> str:
    """The best answer by trying all, choosing earlier where several are best."""
    best = None
    for choice in itertools.product("YN", repeat=len(values)):
        if "YY" in "".join(choice):
            continue
        total = sum(v for v, c in zip(values, choice, strict=True) if c == "Y")
        if best is None or total > best[0]:
            best = (total, "".join(choice))
    assert best is not None
    return best[1]


def test_best_subset_is_the_first_of_the_best() -> None:
    task = build_task("best_subset", numbers=5, largest=3)
    for row in rows(task, 200):
        values, rest = [int(x) for x in row[:5]], row[6:]
        assert row[5] == "="
        answer = solutions(values)
        assert "".join(rest[5:]) == answer
        for k, shown in enumerate(rest[:5], 1):
            part = values[-k:]
            assert int(shown) == sum(v for v, c in zip(part, solutions(part), strict=True) if c == "Y")
    for row in rows(task.replace(form="answer"), 50):
        assert "".join(row[6:]) == solutions([int(x) for x in row[:5]])


def test_longer_lists_have_the_same_ids() -> None:
    task = build_task("best_subset", numbers=3)
    longer = task.splits()["numbers=6"]
    assert longer.input_size == task.input_size
    assert [longer.symbol(i) for i in range(task.input_size)] == [task.symbol(i) for i in range(task.input_size)]


def test_train_and_test_problems_are_disjoint_and_even() -> None:
    """All problems of a small size are enumerated: each is in one part, and each part is drawn evenly."""
    for task, length, count in (
        (build_task("long_multiplication", digits=1, form="answer"), 3, 100),
        (build_task("best_subset", numbers=3, largest=1, form="answer"), 3, 27),
    ):
        seen = {}
        for split in ("train", "new problems"):
            drawn = Counter(tuple(row[:length]) for row in rows(task.splits()[split], 6000, seed=1))
            seen[split] = set(drawn)
            assert stats.chisquare(list(drawn.values())).pvalue > 1e-4
        assert seen["train"].isdisjoint(seen["new problems"])
        assert len(seen["train"] | seen["new problems"]) == count


def test_answers_follow_from_the_facts_hop_by_hop() -> None:
    task = build_task("multi_hop", entities=5, relations=3, hops=3, queries=2, steps=True)
    for row, brief in zip(rows(task, 40), rows(task.replace(steps=False), 40), strict=True):
        for tokens, shown in ((row, 3), (brief, 1)):
            facts = {(a, r): b for a, r, b in (tokens[i : i + 3] for i in range(0, 45, 3))}
            assert len(facts) == 15
            for r in ("r0", "r1", "r2"):
                assert len({b for (_, relation), b in facts.items() if relation == r}) == 5
            rest = tokens[45:]
            assert len(rest) == 2 * (5 + shown)
            for q in range(2):
                question = rest[q * (5 + shown) : (q + 1) * (5 + shown)]
                here, way = question[0], []
                for relation in question[1:4]:
                    here = facts[here, relation]
                    way.append(here)
                assert question[4:] == ["=", *way[-shown:]]


def test_every_answer_is_scored_and_counted() -> None:
    task = build_task("multi_hop", entities=4, relations=2, hops=2, queries=3, steps=True)
    prompt = task.sample(30, generator(1))
    at = prompt.scored[0].nonzero().flatten().tolist()
    assert at == [27, 28, 33, 34, 39, 40]
    assert prompt.shot[0, at].tolist() == [0, 0, 1, 1, 2, 2]
    assert task.facets(prompt)["depth"][0, at].tolist() == [1, 2] * 3
    assert task.facets(prompt)["depth"].shape == prompt.inputs.shape


def test_paths_of_train_and_test_are_disjoint() -> None:
    task = build_task("multi_hop", relations=3, hops=3)
    train, test = ({tuple(path) for path in paths(t).tolist()} for t in (task, task.splits()["new paths"]))
    assert train.isdisjoint(test)
    assert train | test == set(itertools.product(range(3), repeat=3))
    for part, known in ((task, train), (task.splits()["new paths"], test)):
        tokens = torch.tensor([[part.entities + 1]])
        assert part.symbol(int(tokens)) == "r1"
        asked = part.sample(50, generator()).inputs[:, part.facts :]
        starts = range(0, asked.shape[1], part.question)
        drawn = {tuple((row[i + 1 : i + 4] - part.entities).tolist()) for row in asked for i in starts}
        assert drawn <= known


@pytest.mark.parametrize("name", ["long_multiplication", "best_subset", "multi_hop"])
def test_the_evaluator_makes_no_error_and_looks_at_nothing_to_come(name: str) -> None:
    for task in build_task(name).splits().values():
        prompt = task.sample(20, generator(2))
        answer = task.learners()["evaluator"](prompt)
        assert task.errors(answer, prompt)["accuracy"][prompt.scored].min() == 1
        other = task.sample(20, generator(3))
        for t in prompt.scored[0].nonzero().flatten().tolist()[:3]:
            mixed = task.sample(20, generator(2))
            mixed.inputs[:, t + 1 :] = other.inputs[:, t + 1 :]
            again = task.learners()["evaluator"](mixed)
            scored = prompt.scored[0, : t + 1]
            assert torch.equal(again[:, : t + 1][:, scored], answer[:, : t + 1][:, scored])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("multi_hop", {"hops": 10}, "at most 9"),
        ("multi_hop", {"relations": 1, "part": "test"}, "use relations 4"),
        ("multi_hop", {"entities": 1}, "greater than or equal to 2"),
        ("best_subset", {"numbers": 1}, "greater than or equal to 2"),
        ("best_subset", {"numbers": 5, "most": 4}, "use most 5"),
        ("long_multiplication", {"digits": 0}, "greater than 0"),
        ("long_multiplication", {"form": "scratch"}, "did you mean 'scratchpad'"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task(name, **options)
