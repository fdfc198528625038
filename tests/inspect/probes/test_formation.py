"""Parts that are known to form at certain steps are dated there, in their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from contextlab import build_model, build_task
from contextlab.inspect import Subject
from contextlab.inspect.probe import records
from contextlab.inspect.probes.formation import CURVE, HALF, JUMP, STEEPEST, Formation, dates, read_off
from contextlab.inspect.probing import _measured

TASK = build_task("induction_head", vocabulary=8, length=16)


def written(layers: int):
    """The written induction head, of which so many layers are there."""
    model = build_model("induction_construction", vocabulary=TASK.input_size, length=16).double().eval()
    with torch.no_grad():
        for block in model.blocks[layers:]:
            for parameter in block.parameters():
                parameter.zero_()
    return model


def test_the_layers_of_a_written_head_are_dated_in_their_order():
    there = {10: 0, 20: 0, 30: 1, 40: 1, 50: 2, 60: 2}
    checkpoints = {step: (lambda layers=layers: written(layers)) for step, layers in there.items()}
    subject = Subject(written(2), TASK, checkpoints=checkpoints)
    probe = Formation(prompts=100, fit=200)
    found = probe.measure(subject)
    halves = found[found["measure"] == HALF].set_index("what")["value"]
    assert halves["'previous' of head 0.0"] == pytest.approx(25, abs=1)
    assert halves["'induction' of head 1.0"] == pytest.approx(45, abs=1)
    assert halves["answer (accuracy)"] == pytest.approx(45, abs=1)
    steepest = found[found["measure"] == STEEPEST].set_index("what")["value"]
    assert steepest["'previous' of head 0.0"] == 30
    assert steepest["answer (accuracy)"] == 50
    assert (found[found["measure"] == JUMP]["value"] > 0.99).all()
    curve = found[(found["measure"] == CURVE) & (found["what"] == "answer (accuracy)")]
    assert curve["at"].tolist() == list(there)
    assert curve["value"].tolist()[-1] == 1
    words = probe.words(records(found))
    assert words[0].startswith("First came 'previous' of head 0.0 (half-way by step 25")
    assert any("a phase change: 100%" in each for each in words)


def test_what_does_not_change_has_no_date():
    checkpoints = {step: (lambda: written(2)) for step in (1, 2, 3)}
    probe = Formation(prompts=20, fit=40)
    found = probe.measure(Subject(written(2), TASK, checkpoints=checkpoints))
    assert set(found["measure"]) == {CURVE}
    assert probe.words(records(found)) == ["Nothing that is measured formed between the first and the last checkpoint."]


def test_dates_of_a_curve_that_is_known():
    steps = list(range(0, 110, 10))
    level = 1 / (1 + np.exp(-(np.array(steps) - 47) / 5))
    rows = {row["measure"]: row for row in dates(steps, np.repeat(level[:, None], 50, 1), np.ones((11, 50)))}
    assert rows[HALF]["value"] == pytest.approx(47, abs=1)
    assert rows[HALF]["ci_low"] == pytest.approx(rows[HALF]["ci_high"])
    assert rows[STEEPEST]["value"] == 50
    assert rows[JUMP]["value"] == pytest.approx(level[5] - level[4], abs=1e-3)
    falling = {row["measure"]: row for row in dates(steps, np.repeat(3 - level[:, None], 50, 1), np.ones((11, 50)))}
    assert falling[HALF]["value"] == pytest.approx(rows[HALF]["value"])


def test_the_interval_of_a_date_covers_it_and_chance_has_none():
    generator = np.random.default_rng(0)
    steps, inside, none = [0, 10, 20, 30, 40], 0, 0
    truth = np.array([0.1, 0.1, 0.3, 0.7, 0.9])  # half of the way at step 25
    for _ in range(60):
        prompts = generator.random((5, 200)) < truth[:, None]
        rows = {row["measure"]: row for row in dates(steps, prompts.astype(float), np.ones((5, 200)))}
        inside += rows[HALF]["ci_low"] <= 25 <= rows[HALF]["ci_high"]
        none += not dates(steps, (generator.random((5, 200)) < 0.5).astype(float), np.ones((5, 200)))
    assert inside >= 52
    assert none >= 52


def test_what_is_read_off_is_what_the_linear_probe_measures():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    numbers = x[:, :2] + 0.5 * torch.randn(300, 2, generator=generator, dtype=torch.float64)
    for wanted in (numbers, (numbers[:, 0] > 0).long()):
        parts, wholes = read_off(x, wanted, 200)
        assert parts.shape == wholes.shape == (100,)
        assert (parts.sum() / wholes.sum()).item() == pytest.approx(_measured(x, wanted, wanted[:200])[0])


def test_too_few_checkpoints_are_refused():
    said = Formation().refusal(Subject(written(2), TASK, checkpoints={1: lambda: written(2)}))
    assert said.startswith("the training has 1 checkpoint, and 3 are needed")
    assert "--set train.keep_checkpoints=true" in said
