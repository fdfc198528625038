"""Words of groups, counters and boxes against plain Python."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab import TaskSpec, build_task
from contextlab.errors import InputError
from contextlab.tasks.groups import group_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moves(name: str) -> dict[int, int]:
    """What a permutation in cycles does."""
    found = {}
    for cycle in re.findall(r"\((\d+)\)", name):
        for a, b in zip(cycle, cycle[1:] + cycle[0], strict=True):
            found[int(a)] = int(b)
    return found


def combine(kind: str, size: int, left: str, right: str) -> str | dict[int, int]:
    """The product of two elements by their names: a sum, or what becomes of each number under left, then right."""
    if kind == "Z":
        return str((int(left) + int(right)) % size)
    first, second = moves(left), moves(right)
    image = {i: second.get(first.get(i, i), first.get(i, i)) for i in range(1, size + 1)}
    return {i: j for i, j in image.items() if i != j}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("Z2", 2),
        ("Z60", 60),
        ("S3", 6),
        ("S5", 120),
        ("A3", 3),
        ("A4", 12),
        ("A5", 60),
        ("A4xZ5", 60),
        ("S3xZ2xZ2", 24),
    ],
)
def test_groups_are_what_they_are_called(name: str, order: int) -> None:
    group = group_of(name)
    table, every = group.table, torch.arange(order)
    assert len(group.names) == len(set(group.names)) == order
    assert table.shape == (order, order)
    assert torch.equal(table[0], every)
    assert torch.equal(table[:, 0], every)
    assert torch.equal(table.sort(1).values, every.expand(order, -1)), "each row holds each element once"
    assert torch.equal(table.sort(0).values, every.unsqueeze(1).expand(-1, order))
    a, b, c = torch.randint(order, (3, 500), generator=generator())
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    factors = [(part[0], int(part[1:])) for part in name.split("x")]
    for i, j in zip(a[:100].tolist(), b[:100].tolist(), strict=True):
        parts = [group.names[k].split(",") for k in (i, j, table[i, j])]
        for (kind, size), left, right, product in zip(factors, *parts, strict=True):
            expected = combine(kind, size, left, right)
            assert (product if kind == "Z" else moves(product)) == expected
    made, new = {0}, {0}
    while new:
        new = {table[i, g].item() for i in new for g in group.generators} - made
        made |= new
    assert made == set(range(order)), "the generators make all"


def test_only_the_named_elements_are_drawn_and_evenly() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for name, elements, count in (
        ("S4", "all", 24),
        ("S4", "swaps", 7),
        ("S4", "generators", 2),
        ("A5", "generators", 3),
    ):
        task = build_task("group_word", group=name, elements=elements, length=20)
        prompt = task.sample(500, generator(1))
        _, seen = prompt.inputs.unique(return_counts=True)
        assert len(seen) == count
        assert scipy.chisquare(seen.numpy()).pvalue > 1e-4
        if elements == "all":  # then the state is even, too
            assert scipy.chisquare(prompt.targets.unique(return_counts=True)[1].numpy()).pvalue > 1e-4
    swaps = {group_of("S4").names[i] for i in group_of("S4").swaps}
    assert swaps == {"e", *(f"({a}{b})" for a, b in itertools.combinations("1234", 2))}


def test_words_multiply_to_their_targets() -> None:
    for name in ("S3", "A5", "S5"):
        task = build_task("group_word", group=name, length=9)
        prompt = task.sample(10, generator(2))
        assert prompt.scored.all()
        for row, targets in zip(prompt.inputs.tolist(), prompt.targets.tolist(), strict=True):
            state: dict[int, int] = {}
            for element, target in zip(row, targets, strict=True):
                change = moves(task.symbol(element))
                state = {i: change.get(state.get(i, i), state.get(i, i)) for i in range(1, 6)}
                assert moves(task.symbol(target)) == {i: j for i, j in state.items() if i != j}
    bits = build_task("group_word", group="Z2", length=12).sample(5, generator(3))
    assert torch.equal(bits.targets, bits.inputs.cumsum(1) % 2), "Z2 is parity"
    numbers = build_task("group_word", group="Z7", length=12).sample(5, generator(3))
    assert torch.equal(numbers.targets, numbers.inputs.cumsum(1) % 7), "Z7 is addition modulo 7"


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(2, 5), st.sampled_from(["stay", "wrap"]), st.integers(0, 999))
def test_counters_count(counters: int, limit: int, at_limit: str, seed: int) -> None:
    task = build_task("counters", counters=counters, limit=limit, at_limit=at_limit, length=15)
    prompt = task.sample(3, generator(seed))
    for row, targets in zip(prompt.inputs.tolist(), prompt.targets.tolist(), strict=True):
        values = [0] * counters
        for token, target in zip(row, targets, strict=True):
            name, direction = task.symbol(token)
            i = ord(name) - ord("a")
            values[i] += 1 if direction == "+" else -1
            values[i] = values[i] % limit if at_limit == "wrap" else max(0, min(limit - 1, values[i]))
            assert target == values[i]


def replay(task: Any, tokens: list[int]) -> dict[str, set[str]]:
    """The contents of every place after the events, from the symbols."""
    words = [task.symbol(token) for token in tokens]
    boxes: dict[str, set[str]] = {}
    for thing, to in zip(words[0 : task.told : 2], words[1 : task.told : 2], strict=True):
        moved = boxes.get(thing, set()) if thing.startswith("b") else {thing}
        boxes = {name: held - moved for name, held in boxes.items()}
        boxes[to] = boxes.get(to, set()) | moved
    return boxes


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 8), st.integers(0, 999), st.data())
def test_boxes_hold_what_was_moved_into_them(boxes: int, objects: int, events: int, seed: int, data: Any) -> None:
    queries = data.draw(st.integers(1, boxes))
    task = build_task("entity_boxes", boxes=boxes, objects=objects, events=events, queries=queries)
    prompt = task.sample(4, generator(seed))
    for row, targets, scored in zip(
        prompt.inputs.tolist(), prompt.targets.tolist(), prompt.scored.tolist(), strict=True
    ):
        held = replay(task, row)
        words = [task.symbol(token) for token in row]
        at, asked = task.told, []
        assert not any(scored[:at])
        for _ in range(queries):
            assert words[at] == "?"
            box = words[at + 1]
            contents = sorted(held.get(box, set()), key=lambda name: int(name[1:]))
            assert words[at + 2 : at + 3 + len(contents)] == [*contents, "end"]
            span = range(at + 1, at + 2 + len(contents))
            assert [task.symbol(targets[t]) for t in span] == [*contents, "end"]
            assert [scored[at], *(scored[t] for t in span)] == [False] + [True] * len(span)
            at, asked = span[-1] + 2, [*asked, box]
        assert len(set(asked)) == queries
        assert set(words[at:]) <= {"end"}
        assert not any(scored[at - 1 :])


def test_events_are_drawn_as_said() -> None:
    """Places before and after each event; pours in their share, and every other choice even."""
    scipy = pytest.importorskip("scipy.stats")
    task = build_task("entity_boxes", boxes=4, objects=5, events=3, pours=0.4)
    count = 6000
    prompt = task.sample(count, generator(5))
    events = prompt.inputs[:, : task.told].unflatten(1, (-1, 2))
    first = events[:, :5]
    assert torch.equal(first[..., 0].sort(1).values, torch.arange(5).expand(count, -1)), "each object is placed once"
    assert scipy.chisquare(first[..., 0][:, 0].bincount().numpy()).pvalue > 1e-4
    assert scipy.chisquare(first[..., 1].flatten().bincount(minlength=9)[5:].numpy()).pvalue > 1e-4
    thing, to = events[:, 5].unbind(1)  # no object is out yet, so a pour is always possible
    pour = thing >= 5
    assert abs(pour.double().mean().item() - 0.4) < 5 * math.sqrt(0.24 / count)
    place = first[..., 1].gather(1, first[..., 0].argsort(1))  # of each object before
    assert (thing[pour].unsqueeze(1) == place[pour]).any(1).all(), "what is poured is not empty"
    assert (thing != to).all()
    assert to[pour].max() < task.out
    away = (to[~pour] - place[~pour].gather(1, thing[~pour].unsqueeze(1)).squeeze(1)) % 5
    assert away.min() > 0, "an object goes elsewhere"
    assert scipy.chisquare(away.bincount()[1:].numpy()).pvalue > 1e-4
    assert scipy.chisquare(thing[~pour].bincount().numpy()).pvalue > 1e-4
    never = build_task("entity_boxes", pours=0.0).sample(50, generator(5))
    assert (never.inputs[:, : build_task("entity_boxes").told : 2] < 10).all()


CASES = [
    ("group_word", {"group": "S4", "length": 11}),
    ("counters", {"counters": 2, "limit": 3, "length": 11}),
    ("entity_boxes", {"boxes": 3, "objects": 4, "events": 5, "queries": 2}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_evaluator_makes_no_error_on_any_split_and_does_not_look_ahead(name: str, options: dict[str, Any]) -> None:
    task = build_task(name, **options)
    assert next(iter(task.splits())) == "train"
    assert len(task.splits()) >= 3
    for split in task.splits().values():
        prompt = split.sample(30, generator(6))
        (best,) = split.learners().values()
        assert split.errors(best(prompt), prompt)["accuracy"][prompt.scored].min() == 1
        assert split.loss(best(prompt), prompt) < 1e-4
        assert split.input_size == task.input_size
    prompt = task.sample(8, generator(7))
    (best,) = task.learners().values()
    found = best(prompt)
    for t in range(prompt.length - 1):
        changed = prompt.rows(0, 8)
        changed.inputs = prompt.inputs.clone()
        changed.inputs[:, t + 1 :] = changed.inputs[:, t + 1 :].flip(0)
        assert torch.equal(best(changed)[:, : t + 1], found[:, : t + 1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("group_word", {"group": "Z1"}, "smallest of its kind is Z2"),
        ("group_word", {"group": "A2"}, "smallest of its kind is A3"),
        ("group_word", {"group": "S7"}, "more than 1000 elements"),
        ("group_word", {"group": "A5xS5"}, "more than 1000 elements"),
        ("group_word", {"group": "Q8"}, "group 'Q8' is unknown: use a cyclic group such as Z60"),
        ("group_word", {"group": "A5", "elements": "swaps"}, "the group is A5"),
        ("group_word", {"length": 0}, "greater than 0"),
        ("counters", {"limit": 1}, "greater than or equal to 2"),
        ("counters", {"at_limit": "wrp"}, "did you mean 'wrap'"),
        ("entity_boxes", {"boxes": 3, "queries": 4}, "at most 3"),
        ("entity_boxes", {"pours": 1.5}, "less than or equal to 1"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task(name, **options)
    with pytest.raises(InputError, match=message):
        TaskSpec.parse({"name": name, "options": options})
