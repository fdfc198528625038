"""Trials that are chosen by those before them, with Optuna's samplers.

What is asked next is a function of the sweep's seed, the trial's number and the scores of the trials before it: a new
sampler is made each time. So a resumed run asks for what one that was never stopped asks for, whatever `--jobs`.
The settings that were asked for lie in `trials/TASK.MODEL.json`, from which other processes read them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contextlab.errors import InputError, ResourceError
from contextlab.experiments.choice import Tried, trials
from contextlab.experiments.folder import RunFolder
from contextlab.experiments.jobs import Job
from contextlab.experiments.paths import Setting
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
            spec.settle(job, number, setting)


def ask(folder: RunFolder, spec: ExperimentSpec, number: int) -> list[Job]:
    """Choose the setting of trial `number` of each model and task by the trials before it. Returns the trials' jobs."""
    found = []
    for job in _adaptive(spec):
        sweep, asked = spec.sweep_of(job.model), _asked(folder, job)
        if number >= (sweep.trials or 0):
            continue
        if number == len(asked):
            training = spec.candidates(job)[0]
            higher = next(iter(training.tasks.values())).higher_is_better
            before = trials(spec, job, lambda trial: trial_record(folder, trial))[:number]
            setting = suggest(sweep, before, number, higher)
            spec.settle(job, number, setting)
            make_folder(folder.path / "trials")
            write_json(_file(folder, job), [*asked, setting])
        found += [spec.candidates(Job("training", job.task, job.model, seed))[number].job for seed in spec.seeds]
    return found


def suggest(sweep: SweepSpec, before: Sequence[Tried], number: int, higher_is_better: bool) -> Setting:
    """The setting that a sampler of Optuna's tries next."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {path: _distribution(values) for path, values in sweep.over.items()}
    seed = int.from_bytes(hashlib.sha256(f"sweep {sweep.seed} {number}".encode()).digest()[:4], "little")
    sampler = getattr(optuna.samplers, SAMPLERS[sweep.sampler])(seed=seed)
    study = optuna.create_study(direction="maximize" if higher_is_better else "minimize", sampler=sampler)
    for each in before:
        params = {path: _as_parameter(values, each.setting[path]) for path, values in sweep.over.items()}
        lost = each.missing > 0 or math.isnan(each.value)
        state = optuna.trial.TrialState.PRUNED if lost else optuna.trial.TrialState.COMPLETE
        value = None if lost else each.value
        study.add_trial(optuna.trial.create_trial(state=state, value=value, params=params, distributions=space))
    found = study.ask(space).params
    return {path: _as_value(values, found[path]) for path, values in sweep.over.items()}


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
