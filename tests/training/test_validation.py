"""Scores on validation prompts."""

from __future__ import annotations

import math

import torch
from tiny_training import Sums, Tiny

from contextlab.training.validation import ValidationSpec, validate


def test_a_prompt_that_is_answered_with_nan_is_not_left_out():
    """A score over the others would flatter the model."""

    class Some(Tiny):
        def forward(self, *args, **more):
            found = super().forward(*args, **more)
            return torch.cat([torch.full_like(found[:1], math.nan), found[1:]])

    assert math.isnan(validate(Some(), Sums(), ValidationSpec(prompts=4, batch=4)).value)
    assert math.isfinite(validate(Tiny(), Sums(), ValidationSpec(prompts=4, batch=4)).value)
