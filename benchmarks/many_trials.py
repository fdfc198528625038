"""How long a run of thousands of finished trials takes to be gone on with, listed and reported.

`python benchmarks/many_trials.py [--trials 10000] [--models 1] [--seeds 1] [--json FILE]`: the trials' records are
written as a run writes them, with scores drawn at random; only the best is trained, for a step, and measured.

With `--ask tpe` (or gp; needs Optuna): how long it takes to choose the setting of one more trial, first of a run that
is gone on with, then of one that goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from contextlab import open_run, run
from contextlab.cli.report import report
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.folder import RunFolder
from contextlab.experiments.record import begin
from contextlab.experiments.sampling import SAMPLERS, Asking
from contextlab.files import make_folder, write_json, write_record
from contextlab.report import chosen_table, summary_table, summary_words


def many(trials: int, models: int = 1, seeds: int = 1, sampler: str = "random") -> ExperimentSpec:
    """A sweep of so many trials in all, over a learning rate: tiny models on recall, one step each."""
    tiny = {"preset": "transformer", "options": {"width": 8, "depth": 1, "heads": 1}}
    return ExperimentSpec.parse(
        {
            "name": "many",
            "tasks": {
                "recall": {"task": "associative_recall", "options": {"vocabulary": 16, "pairs": 3, "length": 16}}
            },
            "models": {f"model_{number}": tiny for number in range(models)},
            "train": {"steps": 1, "batch": 2},
            "evaluate": {"prompts": 16, "batch": 16, "similarity": 0},
            "seeds": list(range(seeds)),
            "sweep": {
                "over": {"train.learning_rate": {"log": [1e-5, 1e-1]}, "train.weight_decay": {"range": [0, 0.5]}},
                "sampler": sampler,
                "trials": trials // (models * seeds),
                "validation": {"prompts": 16},
            },
        }
    )


def write_trials(folder: RunFolder, spec: ExperimentSpec) -> int:
    """Write the run's record and those of all trials, as if they had finished. Returns how many those are."""
    begin(folder, spec, torch.device("cpu"), 1, 1, [])
    rng, trainings = random.Random(0), [each for each in spec.trainings() if each.trial is not None]
    for training in trainings:
        value = rng.random()
        score = {"metric": "accuracy", "value": value, "ci_low": 0.9 * value, "ci_high": value + 0.1 * (1 - value)}
        record = {
            **training.job.fields,
            "status": "finished",
            "message": "",
            "tasks": list(training.tasks),
            "model_spec": training.model.model_dump(mode="json"),
            "train_spec": training.train.model_dump(mode="json"),
            "setting": dict(training.setting),
            "parameters": 1000,
            "steps": 1,
            "threads": 1,
            "seconds": 0.1,
            "validation": {"recall": {**score, "n": 16}},
            "files": {},
        }
        with patch("os.fsync"):  # that these are on disk is not what is measured
            write_record(make_folder(folder.training(training.job)) / "record.json", record)
    return len(trainings)


def asked(folder: RunFolder, sampler: str, trials: int) -> Asking:
    """A run of which so many trials at settings drawn at random have finished, and the sampler may choose more."""
    spec, drawn = many(trials + 9, sampler=sampler), many(trials).sweep_spec("model_0").settings()
    (job,) = spec.measured()
    for number, setting in enumerate(drawn):
        spec.settle(job, number, setting)
    write_trials(folder, spec)
    write_json(make_folder(folder.path / "trials") / f"{job.task}.{job.model}.json", drawn)
    return Asking(folder, spec)


def main() -> None:
    """Time each step, and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--models", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ask", choices=list(SAMPLERS), help="a sampler of Optuna's: time what it takes to ask it")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}

    def timed(what: str, do: Callable[[], Any]) -> Any:
        began, worked = time.perf_counter(), time.process_time()
        found = do()
        seconds[what] = time.perf_counter() - began
        print(f"{what:50} {seconds[what]:7.2f} s, {time.process_time() - worked:.2f} s of one core", flush=True)
        return found

    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary) / "many")
        if given.ask:
            asking = asked(folder, given.ask, given.trials)
            for number in range(given.trials, given.trials + 9):
                timed(f"trial {number:,} is asked for ({given.ask})", lambda number=number: asking.ask(number))
            return
        spec = many(given.trials, given.models, given.seeds)
        count = write_trials(folder, spec)
        print(f"{count:,} finished trials of {given.models} models, {given.seeds} seeds")
        timed("the spec, every training resolved", lambda: ExperimentSpec.parse(spec.model_dump()).trainings())
        timed("gone on with, the best measured, reported", lambda: run(folder.spec, out=folder.path, resume=True))
        timed("gone on with, nothing left to do", lambda: run(folder.spec, out=folder.path, resume=True))
        found = timed("opened (open_run)", lambda: open_run(folder.path))

        def listed() -> None:
            chosen_table(found.records), summary_table(found.results, found.records)
            summary_words(found.results, found.records, found.by_prompt)

        timed("listed: the tables and words of the terminal", listed)
        page = Path(temporary) / "report.html"
        timed("reported (contextlab report RUN)", lambda: report([folder.path], page))
        print(f"the report has {page.stat().st_size / 2**20:.2f} MiB")
    if given.json:
        given.json.write_text(json.dumps({"trials": count, **vars(given), "seconds": seconds}, default=str))


if __name__ == "__main__":
    main()
