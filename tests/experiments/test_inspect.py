"""The key `inspect` of recipes: probes are put to trained models, their table and page are part of the run."""

from __future__ import annotations

import pandas as pd
import pytest

from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec, open_run, run
from contextlab.experiments.subjects import find_subjects
from contextlab.inspect import look

RECIPE = {
    "name": "looked",
    "tasks": {
        "recall": {"task": "associative_recall", "options": {"vocabulary": 16, "pairs": 2, "length": 12}},
        "lines": {"task": "linear_regression", "options": {"dimensions": 2, "examples": 6}},
    },
    "models": {
        "softmax": {"preset": "transformer", "options": {"width": 16, "depth": 1, "heads": 2}},
        "delta": {"preset": "gated_delta_net", "options": {"width": 16, "depth": 1, "heads": 2}},
    },
    "train": {"steps": 2, "batch": 4},
    "evaluate": {"prompts": 4},
    "inspect": {"probes": ["heads:prompts=4", "linear:prompts=20,test=8"]},
}


@pytest.mark.page
def test_probes_are_put_to_every_model_on_every_task(tmp_path):
    done = run({**RECIPE, "seeds": [0, 1]}, out=tmp_path / "run")
    found = done.inspected
    assert done.record["status"] == "finished"
    together = set(found[["model", "task", "seed"]].itertuples(index=False, name=None))
    assert together == {(m, t, s) for m in ("softmax", "delta") for t in ("recall", "lines") for s in (0, 1)}
    assert set(found["probe"]) == set(RECIPE["inspect"]["probes"])
    page, report = ((tmp_path / "run" / name).read_text() for name in ("inspect.html", "report.html"))
    assert "recall: heads:prompts=4" in page
    assert "<li>softmax: " in page
    assert "<li>recall, softmax: " in report
    pd.testing.assert_frame_equal(open_run(tmp_path / "run").inspected, found)

    # The same, asked of the run afterwards; and what was stopped halfway is made again.
    (own,) = (each for each in find_subjects(str(tmp_path / "run"), "lines") if (each.model, each.seed) == ("delta", 1))
    again = own.look(["linear:prompts=20,test=8"]).table
    one = (found["model"] == "delta") & (found["task"] == "lines") & (found["seed"] == 1)
    before = found[one & (found["probe"] == "linear:prompts=20,test=8")].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, before, check_exact=False)
    (tmp_path / "run" / "inspect" / "lines.delta.seed1.parquet").unlink()
    resumed = run({**RECIPE, "seeds": [0, 1]}, out=tmp_path / "run", resume=True).inspected
    pd.testing.assert_frame_equal(resumed, found)


def test_other_probes_are_measured_anew(tmp_path):
    run(RECIPE, out=tmp_path / "run")
    text = (tmp_path / "run" / "experiment.yaml").read_text()
    (tmp_path / "run" / "experiment.yaml").write_text(text.replace("heads:prompts=4", "heads:prompts=5"))
    found = run(tmp_path / "run" / "experiment.yaml", out=tmp_path / "run", resume=True).inspected
    assert set(found.loc[found["probe"].str.startswith("heads"), "probe"]) == {"heads:prompts=5"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"probes": ["heds"]}, "inspect: probes: unknown probe 'heds'; did you mean 'heads'"),
        ({"probes": []}, "inspect.probes"),
        ({"probes": ["heads", "heads"]}, "inspect: probes: 'heads' stands there twice"),
        ({"models": ["softmx"]}, "inspect.models: unknown trained model 'softmx'; did you mean 'softmax'"),
        ({"tasks": ["recal"]}, "inspect.tasks: unknown task of this experiment 'recal'; did you mean 'recall'"),
        ({"probes": ["linear:what=colour"]}, "linear:what=colour can be put to no model of this recipe: what: unknown"),
    ],
)
def test_what_cannot_be_is_told_before_training(changes, said, tmp_path):
    with pytest.raises(InputError) as told:
        run({**RECIPE, "inspect": {**RECIPE["inspect"], **changes}}, out=tmp_path / "run")
    assert said in str(told.value)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob("run/trainings/*"))


def test_a_mapping_of_the_spec_has_the_key():
    spec = ExperimentSpec.parse(RECIPE)
    assert spec.inspect is not None
    assert spec.inspect.probes == ("heads:prompts=4", "linear:prompts=20,test=8")


def test_look_leaves_out_only_where_it_may(tmp_path):
    found = next(each for each in find_subjects_of(tmp_path) if each.task_name == "recall")
    with pytest.raises(InputError, match="what: unknown thing"):
        found.look(["linear:what=colour"])
    assert found.look(["linear:what=colour", "heads:prompts=2"], skip=True).left_out
    with pytest.raises(InputError, match="take its own task"):
        other = next(each for each in find_subjects_of(tmp_path) if each.task_name == "lines")
        look(found.load(), other.task)


def find_subjects_of(folder):
    if not (folder / "run").exists():
        run(RECIPE, out=folder / "run")
    return find_subjects(str(folder / "run"))
