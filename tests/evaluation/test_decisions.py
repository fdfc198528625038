"""Online evaluation: the context is what the predictor did, and regret adds up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from contextlab import ModelSpec, build_model
from contextlab.errors import InputError
from contextlab.evaluation import COLUMNS
from contextlab.evaluation.decisions import regret, rollout
from contextlab.tasks import Bandit, DarkRoom, LinearBandit, LinearRegression


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_ucb1_has_the_regret_of_a_loop_over_problems_and_steps() -> None:
    task, horizon, rng = Bandit(arms=4, noise=0.2), 40, np.random.default_rng(0)
    played = rollout(task.learners()["ucb1"], task, 600, horizon, generator())
    total = played.lost.sum(1)
    loop = []
    for _ in range(600):
        means, seen = rng.random(4), [[] for _ in range(4)]
        lost = 0.0
        for t in range(horizon):
            index = [np.mean(r) + math.sqrt(2 * math.log(t) / len(r)) if r else math.inf for r in seen]
            arm = int(np.argmax(index))
            seen[arm].append(rng.normal(means[arm], 0.2))
            lost += means.max() - means[arm]
        loop.append(lost)
    spread = math.hypot(total.std().item(), np.std(loop)) / math.sqrt(600)
    assert abs(total.mean().item() - np.mean(loop)) < 4 * spread
    # every arm is tried before any is tried again
    assert torch.equal(played.actions[:, :4].sort(1).values, torch.arange(4).expand(600, 4))
    means = played.problem["means"]
    assert torch.allclose(played.lost, means.amax(1, keepdim=True) - means.gather(1, played.actions))
    noise = played.rewards - means.gather(1, played.actions)
    assert noise.std().item() == pytest.approx(0.2, rel=0.03)


def test_those_who_explore_learn_and_those_who_know_the_structure_learn_sooner() -> None:
    task = LinearBandit(arms=8, noise=0.3)
    table = regret(task.learners(), task, problems=200, horizon=80, seed=1)
    whole = table[(table["metric"] == "regret") & table["shot"].isna()].set_index("model")
    assert whole.loc["posterior_sampling", "ci_high"] < whole.loc["thompson", "ci_low"]
    assert whole.loc["thompson", "ci_high"] < whole.loc["greedy", "ci_low"]
    late = table[(table["metric"] == "suboptimality") & (table["model"] == "posterior_sampling")].set_index("shot")
    assert late.loc[79, "value"] < late.loc[0, "value"] / 5


@pytest.mark.parametrize("task", [Bandit(arms=3), DarkRoom(size=4, steps=7)], ids=str)
@pytest.mark.parametrize("sample", [True, False])
def test_a_model_is_read_on_from_its_state(task, sample: bool) -> None:
    spec = ModelSpec(width=16, depth=2, heads=2).for_task(task)
    model = build_model(spec, seed=1).train()
    state = rollout(model, task, 6, 20, generator(2), sample=sample)
    assert model.training
    model.eval()
    whole = rollout(lambda inputs: model(inputs), task, 6, 20, generator(2), sample=sample)
    assert torch.equal(state.actions, whole.actions)
    assert torch.allclose(state.rewards, whole.rewards)


def test_the_room_is_left_for_the_corner_after_each_episode() -> None:
    task = DarkRoom(size=4, steps=6)
    played = rollout(task.learners()["posterior_sampling"], task, 300, 30, generator(3))
    assert not played.states[:, ::6].any()
    goal = played.problem["goal"]
    # In an episode the losses are what was missed of the best return, and the way that is left at its end.
    distance = goal // 4 + goal % 4
    for first in range(0, 30, 6):
        returned = played.rewards[:, first : first + 6].sum(1)
        best = torch.where(distance > 0, 6 - distance + 1, 6).clamp(min=0)
        lost = played.lost[:, first : first + 6].sum(1)
        at_goal = played.rewards[:, first + 5] > 0
        fits = at_goal & (distance <= 6)
        assert torch.allclose(lost[fits], (best - returned)[fits])
    assert played.rewards[:, 24:].sum() > 2 * played.rewards[:, :6].sum()


def test_the_table_is_tidy_and_all_predictors_face_the_same_problems() -> None:
    task = Bandit(arms=3, horizon=12)
    learners = {"even": lambda inputs: torch.zeros(*inputs.shape[:2], 3), "greedy": task.learners()["greedy"]}
    table = regret(learners, task, problems=300)
    assert tuple(table.columns) == COLUMNS
    assert set(table["split"]) == {"online"}
    assert set(table["length"]) == {12}
    assert set(table["kind"]) == {"model", "learner"}
    for _, rows in table.groupby("model"):
        by = {metric: found.set_index("shot")["value"] for metric, found in rows.groupby("metric")}
        steps = by["suboptimality"].loc[list(range(12))].to_numpy(dtype=float)
        assert np.allclose(by["regret"].loc[list(range(12))].to_numpy(dtype=float), steps.cumsum())
    even = table[(table["model"] == "even") & (table["metric"] == "suboptimality") & table["shot"].isna()].iloc[0]
    assert even["ci_low"] - 0.01 < task.chance()["suboptimality"] < even["ci_high"] + 0.01
    first, second = (rollout(learners[name], task, 5, 3, generator(7)) for name in learners)
    assert torch.equal(first.problem["means"], second.problem["means"])


def test_wrong_predictors_and_tasks_are_refused() -> None:
    task = Bandit(arms=3)
    with pytest.raises(InputError, match="rollout needs a decision task, such as bandit"):
        rollout(task.learners()["ucb1"], LinearRegression(), 2, 3, generator())
    with pytest.raises(InputError, match="Bandit has 3 actions, but the predictor gives 5 numbers"):
        rollout(lambda inputs: torch.zeros(*inputs.shape[:2], 5), task, 2, 3, generator())
    with pytest.raises(InputError, match="at least 1 problem and 1 step, got 0 and 3"):
        rollout(task.learners()["ucb1"], task, 0, 3, generator())
    sizes = {"read_in": task.read_in, "input_size": task.input_size, "output_size": task.output_size}
    spec = ModelSpec(width=8, depth=1, heads=1, pool="mean", **sizes)
    with pytest.raises(InputError, match="predicts once a prompt"):
        spec.for_task(task)
    with pytest.raises(InputError, match="pooled read-out"):
        rollout(build_model(spec), task, 2, 3, generator())
