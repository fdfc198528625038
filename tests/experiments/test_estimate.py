"""About how long a run takes: real steps, timed; nothing is written."""

from __future__ import annotations

import pytest
import torch

from contextlab.experiments import ExperimentSpec, estimate
from contextlab.experiments.estimate import makespan
from tests.experiments.test_run import one


def test_jobs_that_take_turns():
    assert makespan([3, 1, 1, 1], 1) == 6
    assert makespan([3, 1, 1, 1], 2) == 3
    assert makespan([1, 1, 3], 2) == 4


def test_a_curriculum_is_timed_at_its_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timed = []

    def step(model, task, spec, state):
        timed.append(task.length)
        return type("Step", (), {"loss": torch.zeros(())})

    monkeypatch.setattr(estimate, "train_step", step)
    monkeypatch.setattr(estimate, "_seconds", lambda call: (call(), float(timed[-1] if timed else 0))[1])
    monkeypatch.setattr(estimate, "_evaluation_seconds", lambda *arguments: 5.0)
    monkeypatch.setattr(estimate, "_learner_seconds", lambda *arguments: 7.0)
    grows = {"length": {"start": 4, "end": 8, "add": 4, "every": 20}, "pairs": {"start": 1, "end": 2, "every": 20}}
    spec = one(train={"steps": 40, "batch": 4, "curriculum": grows}, seeds=[0, 1])
    found = estimate.estimate(ExperimentSpec.parse(spec), torch.device("cpu"))
    (training,) = found.trainings
    assert timed == [4, 8]  # each size once
    assert training.training == 40 * (4 + 8) / 2
    assert (training.seeds, training.steps, found.steps) == (2, 40, 80)
    assert found.seconds == 2 * (240 + 5) + 7
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_is_of_the_right_size():
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    found = estimate.estimate(ExperimentSpec.parse(one()), torch.device("cpu"), threads=1)
    assert torch.equal(torch.rand(3), wanted)
    assert found.seconds == pytest.approx(
        sum(t.training + t.evaluating for t in found.trainings) + sum(found.learners.values())
    )
    assert 0.001 < found.trainings[0].training < 5
