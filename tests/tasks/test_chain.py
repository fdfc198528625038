"""Chain of thought: tokens by hand, the learner against posteriors by simulation, and what features are worth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from contextlab import build_task
from contextlab.errors import InputError
from contextlab.learners.chain import relu_layer
from contextlab.tasks import ChainOfThought

SHOWN = ["all", "examples", "none"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(**options) -> ChainOfThought:
    return build_task("chain_of_thought", **{"dimensions": 3, "hidden": 2, "examples": 12, **options})


@pytest.mark.parametrize("layers", [1, 2])
def test_tokens_show_each_step_after_it_was_asked_for(layers: int) -> None:
    task = make(layers=layers)
    prompt = task.sample(4, generator())
    tokens = prompt.inputs.unflatten(1, (-1, layers + 2))
    targets = prompt.targets.unflatten(1, (-1, layers + 2))
    x, s, y = tokens[:, :, 0, :3], tokens[:, :, 1:-1, 3:5], tokens[:, :, -1, 5:]
    assert torch.equal(tokens.count_nonzero(), x.count_nonzero() + s.count_nonzero() + y.count_nonzero())
    assert torch.equal(targets[:, :, :layers, :2], s)
    assert torch.equal(targets[:, :, layers, 2:], y)
    assert torch.equal(targets.count_nonzero(), s.count_nonzero() + y.count_nonzero())
    place = torch.arange(12 * (layers + 2))
    assert torch.equal(prompt.scored[0], place % (layers + 2) == layers)
    assert torch.equal(prompt.shot[0], place // (layers + 2))
    # each layer is linear before its relu: least squares on the active examples finds the same weights for all
    for first, second in [(x, s[:, :, 0])] + ([(s[:, :, 0], s[:, :, 1])] if layers == 2 else []):
        for b in range(4):
            rows = second[b, :, 0] > 0
            if rows.sum() > first.shape[-1]:
                w = torch.linalg.pinv(first[b, rows].double()) @ second[b, rows, :1].double()
                torch.testing.assert_close(
                    second[b, :, :1].double(), (first[b].double() @ w).relu(), atol=1e-4, rtol=1e-4
                )
    # Not lstsq: its default driver may answer a column of zeros wrongly (pytorch issue 187411).
    v = torch.linalg.pinv(s[:, :, -1].double()) @ y.double()
    assert (s[:, :, -1].double() @ v - y).abs().max() < 1e-4


@pytest.mark.parametrize("shown", SHOWN)
def test_the_query_is_answered_before_it_is_shown(shown: str) -> None:
    task = make(shown=shown)
    prompt = task.sample(3, generator(1))
    assert prompt.inputs.shape == (3, 12 * task.block, task.input_size)
    answers = prompt.targets[prompt.scored][:, -1].view(3, 12)
    places = prompt.scored[0].nonzero().flatten().tolist()
    for i, t in enumerate(places):
        answer = answers[:, i].view(3, 1, 1)
        assert not ((prompt.inputs[:, : t + 1] == answer) & (answer != 0)).any()
        if i + 1 < 12:
            assert (prompt.inputs[:, : places[i + 1] + 1] == answer).flatten(1).any(1).all()
    for name, learner in task.learners().items():
        found = learner(prompt)
        assert found.shape == prompt.targets.shape
        inputs = prompt.inputs.clone()
        cut = places[6] + 1
        inputs[:, cut:] = inputs[:, cut:].flip(0)
        changed = task.sample(3, generator(1))
        changed.inputs = inputs
        if changed.xs is not None:
            first = 6 * task.block + 1
            changed.xs[:, 7:], changed.ys[:, 6:] = changed.xs[:, 7:].flip(0), changed.ys[:, 6:].flip(0)
            assert cut == first
        torch.testing.assert_close(learner(changed)[:, :cut], found[:, :cut], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("shown", SHOWN)
def test_chance_is_the_cost_of_predicting_zero(shown: str) -> None:
    task = make(shown=shown, layers=2, input_scale=1.4)
    prompt = task.sample(20_000, generator(2))
    errors = task.errors(torch.zeros_like(prompt.targets), prompt)
    assert set(errors) == set(task.chance())
    for metric, value in task.chance().items():
        each = errors[metric].mul(prompt.scored).sum(1).double() / 12
        assert abs(each.mean() - value) < 5 * each.std() / len(each) ** 0.5, metric
    total = sum(task.chance().values())
    assert task.loss(torch.zeros_like(prompt.targets), prompt).item() == pytest.approx(total, rel=0.1)


def simulated(xs: Tensor, hs: Tensor, query: Tensor, scale: float) -> float:
    """E scale * relu(w . query) over w ~ N(0, I), given w . x = h / scale of the active examples, by simulation."""
    active = hs > 0
    X, z = xs[active], hs[active] / scale
    w = torch.randn(40_000, xs.shape[1], generator=generator(3), dtype=torch.float64)
    if active.any():  # a draw from the prior, moved to agree with the equations, is one from the posterior
        w = w + (z - w @ X.T) @ torch.linalg.pinv(X).T
    return scale * (w @ query).relu().mean().item()


def test_a_layer_is_learned_as_the_posterior_mean_of_its_active_units() -> None:
    xs = torch.randn(2, 7, 4, generator=generator(4), dtype=torch.float64)
    w = torch.randn(2, 4, 3, generator=generator(5), dtype=torch.float64)
    hs = 0.8 * (xs @ w).relu()
    queries = torch.randn(2, 7, 4, generator=generator(6), dtype=torch.float64)
    found = relu_layer(xs, hs, queries, 0.8, 1e-4)
    for b in range(2):
        for i in range(7):
            for unit in range(3):
                expected = simulated(xs[b, :i], hs[b, :i, unit], queries[b, i], 0.8)
                assert found[b, i, unit].item() == pytest.approx(expected, abs=0.02)
    many = relu_layer(xs.repeat(10_000, 1, 1), hs.repeat(10_000, 1, 1), queries.repeat(10_000, 1, 1), 0.8, 1e-4)
    torch.testing.assert_close(many[-2:], found, atol=1e-6, rtol=1e-6)


def test_features_are_worth_examples() -> None:
    """The paper's point: with the features y is learned from fewer examples, and the query's own make it exact."""
    cost = {}
    for shown in SHOWN:
        task = make(shown=shown, dimensions=5, hidden=4, examples=25)
        prompt = task.sample(300, generator(7))
        learners = task.learners()
        for name, learner in learners.items():
            error = task.errors(learner(prompt), prompt)["squared_error"][prompt.scored].view(300, 25)
            cost[shown, name] = error[:, 15:].mean().item()
    assert cost["all", "chain"] < 1e-3
    assert cost["examples", "chain"] < 0.5 * cost["examples", "gaussian_process"]
    assert cost["examples", "gaussian_process"] == pytest.approx(cost["none", "gaussian_process"], rel=0.3)
    assert min((c, n) for (s, n), c in cost.items() if s == "none")[1] == "gaussian_process"


def test_the_last_step_is_exact_once_the_features_span_it() -> None:
    task = make(hidden=3, examples=30)
    prompt = task.sample(50, generator(8))
    answer = task.learners()["chain"](prompt)
    errors = task.errors(answer, prompt)
    last = errors["step_error"][prompt.scored].view(50, 30)[:, -1]
    assert last.median() < 1e-6
    assert errors["squared_error"][prompt.scored].view(50, 30)[:, -1].max() < 1e-2
    assert math.isclose(task.loss(prompt.targets, prompt).item(), 0)


@pytest.mark.parametrize("shown", ["all", "examples"])
@pytest.mark.parametrize("scale", [1e-4, 1e6])
def test_the_chain_learns_from_small_and_large_inputs_alike(shown: str, scale: float) -> None:
    one, other = make(shown=shown), make(shown=shown, input_scale=scale)
    first, second = one.sample(20, generator()), other.sample(20, generator())
    torch.testing.assert_close(
        scale * one.learners()["chain"](first), other.learners()["chain"](second), rtol=1e-2, atol=1e-2 * scale
    )


def test_other_prompts_are_refused() -> None:
    prompt = make(hidden=5).sample(2, generator())
    with pytest.raises(InputError, match=r"chain needs vectors of 3 \+ 2 \+ 1 numbers, 3 for each example"):
        make().learners()["chain"](prompt)
