"""The command line: every command works, every wrong input is one line and exit code 2."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import yaml

import contextlab
from contextlab import registry, threads
from contextlab.cli import shared
from contextlab.cli.shared import _no_collection
from contextlab.experiments import find_recipe, load_recipe
from contextlab.experiments.recipes import recipe_files
from contextlab.experiments.stages import load_stages
from tests.experiments.test_run import one, tiny


@pytest.mark.parametrize("kind", ["mixers", "mlps", "models", "tasks", "learners", "conversions", "figures", "recipes"])
def test_everything_listed_can_be_shown(call, kind):
    code, out, _ = call("list", kind, "--json")
    rows = json.loads(out)
    assert code == 0
    assert rows
    assert all(row["name"] and row["summary"] for row in rows)
    assert call("list", kind)[0] == 0
    for row in rows:
        code, out, err = call("show", kind, row["name"])
        assert code == 0, err
        assert row["name"] in out
    for row in rows[: 1 if kind == "recipes" else None]:  # all recipes are resolved in tests/experiments
        json.loads(call("show", kind[:-1], row["name"], "--json")[1])


def test_examples_that_show_prints_can_be_run(call):
    for kind in ("mixers", "models"):
        for row in json.loads(call("list", kind, "--json")[1]):
            example = json.loads(call("show", kind, row["name"], "--json")[1])["example"]
            assert eval(example.splitlines()[0], {"contextlab": contextlab}) is not None


@pytest.mark.parametrize("name", recipe_files())
def test_a_recipe_that_is_shown_is_a_recipe(call, tmp_path, monkeypatch, name):
    """`contextlab show recipe NAME > my.yaml && contextlab run my.yaml`."""
    monkeypatch.setattr(shared.console, "width", 40)
    code, out, err = call("show", "recipe", name)
    assert (code, err) == (0, "")
    (tmp_path / "my.yaml").write_text(out)
    assert load_stages("my.yaml") or load_recipe("my.yaml") == load_recipe(name)
    assert yaml.safe_load(out) == yaml.safe_load(find_recipe(name).read_text())
    assert out.count("\n") == find_recipe(name).read_text().rstrip().count("\n") + 1


def test_run_report_and_resume(call, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny()))
    code, out, err = call("run", "tiny.yaml", "--jobs", "1", "--set", "train.steps=2")
    assert code == 0, err
    assert "Report:" in out
    assert "runs/tiny/report.html" in out
    assert (tmp_path / "runs/tiny/report.html").exists()
    code, out, err = call("run", "tiny.yaml", "--out", "runs/tiny")
    assert code == 2
    assert "finished run" in err
    code, out, err = call("evaluate", "runs/tiny", "--jobs", "1", "--set", "evaluate.prompts=8")
    assert code == 0, err
    found = pd.read_parquet(tmp_path / "runs/tiny/results.parquet").query("kind == 'learner'")
    assert set(found.n[found.shot.isna()]) == {8}
    code, out, err = call("evaluate", "runs/tiny", "--set", "train.steps=9")
    assert code == 2
    assert "expected evaluate.KEY=VALUE" in err
    code, out, err = call("report", "runs/tiny", "--out", "all.html")
    assert code == 0, err
    assert (tmp_path / "all.html").stat().st_size < 2_000_000
    # Its trained models, held against the learners.
    code, out, err = call("similarity", "runs/tiny", "--task", "regression", "--prompts", "8", "--out", "s.csv")
    assert code == 0, err
    assert "softmax on regression, split train" in out
    assert "ridge" in out
    assert set(pd.read_csv(tmp_path / "s.csv")["model"]) == {"softmax", "delta"}
    code, out, err = call(
        "similarity", "runs/tiny", "--task", "regression", "--prompts", "4", "--layers", "--out", "l.csv"
    )
    assert code == 0, err
    assert "layer 1" in out
    assert "gradient_descent" in out
    assert set(pd.read_csv(tmp_path / "l.csv")["layer"]) == {"layer 1", "output"}
    code, _, err = call("similarity", "runs/tiny", "--task", "recall", "--layers")
    assert code == 2
    assert "take no steps to count" in err
    for wrong, said in (((), "several tasks"), (("--task", "regresion"), "did you mean 'regression'?")):
        code, _, err = call("similarity", "runs/tiny", *wrong)
        assert code == 2
        assert said in err


def test_check_says_what_a_run_would_do_and_writes_nothing(call, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny(seeds=[0, 1])))
    code, out, err = call("run", "tiny.yaml", "--jobs", "1", "--check")
    assert code == 0, err
    assert "8 trainings, 24 steps in all; learners of 2 tasks" in out
    assert "About" in out
    code, _, err = call("run", "tiny.yaml", "--check", "--set", "evaluate.splits=[trian]")
    assert code == 2
    assert "did you mean 'train'?" in err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_recorded_plugins_are_asked_for_by_name(call, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment.yaml").write_text(yaml.safe_dump(tiny(tasks={"mine": {"task": "of_a_plugin"}})))
    (tmp_path / "run" / "record.json").write_text('{"status": "running", "plugins": ["my_plugin"]}')
    for command in (("run", "run", "--resume"), ("evaluate", "run")):
        code, _, err = call(*command)
        assert code == 2
        assert "add --plugin my_plugin" in err


def test_cost_measures_and_writes(call, tmp_path, monkeypatch):
    code, out, err = call("cost", "gated_delta_net", "--lengths", "32", "--set", "width=16", "--repeats", "1")
    assert code == 0, err
    assert "decode" in out
    table = pd.read_parquet(tmp_path / "costs/gated_delta_net/cost.parquet")
    states = table[table.metric == "state_bytes"].set_index("length").value
    assert states[32] > 0
    assert (tmp_path / "costs/gated_delta_net/cost.html").exists()
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(out)
    monkeypatch.setattr("contextlab.evaluation.cost", lambda *arguments, **options: table)  # measured once is enough
    rows = json.loads(call("cost", "gated_delta_net", "--lengths", "32", "--set", "width=16", "--json")[1])
    assert [row["metric"] for row in rows] == list(table.metric)


@pytest.mark.parametrize(
    "command",
    [["list", "policies"], ["list", "recipes"], ["show", "policy", "h2o"], ["show", "recipe", "demo"], ["doctor"]],
    ids=" ".join,
)
def test_a_table_is_printed_for_people_and_json_where_it_is_asked_for(call, command):
    assert json.loads(call(*command, "--json")[1])
    code, out, _ = call(*command)
    assert code == 0
    with pytest.raises(ValueError, match=r"Expecting|Extra data"):
        json.loads(out)


def test_mixers_are_listed_with_what_their_state_costs(call):
    rows = {row["name"]: row for row in json.loads(call("list", "mixers", "--json")[1])}
    assert rows["attention"]["state_growth"] == "linear"
    assert rows["attention"]["family"] == "softmax"
    assert rows["sliding_window"]["state_growth"] == rows["mamba"]["state_growth"] == "constant"
    assert rows["hgrn"]["state_bytes"] == 64 * 4
    assert rows["mamba"]["family"] == "state space"
    costs = {name: (row["sequence_cost"], row["parallel_form"], row["token_cost"]) for name, row in rows.items()}
    assert costs["attention"] == ("T^2", "attention", "T")
    assert costs["sliding_window"] == ("T", "attention", "1")
    assert costs["gated_delta_net"] == ("T", "chunks", "1")
    assert costs["lstm"] == ("T", "loop", "1")
    code, out, _ = call("list", "mixers")
    assert code == 0
    assert "constant" in out


def test_components_are_listed_family_by_family(call):
    rows = json.loads(call("list", "tasks", "--json")[1])
    assert {row["name"]: row["family"] for row in rows}["copy"] == "recall"
    found = [row["name"] for row in json.loads(call("list", "mixers", "--search", "Delta-rule STATE", "--json")[1])]
    assert "gated_delta_net" in found
    options = {row["name"]: row["options"] for row in json.loads(call("list", "conversions", "--json")[1])}
    assert (options["gqa"], options["average"]) == ("kv_heads=1, layers=all", "weights=null")
    assert "attention" not in found
    assert [row["name"] for row in json.loads(call("list", "recipes", "--search", "byte-level", "--json")[1])]
    for kind in ("tasks", "policies", "conversions", "figures"):  # a summary in each list, whole, however narrow
        told = json.loads(call("list", kind, "--json")[1])
        shown = set(call("list", kind)[1].split())
        assert all(set(row["summary"].split()) <= shown for row in told)
    code, out, _ = call("list", "tasks", "--family", "state tracking")
    assert code == 0
    assert "counters" in out
    assert "associative_recall" not in out
    lines = [line.strip() for line in call("list", "learners")[1].splitlines()]
    assert [line for line in lines if line in {row["family"] for row in rows}] == sorted(
        {row["family"] for row in json.loads(call("list", "learners", "--json")[1])}
    )
    assert "Family: recall." in call("show", "task", "copy")[1]


def test_doctor_names_a_backend_and_a_reason_for_every_op(call):
    code, out, _ = call("doctor", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["backends"]
    assert all(each["why"] for each in told["backends"])
    assert "set of weights" in told["trains_alone"]["mixer lstm"]
    assert "mixer attention" not in told["trains_alone"]
    code, out, _ = call("doctor")
    assert code == 0
    assert "trained alone" in out
    assert "mlp moe" in out


@pytest.mark.parametrize("what", ["experiment", "model", "task", "train", "evaluate"])
def test_schemas_are_json(call, what):
    assert json.loads(call("schema", what)[1])["type"] == "object"


def test_a_plugin_brings_a_mixer_into_a_run(call, tmp_path, monkeypatch):
    known = dict(registry._entries["mixer"])
    monkeypatch.setitem(registry._entries, "mixer", known)  # what is registered here is forgotten afterwards
    (tmp_path / "mine.py").write_text(
        "from contextlab import RecurrentState, register\n"
        "from contextlab.mixers.base import Mixer\n"
        "@register('mixer', 'mean_for_tests')\n"
        "class Mean(Mixer):\n"
        "    '''The mean of all tokens so far.'''\n"
        "    def forward(self, x, state=None, mask=None, keep_state=True):\n"
        "        total = x.cumsum(1)\n"
        "        return total, RecurrentState(memory={'sum': total[:, -1].clone()}, length=x.shape[1])\n"
        "    def state_nbytes(self, length, batch=1, dtype=None):\n"
        "        return batch * self.width * 4\n"
        "    def flops(self, length):\n"
        "        return 0\n"
    )
    data = one(models={"mine": {"spec": {"width": 8, "depth": 1, "layers": ["mean_for_tests"]}}})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    code, _, err = call("run", "tiny.yaml")
    assert code == 2
    assert "mean_for_tests" in err
    code, out, err = call("run", "tiny.yaml", "--plugin", "mine.py", "--jobs", "2")
    assert code == 0, out + err
    assert "mine" in set(pd.read_parquet("runs/tiny/results.parquet").model)
    again = f"contextlab run runs/tiny/experiment.yaml --plugin {tmp_path / 'mine.py'}"
    assert again in out
    assert (
        f"contextlab run tiny.yaml --plugin {tmp_path / 'mine.py'}" in (tmp_path / "runs/tiny/report.html").read_text()
    )
    assert call(*again.split()[1:], "--check")[0] == 0
    # Without it, whatever comes upon its component names the plugin.
    del known["mean_for_tests"], sys.modules["contextlab_plugin_mine"]
    folder = next((tmp_path / "runs/tiny/trainings").iterdir())
    for command in (
        ("run", "runs/tiny/experiment.yaml"), ("similarity", "runs/tiny"), ("cost", str(next(folder.glob("step_*")))),
        ("compress", "runs/tiny", "--policy", "tova", "--budget", "50%"),
    ):  # fmt: skip
        code, _, err = call(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert "mean_for_tests" in err
        assert f"add --plugin {tmp_path / 'mine.py'}" in err


def test_a_plugin_adds_a_figure_to_the_report(call, tmp_path, monkeypatch):
    """One file of at most 15 lines, no other touched."""
    monkeypatch.setitem(registry._entries, "figure", dict(registry._entries["figure"]))
    (tmp_path / "mine.py").write_text(
        "import plotly.graph_objects as go\n"
        "from contextlab import register\n"
        "@register('figure', 'trained_seconds')\n"
        "def seconds(data):\n"
        "    'Seconds of each training'\n"
        "    return go.Figure().add_bar(x=[r['model'] for r in data.records], y=[r['seconds'] for r in data.records])\n"
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(one()))
    code, _, err = call("run", "tiny.yaml", "--jobs", "1", "--set", "train.steps=2", "--plugin", "mine.py")
    assert code == 0, err
    assert "Seconds of each training" in (tmp_path / "runs/tiny/report.html").read_text()
    assert call("run", "runs/tiny", "--resume")[0] == 2  # it asks for what the run was started with
    for command in (("run", "runs/tiny", "--resume"), ("report", "runs/tiny")):
        code, _, err = call(*command, "--plugin", "mine.py")
        assert code == 0, err
    assert "Seconds of each training" in (tmp_path / "report.html").read_text()
    assert "trained_seconds" in call("list", "figures", "--plugin", "mine.py")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "mixer5"], "unknown kind 'mixer5'"),
        (
            ["list", "mixers", "--family", "linaer"],
            "--family: unknown family of mixers 'linaer'; did you mean 'linear'?",
        ),
        (["list", "recipes", "--family", "x"], "--family: recipes have none"),
        (["list", "mixers", "--search", "deltoid"], "no mixer is described by 'deltoid'; did you mean 'delta_net'?"),
        (["list", "recipes", "--search", "qqq zz"], "no recipe is described by 'qqq zz'; without it "),
        (["show", "mixer", "atention"], "did you mean 'attention'?"),
        (["show", "mxer", "attention"], "did you mean 'mixers'?"),
        (["show", "recipe", "dem"], "did you mean 'demo'?"),
        (["run", "nothing"], "unknown recipe 'nothing'"),
        (["run", "nothing.yaml"], "no such file"),
        (["run", "demo", "--set", "train.stepz=1"], "train.stepz: unknown key; did you mean 'steps'?"),
        (["run", "demo", "--set", "train.steps=0"], "train.steps: expected at least 1, got 0"),
        (["run", "demo", "--set", "tasks.recall.options.pairs=80"], "64"),
        (["run", "demo", "--set", "tasks.regression.model.width=30"], "not divisible by 4 heads"),
        (["run", "demo", "--jobs", "0"], "jobs must be at least 1"),
        (["run", "demo", "--device", "tpu"], "device"),
        (["run", "demo", "--plugin", "no_such_module"], "cannot be imported"),
        (["run", "demo", "--plugin", "none.py"], "no such file"),
        (["run", "demo", "--resume"], "no unfinished run"),
        (["report", "nowhere"], "no run there"),
        (["cost", "transfomer"], "did you mean 'transformer'?"),
        (["cost", "transformer", "--lengths", "1k,few"], "expected numbers of tokens"),
        (["cost", "transformer", "--set", "widht=3"], "did you mean 'width'?"),
        (["cost", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["schema", "modle"], "did you mean 'model'?"),
        (["cost", "transformer", "--lengths", "9999999999k"], "--lengths: at most 2147483647 tokens"),
        (["cost", "transformer", "--set", "width=1000000"], "not enough memory"),
        (["run", "demo", "--set", "train.batch=1000000000000"], "train: batch: whole numbers are at most 2147483647"),
        (["run", "demo", "--set", "seeds=[10000000000000000000]"], "seeds: whole numbers are at most 2147483647"),
        (["run", "demo", "--set", "train.steps=" + "9" * 5000], "a value cannot be read"),
        (["learners", "linear_regression", "--set", "noise=1e30"], "noise: expected 0, or a number of size 1e-30 to"),
        (["learners", "associative_recall", "--prompts", "1999999999"], "prompts 1999999999: what is kept of them"),
        (["learners", "demo", "--set", "tasks.recall.options.pairs=3000000000"], "pairs: whole numbers are at most"),
        (
            ["show", "task", "linear_regression", "--sample", "--set", "pool=2000000000", "--set", "dimensions=1000"],
            "the largest size given is pool=2000000000",
        ),
        (["run", "x" * 300], "File name too long"),
        (["report", "x" * 300], "File name too long"),
        (["learners", "9" * 300], "unknown task or recipe"),
        (["compress", "x" * 300, "--policy", "snapkv", "--budget", "50%"], "File name too long"),
        (["cost", "x" * 300], "unknown model"),
        (["cost", "mambaformer", "--set", "heads=3"], "width 64 is not divisible by 3 heads"),
        (["cost", "transformer", "--lengths", "²"], "expected numbers of tokens"),
        (["cost", "transformer", "--set", "depth=1000000"], "a model applies at most 10000 layers"),
        (["cost", "transformer", "--set", "loops=2147483647"], "a model applies at most 10000 layers"),
        (["lst"], "no such command"),
        (["convert", "x", "--to", "gqa", "--budget", "-3", "--out", "y"], "error: --budget: "),
        (["run"], "missing argument"),
        (["run", "demo", "--fast"], "no such option"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(call, arguments, message, tmp_path):
    code, _, err = call(*arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_threads_that_wait_sleep_on_a_busy_machine_only(call, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "x")  # so that what the command sets is undone
    cases = [
        (0.2, 9, None, None),
        (3.0, 3, None, "passive"),
        (3.0, None, None, "passive"),  # a system that does not tell who runs
        (3.0, 1, None, None),  # whoever made the load has ended
        (3.0, 3, "active", "active"),
        (0.2, 1, "active", "active"),
    ]
    for load, running, own, expected in cases:
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        monkeypatch.setattr(threads, "_running", lambda running=running: running)
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
            monkeypatch.delenv(name, raising=False)
        if own is not None:
            monkeypatch.setenv("OMP_WAIT_POLICY", own)
        assert call("--version")[0] == 0
        assert os.environ.get("OMP_WAIT_POLICY") == expected


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_who_has_chosen_how_threads_wait_is_let_be(name, monkeypatch):
    for load in (3.0, 0.2):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        monkeypatch.setattr(threads, "_running", lambda: 9)
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setenv(name, "1")
        threads.yield_cores()
        assert "OMP_WAIT_POLICY" not in os.environ


def test_only_the_first_import_of_torch_is_kept_from_the_collector(monkeypatch):
    frozen: list[int] = []
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(len(frozen)))
    with _no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert frozen == []
    monkeypatch.delitem(sys.modules, "torch")
    with _no_collection():
        pass
    assert frozen == [0]


def test_torch_is_loaded_after_the_command_line_has_chosen_how_threads_wait():
    code = "import contextlab.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_quick_forms_are_found_or_refused(call, monkeypatch):
    import contextlab.experiments

    asked = []
    monkeypatch.setattr(contextlab.experiments, "load_recipe", lambda name, *_: asked.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("run", "mixers-on-recall", "--quick")
    assert asked == ["mixers-on-recall-quick"]
    code, _, err = call("run", "demo", "--quick")
    assert code == 2
    assert "demo has no quick form; those that have one: arithmetic, boolean, " in err


def test_the_learners_of_a_task_and_of_a_recipe_are_measured(call, tmp_path):
    options = ("--prompts", "16", "--out", "r.parquet")
    code, out, _ = call("learners", "associative_recall", "--preset", "easy", *options)
    assert code == 0
    assert "lookup" in out
    assert "100.0%" in out
    assert set(pd.read_parquet(tmp_path / "r.parquet")["model"]) == {"lookup"}
    code, out, _ = call("learners", "demo", "--prompts", "16")
    assert code == 0
    assert "regression · squared error" in out
    assert "recall · accuracy" in out
    code, out, _ = call("learners", "linear_regression", "--splits", "--prompts", "8", "--set", "dimensions=2")
    assert "ridge" in out
    code, out, _ = call("learners", "associative_recall", "--preset", "easy", "--by", "distance", "--prompts", "32")
    assert code == 0
    assert "accuracy by distance" in out
    code, _, err = call("learners", "associative_recall", "--by", "distanse")
    assert code == 2
    assert "did you mean 'distance'?" in err
    code, _, err = call("learners", "asociative_recall")
    assert code == 2
    assert "did you mean 'associative_recall'?" in err
    assert call("learners", "demo", "--preset", "easy")[0] == 2


def test_a_prompt_of_a_task_is_shown(call):
    code, out, _ = call("show", "task", "associative_recall", "--sample", "--preset", "easy", "--seed", "3")
    assert code == 0
    assert "k" in out
    assert "best known learner: lookup" in out
    assert out == call("show", "task", "associative_recall", "--sample", "--preset", "easy", "--seed", "3")[1]
    few = call("show", "task", "associative_recall", "--sample", "--set", "pairs=2", "--set", "queries=1")[1]
    assert "1 prediction scored" in few
    for wrong in (("mixer", "attention", "--sample"), ("task", "associative_recall", "--preset", "easy")):
        code, _, err = call("show", *wrong)
        assert code == 2
        assert err.count("\n") == 1


def test_a_sweep_needs_no_file(call, tmp_path):
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "swept"
    recipe.write_text(yaml.safe_dump(one()))
    over = ["--over", "train.learning_rate=1e-3,3e-2"]
    code, text, _ = call("sweep", str(recipe), *over, "--check")
    assert code == 0
    assert "2 trainings" in text
    assert not out.exists()
    code, text, _ = call("sweep", str(recipe), *over, "--halving", "--set", "sweep.halving.rungs=[0.5]", "--check")
    assert code == 0
    assert (
        "2 trainings, at most 5 steps in all (trials are halved)" in text
    )  # two to step 2 of 3, and one on to its end
    common = ["--set", "sweep.validation.prompts=8", "--out", str(out), "--jobs", "1"]
    assert call("sweep", str(recipe), *over, "--over", "options.width=[8]", *common)[0] == 0
    assert yaml.safe_load((out / "experiment.yaml").read_text())["sweep"] == {
        "over": {"train.learning_rate": [1e-3, 3e-2], "options.width": [8]},
        "validation": {"prompts": 8},
    }
    (out / "report.html").unlink()
    assert call("run", str(out), "--resume", "--jobs", "1")[0] == 0
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "sweeps over no field; give --over"),
        (["demo", "--over", "train.learning_rate"], "expected path=values"),
        (["demo", "--over", "train.learning_rat=1"], "did you mean 'train.learning_rate'"),
        (["demo", "--over", "train.steps=1,2", "--sampler", "grd"], "did you mean 'grid'"),
        (["demo", "--over", "train.steps=1,2", "--trials", "5"], "only 2 different settings"),
        (["demo", "--over", "train.steps=1,2", "--sampler", "tpe", "--trials", "2", "--halving"], "grid or random"),
        (["demo", "--over", "train.steps=1", "--over", "train.steps=2"], "--over train.steps: given twice"),
    ],
)
def test_a_wrong_sweep_is_one_line_and_exit_code_2(call, arguments, message):
    code, _, err = call("sweep", *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
