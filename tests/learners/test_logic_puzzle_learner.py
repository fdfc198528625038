"""The learner of logic-grid puzzles against plain Python that tries every table."""

from __future__ import annotations

import itertools

import pytest
import torch

from contextlab import build_learner, build_task
from contextlab.errors import InputError
from contextlab.learners import PuzzlePosterior
from contextlab.learners.logic_puzzle import BLANK, CLUE, CLUES, EQUALS, HOUSE, VOCABULARY, members, pack
from contextlab.prompt import Prompt


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asked(tokens: torch.Tensor) -> Prompt:
    return Prompt(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens))


def fits(clue: list[int], where: dict[int, int]) -> bool:
    """where: token of each item -> its house, from 0."""
    first, kind, second = clue
    kind -= CLUE
    if not 0 <= kind < len(CLUES) or first not in where:
        return True
    if CLUES[kind] == "found_at":
        return not HOUSE <= second < HOUSE + 1 + max(where.values()) or where[first] == second - HOUSE
    if second not in where:
        return True
    gap = where[second] - where[first]
    return {"same_house": gap == 0, "direct_left": gap == 1, "besides": abs(gap) == 1}[CLUES[kind]]


def by_hand(tokens: list[int], houses: int, attributes: int, slots: int) -> list[dict[int, float]]:
    """Of each cell the chance of each token, from all tables that agree with the clues and the cells before."""
    columns = [
        [[6 * a + v for v in order] for order in itertools.permutations(range(houses))] for a in range(attributes)
    ]
    left = []
    for table in itertools.product(*columns):
        where = {item: house for column in table for house, item in enumerate(column)}
        if all(fits(tokens[3 * i : 3 * i + 3], where) for i in range(slots)):
            left.append([table[a][h] for h in range(houses) for a in range(attributes)])
    shown, answers = tokens[3 * slots + 1 :], []
    for cell in range(houses * attributes):
        agree = [cells for cells in left if cells[:cell] == shown[:cell]]
        values = [cells[cell] for cells in agree]
        answers.append({value: values.count(value) / len(values) for value in values})
    return answers


@pytest.mark.parametrize(("houses", "attributes"), [(2, 2), (3, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("left_out", [0, 2])
def test_probabilities_are_shares_of_the_tables_that_agree(houses: int, attributes: int, left_out: int) -> None:
    task = build_task("logic_puzzle", houses=houses, attributes=attributes, left_out=left_out)
    prompt = task.sample(12, generator(1))
    found = task.learners()["puzzle_posterior"](prompt).double().exp()
    torch.testing.assert_close(found.sum(2), torch.ones(found.shape[:2], dtype=torch.float64), rtol=0, atol=1e-5)
    assert found[:, : task.problem - 1].sub(1 / VOCABULARY).abs().max() < 1e-6
    for row, tokens in enumerate(prompt.inputs.tolist()):
        for cell, chances in enumerate(by_hand(tokens, houses, attributes, task.slots)):
            expected = torch.zeros(VOCABULARY, dtype=torch.float64)
            for value, chance in chances.items():
                expected[value] = chance
            assert (found[row, task.problem - 1 + cell] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_random_clues_are_read_or_say_nothing(seed: int) -> None:
    """Clues of any tokens, true of no puzzle in particular: those that make no sense change nothing."""
    slots = 3
    learner = PuzzlePosterior(3, 2, slots)
    tokens = torch.randint(VOCABULARY, (40, 3 * slots + 6), generator=generator(seed))
    likely = torch.tensor([0, 1, 2, 6, 7, 8])
    tokens[:20, : 3 * slots : 3] = likely[torch.randint(6, (20, slots), generator=generator(seed + 100))]
    tokens[:20, 1 : 3 * slots : 3] = CLUE + torch.randint(4, (20, slots), generator=generator(seed + 200))
    tokens[:20, 2 : 3 * slots : 3] = likely[torch.randint(6, (20, slots), generator=generator(seed + 300))]
    tokens[:20, 2] = HOUSE + torch.randint(4, (20,), generator=generator(seed + 400))
    tokens[:, 3 * slots] = EQUALS
    found = learner(asked(tokens)).double().exp()
    assert found.isfinite().all()
    several = 0
    for row, shown in enumerate(tokens.tolist()):
        for cell, chances in enumerate(by_hand(shown, 3, 2, slots)):
            expected = torch.full((VOCABULARY,), 0.0 if chances else 1 / VOCABULARY, dtype=torch.float64)
            for value, chance in chances.items():
                expected[value] = chance
            several += 0 < max(chances.values(), default=0) < 1
            assert (found[row, 3 * slots + cell] - expected).abs().max() < 1e-5
    assert several > 20


@pytest.mark.parametrize("preset", [None, "easy", "hard"])
def test_it_solves_every_puzzle(preset: str | None) -> None:
    task = build_task("logic_puzzle", preset=preset)
    for name in ("train", "new problems"):
        split = task.splits()[name]
        prompt = split.sample(100 if preset != "hard" else 20, generator(2))
        errors = split.errors(split.learners()["puzzle_posterior"](prompt), prompt)
        assert errors["solved"].eq(1).all()
        assert errors["cross_entropy"][prompt.scored].max() < 1e-4


def test_many_prompts_at_once_are_answered_as_each_alone() -> None:
    task = build_task("logic_puzzle", left_out=1)
    prompt = task.sample(700, generator(3))  # more than are held at once
    learner = task.learners()["puzzle_posterior"]
    found = learner(prompt)
    for start in (0, 300, 690):
        torch.testing.assert_close(learner(prompt.rows(start, start + 10)), found[start : start + 10])


def test_bits_are_packed_and_read_back() -> None:
    for count in (1, 63, 64, 65, 216):
        sets = torch.rand(7, count, generator=generator(count)) < 0.3
        row, number = members(pack(sets))
        assert torch.equal(torch.stack([row, number], 1), sets.nonzero())


def test_other_prompts_are_refused() -> None:
    learner = build_learner("puzzle_posterior", houses=3, attributes=2, slots=5)
    with pytest.raises(InputError, match="reads 21 tokens; the prompt has 22"):
        learner(asked(torch.full((1, 22), BLANK)))
    with pytest.raises(InputError, match="vocabulary 48"):
        learner(asked(torch.full((1, 21), VOCABULARY)))
    with pytest.raises(InputError, match="token ids"):
        learner(asked(torch.zeros(1, 21)))
    with pytest.raises(InputError, match="at most 2"):
        PuzzlePosterior(5, 3, 5)
