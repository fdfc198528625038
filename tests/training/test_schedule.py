from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import Sums

from contextlab.errors import InputError
from contextlab.training import CurriculumSpec, TrainSpec
from contextlab.training.schedule import Curriculum, Turns, clip, rate


@settings(deadline=None, max_examples=50)
@given(steps=st.integers(1, 300), warmup=st.integers(0, 350), final=st.just(0.0) | st.floats(1e-9, 1))
def test_rate_rises_then_falls(steps: int, warmup: int, final: float) -> None:
    spec = TrainSpec(steps=steps, warmup=warmup, final_fraction=final)
    rates = [rate(step, spec) for step in range(steps)]
    assert all(0 < r <= 1 for r in rates)
    peak = min(warmup, steps) - 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[max(peak, 0) :] == sorted(rates[max(peak, 0) :], reverse=True)


def test_rate_at_known_steps() -> None:
    spec = TrainSpec(steps=110, warmup=10, final_fraction=0.2)
    assert rate(0, spec) == pytest.approx(0.1)
    assert rate(10, spec) == 1.0
    assert rate(60, spec) == pytest.approx(0.6)
    assert rate(110, spec) == pytest.approx(0.2)


@settings(deadline=None, max_examples=20)
@given(largest=st.floats(0.01, 10), seed=st.integers(0, 999))
def test_clip_is_that_of_torch(largest: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = {str(i): torch.randn(2, i + 1, generator=generator) for i in range(3)}
    expected = [torch.nn.Parameter(torch.zeros_like(g)) for g in found.values()]
    for parameter, gradient in zip(expected, found.values(), strict=True):
        parameter.grad = gradient.clone()
    theirs = torch.nn.utils.clip_grad_norm_(expected, largest)
    clipped, norm = clip(found, largest)
    torch.testing.assert_close(norm, theirs)
    for parameter, gradient in zip(expected, clipped.values(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    assert all(a is b for a, b in zip(clip(found, None)[0].values(), found.values(), strict=True))


def test_curriculum_grows_options() -> None:
    grows = {
        "used": CurriculumSpec(start=1, end=3, every=10),
        "length": CurriculumSpec(start=2, end=6, add=2, every=5),
    }
    tasks = Curriculum(Sums(), TrainSpec(steps=100, curriculum=grows))
    seen = [(tasks(step).used, tasks(step).length) for step in (0, 5, 9, 10, 25, 99)]  # type: ignore[attr-defined]
    assert seen == [(1, 2), (1, 4), (1, 4), (2, 6), (3, 6), (3, 6)]
    assert tasks(50) is tasks(99)
    task = Sums()
    assert Curriculum(task, TrainSpec())(0) is task


@pytest.mark.parametrize(
    ("option", "end", "message"),
    [
        ("lenght", 6, "train.curriculum: unknown option 'lenght' of Sums; did you mean 'length'?"),
        ("used", 4, "used 4 is larger than size 3"),
        ("size", 3, "input_size is 1, but the model is built for 3"),
    ],
)
def test_impossible_curricula_are_refused(option: str, end: int, message: str) -> None:
    spec = TrainSpec(steps=10, curriculum={option: CurriculumSpec(start=1, end=end, every=1)})
    with pytest.raises(InputError) as caught:
        Curriculum(Sums(used=1) if option == "size" else Sums(), spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


THREE = [Sums(scale=1.0), Sums(scale=2.0), Sums(scale=3.0)]


def test_one_task_after_the_other() -> None:
    turns = Turns(THREE, TrainSpec(steps=11, order="sequential"))
    assert [turns.which(step) for step in range(11)] == [0] * 4 + [1] * 4 + [2] * 3
    assert turns(7) is THREE[1]
    assert [Turns(THREE[:1], TrainSpec(steps=3), 5).which(step) for step in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("order", ["mixed", "random"])
def test_tasks_of_a_step_are_drawn_evenly_from_those_that_are_allowed(order: str) -> None:
    turns = Turns(THREE, TrainSpec(steps=9000, order=order), seed=1)
    chosen = torch.tensor([turns.which(step) for step in range(9000)]).view(3, 3000)
    for block, steps in enumerate(chosen):
        among = block + 1 if order == "mixed" else 3
        counts = torch.bincount(steps, minlength=3)
        assert (counts[among:] == 0).all()
        if among > 1:
            assert scipy.stats.chisquare(counts[:among].numpy()).pvalue > 1e-3
    again = Turns(THREE, TrainSpec(steps=9000, order=order), seed=1)
    assert [again.which(step) for step in range(8999, 8900, -1)] == chosen.flatten().flip(0)[:99].tolist()
    plain, zero = Turns(THREE, TrainSpec(steps=90, order=order)), Turns(THREE, TrainSpec(steps=90, order=order), seed=0)
    assert [plain.which(step) for step in range(90)] == [zero.which(step) for step in range(90)]
    other = Turns(THREE, TrainSpec(steps=9000, order=order), seed=2)
    assert [other.which(step) for step in range(6000, 9000)] != chosen[2].tolist()


def test_options_grow_in_every_task() -> None:
    grows = {"length": CurriculumSpec(start=2, end=6, every=1)}
    turns = Turns(THREE, TrainSpec(steps=6, order="sequential", curriculum=grows))
    seen = [(turns(step).scale, turns(step).length) for step in range(6)]  # type: ignore[attr-defined]
    assert seen == [(1, 2), (1, 3), (2, 4), (2, 5), (3, 6), (3, 6)]


def test_too_few_steps_for_the_tasks_are_refused() -> None:
    with pytest.raises(InputError, match=r"train.steps: 2 steps are too few for 3 tasks; use at least 3"):
        Turns(THREE, TrainSpec(steps=2))
    with pytest.raises(InputError, match="expected a task or several, got none"):
        Turns([], TrainSpec())
