"""The look-up against a loop in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab import build_learner, build_task
from contextlab.errors import InputError
from contextlab.prompt import Prompt


def prompt_of(tokens: torch.Tensor) -> Prompt:
    return Prompt(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=14))
def test_it_is_the_token_after_the_first_occurrence(row: list[int]) -> None:
    logits = build_learner("lookup", vocabulary=7)(prompt_of(torch.tensor([row])))[0]
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(len(row)), atol=1e-5, rtol=0)
    for t, token in enumerate(row):
        first = row.index(token)
        if first == t:
            torch.testing.assert_close(logits[t], torch.full((7,), -math.log(7)))
        else:
            assert logits[t].argmax() == row[first + 1]
            assert logits[t].max() > -1e-5


def test_it_does_not_look_ahead() -> None:
    tokens = torch.randint(0, 5, (4, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 5
    learner = build_learner("lookup", vocabulary=5)
    assert torch.equal(learner(prompt_of(tokens))[:, :7], learner(prompt_of(changed))[:, :7])


def test_bad_prompts_are_refused() -> None:
    learner = build_learner("lookup", vocabulary=4)
    with pytest.raises(InputError, match="token ids"):
        learner(build_task("linear_regression", dimensions=2, examples=3).sample(2, torch.Generator()))
    with pytest.raises(InputError, match="token 4"):
        learner(prompt_of(torch.tensor([[0, 4]])))
