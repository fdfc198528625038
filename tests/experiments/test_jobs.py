"""Jobs are values: any task's name is legal, and no two jobs share a name."""

from __future__ import annotations

from contextlab import run
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.jobs import Job, all_jobs
from tests.experiments.test_run import COMPRESS, MODEL, one, tiny


def test_tasks_may_have_the_names_of_kinds_of_jobs(tmp_path):
    recall = tiny()["tasks"]["recall"]
    spec = one(tasks={"learners": recall, "compress": recall, "training": recall})
    done = run(spec, out=tmp_path / "run")
    assert done.record["status"] == "finished"
    rows = done.results[done.results.metric == "accuracy"]
    assert set(rows.task) == {"learners", "compress", "training"}
    assert all(set(part.kind) == {"model", "learner"} for _, part in rows.groupby("task"))


def test_every_job_of_an_experiment_has_a_key_of_its_own():
    names = {"learners": COMPRESS["tasks"]["needle"], "compress": COMPRESS["tasks"]["mqar"]}
    spec = ExperimentSpec.parse(
        {
            **COMPRESS,
            "tasks": names,
            "multitask": {"seed0": {"tasks": list(names)}},
            "alone": True,
            "models": {"m": MODEL},
            "compress": {**COMPRESS["compress"], "model": "m+seed0", "compare": []},
        }
    )
    jobs = all_jobs(spec)
    assert len({job.key for job in jobs}) == len({job.title for job in jobs}) == len(jobs) == 2 * 3 + 2 + 2
    assert jobs[0] == Job("training", "learners", "m", 0) == spec.trainings()[0].job
    assert spec.training(jobs[0]) is spec.trainings()[0]  # resolved once
    assert spec.model_copy(update={"seeds": (5,)}).trainings()[0].seed == 5
