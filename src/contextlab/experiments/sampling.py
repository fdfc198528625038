"""Trials that are chosen by those before them, with Optuna's samplers.

What is asked next is a function of the sweep's seed, the trial's number and the scores of the trials before it: a new
sampler is made each time, though not a new list of these trials. So a resumed run asks for what one that was never
stopped asks for, whatever `--jobs`.
The settings that were asked for lie in `trials/TASK.MODEL.json`, from which other processes read them.
"""

from __future__ import annotations

import hashlib
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contextlab.errors import InputError, ResourceError
from contextlab.experiments.choice import Tried, trials
from contextlab.experiments.folder import RunFolder
from contextlab.experiments.jobs import Job
from contextlab.experiments.paths import Setting
from contextlab.experiments.rungs import task_of
from contextlab.experiments.spec import ExperimentSpec
from contextlab.experiments.sweep import SweepSpec
from contextlab.experiments.trial import trial_record
from contextlab.experiments.values import Values
from contextlab.files import make_folder, read_json, write_json

SAMPLERS = {"tpe": "TPESampler", "gp": "GPSampler"}
"""By their names here: those of Optuna's that go by the scores of finished trials alone."""


def require_sampler(spec: ExperimentSpec) -> None:
    """Raises ResourceError where a model's sampler needs a package that is not installed."""
    for name in spec.models:
        sampler = spec.sweep_spec(name).sampler
        needed = ["optuna", *(["scipy"] if sampler == "gp" else [])] if sampler in SAMPLERS else []
        for package in needed:
            if find_spec(package) is None:
                raise ResourceError(
                    f"sampler {sampler!r}: the package {package} is not installed; pip install 'contextlab[optuna]', "
                    "or set sampler to random"
                )


def rounds(spec: ExperimentSpec) -> int:
    """Trials, one after another, of the model that has most of those that are chosen by others."""
    return max((spec.sweep_of(job.model).trials or 0 for job in _adaptive(spec)), default=0)


def settle(folder: RunFolder, spec: ExperimentSpec) -> None:
    """Give the trials that were asked for so far their settings."""
    for job in _adaptive(spec):
        for number, setting in enumerate(_asked(folder, job)):
            known = spec.candidates(job)[number].setting
            if json.dumps(known, default=str) != json.dumps(setting):  # a worker does many jobs, and knows most by then
                spec.settle(job, number, setting)


class Asking:
    """Chooses the settings of a run's trials, one after another.

    What a sampler goes by is in the run's folder, and is read from there once: a trial is asked for when those before
    it are done, and they stay as they are while this run goes on. Whoever goes on with the run begins with a new one.
    """

    def __init__(self, folder: RunFolder, spec: ExperimentSpec) -> None:
        self.folder, self.spec = folder, spec
        self.asked = {job: _asked(folder, job) for job in _adaptive(spec)}
        self.samplers: dict[Job, Sampler] = {}

    def ask(self, number: int) -> list[Job]:
        """Choose the setting of trial `number` of each model and task by those before it. Returns the trials' jobs.

        number: one more than in the call before, whose trials are done.
        """
        found = []
        for job, asked in self.asked.items():
            if number >= (self.spec.sweep_of(job.model).trials or 0):
                continue
            if number == len(asked):
                setting = dict(self._next(job, number))
                self.spec.settle(job, number, setting)
                asked.append(setting)
                make_folder(self.folder.path / "trials")
                write_json(_file(self.folder, job), asked)
            jobs = [Job("training", job.task, job.model, seed) for seed in self.spec.seeds]
            found += [self.spec.candidates(each)[number].job for each in jobs]
        return found

    def _next(self, job: Job, number: int) -> Setting:
        if job not in self.samplers:
            higher = task_of(self.spec, job).higher_is_better
            self.samplers[job] = Sampler(self.spec.sweep_of(job.model), higher)
        sampler = self.samplers[job]
        new = range(sampler.told, number)
        for each in trials(self.spec, job, lambda trial: trial_record(self.folder, trial), new):
            sampler.tell(each)
        return sampler.suggest()


class Sampler:
    """One of Optuna's, told of a sweep's trials in order: what it suggests after n of them follows from these alone."""

    def __init__(self, sweep: SweepSpec, higher_is_better: bool) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.told = sweep, 0
        self.space = {path: _distribution(values) for path, values in sweep.over.items()}
        self.study = optuna.create_study(direction="maximize" if higher_is_better else "minimize")

    def tell(self, tried: Tried) -> None:
        """Of the next trial, which has ended."""
        from optuna.trial import TrialState, create_trial

        params = {path: _as_parameter(values, tried.setting[path]) for path, values in self.sweep.over.items()}
        lost = tried.missing > 0 or math.isnan(tried.value)
        state, value = (TrialState.PRUNED, None) if lost else (TrialState.COMPLETE, tried.value)
        self.study.add_trial(create_trial(state=state, value=value, params=params, distributions=self.space))
        self.told += 1

    def suggest(self) -> Setting:
        """The setting of the trial after those that were told."""
        import optuna

        seed = int.from_bytes(hashlib.sha256(f"sweep {self.sweep.seed} {self.told}".encode()).digest()[:4], "little")
        self.study.sampler = getattr(optuna.samplers, SAMPLERS[self.sweep.sampler])(seed=seed)
        asked = self.study.ask(self.space)
        # It is told once it has ended, with the setting as it was rounded; until then samplers leave failed ones out.
        self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return {path: _as_value(values, asked.params[path]) for path, values in self.sweep.over.items()}


def _distribution(values: Values) -> Any:
    import optuna

    points = values.points() if values.integers is None or values.n is not None else None
    if points is not None:  # by their places: values may be lists
        return optuna.distributions.CategoricalDistribution(range(len(points)))
    low, high = values.ends
    if values.integers is not None:
        return optuna.distributions.IntDistribution(low, high)
    return optuna.distributions.FloatDistribution(low, high, log=values.log is not None)


def _as_value(values: Values, parameter: Any) -> Any:
    points = values.points()
    if values.integers is not None and values.n is None:
        return int(parameter)
    if points is not None:
        return points[parameter]
    low, high = values.ends
    return min(max(float(f"{parameter:.6g}"), low), high)


def _as_parameter(values: Values, value: Any) -> Any:
    points = values.points() if values.integers is None or values.n is not None else None
    return value if points is None else points.index(value)


def _adaptive(spec: ExperimentSpec) -> list[Job]:
    """A job of kind "training" for each model and task whose trials are chosen by those before them."""
    return [
        job
        for job in spec.measured()
        if job.seed == spec.seeds[0] and spec.sweep_of(job.model).over and spec.sweep_of(job.model).sampler in SAMPLERS
    ]


def _file(folder: RunFolder, job: Job) -> Path:
    return folder.path / "trials" / f"{job.task}.{job.model}.json"


def _asked(folder: RunFolder, job: Job) -> list[dict[str, Any]]:
    path = _file(folder, job)
    found = read_json(path) if path.exists() else []
    if not isinstance(found, list):
        raise InputError(f"{path}: expected a list of settings; delete it, and the trials are chosen again")
    return found
