"""Successive halving: which trials of a sweep go on at each rung, as a pure function of their scores.

The rule is that of Jamieson and Talwalkar (1502.07943): train all a little, keep the better part, train those further.
What differs: theirs halves a number of rounds that follows from a budget, which all rounds share evenly, until one is
left; here rungs are shares of a training, and those that are left after the last one are trained to the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from contextlab.errors import InputError
from contextlab.spec import Spec, describe
from contextlab.training.spec import ROUNDING


class HalvingSpec(Spec):
    """When trials of a sweep are dropped before their end.

    rungs: shares of a training's steps, rising. There the trials that are still in pause, and are scored on the sweep's
        validation prompts; rungs after the first are held while more than one is in.
    reduction: of n trials the best n / reduction go on, rounded up; 1 drops none.
    seeds: so many of the experiment's seeds decide, the first; the others are trained at the chosen setting alone. None
        lets all decide.
    metric: of the tasks, by which rungs are judged; None takes the task's own. Early on a finer one may tell more, such
        as cross_entropy.
    """

    rungs: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.25, 0.5)
    reduction: Annotated[float, Field(ge=1)] = 2
    seeds: PositiveInt | None = 1
    metric: str | None = None

    @model_validator(mode="after")
    def _rising(self) -> HalvingSpec:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise InputError(f"rungs: expected rising shares, such as [0.25, 0.5], got {describe(list(self.rungs))}")
        return self

    def step(self, rung: int, steps: int) -> int:
        """The step, counted from 1, at which a training of so many steps pauses for a rung."""
        return max(1, math.ceil(self.rungs[rung] * steps - ROUNDING))

    def kept(self, trials: int) -> int:
        """How many of so many go on at most."""
        return math.ceil(trials / self.reduction)

    def sizes(self, trials: int) -> list[int]:
        """How many are in at most at each rung that is held, then after the last one."""
        found = [trials]
        for _ in self.rungs:
            found.append(self.kept(found[-1]))
            if found[-1] == 1:
                break
        return found


@dataclass(frozen=True)
class Race:
    """Who was in when, by the trials' numbers.

    rounds: at each rung that was held those that were in, in order.
    dropped: at each of them those that had a score, and did not go on.
    left: those that are left after the last one that was held.
    """

    rounds: tuple[tuple[int, ...], ...]
    dropped: tuple[tuple[int, ...], ...]
    left: tuple[int, ...]

    @property
    def level(self) -> int | None:
        """The last rung at which all trials can be compared, as none that had a score was dropped before; None: at the
        end of training."""
        last = None if len(self.left) > 1 else len(self.rounds) - 1
        return next((rung for rung, gone in enumerate(self.dropped) if gone), last)

    def dropped_at(self, trial: int) -> int | None:
        """The rung at which a trial was dropped; None where it is left, or has never had a score."""
        return next((rung for rung, gone in enumerate(self.dropped) if trial in gone), None)


def race(
    halving: HalvingSpec,
    trials: Sequence[int],
    scores: Callable[[int, int], Sequence[float]],
    higher_is_better: bool,
    rungs: int | None = None,
    lost: Collection[int] = (),
    hopeless: Callable[[int, int], int] = lambda rung, trial: 0,
) -> Race:
    """Who goes on, rung by rung.

    trials: their numbers.
    scores: of (rung, trial), one from each seed that decides, in any order; nan where it gave none.
    rungs: how many are held, the first; None: all.
    lost: those that diverged after a rung: where all that went on from one did, the next best of it go on in their
        place.
    hopeless: of (rung, trial), how many of its seeds gave a score, but had ended by then as hopeless.
    """
    rounds: list[tuple[int, ...]] = []
    dropped: list[tuple[int, ...]] = []
    left = tuple(trials)
    for rung in range(len(halving.rungs[:rungs])):
        if rung and len(left) == 1:
            break
        found = {trial: list(scores(rung, trial)) for trial in left}
        ended = {trial: hopeless(rung, trial) for trial in left}
        rounds.append(left)
        left = tuple(go_on(found, halving.kept(len(left)), higher_is_better, ended))
        others = {trial: each for trial, each in found.items() if trial not in lost}
        if others and all(trial in lost for trial in left):
            left = tuple(go_on(others, halving.kept(len(rounds[-1])), higher_is_better, ended))
        dropped.append(tuple(t for t in rounds[-1] if t not in left and not all(map(math.isnan, found[t]))))
    return Race(tuple(rounds), tuple(dropped), left)


def go_on(
    scores: Mapping[int, Sequence[float]], most: int, higher_is_better: bool, hopeless: Mapping[int, int] | None = None
) -> list[int]:
    """The numbers of the best trials, at most `most`, in order.

    Those with the fewest seeds that are hopeless or without a score come first, of these those with the fewest without
    a score, then the best mean, of equals the first: the order of `choice.best`. A trial of which no seed has hope goes
    on only where none has one, and then alone.

    scores: trial -> one from each seed; nan where it gave none.
    hopeless: trial -> how many of its seeds gave a score, but ended as hopeless; None: none did.
    """

    def place(trial: int) -> tuple[int, int, float, int]:
        known = sorted(score for score in scores[trial] if not math.isnan(score))  # whatever the seeds' order
        mean = sum(known) / len(known) if known else 0.0
        missing = len(scores[trial]) - len(known)
        return missing + (hopeless or {}).get(trial, 0), missing, -mean if higher_is_better else mean, trial

    order = sorted(scores, key=place)
    hopeful = [trial for trial in order[:most] if place(trial)[0] < len(scores[trial])]
    return sorted(hopeful or order[:1])
