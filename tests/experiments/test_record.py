"""The record of a run: plugins that must be named, threads that stay, evaluations that may change."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import yaml

from contextlab import run
from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.folder import RunFolder, evaluations
from contextlab.experiments.jobs import first_jobs
from contextlab.experiments.record import change_evaluation, differs_in_evaluation_only, shares
from contextlab.files import read_json, read_record, write_record
from tests.experiments.test_run import Tape, one, tiny


def test_no_plugin_is_imported_because_a_record_names_it(tmp_path):
    folder, plugin = tmp_path / "run", tmp_path / "mine.py"
    plugin.write_text("")
    run(one(), out=folder, plugins=[str(plugin)])
    assert read_json(folder / "record.json")["plugins"] == [str(plugin)]
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'evil.txt')!r}, 'w')\n")
    record = read_record(folder / "record.json")
    write_record(folder / "record.json", {**record, "plugins": [str(evil)], "status": "interrupted"})
    (folder / "report.html").unlink()
    with pytest.raises(InputError, match=f"started with 1 plugin, and plugins .* add --plugin {evil}"):
        run(one(), out=folder, resume=True, jobs=2)
    assert not (tmp_path / "evil.txt").exists()


def test_what_was_measured_keeps_the_evaluation_that_it_was_measured_with(tmp_path):
    """In runs of older versions a record does not say it, and the table of a learner may have no record."""
    folder, before = RunFolder(tmp_path), ExperimentSpec.parse(tiny())
    spec = ExperimentSpec.parse(tiny(evaluate={"prompts": 24, "batch": 16}))
    stopped, measured, told, nothing, *_ = first_jobs(before)
    for job in (stopped, measured, told):
        folder.job_record(job).parent.mkdir(parents=True, exist_ok=True)
    write_record(folder.job_record(stopped), {**stopped.fields, "status": "failed", "message": "killed"})
    folder.table(measured).write_bytes(b"")
    own = {**told.fields, "status": "finished", "message": "", "evaluate_spec": {"recall": {"prompts": 3}}}
    write_record(folder.job_record(told), own)
    change_evaluation(folder, before, spec)
    first, second, third = (read_record(folder.job_record(job)) for job in (stopped, measured, told))
    assert (first["status"], first["evaluate_spec"]) == ("failed", evaluations(stopped, before))
    assert (second["status"], second["evaluate_spec"]) == ("finished", evaluations(measured, before))
    assert third["evaluate_spec"] == own["evaluate_spec"]
    assert not folder.job_record(nothing).exists()
    assert ExperimentSpec.parse(yaml.safe_load(folder.spec.read_text())) == spec


class FailsAtStep3(Tape):
    def update(self, key, step, steps, loss):
        if step == 3:
            raise ZeroDivisionError


def test_a_resumed_run_keeps_its_threads_and_says_so_where_it_does_not(tmp_path):
    spec = one(train={"steps": 4, "batch": 4, "log_every": 1, "checkpoint_every": 1})
    before = torch.get_num_threads()
    done = run(spec, out=tmp_path / "kept", threads=2, progress=FailsAtStep3())
    assert torch.get_num_threads() == before
    assert done.records[0]["message"].startswith("ZeroDivisionError")
    shutil.copytree(done.folder, tmp_path / "changed")
    record = run(spec, out=tmp_path / "kept", resume=True).records[0]
    assert (record["threads"], record["message"]) == (2, "")
    with pytest.warns(UserWarning, match="trained with 2, then with 1 threads"):
        record = run(spec, out=tmp_path / "changed", resume=True, threads=1).records[0]
    assert record["threads"] == 1
    assert "last digits may differ" in record["message"]


def test_the_cores_are_shared_out():
    cpu, cores = torch.device("cpu"), len(os.sched_getaffinity(0))
    assert shares(8, cpu, 1, None) == (1, torch.get_num_threads())
    assert shares(1, cpu, None, None) == (1, torch.get_num_threads())
    assert shares(8, cpu, 4, 3) == (4, 3)
    assert shares(100, cpu, None, None) == (cores, 1)


@pytest.mark.parametrize(
    ("changes", "only"),
    [
        ({"evaluate": {"prompts": 8}}, True),
        ({"tasks": {"recall": {**tiny()["tasks"]["recall"], "evaluate": {"prompts": 8}}}}, True),
        ({"train": {"steps": 4, "batch": 4}}, False),
        ({"seeds": [1]}, False),
        ({"description": "another"}, False),
        ({"tasks": {"recall": {**tiny()["tasks"]["recall"], "train": {"steps": 9}}}}, False),
    ],
)
def test_what_may_differ_in_a_run_that_is_resumed(changes, only):
    specs = (ExperimentSpec.parse(one()), ExperimentSpec.parse(one(**changes)))
    assert differs_in_evaluation_only(*specs) is only
