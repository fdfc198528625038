"""One job: a fault of it is recorded, and the others go on, in this process as in workers."""

from __future__ import annotations

import pytest

from contextlab import run
from contextlab.errors import InputError
from contextlab.experiments import work
from contextlab.files import read_json
from contextlab.learners.recall import Lookup
from tests.experiments.test_run import MODEL, Tape, one, tiny

OUT_OF_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


@pytest.mark.page
def test_a_learner_that_fails_is_one_failed_job(tmp_path, monkeypatch):
    """One on each of two tasks, for want of memory and by a fault; the third task is measured."""
    recall = tiny()["tasks"]["recall"]
    large = {**recall, "options": {**recall["options"], "length": 10}}
    spec, answer = tiny(models={"softmax": MODEL}, tasks={**tiny()["tasks"], "large": large}), Lookup.__call__

    def fail(self, prompt):
        if prompt.batch > 1:  # one prompt, before the training, it can
            raise OUT_OF_MEMORY if prompt.length > 8 else ZeroDivisionError("by zero")
        return answer(self, prompt)

    with monkeypatch.context() as patch:
        patch.setattr(Lookup, "__call__", fail)
        tape = Tape()
        done = run(spec, out=tmp_path / "run", progress=tape)
    assert {key: status for key, (status, _) in tape.ended.items()} == {
        "regression.softmax.seed0": "finished",
        "learners.regression": "finished",
        "recall.softmax.seed0": "failed",  # the best learner is what models are held against
        "learners.recall": "failed",
        "large.softmax.seed0": "failed",
        "learners.large": "failed",
    }
    assert done.record["status"] == "failed"
    failed = {each["job"]: each["message"] for each in done.record["failed"]}
    assert failed.keys() == {key for key, (status, _) in tape.ended.items() if status == "failed"}
    assert all("not enough memory" in failed[key] for key in ("large.softmax.seed0", "learners.large"))
    assert all("ZeroDivisionError: by zero" in failed[key] for key in ("recall.softmax.seed0", "learners.recall"))
    assert set(done.results.task) == {"regression"}
    assert "learners.recall" in done.report.read_text()
    steps = [record["steps"] for record in done.records]
    again = run(spec, out=tmp_path / "run", resume=True, progress=(tape := Tape()))
    assert again.record["status"] == "finished"
    assert again.record["failed"] == []
    assert not tape.updates  # nothing was trained again
    assert [record["steps"] for record in again.records] == steps


def test_a_model_that_lacks_memory_is_one_failed_job(tmp_path, monkeypatch):
    train = work.train

    def lacking(model, tasks, *arguments, folder, **options):
        if "delta" in folder.name:
            raise OUT_OF_MEMORY
        return train(model, tasks, *arguments, folder=folder, **options)

    monkeypatch.setattr(work, "train", lacking)
    done = run(tiny(tasks={"recall": tiny()["tasks"]["recall"]}), out=tmp_path / "run")
    said = {r["key"]: (r["status"], r["message"]) for r in done.records}
    assert said["recall.softmax.seed0"] == ("finished", "")
    assert said["recall.delta.seed0"][0] == "failed"
    assert "not enough memory" in said["recall.delta.seed0"][1]


def test_an_error_of_ours_is_told_without_a_traceback(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise InputError("splits: it cannot")

    monkeypatch.setattr(work, "measure", refuse)
    done = run(one(), out=tmp_path / "run")
    own = done.folder / "trainings" / "recall.softmax.seed0"
    assert read_json(own / "record.json")["message"] == "splits: it cannot"
    assert not (own / "log.txt").exists()
