"""Losses and errors are computed in float32 at least, and keep the digits of a float64 model."""

from __future__ import annotations

import pytest
import torch

from contextlab.tasks import build_task


@pytest.mark.parametrize("name", ["linear_regression", "associative_recall"])
def test_losses_keep_the_digits_of_the_prediction(name: str) -> None:
    task = build_task(name)
    prompt = task.sample(3, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    shape = (*prompt.inputs.shape[:2], task.output_size)
    exact = torch.randn(shape, generator=generator, dtype=torch.float64)
    loss = task.loss(exact, prompt)
    assert loss.dtype == torch.float64
    moved = task.loss(exact * (1 + 1e-11), prompt)  # less than float32 can tell
    assert 1e-13 < float((moved - loss).abs() / loss) < 1e-9
    assert all(each.dtype in (torch.float64, torch.float32) for each in task.errors(exact, prompt).values())
    half = exact.bfloat16()
    assert task.loss(half, prompt).dtype == torch.float32
    torch.testing.assert_close(task.loss(half, prompt).double(), task.loss(half.double(), prompt), rtol=1e-5, atol=0)
