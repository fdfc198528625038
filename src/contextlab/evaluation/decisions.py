"""Online evaluation of decision tasks: a predictor's own actions fill its context; regret by step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.evaluation.evaluate import _evaluating, predict
from contextlab.evaluation.intervals import Z95
from contextlab.evaluation.results import table
from contextlab.evaluation.spec import EvaluateSpec
from contextlab.learners.bandits import DecisionLearner
from contextlab.prompt import Learner, Predictor, Prompt
from contextlab.tasks.decisions import DecisionTask, Transitions

ONLINE = "online"
"""The split of online play in tables of results."""


@dataclass
class Rollout:
    """What a predictor did, step by step.

    problem: what was drawn, name -> [B, ...].
    states: [B, horizon] int64, in which it acted.
    actions: [B, horizon] int64.
    rewards: [B, horizon].
    lost: [B, horizon], the expected reward that each action lost against the best one.
    """

    problem: dict[str, Tensor]
    states: Tensor
    actions: Tensor
    rewards: Tensor
    lost: Tensor


def rollout(
    predictor: Predictor,
    task: DecisionTask,
    problems: int,
    horizon: int,
    generator: torch.Generator,
    *,
    sample: bool = True,
) -> Rollout:
    """Let a predictor act on fresh problems, all at once; each step's transition is the next token of its context.

    predictor: a model, which is read on from its state; a learner; or a function of the inputs so far.
    problems: drawn from the task, each with a context of its own. horizon: steps.
    generator: draws the problems first, so the same seed gives the same problems to every predictor; where it lives,
        the problems do.
    sample: draw actions from the predicted distribution, as posterior sampling does; else take the likeliest.
    """
    if not isinstance(task, DecisionTask):
        raise InputError(
            f"rollout needs a decision task, such as bandit, linear_bandit or darkroom, not {type(task).__name__}"
        )
    if problems < 1 or horizon < 1:
        raise InputError(f"rollout needs at least 1 problem and 1 step, got {problems} and {horizon}")
    problem = task.problems(problems, generator, generator.device)
    start = state = task.start(problem).unsqueeze(1)
    ask = _Asking(predictor, task, problems, horizon, generator.device)
    token = task.encode(state, None)
    steps = []
    with _evaluating(predictor):
        for t in range(horizon):
            logits = ask(token)
            if sample:
                action = F.softmax(logits.float(), -1).multinomial(1, generator=generator)
            else:
                action = logits.argmax(-1, keepdim=True)
            reward, after = task.step(problem, state, action, generator)
            steps.append((state, action, reward, task.lost(problem, state, action)))
            query = start if task.episode is not None and (t + 1) % task.episode == 0 else after
            token = task.encode(query, Transitions(state, action, reward, after))
            state = query
    states, actions, rewards, lost = (torch.cat(each, 1) for each in zip(*steps, strict=True))
    return Rollout(problem, states, actions, rewards, lost)


class _Asking:
    """The predictor's logits after one more token."""

    def __init__(
        self, predictor: Predictor, task: DecisionTask, problems: int, horizon: int, device: torch.device
    ) -> None:
        self.predictor, self.task = predictor, task
        self.reads = isinstance(predictor, nn.Module) and callable(getattr(predictor, "read", None))
        self.state: Any = None
        self.length = 0
        if not self.reads:
            self.inputs = torch.empty(problems, horizon, task.input_size, device=device)

    def __call__(self, token: Tensor) -> Tensor:
        logits = self._logits(token)
        if logits.shape != (len(token), self.task.actions):
            raise InputError(
                f"rollout: {type(self.task).__name__} has {self.task.actions} actions, but the predictor gives "
                f"{logits.shape[-1]} numbers"
            )
        return logits

    def _logits(self, token: Tensor) -> Tensor:
        if self.reads:
            prediction, self.state = self.predictor.read(token, self.state)  # type: ignore[attr-defined]
            return prediction[:, -1]
        self.inputs[:, self.length] = token[:, 0]
        self.length += 1
        seen = self.inputs[:, : self.length]
        nothing = torch.zeros(seen.shape[:2], dtype=torch.int64, device=seen.device)
        prompt = Prompt(seen, nothing, nothing.bool(), nothing)
        if isinstance(self.predictor, DecisionLearner):
            return self.predictor.last(prompt)
        return predict(self.predictor, prompt)[:, -1]


def regret(
    predictors: Mapping[str, Predictor] | Predictor,
    task: DecisionTask,
    *,
    problems: int = 256,
    horizon: int | None = None,
    sample: bool = True,
    seed: int = EvaluateSpec().seed,
    run: str = "",
    task_name: str | None = None,
    device: torch.device | str | None = None,
    by_problem: list[dict[str, Any]] | None = None,
) -> pd.DataFrame:
    """Online performance of predictors, all on the same problems; see `rollout`.

    predictors: models and learners by name, or one alone.
    horizon: steps; None for the task's.
    run, task_name: written into the table.
    device: where the problems are; None takes the first model's.
    by_problem: where given, a row of each problem's regret is added to it (see `results.BY_PROMPT_COLUMNS`).

    Returns a tidy table (see `results.COLUMNS`), split "online", `shot` the steps made before. Metrics: "regret", the
    expected reward lost so far; "suboptimality", that lost in this step; "reward". Where the shot is missing, "regret"
    is that of the whole rollout, the others are means over steps. Intervals are normal 95% intervals over problems; one
    problem has none.
    """
    named = predictors if isinstance(predictors, Mapping) else {"model": predictors}
    steps = task.horizon if horizon is None else horizon
    if device is None:
        models = (predictor for predictor in named.values() if isinstance(predictor, nn.Module))
        device = next((parameter.device for model in models for parameter in model.parameters()), "cpu")
    rows: list[dict[str, Any]] = []
    for name, predictor in named.items():
        generator = torch.Generator(device).manual_seed(seed)
        played = rollout(predictor, task, problems, steps, generator, sample=sample)
        lost, reward = played.lost.double(), played.rewards.double()
        total = lost.cumsum(1)
        whole = {"regret": total[:, -1:], "suboptimality": lost.mean(1, True), "reward": reward.mean(1, True)}
        each = {"regret": total, "suboptimality": lost, "reward": reward}
        who = {
            "run": run,
            "model": name,
            "kind": "learner" if isinstance(predictor, Learner) else "model",
            "seed": 0,
            "task": task_name or type(task).__name__,
            "split": ONLINE,
            "length": steps,
            "n": problems,
        }
        if by_problem is not None:
            drawn = "".join(f"{key}:{value.flatten().tolist()}" for key, value in sorted(played.problem.items()))
            drawn_as = {"metric": "regret", "prompts": hashlib.blake2b(drawn.encode(), digest_size=8).hexdigest()}
            row = {key: value for key, value in who.items() if key not in ("length", "n")}
            by_problem.append({**row, **drawn_as, "chance": math.nan, "values": total[:, -1].float().cpu().numpy()})
        for metric, by_step in each.items():
            values = torch.cat([whole[metric], by_step], 1)
            unknown = torch.full(values.shape[1:], math.nan)  # of one problem
            half = Z95 * values.std(0) / math.sqrt(problems) if problems > 1 else unknown
            for i, (value, width) in enumerate(zip(values.mean(0).tolist(), half.tolist(), strict=True)):
                shot = None if i == 0 else i - 1
                rows.append(
                    {**who, "metric": metric, "shot": shot, "value": value, "ci_low": value - width}
                    | {"ci_high": value + width}
                )
    return table(rows)
