"""All trials of a run as one tidy table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from contextlab.experiments.choice import NUMBERS, Records
from contextlab.experiments.jobs import Job
from contextlab.experiments.rungs import most_rungs
from contextlab.experiments.spec import ExperimentSpec


def sweep_table(spec: ExperimentSpec, records: Records, chosen: Mapping[Job, int]) -> pd.DataFrame:
    """Every trial as a tidy table: a row for each seed and task that it was scored on, with a column for each field.

    chosen: of each measured job the number of the trial that it has.

    Columns: run, task, model, seed, trial, status, stopped ("solved" or "hopeless" where the training ended before its
    last step), steps, seconds, metric, value, ci_low, ci_high, n, chosen, and one for each path, swept or tied. A trial
    that gave no score has one row without a value. With halving the score is the last that the trial got, and there are
    `told`, how it stands in words, and `rung_1`, `rung_2`, ...: its scores at the rungs.
    """
    rows = []
    rungs = most_rungs(spec)
    for training in spec.trainings():
        if training.trial is None:
            continue
        record = records(training.job)
        setting = {**training.setting, **spec.sweep_of(training.model_name).ties(training.setting)}
        who = {
            "run": spec.name,
            "model": training.model_name,
            "seed": training.seed,
            "trial": training.trial,
            "status": record.get("status", "missing"),
            "stopped": record.get("stopped", ""),
            "steps": record.get("steps"),
            "seconds": record.get("seconds"),
            "chosen": chosen.get(training.measured) == training.trial,
        }
        for name, task in training.tasks.items():
            at = [each["validation"].get(name, {}) for each in record.get("rungs") or ()]
            score: Mapping[str, Any] = (record.get("validation") or {}).get(name) or next(reversed(at), {})
            own = {"metric": score.get("metric", task.metric), **{key: score.get(key) for key in (*NUMBERS, "n")}}
            if rungs:
                own |= {"told": record.get("message")}
                own |= {f"rung_{k + 1}": at[k].get("value") if k < len(at) else None for k in range(rungs)}
            rows.append({**who, "task": name, **own, **setting})
    found = pd.DataFrame(rows)
    paths = [name for name in found if "." in str(name)]
    for path in paths:
        if not pd.api.types.is_numeric_dtype(found[path]):
            found[path] = found[path].map(lambda value: None if _absent(value) else str(value)).astype("string")
    order = [
        "run",
        "task",
        "model",
        "seed",
        "trial",
        *paths,
        "status",
        "stopped",
        "steps",
        "seconds",
        "metric",
        *NUMBERS,
        "n",
        *(name for name in found if name == "told" or str(name).startswith("rung_")),
        "chosen",
    ]
    text = dict.fromkeys({"run", "task", "model", "status", "stopped", "metric", "told"} & set(order), "string")
    numbers = {
        **dict.fromkeys(("seed", "trial", "steps", "n"), "Int64"),
        **dict.fromkeys((*NUMBERS, "seconds", *(f"rung_{k + 1}" for k in range(rungs))), "float64"),
    }
    return found[order].astype({**text, **numbers})


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
