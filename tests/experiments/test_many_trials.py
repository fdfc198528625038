"""What a run does for each of its trials does not grow with their number: records read, functions called, counted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from contextlab import open_run, run
from contextlab.cli.report import report
from contextlab.experiments import ExperimentSpec, sampling
from contextlab.experiments import folder as folders
from contextlab.experiments.folder import RunFolder
from contextlab.report.sections import TaskData
from contextlab.report.sweep import chosen_table
from contextlab.report.sweep_figure import MOST_POINTS, by_swept_field

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from many_trials import many, write_trials


def reads(monkeypatch: pytest.MonkeyPatch, do: Any) -> int:
    """How many records of jobs are read."""
    count = 0

    def counted(*given: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        return plainly(*given)

    plainly = folders.read_record
    with monkeypatch.context() as patch:
        patch.setattr(folders, "read_record", counted)
        do()
    return count


def calls(do: Any) -> int:
    """How many functions of Python and of C are called."""
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        do()
    finally:
        sys.setprofile(before)
    return count


def test_records_are_read_a_few_times_each_whatever_the_seeds(tmp_path, monkeypatch):
    found = {}
    for seeds, trials in ((1, 6), (3, 18)):
        folder, spec = RunFolder(tmp_path / str(seeds)), many(trials, models=1, seeds=seeds)
        assert write_trials(folder, spec) == trials
        done = reads(monkeypatch, lambda folder=folder, spec=spec: run(spec, out=folder.path, resume=True))
        again = reads(monkeypatch, lambda folder=folder, spec=spec: run(spec, out=folder.path, resume=True))
        opened = reads(monkeypatch, lambda folder=folder: open_run(folder.path))
        reported = reads(monkeypatch, lambda folder=folder: report([folder.path], tmp_path / "report.html"))
        assert opened <= 1 + seeds  # the run's own, and those of what was measured
        assert reported == opened
        found[trials] = (done, again)
    for few, more in zip(found[6], found[18], strict=True):
        assert more <= 3.2 * few
        assert more <= 8 * 18
    assert len(open_run(folder.path).sweep) == 18


def test_a_sampler_is_told_of_each_finished_trial_once(tmp_path, monkeypatch):
    class Fixed:
        def __init__(self, *_: Any) -> None:
            self.told = 0

        def tell(self, tried: Any) -> None:
            assert (tried.number, tried.missing) == (self.told, 0)
            self.told += 1

        def suggest(self) -> dict[str, float]:
            return {"train.learning_rate": 1e-3 / (1 + self.told), "train.weight_decay": 0.25}

    monkeypatch.setattr(sampling, "Sampler", Fixed)
    folder, spec = RunFolder(tmp_path / "run"), many(12, seeds=2, sampler="tpe")
    write_trials(folder, spec)
    asking = sampling.Asking(folder, spec)
    assert [reads(monkeypatch, lambda number=number: asking.ask(number)) for number in range(5)] == [0, 2, 2, 2, 2]
    # whoever goes on with the run reads them once more, and none that is asked for already
    again = sampling.Asking(folder, many(12, seeds=2, sampler="tpe"))
    sampling.settle(folder, again.spec)
    assert [reads(monkeypatch, lambda number=number: again.ask(number)) for number in range(6)] == [0] * 5 + [10]
    assert asking.asked[spec.measured()[0]] == again.asked[spec.measured()[0]][:5]
    settled = []
    monkeypatch.setattr(ExperimentSpec, "settle", lambda *given: settled.append(given[2]))
    sampling.settle(folder, again.spec)
    assert settled == []  # a worker that knows them all resolves none again
    sampling.settle(folder, spec)
    assert settled == [5]


def test_reporting_a_trial_costs_the_same_among_many(tmp_path):
    folder = RunFolder(tmp_path / "run")
    write_trials(folder, many(3))
    done = run(folder.spec, out=folder.path, resume=True)
    found = []
    for trials in (200, 400, 800):
        curve = [
            {"trial": i, "setting": {"train.learning_rate": 1e-5 * (i + 1)}, "statuses": ["finished"], "stopped": [""],
             "value": 0.5 + i / 2000, "ci_low": 0.4, "ci_high": 0.99}
            for i in range(trials)
        ]  # fmt: skip
        (record,) = done.records
        setting = curve[-1]["setting"]
        sweep = {**record["sweep"], "curve": curve, "trials": trials, "windows": {}}
        records = [{**record, "sweep": sweep, "setting": setting, "trial": trials - 1}]
        data = TaskData("recall", data_of(done), records)
        found.append(calls(lambda records=records, data=data: (chosen_table(records), by_swept_field(data))))
        (drawn,) = by_swept_field(data)
        line = next(trace for trace in drawn.figure.data if trace.name)
        assert len(line.x) == min(trials, MOST_POINTS)
        assert line.y[-1] == pytest.approx(0.5 + (trials - 1) / 2000)  # the best is there
    assert found[2] - found[1] <= 2.5 * (found[1] - found[0])


def data_of(done: Any) -> Any:
    from contextlab.evaluation import Measured

    return Measured(done.results, done.facets, done.similarity, pd.DataFrame(done.by_prompt))
