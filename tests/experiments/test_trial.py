"""How good a trial is, and how sure that is."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from contextlab.experiments import trial

Z = 1.959964


def scored(values, monkeypatch):
    """What is told of a model that has these shares on the prompts."""
    monkeypatch.setattr(trial, "values_of", lambda *args, **more: {"accuracy": values})
    spec = SimpleNamespace(sweep_of=lambda name: SimpleNamespace(validation=None))
    training = SimpleNamespace(model_name="m", tasks={"recall": SimpleNamespace(metric="accuracy")})
    return trial.score(None, spec, training, torch.device("cpu"), {})["recall"]


def wilson(share, count):
    middle, width = share + Z**2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return [(middle - width) / (1 + Z**2 / count), (middle + width) / (1 + Z**2 / count)]


@pytest.mark.parametrize("differ", [0, 1, 5])
def test_few_prompts_that_missed_a_little_make_a_score_no_surer(differ, monkeypatch):
    values = torch.ones(96, dtype=torch.float64)
    values[:differ] = 0.75
    told = scored(values, monkeypatch)
    assert told["value"] == pytest.approx(1 - 0.25 * differ / 96)
    assert [told["ci_low"], told["ci_high"]] == pytest.approx(wilson(told["value"], 96))


def test_six_tell_how_far_they_are_apart(monkeypatch):
    values = torch.ones(96, dtype=torch.float64)
    values[:6] = 0.75
    told = scored(values, monkeypatch)
    trials = told["value"] * (1 - told["value"]) * 96 / float(values.var())
    assert trials > 96
    assert [told["ci_low"], told["ci_high"]] == pytest.approx(wilson(told["value"], trials))
