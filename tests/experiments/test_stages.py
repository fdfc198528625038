"""Recipes in stages: tried before the first one is begun, run one after another, resumed, refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from typer.testing import CliRunner

from contextlab import run
from contextlab.cli.commands import app
from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec, load_recipe
from contextlab.experiments.stages import FILE, Stages, load_stages
from contextlab.models import load_model
from contextlab.training import checkpoint
from tests.experiments.test_run import MODEL, same_results, tiny

SMALL = {"options": {"width": 8, "depth": 2, "heads": 2}}


def staged(**changes):
    """Train a transformer, put another mixer into its first block and train that alone, then all of it."""
    base = {
        "name": "three",
        "tasks": {"recall": tiny()["tasks"]["recall"]},
        "train": {"steps": 2, "batch": 4, "log_every": 1},
        "evaluate": {"prompts": 8, "batch": 8, "splits": ["train"]},
        "seeds": [0, 1],
        "stages": {
            "first": {"models": {"softmax": {**MODEL, **SMALL}}},
            "swap": {
                "models": {"hybrid": {"from": "first:softmax", "replace": {"layers": "0", "mixer": "gla"}}},
                "train": {"freeze": ["blocks.1.*", "read_*"]},
            },
            "last": {"models": {"hybrid": {"from": "swap:hybrid"}}, "train": {"learning_rate": 0.01}},
        },
    }
    return {**base, **changes}


def weights(folder, stage, model):
    return load_model(checkpoint.newest(folder / stage / "trainings" / f"recall.{model}.seed1")).state_dict()


def test_each_stage_starts_from_the_one_before_and_is_a_run(tmp_path):
    done = run(staged(seeds=[1]), out=tmp_path / "run")
    folder = tmp_path / "run"
    assert done.folder == folder / "last"
    assert sorted(each.name for each in folder.iterdir()) == ["first", "last", FILE, "swap"]
    first, swap, last = (weights(folder, *each) for each in
                         [("first", "softmax"), ("swap", "hybrid"), ("last", "hybrid")])  # fmt: skip
    kept = {name for name in first if name.startswith(("blocks.1.", "read_"))}
    assert all(torch.equal(first[name], swap[name]) for name in kept)
    assert not torch.equal(swap["read_in.weight"], last["read_in.weight"])
    record = json.loads((folder / "swap" / "record.json").read_text())
    assert record["name"] == "three-swap"
    assert record["sources"]["recall.hybrid.seed1"]["from"] == f"{folder / 'first'}:softmax"
    with pytest.raises(InputError, match="holds a run in stages; go on with --resume, or choose another folder"):
        run(staged(seeds=[1]), out=folder)
    with pytest.raises(InputError, match="was started with another recipe"):
        run(staged(seeds=[0]), out=folder, resume=True)
    with pytest.raises(
        InputError, match=r"a run in stages; expected one of them \(.*first, .*last, .*swap\), or :MODEL"
    ):
        ExperimentSpec.parse(tiny(models={"m": {"from": str(folder)}}))
    # A run that was killed in its second stage, and moved, goes on there, and comes out as if it had not been.
    shutil.copytree(folder, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "last")
    swap = tmp_path / "killed" / "swap"
    for path in swap.glob("**/*.parquet"):
        path.unlink()
    (swap / "trainings" / "recall.hybrid.seed1" / "record.json").unlink()
    shutil.rmtree(checkpoint.newest(swap / "trainings" / "recall.hybrid.seed1"))
    status = json.loads((swap / "record.json").read_text())
    del status["checksum"]
    (swap / "record.json").write_text(json.dumps({**status, "status": "running", "files": {}}))
    again = run(staged(seeds=[1]), out=tmp_path / "killed", resume=True)
    assert same_results(again.results, done.results)


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(staged(seeds=[0]), sort_keys=False))
    printed = CliRunner().invoke(app, ["run", "three.yaml", "--check", "--set", "stages.last.train.steps=1"])
    said = " ".join(printed.output.split())
    assert printed.exit_code == 0, printed
    assert "hybrid starts from first:softmax: carried over: " in said
    assert "hybrid starts from swap:hybrid: carried over: " in said
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match="three.yaml: has stages; contextlab run takes such a recipe"):
        load_recipe("three.yaml")
    assert load_stages("demo") is None


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("first", {"models": {"m": {"from": "last:hybrid"}}}, "stages.first: from: last is no stage before first"),
        ("swap", {"models": {"m": {"from": "first:soft"}}}, "stages.swap: from: unknown model of stage first 'soft'"),
        ("swap", {"models": {"m": {"from": "first:softmax", "remove": [2]}}}, "remove: 2 is not among the 2 blocks"),
        ("last", {"train": {"freeze": ["block"]}}, "'block' matches no parameter"),
        ("last", {"trian": {}}, "stages.last: trian: unknown key; did you mean 'train'?"),
        ("last", {"name": "x"}, "stages.last: name: a stage has none; leave it out"),
        ("last", {"seeds": [5]}, "softmax is trained 2 times there"),
    ],
)
def test_a_fault_of_any_stage_is_told_before_the_first_is_begun(stage, changes, message, tmp_path):
    recipe = staged()
    recipe["stages"][stage] = {**recipe["stages"][stage], **changes}
    if "seeds" in changes:
        recipe["stages"]["last"]["models"] = {"hybrid": {"from": "first:softmax"}}
    with pytest.raises(InputError) as caught:
        run(recipe, out=tmp_path / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_is_no_recipe_in_stages():
    with pytest.raises(InputError, match="stages: expected at least one stage"):
        Stages({"name": "x", "stages": {}})
    with pytest.raises(InputError, match="stages: expected a mapping from names to stages, got list"):
        load_stages({"name": "x", "stages": ["a"]})
    assert load_stages({"name": "x"}) is None
