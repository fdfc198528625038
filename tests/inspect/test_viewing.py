"""What interactive maps show: the matrices of heads, influences where there are none, and words."""

from __future__ import annotations

import pytest
import torch

from contextlab import ModelSpec, build_model, build_task
from contextlab.errors import InputError
from contextlab.inspect import influence, mixing
from contextlab.inspect.probe import Subject
from contextlab.inspect.viewing import pick, view

TASK = build_task("associative_recall", pairs=3, length=16, vocabulary=16)


def model_of(*layers, task=TASK):
    return build_model(ModelSpec(width=8, depth=len(layers), heads=2, layers=list(layers)).for_task(task)).eval()


def test_heads_are_shown_by_their_matrices_and_others_by_influence():
    model = model_of("attention", "lstm")
    found = view(model, TASK, "both", seed=3, prompts=2)
    assert [(part.name, part.heads) for part in found.parts] == [
        ("whole model", ["influence"]),
        ("layer 0", ["head 0", "head 1"]),
        ("layer 1", ["influence"]),
    ]
    inputs = Subject(model, TASK, 3).prompts(2).inputs
    with torch.no_grad():
        matrix = mixing(model, inputs)["blocks.0.mixer"]
    for row in range(2):
        torch.testing.assert_close(found.parts[1].maps[row], matrix[row])  # its rows sum to 1 as they are
        slopes = influence(model, inputs, layer=1)[row]
        torch.testing.assert_close(found.parts[2].maps[row][0], slopes / slopes.abs().sum(-1, keepdim=True))
        assert found.prompts[row].words == [TASK.symbol(token) for token in inputs[row].tolist()]


def test_wanted_and_said_are_told_where_predictions_count():
    model = model_of("attention")
    (shown,) = view(model, TASK, "one", prompts=1).prompts
    prompt = Subject(model, TASK).prompts(1)
    with torch.no_grad():
        said = model(prompt.inputs)[0].argmax(-1)
    assert set(shown.wanted) == set(prompt.scored[0].nonzero()[:, 0].tolist())
    for place, told in shown.wanted.items():
        assert told == (TASK.symbol(prompt.targets[0, place].item()), TASK.symbol(said[place].item()))


def test_vectors_are_shown_by_their_numbers():
    task = build_task("linear_regression", dimensions=2, examples=4)
    (shown,) = view(model_of("mamba2", task=task), task, "numbers", prompts=1).prompts
    assert shown.words == [str(place) for place in range(len(shown.words))]
    assert shown.values[0].count(",") == task.input_size - 1


def test_a_few_places_are_picked_the_last_that_count_first():
    assert pick(range(5), [1], 9) == [0, 1, 2, 3, 4]
    assert pick(range(100), [7, 50, 99], 2) == [50, 99]
    found = pick(range(100), [7, 50], 12)
    assert {7, 50} <= set(found)
    assert len(found) <= 12
    assert found == sorted(set(found))


def test_models_of_other_tasks_are_refused():
    with pytest.raises(InputError, match="take its own task"):
        view(model_of("attention"), build_task("linear_regression"), "other")
