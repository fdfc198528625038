from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import Sums

from contextlab.errors import InputError
from contextlab.training import CurriculumSpec, TrainSpec
from contextlab.training.schedule import Curriculum, clip, rate


@settings(deadline=None, max_examples=50)
@given(steps=st.integers(1, 300), warmup=st.integers(0, 350), final=st.floats(0, 1))
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
        ("lenght", 6, "train.curriculum: unknown option of Sums 'lenght'; did you mean 'length'?"),
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
