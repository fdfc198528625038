"""Scores on validation prompts."""

from __future__ import annotations

import math

import torch
from tiny_training import Sums, Tiny

from contextlab.models import ModelSpec, build_model
from contextlab.tasks import build_task
from contextlab.training.validation import ValidationSpec, validate, validate_all


def test_a_prompt_that_is_answered_with_nan_is_not_left_out():
    """A score over the others would flatter the model."""

    class Some(Tiny):
        def forward(self, *args, **more):
            found = super().forward(*args, **more)
            return torch.cat([torch.full_like(found[:1], math.nan), found[1:]])

    assert math.isnan(validate(Some(), Sums(), ValidationSpec(prompts=4, batch=4)).value)
    assert math.isfinite(validate(Tiny(), Sums(), ValidationSpec(prompts=4, batch=4)).value)


def test_several_metrics_at_once_are_each_what_it_is_alone():
    task = build_task("associative_recall", vocabulary=16, pairs=2, length=8)
    model = build_model(ModelSpec(layers=["attention"], width=8, depth=1, heads=1).for_task(task))
    metrics = ["cross_entropy", "accuracy"]
    both = validate_all(model, task, ValidationSpec(prompts=10, batch=4), metrics)
    alone = {each: validate(model, task, ValidationSpec(prompts=10, batch=4), metric=each) for each in metrics}
    assert both == alone
    assert both["accuracy"] != both["cross_entropy"]
