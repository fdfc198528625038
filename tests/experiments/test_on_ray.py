"""A run on a real Ray of two nodes on this machine, of which one is killed; where Ray is installed."""

from __future__ import annotations

import json
import time

import pytest
import torch

from contextlab import run
from contextlab.errors import InputError, ResourceError
from contextlab.experiments import on_ray
from contextlab.experiments.run import Interrupted

from .test_run import MODEL, Tape, same_results, tiny

SPEC = tiny(
    tasks={"recall": tiny()["tasks"]["recall"]},
    models={"softmax": MODEL},
    seeds=[0, 1, 2],
    train={"steps": 400, "batch": 4, "log_every": 10, "checkpoint_every": 20},
)


def test_an_engine_is_named_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--on: unknown engine 'rai'; did you mean 'ray'"):
        run(SPEC, out=tmp_path / "run", on="rai:auto")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ResourceError, match=r"ray is not installed; pip install 'contextlab\[ray\]'"):
        run(SPEC, out=tmp_path / "run", on="ray")
    assert not (tmp_path / "run").exists()


def test_a_task_refuses_a_folder_that_its_node_does_not_see(tmp_path):
    said = on_ray._do({"folder": str(tmp_path / "elsewhere"), "started": "now"}, {}, None)
    assert "does not see the run's folder" in said
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "record.json").write_text(json.dumps({"status": "running", "started": "before"}))
    assert "does not see" in on_ray._do({"folder": str(tmp_path / "elsewhere"), "started": "now"}, {}, None)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_node_that_is_killed_takes_nothing_with_it(cluster, tmp_path, finished):
    second = cluster.add_node(num_cpus=1, include_dashboard=False)
    cluster.wait_for_nodes()

    class Killer(Tape):
        killed = 0.0

        def update(self, key, step, steps, loss):
            super().update(key, step, steps, loss)
            at_work = {name for name, *_ in self.updates}
            if len(at_work) > 1 and step >= 60 and not self.killed:  # one a node
                self.killed = time.time()
                cluster.remove_node(second, allow_graceful=False)

    tape = Killer()
    threads = torch.get_num_threads()
    done = run(SPEC, out=tmp_path / "run", on="ray", threads=1, progress=tape)
    assert torch.get_num_threads() == threads
    assert tape.killed
    assert done.record["status"] == "finished"
    whole = finished(SPEC, tmp_path / "whole")
    assert same_results(whole.results, done.results)
    for mine, other in zip(done.records, whole.records, strict=True):
        assert mine["history"]["loss"] == other["history"]["loss"]
        assert mine["threads"] == other["threads"] == 1


def test_ctrl_c_saves_on_the_cluster_and_is_resumed_there(cluster, tmp_path, finished):
    class Stop(Tape):
        def update(self, key, step, steps, loss):
            if step >= 60:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="--resume --on ray"):
        run(SPEC, out=tmp_path / "run", on="ray", threads=1, progress=Stop())
    record = json.loads((tmp_path / "run" / "trainings" / "recall.softmax.seed0" / "record.json").read_text())
    assert record["status"] == "interrupted"
    done = run(SPEC, out=tmp_path / "run", on="ray", resume=True)
    assert same_results(finished(SPEC, tmp_path / "whole").results, done.results)


def test_trials_are_halved_on_the_cluster_as_in_one_process(cluster, tmp_path, finished):
    train = {"steps": 8, "batch": 4, "checkpoint_every": 0}
    sweep = {"over": {"train.learning_rate": [1e-9, 3e-2, 1e-3]}, "halving": True, "validation": {"prompts": 16}}
    spec = {**SPEC, "train": train, "sweep": sweep, "seeds": [0, 1]}
    done = run(spec, out=tmp_path / "run", on="ray", threads=1)
    whole = finished(spec, tmp_path / "whole")
    assert same_results(whole.results, done.results)
    assert done.sweep["told"].tolist() == whole.sweep["told"].tolist()


def test_a_job_that_fits_on_no_node_is_told(cluster, tmp_path):
    with pytest.raises(ResourceError, match="no node of the cluster has 64 CPUs"):
        run(SPEC, out=tmp_path / "run", on="ray", threads=64)
