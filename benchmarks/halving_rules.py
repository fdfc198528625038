"""What rules of early decision would have done with trainings that were made whole; see `benchmarks/halving.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch

from contextlab.evaluation.intervals import Interval, t95
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.choice import Tried, best
from contextlab.experiments.halving import HalvingSpec, race
from contextlab.experiments.rungs import HOPELESS
from contextlab.models import build_model
from contextlab.training import TrainSpec
from contextlab.training.spec import UntilSpec
from contextlab.training.until import STREAM, Look, Until
from contextlab.words import counted

TASK, VALIDATION, TEST = "recall", "validation", "halving's test"
METRICS = ("accuracy", "cross_entropy")
LATE = 0.05
"""A training is a late learner where its accuracy at the end is by so much better than when it was stopped."""

Made = Mapping[str, Any]
"""A training, as `halving.measured` gives it."""


@dataclass(frozen=True)
class Rule:
    """When trials are dropped, and when a training ends; None: never. name: in the table."""

    name: str
    halving: HalvingSpec | None = None
    until: UntilSpec | None = None


SOLVED = {"at_least": 0.995}
SURE = {"metric": "cross_entropy", "at_most": 0.03}
LOOKS = 12
"""Of `until` in a training."""


def rules(spec: ExperimentSpec) -> list[Rule]:
    """The rules to compare; the first is the full grid, the second the recipe's own."""
    training = spec.model_copy(update={"early": True}).trainings()[0]
    recipe = spec.sweep_of(training.model_name).halving  # whatever `early` says
    every_steps = training.train.steps // LOOKS
    solved = UntilSpec(**SOLVED, every=every_steps)
    every = [Rule("full grid"), Rule("the recipe's", recipe, training.train.until)]
    every.append(Rule("solved", None, solved))
    every += [
        Rule(f"solved; hopeless {share:g}, by {metric}", None, UntilSpec(**goal, hopeless=share, every=every_steps))
        for goal, metric in ((SOLVED, "accuracy"), (SURE, "cross-entropy"))
        for share in (0.25, 0.5, 0.75)
    ]
    for rungs, reduction, seeds in (
        ((0.25, 0.5), 2, 1), ((1 / 6, 1 / 3), 2, 1), ((0.5, 0.75), 2, 1), ((0.25,), 4, 1), ((0.5,), 4, 1),
        ((0.25,), 2, 1), ((0.5,), 2, 1), ((0.25, 0.5), 2, None),
    ):  # fmt: skip
        for metric in METRICS:
            words = " and ".join(str(Fraction(rung).limit_denominator(12)) for rung in rungs)
            who = "1 seed" if seeds else "all seeds"
            name = f"rungs {words}, by {metric.replace('_', '-')}, 1 of {reduction}, {who}"
            halving = HalvingSpec(rungs=rungs, reduction=reduction, seeds=seeds, metric=metric)
            every.append(Rule(f"{name}; solved", halving, solved))
    return every


@dataclass
class Outcome:
    """What a rule would have done.

    steps, seconds: of all trainings that it makes. chosen, accuracy: of each mixer the trial, and its accuracy on the
    test, the mean over seeds. dropped: mixers of which halving dropped a trial that ends better than the one kept by
    LATE, on validation prompts. lost: trainings that were stopped as hopeless and are late learners. hopeless: all that
    were stopped so. made: trainings that were begun.
    """

    steps: int = 0
    seconds: float = 0.0
    chosen: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    hopeless: int = 0
    made: int = 0


class Replay:
    """Trainings of a grid, and what rules would have done with them."""

    def __init__(self, spec: ExperimentSpec, made: Sequence[Made]) -> None:
        self.task = spec.build_task(TASK)
        first = spec.trainings()[0]
        self.model, self.seeds = build_model(first.model), list(spec.seeds)
        self.steps = int(made[0]["steps"])
        self.goals: dict[str, Until] = {}
        self.grid: dict[str, dict[tuple[int, int], Made]] = {}
        for each in made:
            self.grid.setdefault(each["model"], {})[each["trial"], each["seed"]] = each

    @cached_property
    def full(self) -> Outcome:
        """Of the full grid."""
        return self(Rule("full grid"))

    def __call__(self, rule: Rule) -> Outcome:
        """What the rule would have done."""
        found = Outcome()
        for name, made in self.grid.items():
            ends = {key: self.end(each, rule.until) for key, each in made.items()}
            self._decide(rule, name, made, ends, found)
        return found

    def _goal(self, until: UntilSpec) -> Until:
        key = until.model_dump_json()
        if key not in self.goals:
            spec = TrainSpec(steps=self.steps, until=until)
            self.goals[key] = Until(self.model, [self.task], spec, torch.device("cpu"))
        return self.goals[key]

    def end(self, made: Made, until: UntilSpec | None) -> tuple[int, str]:
        """After which step a training ends, and why before its last one: "solved", "hopeless" or ""."""
        if until is None:
            return made["made"], ""
        goal = self._goal(until)
        before: Look | None = None
        for each in made["looks"]:
            if not goal.due(each["step"]) or each["step"] == self.steps:
                continue
            value, low, high, _ = each[STREAM][until.metric or self.task.metric]
            look: Look = {"step": each["step"], "values": [value], "ci_low": [low], "ci_high": [high]}
            if goal.reached(look):
                return each["step"], "solved"
            if goal.hopeless(look, before):
                return each["step"], HOPELESS
            before = look
        return made["made"], ""

    def score(self, made: Made, step: int, stream: str, metric: str) -> float:
        """At the last look up to a step; nan where the training had diverged by then, or was not looked at yet."""
        if made["status"] == "diverged" and made["made"] <= step:
            return math.nan
        looks = [each for each in made["looks"] if each["step"] <= step]
        return float(looks[-1][stream][metric][0]) if looks else math.nan

    def _decide(
        self,
        rule: Rule,
        name: str,
        made: Mapping[tuple[int, int], Made],
        ends: Mapping[tuple[int, int], tuple[int, str]],
        found: Outcome,
    ) -> None:
        """What the rule would have done with one mixer, added to what was found of others."""
        trials = sorted({trial for trial, _ in made})
        reached = dict.fromkeys(trials, self.steps)  # of each trial, from the seeds that decide
        deciding, left = self.seeds, tuple(trials)
        if rule.halving is not None:
            halving, deciding = rule.halving, self.seeds[: rule.halving.seeds]
            metric = halving.metric or self.task.metric

            def scores(rung: int, trial: int) -> list[float]:
                at = halving.step(rung, self.steps)
                return [
                    self.score(made[trial, seed], min(at, ends[trial, seed][0]), VALIDATION, metric)
                    for seed in deciding
                ]

            def hopeless(rung: int, trial: int) -> int:
                at, values = halving.step(rung, self.steps), scores(rung, trial)
                pairs = zip((ends[trial, seed] for seed in deciding), values, strict=True)
                return sum(why == HOPELESS and step <= at and not math.isnan(value) for (step, why), value in pairs)

            lost = [t for t in trials if any(made[t, seed]["status"] == "diverged" for seed in deciding)]
            held = race(halving, trials, scores, metric == "accuracy", None, lost, hopeless)
            left = held.left
            for rung, dropped in enumerate(held.rounds):
                for trial in set(dropped) - set(held.rounds[rung + 1] if rung + 1 < len(held.rounds) else left):
                    reached[trial] = halving.step(rung, self.steps)
        chosen = best(self._tried(made, ends, left, deciding), self.task.higher_is_better).number
        begun = {(trial, seed): reached[trial] for trial in trials for seed in deciding}
        begun |= {(chosen, seed): self.steps for seed in self.seeds}
        for key, most in begun.items():
            step, why = ends[key]
            found.made += 1
            found.steps += min(step, most)
            found.seconds += made[key]["seconds"] * min(step, most) / made[key]["made"]
            if why == HOPELESS and step <= most:
                found.hopeless += 1
                whole, stopped = (self.score(made[key], at, TEST, "accuracy") for at in (self.steps, step))
                if whole - stopped > LATE:
                    found.lost.append(f"{name} trial {key[0]} seed {key[1]}")
        found.chosen[name] = chosen
        test = [self.score(made[chosen, seed], ends[chosen, seed][0], TEST, "accuracy") for seed in self.seeds]
        found.accuracy[name] = sum(0.0 if math.isnan(each) else each for each in test) / len(test)
        at_end = {trial: self._mean(made, trial) for trial in trials}
        if any(at_end[trial] - at_end[chosen] > LATE for trial in trials if trial not in left):
            found.dropped.append(name)

    def _tried(
        self,
        made: Mapping[tuple[int, int], Made],
        ends: Mapping[tuple[int, int], tuple[int, str]],
        left: Sequence[int],
        seeds: Sequence[int],
    ) -> Iterator[Tried]:
        """The trials that are left, as they are compared at the end."""
        for trial in left:
            values = [self.score(made[trial, s], ends[trial, s][0], VALIDATION, self.task.metric) for s in seeds]
            known = [value for value in values if not math.isnan(value)]
            statuses = ["diverged" if math.isnan(value) else "finished" for value in values]
            mean, why = sum(known) / len(known) if known else math.nan, [ends[trial, s][1] for s in seeds]
            yield Tried(trial, made[trial, seeds[0]]["setting"], statuses, mean, math.nan, math.nan, why)

    def _mean(self, made: Mapping[tuple[int, int], Made], trial: int) -> float:
        """Accuracy of a trial on validation prompts at the end of whole trainings; 0 where one diverged."""
        values = [self.score(made[trial, seed], self.steps, VALIDATION, "accuracy") for seed in self.seeds]
        return sum(0.0 if math.isnan(value) else value for value in values) / len(values)


def lost(replay: Replay, outcome: Outcome) -> tuple[Interval, str, float]:
    """Accuracy that the full grid's choice has more: the mean over mixers with its interval, and where it is most."""
    each = {name: value - outcome.accuracy[name] for name, value in replay.full.accuracy.items()}
    values = torch.tensor(list(each.values()), dtype=torch.float64)
    half = t95(len(each) - 1) * float(values.std()) / math.sqrt(len(each)) if len(each) > 1 else math.inf
    worst = max(each, key=lambda name: each[name])
    return Interval.around(float(values.mean()), half), worst, each[worst]


def told(spec: ExperimentSpec, made: Sequence[Made]) -> str:
    """The paragraph and the table of docs/runs.md."""
    replay = Replay(spec, made)
    mixers, full = len(replay.grid), replay.full
    rows = [
        "| rule | steps | training time | trainings a mixer | choice differs | accuracy lost, mean | most | late "
        "learners dropped | hopeless, of them late |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | ---: |",
    ]
    every = rules(spec)
    outcomes = {rule.name: replay(rule) for rule in every}
    for rule in every:
        out = outcomes[rule.name]
        gone, worst, most = lost(replay, out)
        differs = sum(out.chosen[name] != full.chosen[name] for name in full.chosen)
        rows.append(
            f"| {rule.name} | {out.steps / full.steps:.0%} | {out.seconds / full.seconds:.0%} | "
            f"{out.steps / (mixers * replay.steps):.2f} | {differs} of {mixers} | {_points(gone)} | {most * 100:.1f} "
            f"({worst}) | {', '.join(out.dropped) or 'none'} | {out.hopeless}, {len(out.lost)} |"
        )
    return f"{paragraph(spec, replay, outcomes[every[1].name])}\n\n" + "\n".join(rows)


def paragraph(spec: ExperimentSpec, replay: Replay, out: Outcome) -> str:
    """What the recipe's own rule did, in words."""
    full, mixers = replay.full, len(replay.grid)
    trials = len({trial for each in replay.grid.values() for trial, _ in each})
    gone, worst, most = lost(replay, out)
    differs = [name for name in full.chosen if out.chosen[name] != full.chosen[name]]
    apart = [name for name in differs if full.accuracy[name] - out.accuracy[name] > 0.01]
    return (
        f"Measured on {mixers} mixers of `{spec.name}`, {trials} learning rates and {len(replay.seeds)} seeds each, "
        f"all trained whole ({len(replay.grid) * trials * len(replay.seeds)} trainings): the recipe's rule makes "
        f"{out.steps / full.steps:.0%} of the full grid's steps in {out.seconds / full.seconds:.0%} of its training "
        f"time. Its choice differs for {len(differs)} of {mixers} mixers, for {len(apart)} of them by more than a "
        f"point of accuracy on the test. It loses {_points(gone)} points of accuracy on average (95% interval over "
        f"mixers), at most {most * 100:.1f} (`{worst}`). Halving dropped a rate that ends more than {LATE * 100:.0f} "
        f"points better for {counted(len(out.dropped), 'mixer')}{_names(out.dropped)}."
        + (
            f" {out.hopeless} trainings were stopped as hopeless, of which {len(out.lost)} would have come more than "
            f"{LATE * 100:.0f} points further{_names(out.lost)}."
        )
        * bool(out.hopeless)
    )


def _names(names: Sequence[str]) -> str:
    return f" ({', '.join(f'`{name}`' for name in names)})" if names else ""


def _points(told: Interval) -> str:
    """0.3 (-0.1 to 0.7), in points of accuracy."""
    return f"{told.value * 100:.1f} ({told.low * 100:.1f} to {told.high * 100:.1f})"
