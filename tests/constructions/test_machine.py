"""A looped model that carries out the SUBLEQ program of its prompt, one instruction a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab import InputError, build_model
from contextlab.constructions import SubleqConstruction
from contextlab.constructions.machine import LARGEST
from contextlab.tasks import build_task
from tests.constructions.agreement import distance


@settings(max_examples=5, deadline=None)
@given(
    lines=st.integers(1, 8), cells=st.integers(1, 4), steps=st.integers(1, 8), values=st.sampled_from([1, 9, 20_000]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_it_runs_programs_without_an_error(lines, cells, steps, values, seed):
    task = build_task("subleq", lines=lines, cells=cells, steps=steps, values=values)
    assert distance(SubleqConstruction(lines, cells, steps), task, seed) == (0, 0)


@torch.no_grad()
def test_it_is_exact_in_float32_up_to_the_largest_numbers():
    """A program that makes them grow as fast as any does, each cell less the other in turn."""
    task = build_task("subleq", lines=26, cells=2, steps=25)
    made = SubleqConstruction(26, 2, 25)
    made.check_task(task)
    prompt = task.sample(1, torch.Generator().manual_seed(0))
    step = torch.arange(25)
    prompt.inputs[0, :25, 4:7] = torch.stack([step % 2, 1 - step % 2, step + 1], 1).float()
    prompt.inputs[0, 26:28, 7] = torch.tensor([9.0, -9.0])
    wanted = made.learner()(prompt)
    assert LARGEST / 2 < wanted.abs().max() < LARGEST
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(made.build(dtype)(prompt.inputs.to(dtype)), wanted.to(dtype))


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{"lines": 2048, "cells": 1}, {"lines": 2, "cells": 64}])
def test_it_finds_every_address(sizes):
    task = build_task("subleq", **sizes, steps=2)
    prompt = task.sample(1, torch.Generator().manual_seed(1))
    prompt.inputs[0, 0, 4:7] = torch.tensor([sizes["cells"] - 1, sizes["cells"] - 1, sizes["lines"] - 1]).float()
    made = SubleqConstruction(**sizes, steps=2)
    assert torch.equal(build_model(made.spec())(prompt.inputs), made.learner()(prompt))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 30}, "steps 30: the numbers of the memory may grow beyond 2097151, .* use at most 29"),
        ({"lines": 2049}, "lines 2049: the squares of addresses are exact in float32 up to 2048; use at most 2048"),
        ({"cells": 2049}, "cells 2049: .* use at most 2048"),
    ],
)
def test_sizes_for_which_it_would_not_be_exact_are_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        SubleqConstruction(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("subleq", {"lines": 9}, "subleq_construction is written for lines 8, the task has 9; give lines: 9"),
        ("subleq", {"steps": 9}, "is written for steps 8, the task has 9; give steps: 9"),
        ("subleq", {"values": 100_000}, "values of up to 100000, 8 steps .* above 2097151.* at most 5 steps"),
        ("linear_regression", {}, "runs programs as the task subleq draws them; name that task"),
    ],
)
def test_tasks_that_it_does_not_fit_are_refused_in_one_line(name, options, message):
    with pytest.raises(InputError, match=message) as caught:
        SubleqConstruction().spec().for_task(build_task(name, **options))
    assert "\n" not in str(caught.value)
