"""Runs: what lies in the folder, what is refused, what a kill leaves, what resuming gives."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
import yaml

from contextlab import open_run, run
from contextlab.errors import InputError, ResourceError
from contextlab.evaluation import evaluate
from contextlab.evaluation.compress import compress
from contextlab.experiments import ExperimentSpec
from contextlab.files import read_json, read_record, write_record

MODEL = {"preset": "transformer", "options": {"width": 8, "depth": 1, "heads": 2}}


def tiny(**changes):
    base = {
        "name": "tiny",
        "tasks": {
            "regression": {"task": "linear_regression", "options": {"dimensions": 2, "examples": 4}},
            "recall": {"task": "associative_recall", "options": {"vocabulary": 16, "pairs": 2, "length": 8}},
        },
        "models": {"softmax": MODEL, "delta": {**MODEL, "preset": "gated_delta_net"}},
        "train": {"steps": 3, "batch": 4, "log_every": 1},
        "evaluate": {"prompts": 16, "batch": 16},
    }
    return {**base, **changes}


def one(**changes):
    """A run of one training."""
    spec = tiny(models={"softmax": MODEL}, tasks={"recall": tiny()["tasks"]["recall"]})
    return {**spec, **changes}


class Tape:
    """A Progress that remembers."""

    def __init__(self):
        self.ended, self.updates = {}, []

    def update(self, key, step, steps, loss):
        self.updates.append((key, step))

    def phase(self, key, text): ...

    def done(self, key, status, message):
        self.ended[key] = (status, message)


def same_results(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    keys = ["model", "kind", "seed", "task", "split", "metric", "shot", "length"]
    timeless = (t[t["metric"] != "training_seconds"] for t in (a, b))
    left, right = (t.sort_values(keys, ignore_index=True) for t in timeless)
    pd.testing.assert_frame_equal(left, right, check_exact=True)
    return True


@pytest.mark.page
def test_a_model_of_several_tasks_is_measured_on_each(tmp_path):
    tasks = {
        "linear": {"task": "linear_regression", "options": {"dimensions": 2, "examples": 4}},
        "noisy": {"task": "linear_regression", "options": {"dimensions": 2, "examples": 6, "noise": 2}},
    }
    groups = {order: {"tasks": ["linear", "noisy"], "train": {"order": order}} for order in ("sequential", "mixed")}
    spec = tiny(
        tasks=tasks, models={"softmax": MODEL}, multitask=groups, train={"steps": 4, "batch": 4, "log_every": 1}
    )
    done = run(spec, out=tmp_path / "run")
    assert {r["status"] for r in done.records} == {"finished"}
    several = {r["model"]: r for r in done.records if len(r["tasks"]) > 1}
    assert several.keys() == {"softmax+sequential", "softmax+mixed"}
    for task in tasks:
        rows = done.results[(done.results.task == task) & (done.results.kind == "model")]
        assert set(rows.model) == {"softmax", "softmax+sequential", "softmax+mixed"}
        assert rows[rows.metric == "squared_error"].value.notna().all()
        assert (rows[rows.metric == "training_seconds"].groupby("model").size() == 1).all()
        assert done.models(task).keys() == {"softmax", "softmax+sequential", "softmax+mixed"}
        found = evaluate(done.models(task)["softmax+mixed"], done.task(task), prompts=16, batch=16, splits=("train",))
        measured = rows[(rows.model == "softmax+mixed") & (rows.split == "train") & (rows.metric == "squared_error")]
        wanted = found[found.metric == "squared_error"].value.tolist()
        assert measured.value.tolist() == pytest.approx(wanted)
    assert "the loss on the task whose turn it was" in done.report.read_text()


@pytest.mark.page
def test_a_run_leaves_spec_results_records_and_report(tmp_path):
    tape = Tape()
    done = run(tiny(), out=tmp_path / "run", progress=tape)
    assert done.record["status"] == "finished"
    assert {r["status"] for r in done.records} == {"finished"}
    assert len(done.records) == 4
    assert set(tape.ended) == {r["key"] for r in done.records} | {"learners.regression", "learners.recall"}
    assert list(done.results.columns) == [
        "run", "model", "kind", "seed", "task", "split", "metric", "shot", "length", "value", "ci_low", "ci_high", "n",
    ]  # fmt: skip
    assert {"softmax", "delta", "ridge", "lookup"} <= set(done.results.model)
    assert {"state_bytes", "flops", "parameters"} <= set(done.results.metric)
    assert "<html" in done.report.read_text()
    again = ExperimentSpec.parse(yaml.safe_load((done.folder / "experiment.yaml").read_text()))
    assert again == ExperimentSpec.parse(tiny())
    opened = open_run(done.folder)
    same_results(opened.results, done.results)
    for name in ("facets", "similarity"):
        pd.testing.assert_frame_equal(getattr(opened, name), getattr(done, name))
    assert set(done.facets["facet"]) == {"position", "distance"}
    assert set(done.facets["model"]) == {"softmax", "delta", "lookup"}
    assert set(done.similarity["model"]) == {"softmax", "delta"}
    assert "ridge" in set(done.similarity["learner"])


def test_a_taken_folder_is_never_written_over(tmp_path, finished):
    folder = tmp_path / "run"
    done = finished(tiny(), folder)
    before = done.report.read_bytes()
    with pytest.raises(InputError, match="holds a finished run, which is not overwritten"):
        run(tiny(), out=folder)
    same_results(run(tiny(), out=folder, resume=True).results, done.results)  # nothing is missing, nothing is written
    assert read_record(folder / "record.json") == done.record
    with pytest.raises(InputError, match="started with another spec"):
        run(tiny(seeds=[3]), out=folder, resume=True)
    write_record(folder / "record.json", {**done.record, "status": "interrupted"})
    with pytest.raises(InputError, match="unfinished run .*--resume"):
        run(tiny(), out=folder)
    with pytest.raises(InputError, match="started with another spec"):
        run(tiny(seeds=[3]), out=folder, resume=True)
    assert done.report.read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="holds files but no run"):
        run(tiny(), out=tmp_path / "mine")
    with pytest.raises(InputError, match="is a file"):
        run(tiny(), out=tmp_path / "mine" / "thesis.txt")
    with pytest.raises(InputError, match="no run to resume"):
        run(tiny(), out=tmp_path / "new", resume=True)


def test_the_default_folder_takes_the_next_free_number(tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    finished(one(), "runs/tiny")
    assert str(run(one()).folder) == "runs/tiny-2"
    with pytest.raises(InputError, match="no unfinished run"):
        run(one(), resume=True)


def test_an_interrupted_run_resumes_to_the_same_results(tmp_path, finished):
    class Stop(Tape):
        def update(self, key, step, steps, loss):
            super().update(key, step, steps, loss)
            if key.startswith("recall.softmax") and step == 2:
                raise KeyboardInterrupt

    whole = finished(tiny(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), out=tmp_path / "cut", progress=Stop())
    assert read_json(tmp_path / "cut" / "record.json")["status"] == "interrupted"
    resumed = run(tiny(), out=tmp_path / "cut", resume=True)
    assert same_results(whole.results, resumed.results)
    pd.testing.assert_frame_equal(whole.facets, resumed.facets, check_exact=True)
    pd.testing.assert_frame_equal(whole.similarity, resumed.similarity, check_exact=True)


@pytest.mark.parametrize(
    ("how", "ignored", "jobs"),
    [(signal.SIGKILL, False, 2), (signal.SIGINT, False, 2), (signal.SIGTERM, True, 1)],
)
def test_stopped_at_any_moment_it_resumes_exactly(tmp_path, finished, how, ignored, jobs):
    """ignored: SIGINT, as in a shell's background jobs; SIGTERM must end the run in order there, too."""
    spec = one(train={"steps": 150, "batch": 8, "log_every": 10, "checkpoint_every": 10})
    spec["models"]["delta"] = tiny()["models"]["delta"]
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "contextlab.cli", "run", str(recipe), "--jobs", str(jobs), "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "cut")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("cut/trainings/*/step_*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), errors
    assert b"Traceback" not in errors
    if how != signal.SIGKILL:
        assert f"go on with: contextlab run {tmp_path / 'cut'} --resume" in errors.decode()
        assert read_json(tmp_path / "cut" / "record.json")["status"] == "interrupted"
    whole = finished(spec, tmp_path / "whole")
    assert whole.record["threads"] == 1
    resumed = run(spec, out=tmp_path / "cut", resume=True)
    assert resumed.record["threads"] == 1
    assert same_results(whole.results, resumed.results)


@pytest.mark.page
def test_a_model_that_diverges_is_recorded_and_the_others_go_on(tmp_path):
    broken = {**MODEL, "train": {"learning_rate": 1e30, "matrix_learning_rate": 1e30, "clip": None, "warmup": 0}}
    spec = tiny(models={"softmax": MODEL, "broken": broken}, tasks={"recall": tiny()["tasks"]["recall"]})
    spec["train"] = {**spec["train"], "steps": 20}
    done = run(spec, out=tmp_path / "run")
    statuses = {r["model"]: r["status"] for r in done.records}
    assert statuses == {"softmax": "finished", "broken": "diverged"}
    assert "broken" not in set(done.results.model)
    assert "diverged" in done.report.read_text()
    assert done.record["status"] == "finished"


def test_workers_give_the_bits_of_one_process_load_its_plugins_and_may_die(tmp_path, monkeypatch, finished):
    """In one run, for each worker takes seconds to start."""
    spec = tiny()
    trace, plugin = tmp_path / "trace", tmp_path / "deadly.py"
    plugin.write_text(
        "import os, sys\n"
        f"open({str(trace)!r}, 'a').write(str(os.getpid()) + ' ')\n"
        "from contextlab.experiments import work\n"
        "train = work.train\n"
        "def deadly(*args, folder, **options):\n"
        "    if folder.name == 'recall.delta.seed0' and not os.environ.get('SURVIVE'): os.kill(os.getpid(), 9)\n"
        "    return train(*args, folder=folder, **options)\n"
        "if sys.argv[0].endswith('worker.py'): work.train = deadly\n"
    )
    tape = Tape()
    done = run(spec, out=tmp_path / "run", jobs=2, threads=1, plugins=[str(plugin)], progress=tape)
    assert (done.record["jobs"], done.record["threads"]) == (2, 1)
    trainings = {f"{task}.{model}.seed0" for task in ("recall", "regression") for model in ("softmax", "delta")}
    assert tape.ended.keys() == trainings | {"learners.recall", "learners.regression"}
    processes = trace.read_text().split()
    assert str(os.getpid()) in processes
    assert len(set(processes)) == 1 + 3  # two workers do six jobs, and one in the place of that which dies

    record = next(r for r in done.records if r["key"] == "recall.delta.seed0")
    assert record["status"] == "failed"
    assert "signal SIGKILL" in record["message"]
    assert done.record["status"] == "failed"
    whole = finished(spec, tmp_path / "whole")
    assert {r["threads"] for r in [*whole.records, *done.records] if r is not record} == {1}
    lost = (whole.results["model"] == "delta") & (whole.results["task"] == "recall")
    assert same_results(whole.results[~lost], done.results)

    with pytest.raises(InputError, match=f"started with 1 plugin.*add --plugin {plugin}"):
        run(spec, out=tmp_path / "run", resume=True)
    monkeypatch.setenv("SURVIVE", "1")
    again = run(spec, out=tmp_path / "run", resume=True, plugins=[str(plugin)])
    assert again.record["status"] == "finished"
    assert same_results(whole.results, again.results)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        run(tiny(), out=tmp_path / "run")


def test_two_processes_cannot_work_on_one_run(tmp_path):
    class Second(Tape):
        def update(self, key, step, steps, loss):
            with pytest.raises(InputError, match="unfinished run|another process"):
                run(one(), out=tmp_path / "run")
            with pytest.raises(InputError, match="another process is working on this run"):
                run(one(), out=tmp_path / "run", resume=True)
            super().update(key, step, steps, loss)

    tape = Second()
    run(one(), out=tmp_path / "run", progress=tape)
    assert tape.updates


def test_cuda_that_is_not_there_is_told(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ResourceError, match="cuda"):
        run(tiny(), out=tmp_path / "run", device="cuda")
    assert not (tmp_path / "run").exists()


def test_records_are_plain_json(tmp_path, finished):
    done = finished(tiny(), tmp_path / "run")
    for record in [done.record, *done.records]:
        assert json.loads(json.dumps(record)) == record


@pytest.mark.page
def test_decision_tasks_are_played_online_and_their_regret_is_drawn(tmp_path):
    spec = tiny(tasks={"bandit": {"task": "bandit", "options": {"arms": 3, "horizon": 6}}}, models={"softmax": MODEL})
    done = run({**spec, "evaluate": {"prompts": 8, "splits": ["train"], "rollouts": 5}}, out=tmp_path / "run")
    regret = done.results[(done.results["metric"] == "regret") & done.results["shot"].isna()]
    assert {"softmax", "ucb1", "thompson"} <= set(regret["model"])
    assert (regret["n"] == 5).all()
    text = done.report.read_text()
    assert "Regret by the steps played" in text
    assert "on the same 5 problems" in text


COMPRESS = {
    "name": "cheaper",
    "tasks": {
        "needle": {"task": "needle", "options": {"length": 192}},
        "mqar": {"task": "associative_recall", "options": {"vocabulary": 256, "pairs": 4, "length": 32}},
    },
    "multitask": {"all": {"tasks": ["needle", "mqar"]}},
    "alone": False,
    "models": {"softmax": MODEL, "delta": {**MODEL, "preset": "gated_delta_net"}},
    "train": {"steps": 2, "batch": 2, "log_every": 1},
    "evaluate": {"prompts": 4, "batch": 4, "splits": ["train"]},
    "compress": {
        "model": "softmax+all",
        "compare": ["delta+all"],
        "policies": ["streaming_llm:sinks=2", "h2o:window=40"],
        "budgets": ["50%", "10%"],
        "tasks": ["needle"],
        "lengths": [192],
        "prompts": 2,
    },
    "seeds": [0, 1],
}


@pytest.mark.page
def test_a_recipe_measures_a_trained_model_under_policies(tmp_path, finished):
    done = finished(COMPRESS, tmp_path / "run")
    assert done.record["status"] == "finished"
    found = done.compressed
    assert set(found["seed"]) == {0, 1}
    assert set(zip(found["model"], found["split"], strict=True)) == {
        ("full", "full"), ("delta+all", "full"), ("streaming_llm:sinks=2", "50%"), ("streaming_llm:sinks=2", "10%"),
        ("h2o:window=40", "50%"),
    }  # fmt: skip
    page = (tmp_path / "run" / "compress.html").read_text()
    assert "Left out: 1 settings" in page
    done.report.unlink()  # the one that is there may be without a page
    report = run(COMPRESS, out=done.folder, resume=True).report.read_text()
    assert "What softmax+all loses when its context is made cheaper" in report

    model = done.models("needle")["softmax+all:1"]
    again = compress(model, ["streaming_llm:sinks=2"], ["10%"], ["needle"], [192], prompts=2, seed=1)
    for metric in ("accuracy", "cross_entropy", "state_bytes"):
        chosen = [t[t["model"].eq("streaming_llm:sinks=2") & t["metric"].eq(metric)] for t in (found, again)]
        theirs = chosen[0][chosen[0]["seed"].eq(1) & chosen[0]["split"].eq("10%")]
        assert theirs["value"].tolist() == chosen[1]["value"].tolist()

    (tmp_path / "run" / "compress" / "softmax+all.seed1.parquet").unlink()  # as if it had been stopped there
    record = read_record(tmp_path / "run" / "record.json")
    write_record(tmp_path / "run" / "record.json", {**record, "status": "interrupted"})
    resumed = run(COMPRESS, out=tmp_path / "run", resume=True).compressed
    quality = [t[t["metric"].isin(["accuracy", "state_bytes"])].reset_index(drop=True) for t in (found, resumed)]
    pd.testing.assert_frame_equal(*quality)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "softmx+all"}, "compress.model: unknown trained model 'softmx.all'; did you mean 'softmax.all'"),
        ({"compare": ["softmax"]}, "compress.compare: unknown trained model 'softmax'"),
        ({"policies": ["h3o"]}, "compress: unknown policy 'h3o'; did you mean 'h2o'"),
        ({"budgets": ["0%"]}, "compress: budget: 0% keeps nothing"),
        ({"budgets": []}, "compress: policy .*: expected a budget"),
        ({"policies": []}, "compress.policies"),
        ({"prompts": 1}, "compress.prompts"),
    ],
)
def test_impossible_policies_of_a_recipe_are_refused_before_anything_is_trained(changes, message, tmp_path):
    spec = {**COMPRESS, "compress": {**COMPRESS["compress"], **changes}}
    with pytest.raises(InputError, match=message):
        run(spec, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_of_one_task_each_are_not_compressed(tmp_path):
    spec = {**COMPRESS, "alone": True, "compress": {**COMPRESS["compress"], "model": "softmax", "compare": []}}
    with pytest.raises(InputError, match="'softmax' is trained on each task by itself"):
        run(spec, out=tmp_path / "run")
