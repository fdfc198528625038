"""Linear probes: what is known to be held is read off, what is not there is not, by the definition."""

from __future__ import annotations

import pytest
import torch

import contextlab
from contextlab import build_model, build_task
from contextlab.errors import InputError
from contextlab.inspect import linear_probe
from contextlab.inspect.probing import _measured, _ridge, fresh_model

REGRESSION = build_task("linear_regression", dimensions=3, examples=24)
RECALL = build_task("associative_recall", vocabulary=16, pairs=2, length=12)


def test_the_written_state_holds_the_weights_and_the_vectors_do_not():
    model = build_model("gd_construction", dimensions=3, learning_rate=0.05).double()
    found = linear_probe(
        model, REGRESSION, "weights", ["embedded", "blocks.0.mixer.state"], prompts=400, test=200
    ).set_index("site")
    state, token = found.loc["blocks.0.mixer.state"], found.loc["embedded"]
    assert state["measure"] == "r2"
    assert state["value"] > 0.8  # sums of x y^T, of 24 examples
    assert state["ci_low"] < state["value"] < state["ci_high"]
    assert state["ci_low"] > 0.7
    assert token["ci_low"] < 0.3
    assert max(state["shuffled"], token["shuffled"]) < 0.1


def test_answers_that_stand_in_the_stream_are_classes_that_are_read():
    task = build_task("induction_head", vocabulary=8, length=16)
    model = build_model("induction_construction", vocabulary=task.input_size, length=16).double()
    place = int(task.sample(1, torch.Generator().manual_seed(0)).scored[0].nonzero()[-1])
    found = linear_probe(
        model, task, sites=["blocks.0.input", "blocks.1.output"], place=place, prompts=200, test=100
    ).set_index("site")
    before, after = found.loc["blocks.0.input"], found.loc["blocks.1.output"]
    assert after["measure"] == "accuracy"
    assert after["value"] > 0.95
    assert before["ci_high"] < 0.6
    assert after["shuffled"] < 0.4
    assert after["place"] == place


def test_ridge_is_its_closed_form_in_either_shape():
    generator = torch.Generator().manual_seed(0)
    for rows, size in ((30, 5), (8, 20)):
        x, y, queries = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((rows, size), (rows, 2), (4, size))
        )
        found = _ridge(x, y, queries, (0.1, 3.0))
        for strength, each in zip((0.1, 3.0), found, strict=True):
            weights = torch.linalg.solve(x.mT @ x + strength * rows * torch.eye(size, dtype=torch.float64), x.mT @ y)
            torch.testing.assert_close(each, queries @ weights)


def test_the_interval_holds_the_share_of_variance():
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(60):  # y = x + noise of the same size: half of the variance is told
        x = torch.randn(400, 1, generator=generator, dtype=torch.float64)
        y = x + torch.randn(400, 1, generator=generator, dtype=torch.float64)
        _, low, high = _measured(x, y, y[:250])
        inside += low <= 0.5 <= high
    assert 51 <= inside <= 60


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        (REGRESSION, {"what": "wieghts"}, "did you mean 'weights'"),
        (REGRESSION, {"place": 24}, "place: expected one from -24 to 23, got 24"),
        (REGRESSION, {"sites": "blocks.0.mixer.state"}, "blocks.0.mixer.state: grows with the text"),
        (REGRESSION, {"sites": "blocks.0.outputs"}, "did you mean 'blocks.0.output'"),
        (REGRESSION, {"prompts": 5}, "expected at least 10 to fit on and 2 to test on, got 5 and 512"),
        (RECALL, {"place": 1}, "what is predicted at 1 does not count in every prompt"),
        (
            build_task("linear_regression", dimensions=4),
            {},
            "the task's tokens are vectors of 9 numbers, and the model reads",
        ),
    ],
)
def test_what_cannot_be_probed_is_told_in_one_line(task, options, said):
    reads = RECALL if task is RECALL else REGRESSION
    sizes = {"input_size": reads.input_size, "output_size": reads.output_size, "read_in": reads.read_in}
    model = build_model("transformer", width=8, depth=1, heads=2, **sizes)
    with pytest.raises(InputError) as caught:
        linear_probe(model, task, **{"what": "target", **options})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_model_is_read_as_one_that_is_not_in_training():
    model = build_model("lstm", width=8, depth=1, input_size=REGRESSION.input_size, output_size=1, read_in="vector")
    modes = []
    model.blocks[0].register_forward_pre_hook(lambda module, given: modes.append(module.training))
    model.train()
    linear_probe(model, REGRESSION, "weights", prompts=20, test=10, untrained=False)
    assert modes == [False]
    assert model.training


def test_the_untrained_model_is_a_control():
    sizes = {"input_size": REGRESSION.input_size, "output_size": 1, "read_in": "vector"}
    model = build_model("gated_delta_net", width=16, depth=1, heads=2, **sizes)
    found = linear_probe(model, REGRESSION, "weights", "blocks.*.mixer.state", prompts=120, test=60)
    assert found["untrained"].notna().all()
    assert abs(found["untrained"] - found["value"]).max() < 0.4  # neither is trained
    without = linear_probe(model, REGRESSION, "weights", "blocks.*.mixer.state", prompts=120, test=60, untrained=False)
    assert without["untrained"].isna().all()


def test_the_control_of_a_construction_has_weights_that_are_drawn():
    model = contextlab.build_model("gd_construction", dimensions=3, learning_rate=0.05).double()
    fresh = fresh_model(model, 1)
    assert not fresh.training
    assert next(fresh.parameters()).dtype == torch.float64
    assert [each.shape for each in fresh.parameters()] == [each.shape for each in model.parameters()]
    here, there = (dict(each.named_parameters()) for each in (model, fresh))
    assert not torch.equal(here["blocks.0.mixer.in_proj.weight"], there["blocks.0.mixer.in_proj.weight"])
    again = dict(fresh_model(model, 1).named_parameters())
    assert all(torch.equal(again[name], value) for name, value in there.items())
