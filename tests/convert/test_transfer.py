"""The engine: what the teacher hands on, the losses written naively, what is run, and exact resume."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab.convert import Distil, Linearize, Stage
from contextlab.convert.students import Layers, watched
from contextlab.convert.teacher import TeacherTask, read_layers, task_of
from contextlab.convert.transfer import share_out, transfer
from contextlab.errors import InputError
from contextlab.tasks import build_task
from contextlab.training.step import part_weights

from .teachers import teacher, tokens

TASK = build_task("associative_recall", vocabulary=12, pairs=3, length=16)
ATTENTION = Stage("attention", Distil(attention=1.0), trains="new")
LOGITS = Stage("logits", Distil(hidden=0.5, logits=1.0, temperature=2.0))


def pair(**options):
    """A teacher and its student, whose layers 0 and 2 of three are others."""
    model = teacher(depth=3, **options)
    return model, Linearize(mixer="gated_delta_net", layers=[0, 2])(model).model


def drawn(task, batch=4):
    return task.sample(batch, torch.Generator().manual_seed(5))


@torch.no_grad()
def test_a_teachers_layers_are_read_as_they_are_and_no_further():
    model, _ = pair()
    x, expected = model.read_in(tokens()), []
    for block in model.blocks:
        normed = block.mixer_norm(x)
        y = block.mixer(normed)[0]
        expected.append((normed, y))
        x = x + y
        x = x + block.mlp(block.mlp_norm(x))
    runs = []
    hooks = [block.mlp.register_forward_hook(lambda *_, i=i: runs.append(i)) for i, block in enumerate(model.blocks)]
    given, made = read_layers(model, tokens(), [0, 1])
    assert runs == [0]  # the last mixer that is asked for is the last thing that is run
    for got, wanted in zip(zip(given, made, strict=True), expected, strict=False):
        torch.testing.assert_close(got, wanted)
    for hook in hooks:
        hook.remove()
    assert not model.blocks[1].mixer._forward_hooks
    torch.testing.assert_close(watched(model, tokens(), True)[..., 12:28], model.blocks[0](
        model.read_in(tokens()), None, None, False, model.read_in(tokens()), None)[0])  # fmt: skip


@torch.no_grad()
def test_attention_transfer_is_the_share_of_squares_that_is_not_given():
    model, student = pair()
    task = task_of(model, TASK, ATTENTION.distil, [0, 2])
    prompt = drawn(task)
    given, made = read_layers(model, prompt_tokens(task), [0, 2])
    answer = Layers(student, [0, 2])(prompt.inputs)
    expected = 0.0
    for place, i in enumerate((0, 2)):
        y = student.blocks[i].mixer(given[place])[0]
        expected += float((y - made[place]).square().mean() / task.scales[place]) / 2
    assert float(task.loss(answer, prompt)) == pytest.approx(expected, rel=1e-5)
    assert float(task.loss(Layers(model, [0, 2])(prompt.inputs), prompt)) == pytest.approx(0, abs=1e-12)
    assert sum(task.by_layer(answer, prompt)) / 2 == pytest.approx(expected, rel=1e-5)
    measured = task.sample(8, torch.Generator().manual_seed(0))
    nothing = task.loss(torch.zeros_like(measured.targets), measured)
    assert float(nothing) == pytest.approx(1.0, rel=1e-5)  # a mixer that answers nothing


def prompt_tokens(task):
    return drawn(task.task).inputs


@torch.no_grad()
def test_distillation_is_the_divergence_and_the_hidden_vectors_written_naively():
    model, student = pair()
    distil = Distil(hidden=0.5, logits=2.0, task=0.25, temperature=3.0)
    task = task_of(model, TASK, distil, [0, 2])
    prompt = drawn(task)
    got = task.loss(watched(student, prompt.inputs, True), prompt)
    theirs, ours = (each(prompt.inputs).double() for each in (model, student))
    p, q = (each.div(3.0).softmax(-1) for each in (theirs, ours))
    kl = (p * (p / q).log()).sum(-1)[prompt.scored].mean()
    hidden = [watched(each, prompt.inputs, True)[..., 12:].double().split(16, -1) for each in (model, student)]
    squares = [(a - b).square().mean() / scale for a, b, scale in zip(*hidden, task.scales[1:], strict=True)]
    expected = 2.0 * 9.0 * kl + 0.5 * sum(squares) / 3 + 0.25 * TASK.loss(ours, prompt)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    alone = task_of(model, TASK, Distil(logits=1.0), [0])
    assert float(alone.loss(model(prompt.inputs), drawn(alone))) == pytest.approx(0, abs=1e-9)


@torch.no_grad()
def test_real_predictions_are_distilled_by_their_squares():
    task = build_task("linear_regression", dimensions=3, examples=5)
    from contextlab.models import build_model

    model = build_model({"width": 16, "depth": 1, "heads": 2, "read_in": "vector", "input_size": 7, "output_size": 1})
    wrapped = task_of(model, task, Distil(logits=1.0), [0])
    prompt = drawn(wrapped, 8)
    off = model(prompt.inputs) + 2.0
    assert float(wrapped.loss(off, prompt)) == pytest.approx(4.0 / wrapped.scales[0], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stage", [ATTENTION, LOGITS])
def test_a_batch_may_be_cut(stage):
    """The objective of the whole is the mean of its parts', each by its scored positions."""
    model, student = pair()
    task = task_of(model, TASK, stage.distil, [0, 2])
    prompt = drawn(task, 4)
    run = Layers(student, [0, 2]) if stage is ATTENTION else lambda x: watched(student, x, True)
    whole = task.loss(run(prompt.inputs), prompt)
    weights = part_weights(None, prompt, 2)
    parts = [prompt.rows(0, 2), prompt.rows(2, 4)]
    cut = sum(w * task.loss(run(part.inputs), part) for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(cut.double(), whole.double(), rtol=1e-5, atol=0)


def test_only_what_is_new_learns_from_attention_and_all_from_predictions():
    model, student = pair()
    before = {name: each.clone() for name, each in student.state_dict().items()}
    teachers = {name: each.clone() for name, each in model.state_dict().items()}
    first, second = transfer(model.float(), student.float(), [TASK], [ATTENTION, LOGITS], layers=[0, 2], budget=2)
    after = student.state_dict()
    assert all(torch.equal(each.float(), model.state_dict()[name]) for name, each in teachers.items())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not torch.equal(after["blocks.1.mixer.qkv_proj.weight"], before["blocks.1.mixer.qkv_proj.weight"].float())
    assert (first.name, first.steps, second.steps, first.tokens) == ("attention", 1, 1, 16 * 16)

    model, student = pair()
    before = {name: each.clone().float() for name, each in student.state_dict().items()}
    transfer(model.float(), student.float(), [TASK], [ATTENTION], layers=[0, 2], budget=2)
    moved = {name for name, each in student.state_dict().items() if not torch.equal(each, before[name])}
    assert moved
    assert all(name.startswith(("blocks.0.mixer.", "blocks.2.mixer.")) for name in moved)


def test_what_was_interrupted_goes_on_exactly(tmp_path):
    def run(folder, stop=None):
        model, student = pair()

        def progress(step, steps, loss):
            if stop is not None and len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(step)

        results = transfer(
            model.float(), student.float(), [TASK, TASK.replace(pairs=2)], [ATTENTION, LOGITS], layers=[0, 2],
            budget=12, train_spec={"batch": 4, "checkpoint_every": 2, "log_every": 1}, folder=folder, resume=True,
            progress=progress,
        )  # fmt: skip
        return results, student.state_dict()

    seen: list[int] = []
    whole, expected = run(tmp_path / "whole")
    for stop in (3, 9):  # in the first stage, then in the second
        seen = []
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"cut-{stop}", stop)
        seen = []
        results, weights = run(tmp_path / f"cut-{stop}")
        assert len(seen) < 12
        assert all(torch.equal(weights[name], each) for name, each in expected.items())
        assert [each.last for each in results] == [each.last for each in whole]


def test_a_stage_of_another_teacher_is_not_gone_on_with(tmp_path):
    model, student = pair()
    run = {"layers": [0, 2], "budget": 2, "folder": tmp_path, "resume": True}
    transfer(model.float(), student.float(), [TASK], [ATTENTION], **run)
    with torch.no_grad():
        model.blocks[0].mixer.qkv_proj.weight.add_(1)
    with pytest.raises(InputError, match="a checkpoint of another training: task"):
        transfer(model, student, [TASK], [ATTENTION], **run)


def test_steps_are_shared_out():
    stages = [Stage("a", Distil(attention=1.0), share=1), Stage("b", Distil(logits=1.0), share=3)]
    assert share_out(100, stages) == [25, 75]
    assert sum(share_out(7, stages)) == 7
    with pytest.raises(InputError, match="budget: 4 steps are too few for the stages a, b on 2 tasks; give at least 9"):
        share_out(4, stages, 2)
    assert share_out(9, stages, 2) == [2, 7]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "all weights are 0: give one of attention, matrix, hidden, logits and task"),
        ({"attention": 1, "logits": 1}, "attention: is learned on the teacher's own inputs, so logits cannot stand"),
        ({"logit": 1}, "did you mean 'logits'"),
        ({"logits": -1}, "logits"),
    ],
)
def test_impossible_objectives_are_refused(weights, message):
    with pytest.raises(InputError) as error:
        Distil(**weights)
    assert message in str(error.value)


def test_a_loss_that_is_not_finite_names_its_stage():
    model, student = pair()
    with pytest.raises(InputError, match="stage task: the loss or its gradient was not finite"):
        transfer(
            model.float(), student.float(), [TASK], [Stage("task", Distil(task=1.0))], layers=[0, 2], budget=4,
            train_spec={"learning_rate": 1e30, "warmup": 0, "clip": None},
        )  # fmt: skip


def test_the_budget_says_the_steps():
    model, student = pair()
    with pytest.raises(InputError, match=r"train.steps: the budget says how many; leave steps out"):
        transfer(model, student, [TASK], [ATTENTION], layers=[0, 2], budget=4, train_spec={"steps": 3})


def test_the_teacher_tells_nothing_where_only_the_task_counts():
    model, _ = pair()
    task = task_of(model, TASK, Distil(task=1.0), [0])
    assert isinstance(task, TeacherTask)
    prompt = drawn(task)
    assert "teacher" not in (prompt.hidden or {})
    logits = torch.randn(*prompt.targets.shape, 12)
    expected = F.cross_entropy(logits[prompt.scored], prompt.targets[prompt.scored])
    torch.testing.assert_close(task.loss(logits, prompt), expected)
