"""SUBLEQ programs: what is drawn, what they leave behind by a loop written out, and what is refused."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab import InputError, build_task
from contextlab.learners import SubleqInterpreter
from contextlab.learners.subleq import most_steps


def drawn(batch=3, seed=0, **options):
    return build_task("subleq", **options).sample(batch, torch.Generator().manual_seed(seed))


def naive(program, memory, steps):
    """Memory and the next line, one instruction after another."""
    memory, line = list(memory), 0
    for _ in range(steps):
        a, b, c = program[line]
        memory[b] -= memory[a]
        line = c if memory[b] <= 0 else line + 1
    return [*memory, line]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 12), st.integers(1, 50), st.integers(0, 999))
def test_the_answer_is_what_the_program_leaves(lines, cells, steps, values, seed):
    prompt = drawn(seed=seed, lines=lines, cells=cells, steps=steps, values=values)
    assert prompt.inputs.shape == (3, lines + cells + 1, 8)
    assert prompt.targets.shape == (3, lines + cells + 1, cells + 1)
    for tokens, targets, scored in zip(prompt.inputs.tolist(), prompt.targets.tolist(), prompt.scored, strict=True):
        kinds = [[1, 0, 0, line] for line in range(lines)] + [[0, 1, 0, cell] for cell in range(cells)]
        assert [token[:4] for token in tokens] == [*kinds, [0, 0, 1, 0]]
        program, memory = [list(map(int, token[4:7])) for token in tokens[:lines]], [t[7] for t in tokens[lines:-1]]
        assert targets[-1] == naive(program, memory, steps)
        assert not any(map(any, targets[:-1]))
        assert not any(token[7] for token in tokens[:lines])
        assert not any(any(token[4:7]) for token in tokens[lines:])
        assert max(map(abs, memory)) <= values
        assert all(a < cells and b < cells and c < lines for a, b, c in program)
        assert program[-1][0] == program[-1][1]
        assert scored.nonzero().tolist() == [[lines + cells]]
    answer = SubleqInterpreter(lines, cells, steps)(prompt)
    assert torch.equal(answer, prompt.targets)


def test_cells_jumps_and_numbers_are_drawn_evenly():
    prompt = drawn(4000, lines=3, cells=4, values=2)
    for column, at in ((4, 0), (5, 1), (6, 2), (7, 5)):
        counts = prompt.inputs[:, at, column].unique(return_counts=True)[1]
        assert len(counts) == {4: 4, 5: 4, 6: 3, 7: 5}[column]
        assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_how_answers_are_scored():
    task = build_task("subleq", lines=3, cells=2, steps=2)
    prompt = task.sample(2, torch.Generator().manual_seed(0))
    said = prompt.targets.clone()
    said[:, -1] += torch.tensor([[0.4, 0.0, -0.4], [0.0, 3.0, 0.0]])
    found = {name: each[:, -1].tolist() for name, each in task.errors(said, prompt).items()}
    assert found["squared_error"] == pytest.approx([0.32, 9.0], abs=1e-5)
    assert found["accuracy"] == pytest.approx([1.0, 2 / 3])
    assert found["exact_match"] == [1.0, 0.0]
    assert task.loss(said, prompt).item() == pytest.approx(4.66, abs=1e-5)


def test_numbers_grow_as_fibonacci_s_at_most():
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(sum(fibonacci[-2:]))
    for steps in range(1, 38):  # values x F(steps + 2), the first two of which are F(1) = F(2) = 1
        assert most_steps(3, 3 * fibonacci[steps + 1]) == steps
        assert most_steps(3, 3 * fibonacci[steps + 1] - 1) == steps - 1
    # a program that grows so: the one cell less the other, in turn, of opposite signs
    program = [[step % 2, 1 - step % 2, step + 1] for step in range(9)]
    assert max(map(abs, naive(program, [3, -3], 9)[:2])) == 3 * fibonacci[10]


def test_the_prompt_in_words():
    task = build_task("subleq", lines=2, cells=2, steps=1)
    prompt = drawn(1, lines=2, cells=2, steps=1)
    prompt.inputs[0, :2, 4:7] = torch.tensor([[0, 1, 0], [1, 1, 1]])
    prompt.inputs[0, 2:4, 7] = torch.tensor([3, -4])
    prompt.targets[0, -1] = torch.tensor([3, -7, 0])
    assert task.words(prompt) == "0: 0 1 0\n1: 1 1 1\nmemory 3 -4\nrun [memory 3 -7, next line 0]"


def test_splits():
    assert list(build_task("subleq").splits()) == ["train", "steps=16", "lines=16"]
    assert list(build_task("subleq", steps=20).splits()) == ["train", "lines=16"]  # 40 would leave what float32 holds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 30}, "steps 30: from values of up to 9 .* above 2\\^24.* use at most 29"),
        ({"values": 100_000, "steps": 11}, "steps 11: from values of up to 100000 .* use at most 10"),
        ({"cells": 0}, "cells: input should be greater than 0"),
    ],
)
def test_sizes_whose_numbers_are_not_exact_are_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        build_task("subleq", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        ((0, 0, 6), 3.0, "expected whole numbers, instructions of cells and lines that there are"),
        ((0, 0, 4), -1.0, "expected whole numbers, instructions of cells and lines that there are"),
        ((0, 4, 7), 0.5, "expected whole numbers"),
        ((0, 2, 4), 5.0, "a last line with a = b|of cells and lines that there are"),
        ((0, 0, 0), 0.0, "reads so many lines and cells, then one token that runs the program"),
        ((0, 4, 7), 2.0**51, "steps 8: numbers could become larger than 2\\^53"),
    ],
)
def test_what_is_no_prompt_of_the_task_is_not_interpreted(at, value, message):
    prompt = drawn(1, lines=3, cells=2).to(torch.float64)
    prompt.inputs[at] = value
    with pytest.raises(InputError, match=message) as caught:
        SubleqInterpreter(3, 2, 8)(prompt)
    assert "\n" not in str(caught.value)


def test_other_sizes_are_not_interpreted():
    with pytest.raises(InputError, match="lines 4, cells 2 reads 7 vectors of 8 numbers, as subleq draws; got"):
        SubleqInterpreter(4, 2, 8)(drawn(1, lines=3, cells=2))
