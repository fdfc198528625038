"""MOHAWK's first stage: mixing matrices of the student against the teacher's."""

from __future__ import annotations

import pytest
import torch

from contextlab.convert import Distil, Linearize, Stage, build_conversion
from contextlab.convert.students import Layers
from contextlab.convert.teacher import read_layers, task_of
from contextlab.convert.transfer import transfer
from contextlab.errors import InputError
from contextlab.mixers.delta.rwkv7 import Rwkv7
from contextlab.tasks import build_task

from .teachers import teacher

TASK = build_task("associative_recall", vocabulary=12, pairs=3, length=16)
MATRIX = Stage("matrix", Distil(matrix=1.0), trains="new")


@torch.no_grad()
def test_the_loss_is_the_share_of_the_frobenius_norm():
    model = teacher()
    student = build_conversion("mohawk")(model).model
    task = task_of(model, TASK, MATRIX.distil, [0, 1])
    prompt = task.sample(4, torch.Generator().manual_seed(5))
    inputs = TASK.sample(4, torch.Generator().manual_seed(5)).inputs
    given, _ = read_layers(model, inputs, [0, 1])
    answer = Layers(student, [0, 1], matrices=True)(prompt.inputs)
    expected = 0.0
    for i in (0, 1):
        theirs, ours = (each.blocks[i].mixer.mixing(given[i]) for each in (model, student))
        assert theirs.shape == (4, 4, 16, 16)
        torch.testing.assert_close(theirs.sum(-1), torch.ones_like(theirs[..., 0]))
        norm = task.scales[i] * theirs.numel()
        expected += float((ours - theirs).square().sum() / norm) / 2
    assert float(task.loss(answer, prompt)) == pytest.approx(expected, rel=1e-6)
    itself = Layers(model, [0, 1], matrices=True)(prompt.inputs)
    assert float(task.loss(itself, prompt)) == pytest.approx(0, abs=1e-12)


def test_matrices_are_learned():
    model = teacher().float()
    student = Linearize(mixer="linear_attention", mixer_options={"feature_map": "hedgehog"})(model).model
    values = student.blocks[0].mixer.in_proj.weight[32:].detach().clone()
    (found,) = transfer(model, student, [TASK], [MATRIX], layers=[0, 1], budget=30, train_spec={"batch": 8})
    assert found.last < 0.8 * found.first
    moved = student.blocks[0].mixer.in_proj.weight[32:]
    assert torch.allclose(moved, values, atol=1e-2)  # values are no part of the matrices


@pytest.mark.parametrize("mixer", ["gla", "gated_delta_net", "kda", "retention"])
def test_matrices_of_decays_and_delta_rules_are_learned_too(mixer):
    model = teacher(depth=1).float()
    student = Linearize(mixer=mixer)(model).model
    (found,) = transfer(model, student, [TASK], [MATRIX], layers=[0], budget=12, train_spec={"batch": 8})
    assert found.last < found.first


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (
            {"mixer": "rwkv7"},
            "matrix: layer 0, 'rwkv7', does not tell by which matrices it mixes tokens; those that do",
        ),
        ({"mixer": "window_linear", "mixer_options": {"heads": 2, "head_dim": 8, "kv_heads": 2}}, "has 2 heads and"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(to, message, monkeypatch):
    monkeypatch.setattr(Rwkv7, "tells_mixing", False)  # all that attention becomes do
    model = teacher(depth=1)
    student = Linearize(**to)(model).model
    with pytest.raises(InputError) as error:
        transfer(model, student, [TASK], [MATRIX], layers=[0], budget=2)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_matrices_are_a_stage_of_their_own():
    with pytest.raises(InputError, match="matrix: is learned on the teacher's own inputs, so hidden cannot stand"):
        Distil(matrix=1.0, hidden=1.0)
