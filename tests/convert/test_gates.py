"""Layers chosen by gates between the old mixer and the new one."""

from __future__ import annotations

import json

import pytest
import torch

from contextlab.convert import Linearize, convert
from contextlab.convert.gates import Gated, capped, train_gates
from contextlab.errors import InputError
from contextlab.tasks import build_task

from .teachers import teacher, tokens

TASK = build_task("associative_recall", vocabulary=12, pairs=3, length=16)


@pytest.mark.parametrize("count", [1, 2.5, 4])
def test_gates_add_up_to_the_count_whatever_the_scores(count):
    scores = torch.tensor([3.0, -1.0, 0.5, 20.0, -30.0], dtype=torch.float64, requires_grad=True)
    gates = capped(scores, count)
    assert float(gates.detach().sum()) == pytest.approx(count, abs=1e-9)
    assert torch.equal(gates.argsort(), scores.argsort())
    near = torch.tensor([0.3, -0.1, 0.2, 0.0, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: capped(s, count), near)


def pair():
    """A teacher, and a student whose layer 1 of three answers nothing while the others answer as the teacher's."""
    model = teacher(depth=3)
    student = Linearize(mixer="sliding_window", mixer_options={"window": 20})(model).model
    with torch.no_grad():
        student.blocks[1].mixer.out_proj.weight.zero_()
    return model.float(), student.float()


@torch.no_grad()
def test_a_gate_mixes_the_answers_of_both():
    model, student = pair()
    new = [block.mixer for block in student.blocks]
    mixed = Gated(model, student, [1], 1)
    for share, expected in ((0.0, model(tokens())), (0.25, None)):
        mixed.gates = lambda share=share: torch.tensor([share])
        got = mixed(tokens())
        if expected is not None:
            torch.testing.assert_close(got, expected)
    model.blocks[1].mixer.out_proj.weight.mul_(0.75)  # as the new mixer answers nothing
    torch.testing.assert_close(got, model(tokens()))
    mixed.leave()
    assert all(block.mixer is each for block, each in zip(student.blocks, new, strict=True))


def test_the_layer_that_is_needed_is_found():
    model, student = pair()
    before = {name: each.clone() for name, each in student.state_dict().items()}
    gates, told = train_gates(model, student, [TASK], [0, 1, 2], 2, 15, {"batch": 8})
    assert gates[1] < min(gates[0], gates[2]) - 0.1
    assert sum(gates.values()) == pytest.approx(2, abs=1e-4)
    assert (told.steps, told.last < told.first) == (15, True)
    after = student.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(each, after[name]) for name, each in before.items())
    assert all(each.requires_grad for each in (*student.parameters(), *model.parameters()))


def test_a_conversion_takes_the_layers_of_the_widest_gates(tmp_path):
    options = {"budget": 12, "prompts": 8, "train": {"batch": 4}}
    found = convert(teacher(depth=3).float(), "gla", TASK, layers="gates:2", **options)
    gates = {each.layer: each.gate for each in found.choices}
    assert found.layers == sorted(sorted(gates, key=gates.get)[1:])
    assert [(each.name, each.steps) for each in found.stages] == [("attention", 4), ("gates", 3), ("logits", 5)]
    assert [layer.mixer for layer in found.model.spec.pattern()].count("gla") == 2
    record = json.loads((found.save(tmp_path / "new") / "convert.json").read_text())
    assert record["choices"][0]["divergence"] is None


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ("gates", {}, "layers: expected gates:N, for example gates:2, got 'gates'"),
        ("gates:0", {}, "layers: expected gates:N"),
        ("gates:3", {}, "layers: gates:3 is more than the 2 that can change; use all"),
        ("gates:1", {"budget": 0}, "layers: gates are trained; give a budget of at least 4 steps, or use auto"),
        ("gates:1", {"data": None, "budget": 0}, "layers gates: are chosen by what the model answers; give data"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(layers, options, message):
    given = {"data": TASK, "budget": 8, "prompts": 4, **options}
    with pytest.raises(InputError) as error:
        convert(teacher(), "gla", layers=layers, **given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
