"""Prompts as people read them."""

from __future__ import annotations

import torch

from contextlab.prompt import Prompt
from contextlab.tasks import build_task


def test_a_prompt_without_examples_is_told_vector_by_vector_and_answers_only_where_they_count() -> None:
    prompt = Prompt(
        inputs=torch.tensor([[[9.0, 9.0]] * 3, [[1.0, 0.5], [2.0, -1.0], [0.0, 3.0]]]),
        targets=torch.tensor([[[9.0]] * 3, [[4.0], [5.0], [-6.0]]]),
        scored=torch.tensor([[True] * 3, [False, True, False]]),
        shot=torch.zeros(2, 3, dtype=torch.int64),
    )
    lines = build_task("linear_regression").words(prompt, row=1).splitlines()
    assert len(lines) == 3
    assert ["[" in line for line in lines] == [False, True, False]
    before, answer = lines[1].split("[")
    assert [float(each) for each in before.replace(",", " ").split()] == [2.0, -1.0]
    assert float(answer.rstrip("]")) == 5.0
