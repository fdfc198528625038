"""A trained run, measured again in another way: nothing is trained, and a kill between mixes nothing."""

from __future__ import annotations

import pytest

from contextlab import run
from contextlab.errors import InputError
from contextlab.experiments import evaluate_run
from contextlab.files import write_json
from tests.experiments.test_run import Tape, one, same_results, tiny


def weights(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*.safetensors")}


def counts(done):
    rows = done.results[done.results.metric.isin(["accuracy", "squared_error"]) & done.results["shot"].isna()]
    return rows.groupby("task").n.unique().apply(list).to_dict()


@pytest.mark.parametrize("how", ["evaluate", "resume"])
def test_another_evaluation_is_measured_and_nothing_trained(tmp_path, finished, how):
    folder = tmp_path / "run"
    trained = weights(finished(tiny(), folder).folder)
    wanted = tiny(evaluate={"prompts": 24, "batch": 16})
    tape = Tape()
    if how == "evaluate":
        done = evaluate_run(folder, ["evaluate.prompts=24"], progress=tape)
    else:
        done = run(wanted, out=folder, resume=True, progress=tape)
    assert not tape.updates
    assert weights(folder) == trained
    assert counts(done) == {"regression": [24], "recall": [24]}
    assert done.record["status"] == "finished"
    assert same_results(done.results, finished(wanted, tmp_path / "at once").results)
    assert all(len(record["history"]["loss"]) == 3 for record in done.records)


def test_only_what_changed_is_measured_again(tmp_path, finished):
    finished(tiny(), tmp_path / "run")
    change = ["tasks.recall.evaluate={prompts: 8}"]
    done = evaluate_run(tmp_path / "run", change, progress=(tape := Tape()))
    assert tape.ended.keys() == {"recall.softmax.seed0", "recall.delta.seed0", "learners.recall"}
    assert counts(done) == {"regression": [16], "recall": [8]}
    evaluate_run(tmp_path / "run", change, progress=(tape := Tape()))
    assert not tape.ended
    evaluate_run(tmp_path / "run", progress=(tape := Tape()))  # without a change all is measured again
    assert len(tape.ended) == 6


def test_an_evaluation_that_is_stopped_goes_on_and_mixes_nothing(tmp_path, finished):
    class Stop(Tape):
        def done(self, key, status, message):
            raise KeyboardInterrupt

    wanted = tiny(evaluate={"prompts": 24, "batch": 16})
    done = finished(tiny(), tmp_path / "run")
    for record in done.records:  # as runs of older versions left them
        path = done.folder / "trainings" / record["key"] / "record.json"
        write_json(path, {k: v for k, v in record.items() if k not in ("evaluate_spec", "files", "kind")})
    (done.folder / "learners" / "recall.record.json").unlink()
    with pytest.raises(KeyboardInterrupt, match="go on with"):
        evaluate_run(done.folder, ["evaluate.prompts=24"], progress=Stop())
    assert same_results(run(tiny(), out=done.folder, resume=True).results, done.results)  # back to what it was
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(done.folder, ["evaluate.prompts=24"], progress=Stop())
    assert counts(run(wanted, out=done.folder, resume=True)) == {"regression": [24], "recall": [24]}


def test_what_cannot_be_measured_again_is_refused(tmp_path, finished):
    done = finished(one(), tmp_path / "run")
    before = done.report.read_bytes()
    for changes, message in (
        (["train.steps=9"], "expected evaluate.KEY=VALUE or tasks.NAME.evaluate.KEY=VALUE"),
        (["evaluate.splits=[trian]"], "unknown split 'trian'; did you mean 'train'"),
        (["evaluate.prompt=9"], "did you mean 'prompts'"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_run(done.folder, changes)
    with pytest.raises(InputError, match="no run there"):
        evaluate_run(tmp_path / "nowhere")
    assert done.report.read_bytes() == before
    last = next(done.folder.glob("trainings/*/step_*"))
    last.rename(last.with_name("put away"))
    with pytest.raises(InputError, match="no training of this run has finished; go on with: contextlab run"):
        evaluate_run(done.folder)
