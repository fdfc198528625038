"""A run's folder: who gets which, what a kill at the very start leaves, what is missing of a finished run."""

from __future__ import annotations

import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from contextlab import open_run, run
from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec, evaluate_run
from contextlab.experiments.folder import RunFolder, claimed, find_folder, spec_text
from contextlab.files import read_json, read_record, write_json, write_record
from tests.experiments.test_run import COMPRESS, one, same_results


def test_of_several_runs_that_start_at_once_each_has_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = ExperimentSpec.parse(one())
    ready, all_have = threading.Barrier(4), threading.Barrier(4)

    def start(_: int) -> str:
        ready.wait()
        with claimed(spec, None, resume=False) as folder:
            folder.spec.write_bytes(spec_text(spec))
            all_have.wait(timeout=20)
            return str(folder)

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(start, range(4))) == ["runs/tiny", "runs/tiny-2", "runs/tiny-3", "runs/tiny-4"]


@pytest.mark.parametrize("written", [(), ("experiment.yaml",)])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_killed_before_its_record_is_fresh_and_can_be_resumed(tmp_path, written, resume):
    spec = ExperimentSpec.parse(one())
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".lock", ".record.json.0123456789ab", *written):
        (folder / name).write_bytes(spec_text(spec) if name in written else b"")
    if resume and not written:
        with pytest.raises(InputError, match="there is no run to resume"):
            run(spec, out=folder, resume=True)
        return
    done = run(spec, out=folder, resume=resume)
    assert done.record["status"] == "finished"
    assert not list(folder.glob(".record*"))  # what was half written is gone


def test_of_several_unfinished_runs_the_newest_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = ExperimentSpec.parse(one())
    for number in range(1, 12):
        folder = RunFolder(Path("runs") / ("tiny" if number == 1 else f"tiny-{number}"))
        folder.path.mkdir(parents=True)
        if number < 11:  # of the last one nothing was written yet
            folder.spec.write_bytes(spec_text(spec))
            write_json(folder.record, {"status": "interrupted"})
    assert [str(each) for each in find_folder(spec, None, resume=True)] == ["runs/tiny-10"]


def test_a_foreign_experiment_is_not_written_over(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "experiment.yaml").write_text("name: mine\n")
    with pytest.raises(InputError, match="holds files but no run"):
        run(one(), out=folder)
    assert [path.name for path in folder.iterdir()] == ["experiment.yaml"]


def test_resuming_a_finished_run_makes_again_what_is_missing(tmp_path, finished):
    spec = ExperimentSpec.parse(COMPRESS)
    whole = finished(COMPRESS, tmp_path / "run")
    files = sorted(path for path in whole.folder.rglob("*") if path.is_file() and path.suffix in (".parquet", ".html"))
    assert {path.name for path in files} >= {"report.html", "compress.html", "facets.parquet", "needle.parquet"}
    softmax, delta = spec.trainings()[0].key, spec.trainings()[2].key
    lost = [
        *(path for path in files if path.parent.name in ("run", "learners")),
        whole.folder / "trainings" / softmax / "facets.parquet",
        whole.folder / "compress" / "softmax+all.seed1.parquet",
    ]
    for path in lost:
        path.unlink()
    shutil.rmtree(whole.folder / "trainings" / delta)
    assert not RunFolder(whole.folder).whole(spec)
    again = run(spec, out=whole.folder, resume=True)
    assert all(path.exists() for path in files)
    assert again.record["status"] == "finished"
    assert same_results(whole.results, again.results)
    before = [path.stat().st_mtime_ns for path in files]
    run(spec, out=whole.folder, resume=True)  # nothing is missing
    assert before == [path.stat().st_mtime_ns for path in files]


def test_a_lock_that_is_a_link_is_refused(tmp_path, finished):
    finished(one(), tmp_path / "run")
    lock, elsewhere = tmp_path / "run" / ".lock", tmp_path / "precious"
    elsewhere.write_text("precious")
    lock.unlink()
    lock.symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"\.lock: expected a lock"):
        run(one(), out=tmp_path / "run", resume=True)
    assert elsewhere.read_text() == "precious"


@pytest.mark.parametrize("content", ["[]", "{}", '{"status": 3}', "{"])
def test_a_damaged_record_is_one_line_that_names_it(tmp_path, finished, content):
    folder = finished(one(), tmp_path / "run").folder
    for record in (folder / "record.json", folder / "trainings" / "recall.softmax.seed0" / "record.json"):
        before = record.read_text()
        record.write_text(content)
        with pytest.raises(InputError, match=f"{record}: .*delete it") as caught:
            run(one(), out=folder, resume=True)
        assert "\n" not in str(caught.value)
        record.write_text(before)
    table = folder / "learners" / "recall.parquet"
    table.write_bytes(table.read_bytes()[:100])
    (folder / "report.html").unlink()
    with pytest.raises(InputError, match=f"{table}: damaged.*delete it, and contextlab run {folder} --resume"):
        run(one(), out=folder, resume=True)
    table.unlink()
    assert run(one(), out=folder, resume=True).record["status"] == "finished"
    assert read_json(folder / "record.json")["status"] == "finished"


SMALL = {
    **COMPRESS,
    "models": {"softmax": COMPRESS["models"]["softmax"]},
    "compress": {**COMPRESS["compress"], "compare": [], "policies": ["streaming_llm:sinks=2"], "budgets": ["50%"]},
    "seeds": [0],
}
"""A run with every kind of file."""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(SMALL, out=folder)
    return folder


def test_a_changed_byte_of_a_file_of_a_finished_run_is_told_and_the_file_made_again(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    of_jobs = ["learners/needle.parquet", "trainings/*/results.parquet", "compress/*.left_out.json"]
    paths = [next(folder.glob(name)) for name in ["results.parquet", "compress.parquet", "report.html", *of_jobs]]
    for path in paths:
        before = path.read_bytes()
        middle = len(before) // 2
        path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        told = f"^{re.escape(str(path))}: damaged: it has changed since .*; delete it, and contextlab run {folder} "
        with pytest.raises(InputError, match=told):
            run(SMALL, out=folder, resume=True)
        if path.parent.name == "compress":
            with pytest.raises(InputError, match=told):
                evaluate_run(folder, ["evaluate.prompts=5"])
        if path.parent == folder and path.suffix == ".parquet":
            with pytest.raises(InputError, match=told):
                open_run(folder)
        path.write_bytes(before)
    for path in paths:
        path.unlink()
    run(SMALL, out=folder, resume=True)
    assert all(path.exists() for path in paths)
    after, first = (read_record(each / "record.json")["files"] for each in (folder, whole_run))
    assert after.keys() == first.keys()


@pytest.mark.parametrize("name", ["record.json", "learners/needle.record.json", "trainings/*/record.json"])
def test_a_changed_number_of_a_record_is_told(whole_run, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    path = next(folder.glob(name))
    record = read_json(path)
    write_json(path, {**record, "steps": 7})
    for again in (lambda: run(SMALL, out=folder, resume=True), lambda: evaluate_run(folder, ["evaluate.prompts=8"])):
        with pytest.raises(InputError, match=rf"{re.escape(str(path))}: damaged: it has changed .*; delete it"):
            again()


def test_a_run_without_checksums_is_read_and_gone_on_with(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    for path in folder.rglob("*record.json"):
        record = read_json(path)
        record.pop("checksum")
        record["files"] = list(record["files"])  # as older versions wrote it
        write_json(path, record)
    assert open_run(folder).record["status"] == "finished"
    (folder / "report.html").unlink()
    assert run(SMALL, out=folder, resume=True).report.exists()


@pytest.mark.parametrize("key", ["name", "device", "jobs", "threads"])
def test_a_record_of_another_shape_is_one_line(whole_run, tmp_path, key):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    record = read_record(folder / "record.json")
    write_json(folder / "record.json", {name: value for name, value in record.items() if name != key})
    told = rf"record.json: damaged: it lacks the key '{key}'; delete it"
    for call in (
        lambda: run(SMALL, out=folder, resume=True),
        lambda: evaluate_run(folder),
        lambda: open_run(folder),
    ):
        with pytest.raises(InputError, match=told):
            call()
    path = next(folder.glob("trainings/*/record.json"))
    write_record(folder / "record.json", record)
    write_json(path, {**read_record(path), "seed": "0"})
    with pytest.raises(InputError, match="'seed' is a str, expected int; delete it"):
        open_run(folder)
