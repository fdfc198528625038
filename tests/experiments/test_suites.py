"""The public suites: every one has a full and a quick form, whose tasks can be drawn and trained on."""

from __future__ import annotations

import pytest
import torch

from contextlab.experiments import load_recipe
from contextlab.models import build_model
from contextlab.training import train
from contextlab.training.schedule import Curriculum, rate

SUITES = (
    "garg",
    "boolean",
    "mambaformer",
    "mad",
    "zoology",
    "regbench",
    "ruler",
    "lra-text",
    "arithmetic",
    "multitask",
)


@pytest.mark.parametrize("name", [form for suite in SUITES for form in (suite, f"{suite}-quick")])
def test_the_tasks_of_a_suite_can_be_drawn_and_have_learners(name: str) -> None:
    spec = load_recipe(name)
    assert len(spec.models) >= 2
    for task_name in spec.tasks:
        task = spec.build_task(task_name)
        assert task.learners()
        assert set(spec.tasks[task_name].evaluate.get("splits") or ()) <= set(task.splits())
        for model in spec.models:
            spec.model_spec(model, task_name, task)


@pytest.mark.parametrize("suite", SUITES)
def test_a_model_of_the_quick_form_can_take_a_step(suite: str) -> None:
    spec = load_recipe(f"{suite}-quick")
    task_name, model_name = next(iter(spec.tasks)), next(iter(spec.models))
    task = spec.build_task(task_name)
    model = build_model(spec.model_spec(model_name, task_name, task))
    prompt = task.sample(2, torch.Generator().manual_seed(0))
    loss = task.loss(model(prompt.inputs), prompt)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("linear", [(5, 11), (5, 11), (6, 13), (12, 25), (19, 39), (20, 41), (20, 41)]),
        ("sparse_linear", [(5, 11), (5, 11), (6, 13), (12, 25), (19, 39), (20, 41), (20, 41)]),
        ("relu_network", [(5, 26), (5, 26), (6, 31), (12, 61), (19, 96), (20, 101), (20, 101)]),
        ("decision_tree", [(5, 26), (5, 26), (6, 31), (12, 61), (19, 96), (20, 101), (20, 101)]),
    ],
)
def test_garg_is_trained_as_published(name: str, sizes: list[tuple[int, int]]) -> None:
    """src/conf and src/curriculum.py of github.com/dtsip/in-context-learning at commit 3383371.

    sizes: dimensions that are not zero and examples at seven steps, as their Curriculum has them.
    """
    spec = load_recipe("garg")
    train = spec.train_spec("transformer", name)
    task = Curriculum(spec.build_task(name), train)
    steps = (0, 1999, 2000, 14_000, 29_999, 30_000, 500_000)
    assert [(task(step).active, task(step).examples) for step in steps] == sizes  # type: ignore[attr-defined]
    assert [(train.steps, train.batch, train.learning_rate, train.optimizer)] == [(500_001, 64, 1e-4, "adamw")]
    assert all(rate(step, train) == 1 for step in (0, 1000, 500_000))
    prompt = task(0).sample(2, torch.Generator().manual_seed(0))
    assert prompt.inputs.shape == (2, 2 * sizes[0][1], 21)
    assert not prompt.inputs[..., 5:20].any()


@pytest.mark.parametrize("name", ["multitask", "multitask-quick"])
def test_one_model_goes_through_several_classes_in_three_orders(name: str) -> None:
    spec = load_recipe(name)
    groups = {each.task_name: each for each in spec.trainings() if len(each.tasks) > 1}
    assert {key: each.train.order for key, each in groups.items()} == {o: o for o in ("sequential", "mixed", "random")}
    for each in groups.values():
        assert [task.degree for task in each.tasks.values()] == [1, 2, 3]  # type: ignore[attr-defined]
    if name.endswith("-quick"):
        chosen = groups["mixed"]
        model = build_model(chosen.model)
        short = chosen.train.model_copy(update={"steps": 3, "batch": 4})
        assert train(model, list(chosen.tasks.values()), short).status == "finished"


def test_mad_trains_as_its_authors_do() -> None:
    """12,800 fixed examples (256 of memorization) for 200 epochs; another number of them is an option."""
    spec = load_recipe("mad")
    steps = {each.task_name: each.train.steps for each in spec.trainings()}
    assert steps.pop("memorization") == 400
    assert set(steps.values()) == {20_000}
    train = spec.trainings()[0].train
    assert (train.examples, train.epochs, train.batch, train.optimizer) == (12_800, 200, 128, "adamw")
    assert train.learning_rate * rate(0, train) == 5e-4
    assert train.learning_rate * rate(train.steps, train) == pytest.approx(1e-6)
    fewer = {each.task_name: each.train for each in load_recipe("mad", ["train.examples=800"]).trainings()}
    assert (fewer["recall"].examples, fewer["recall"].steps) == (800, 1250)
    assert (fewer["memorization"].examples, fewer["memorization"].steps) == (256, 400)
    quick = {each.train.steps for each in load_recipe("mad-quick").trainings()}
    assert quick == {400}
