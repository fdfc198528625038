"""About how long a run takes: real steps, timed; nothing is written."""

from __future__ import annotations

import pytest
import torch

from contextlab.experiments import ExperimentSpec, estimate, timing
from contextlab.experiments.estimate import makespan
from contextlab.models import build_model
from tests.experiments.test_run import one


def test_jobs_that_take_turns():
    assert makespan([3, 1, 1, 1], 1) == 6
    assert makespan([3, 1, 1, 1], 2) == 3
    assert makespan([1, 1, 3], 2) == 4


def test_what_is_timed_grows_until_the_budget_is_used_up(monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(timing, "clock", lambda call, size: (call(size), 0.01 * size + least)[1])
    least = 0.0
    sizes = [1, 4, 16, 64]
    assert timing.timed(calls.append, sizes, float, 0.2) == pytest.approx(0.64)
    assert set(calls) == {1, 4, 16}  # the next would take 0.64 s
    calls.clear()
    assert timing.timed(calls.append, sizes, float, 100.0) == pytest.approx(0.64)
    assert set(calls) == {1, 4, 16, 64}
    assert timing.timed(calls.append, sizes, lambda size: size**2, 0.0) == pytest.approx(0.01 * 64**2)
    least = 10.0  # seconds that each call takes, and that are not scaled
    assert timing.timed(calls.append, sizes, float, 0.0, overhead=10.0) == pytest.approx(10.64)
    assert timing.timed(calls.append, sizes, float, 0.0, overhead=10.0, rate=10.0) == pytest.approx(10 + 6.4)


def test_a_curriculum_is_counted_at_its_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lengths = []

    def learning(model, whole, inputs, train, seconds, rate):
        lengths.append(inputs.shape[1])
        return 3.0

    monkeypatch.setattr(timing, "timed", lambda *arguments: 0.0)
    monkeypatch.setattr(timing, "learning_seconds", learning)
    monkeypatch.setattr(timing, "updating_seconds", lambda *arguments: 100.0)
    grows = {"length": {"start": 4, "end": 8, "add": 4, "every": 20}, "pairs": {"start": 1, "end": 2, "every": 20}}
    spec = ExperimentSpec.parse(one(train={"steps": 40, "batch": 4, "curriculum": grows}, seeds=[0, 1]))
    found = estimate.estimate(spec, torch.device("cpu"))
    (training,) = found.trainings
    first = spec.trainings()[0]
    task, evaluate = first.tasks["recall"], first.evaluate["recall"]
    model, longest = build_model(first.model), task.sample(1, torch.Generator()).length
    short = task.replace(length=4, pairs=1).sample(1, torch.Generator()).length
    assert lengths == [longest]  # the largest size, once
    assert short < longest
    ratio = model.flops(short) / model.flops(longest)
    assert training.training == pytest.approx(40 * (100 + 3 * (1 + ratio) / 2))
    prompts = evaluate.prompts * len(task.splits() if evaluate.splits is None else evaluate.splits)
    assert training.evaluating == pytest.approx(prompts * 3 / 4 / 3)
    assert (training.seeds, training.steps, found.steps) == (2, 40, 80)
    assert found.seconds == pytest.approx(2 * (training.training + training.evaluating))
    assert list(tmp_path.iterdir()) == []


def test_a_large_model_is_timed_by_one_layer_of_each_kind(monkeypatch):
    """The estimate is that of the whole model, by its FLOPs and its parameters."""
    monkeypatch.setattr(estimate, "SECONDS", 0.0)  # nothing is timed twice
    monkeypatch.setattr(estimate, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(timing, "clock", lambda call, size: (call(size), 1.0)[1])
    monkeypatch.setattr(timing, "flops_a_second", lambda: 1e30)  # so that each call is overhead alone
    built = []
    monkeypatch.setattr(
        estimate, "build_model", lambda spec, seed: built.append(build_model(spec, seed=seed)) or built[-1]
    )
    large = {"preset": "transformer", "options": {"width": 16, "depth": 6, "heads": 2}}
    spec = ExperimentSpec.parse(one(models={"softmax": large}, train={"steps": 1, "batch": 4}))
    plain = estimate.estimate(spec, torch.device("cpu")).trainings[0]
    monkeypatch.setattr(estimate, "LARGE", 100)
    short = estimate.estimate(spec, torch.device("cpu")).trainings[0]
    assert [model.spec.depth for model in built] == [6, 1]
    assert short.parameters == plain.parameters == built[0].parameter_count
    length = spec.trainings()[0].tasks["recall"].length
    flops, parameters = (
        built[0].flops(length) / built[1].flops(length),
        built[0].parameter_count / built[1].parameter_count,
    )
    drawing = 4  # prompts, of which one is timed
    assert plain.training == pytest.approx(drawing + 1 + 1)
    assert short.training == pytest.approx(drawing + flops + parameters)


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


def test_it_draws_from_generators_of_its_own():
    """So other threads may draw from the shared stream meanwhile: nothing puts it back to what it was."""
    before = torch.get_rng_state()
    estimate.estimate(ExperimentSpec.parse(one()), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
