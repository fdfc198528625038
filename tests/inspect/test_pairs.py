"""Scores of pairs in closed form, each prompt at the place that it asks at."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model, build_task
from contextlab.errors import InputError
from contextlab.inspect import Subject
from contextlab.inspect.pairs import Pairs, margin_of, pairs_of, pairs_refusal, share_of
from contextlab.models import preset
from contextlab.prompt import asked_at


def pair(name, **options):
    task = build_task(name, **options)
    clean = task.sample(12, torch.Generator().manual_seed(0))
    corrupted = task.corrupt(clean, torch.Generator().manual_seed(1))
    return task, clean, corrupted, asked_at(clean, corrupted)


def test_of_tokens_it_is_the_difference_of_two_logits_at_each_row_s_own_place():
    _, clean, corrupted, at = pair("associative_recall", vocabulary=16, pairs=4, length=24, queries=1)
    assert at.unique().numel() > 1
    logits = torch.randn(12, 24, 16, dtype=torch.float64)
    score = Pairs(clean, corrupted, at, True).score(logits)
    for row, place in enumerate(at.tolist()):
        one, other = clean.targets[row, place], corrupted.targets[row, place]
        assert score[row] == logits[row, place, one] - logits[row, place, other]


def test_of_numbers_it_goes_from_0_to_1_on_the_way_between_the_targets():
    _, clean, corrupted, at = pair("linear_regression", dimensions=3, examples=6)
    pairs = Pairs(clean, corrupted, at, False)
    assert pairs.score(corrupted.targets).abs().max() == 0
    assert pairs.score(clean.targets).mean().item() == pytest.approx(1, rel=1e-6)
    halfway = pairs.score((clean.targets + corrupted.targets) / 2)
    torch.testing.assert_close(halfway, pairs.score(clean.targets) / 2)
    _, clean, corrupted, at = pair("vector_recall", pairs=3, dimensions=4)
    pairs = Pairs(clean, corrupted, at, False)
    way = clean.targets[:, -1] - corrupted.targets[:, -1]
    across = torch.linalg.cross(torch.nn.functional.pad(way[:, :3], (0, 0)), torch.randn(12, 3))
    aside = corrupted.targets.clone()
    aside[:, -1, :3] += across
    assert pairs.score(aside).abs().max() < 1e-5  # what is at a right angle to the way counts nothing


def test_of_labels_and_classes():
    _, clean, corrupted, at = pair("logistic_regression", dimensions=3, examples=6)
    logits = torch.randn(12, 6, 1)
    score = Pairs(clean, corrupted, at, True).score(logits)
    torch.testing.assert_close(score, logits[:, -1, 0] * clean.targets[:, -1, 0])
    _, clean, corrupted, at = pair("softmax_regression", dimensions=3, examples=6, classes=3)
    logits = torch.randn(12, 6, 3)
    score = Pairs(clean, corrupted, at, True).score(logits)
    own, other = (each.targets[:, -1].argmax(-1, keepdim=True) for each in (clean, corrupted))
    torch.testing.assert_close(score, (logits[:, -1].gather(1, own) - logits[:, -1].gather(1, other))[:, 0])


def test_a_share_has_the_interval_of_a_ratio_of_means():
    whole = 1 + torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = share_of(0.3 * whole + 0.1 * noise, whole)
    assert found["ci_low"] < 0.3 < found["ci_high"]
    assert found["ci_high"] - found["ci_low"] == pytest.approx(2 * 1.96 * 0.1 / 1.5 / 4000**0.5, rel=0.05)
    exact = share_of(0.3 * whole, whole)
    assert exact["ci_high"] - exact["ci_low"] < 1e-12  # it varies with the whole, and so not at all
    with pytest.raises(InputError, match="nothing to be brought back"):
        share_of(whole, 0 * whole)


def test_pairs_are_those_that_have_another_answer():
    task = build_task("mad_recall", vocabulary=4, length=6)
    model = build_model(preset("transformer", width=16, depth=1, heads=2).for_task(task)).eval()
    subject = Subject(model, task)
    pairs = pairs_of(subject, 64)
    assert 2 <= len(pairs.at) < 64
    assert torch.equal(pairs.at, asked_at(pairs.clean, pairs.corrupted))
    assert margin_of(pairs, model).shape == pairs.at.shape
    assert not pairs_refusal(subject)
    other = Subject(model, build_task("listops"))
    assert pairs_refusal(other) == "listops tells no context that gives the same question another answer"
