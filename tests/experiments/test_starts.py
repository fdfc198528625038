"""Recipes whose models start from trained ones: found, checked before the first step, recorded, resumed, refused."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from typer.testing import CliRunner

from contextlab import open_run, run
from contextlab.cli.shared import app
from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec, find_model, load_recipe
from contextlab.experiments.check import check
from contextlab.experiments.folder import spec_text
from contextlab.files import read_record, write_record
from contextlab.models import build_model, load_model, save_model
from contextlab.training import checkpoint
from tests.experiments.test_run import MODEL, same_results, tiny

RECALL = {"recall": tiny()["tasks"]["recall"]}
CPU = torch.device("cpu")


def base(**changes):
    """A run of two models from two seeds."""
    models = {"softmax": {**MODEL, "options": {"width": 8, "depth": 2, "heads": 2}}, "delta": MODEL}
    return tiny(tasks=RECALL, models=models, seeds=[0, 1], **changes)


def adapted(source, entry=None, **changes):
    """A recipe of one model that starts from `source`."""
    return tiny(name="adapted", tasks=RECALL, models={"m": {"from": str(source), **(entry or {})}}, **changes)


@pytest.fixture
def trained(tmp_path, finished):
    return finished(base(), tmp_path / "base").folder


def weights(folder, key):
    return load_model(checkpoint.newest(folder / "trainings" / key)).state_dict()


def test_each_seed_starts_from_the_training_of_the_same_seed(trained, tmp_path):
    one_step = {"steps": 1, "batch": 4, "freeze": ["blocks.*"]}
    done = run(adapted(f"{trained}:softmax", train=one_step, seeds=[0, 1]), out=tmp_path / "run")
    for seed in (0, 1):
        before = weights(trained, f"recall.softmax.seed{seed}")
        after = weights(done.folder, f"recall.m.seed{seed}")
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == {name for name in before if name.startswith("blocks.")}
    (record, _) = sorted(done.records, key=lambda each: each["seed"])
    newest = checkpoint.newest(trained / "trainings" / "recall.softmax.seed0")
    assert record["start"]["folder"] == str(newest)
    assert record["start"]["weights_sha256"] == read_record(newest / "model.json")["weights_sha256"]
    assert record["start"]["told"] == ["carried over: 16 of 16 tensors, 100.0% of the numbers"]
    assert done.record["sources"]["recall.m.seed1"]["weights_sha256"] != record["start"]["weights_sha256"]
    with pytest.raises(InputError, match="softmax was trained 2 times there; give one of these folders: .*seed0, "):
        run(adapted(f"{trained}:softmax", seeds=[7]), out=tmp_path / "other")


def test_every_model_is_told_what_it_starts_from(trained, tmp_path):
    source = f"{trained}:softmax"
    recipe = adapted(source)
    [(name, entry)] = recipe["models"].items()
    recipe["models"] = {name: entry, "frozen": {**entry, "train": {"freeze": ["blocks.0.*"]}}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    said = " ".join(CliRunner().invoke(app, ["run", str(path), "--check"]).output.split())
    assert f"frozen, {name} start from {source}: carried over: " in said


def test_blocks_are_replaced_removed_and_added_and_it_is_said_before_the_first_step(trained, tmp_path):
    source = f"{trained}:softmax"
    entry = {"remove": [0], "replace": {"layers": [1], "mixer": "gla"}, "options": {"depth": 2}, "init": "zero"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(adapted(source, entry)))
    said = " ".join(CliRunner().invoke(app, ["run", str(path), "--check"]).output.split())
    assert f"m starts from {source}: carried over: " in said
    assert "zero at the start: blocks.1.mixer.out_proj.weight" in said
    assert "dropped: blocks.0.mixer_norm.weight" in said
    done = run(path, out=tmp_path / "run")
    model = done.models("recall")["m"]
    assert [layer.mixer for layer in model.spec.pattern()] == ["gla", "gla"]
    assert "zero at the start" in " ".join(done.records[0]["start"]["told"])


def test_all_places_of_a_trained_model_are_the_same_start(trained, tmp_path):
    training = trained / "trainings" / "recall.softmax.seed0"
    save_model(load_model(checkpoint.newest(training)), tmp_path / "saved")
    for source in (training, checkpoint.newest(training), tmp_path / "saved", f"{trained}:softmax"):
        (job,) = ExperimentSpec.parse(adapted(source)).trainings()
        assert job.start.source.digest == read_record(checkpoint.newest(training) / "model.json")["weights_sha256"]
        assert job.model == load_model(tmp_path / "saved").spec
    with pytest.raises(InputError, match="softmax was trained 2 times there"):
        find_model(f"{trained}:softmax")
    shutil.rmtree(trained / "trainings" / "recall.softmax.seed1")
    assert find_model(f"{trained}:softmax")[0] == "recall.softmax.seed0"


def test_a_killed_run_is_gone_on_with_exactly_and_a_changed_source_is_refused(trained, tmp_path):
    source = tmp_path / "saved"
    save_model(build_model(load_model(checkpoint.newest(trained / "trainings" / "recall.softmax.seed0")).spec), source)
    recipe = adapted(source, {"options": {"depth": 3}, "init": "copied"})
    whole = run(recipe, out=tmp_path / "whole")
    folder = shutil.copytree(whole.folder, tmp_path / "killed")
    training = next(folder.glob("trainings/*"))
    for name in ("record.json", "results.parquet"):
        (training / name).unlink()
    shutil.rmtree(checkpoint.newest(training))
    record = read_record(folder / "record.json")
    resumed = run(recipe, out=folder, resume=True)
    assert same_results(resumed.results, whole.results)
    assert resumed.record["sources"] == record["sources"]
    save_model(build_model(load_model(source).spec, seed=9), source)
    with pytest.raises(InputError) as caught:
        run(recipe, out=folder, resume=True)
    assert "recall.m.seed0 starts from" in str(caught.value)
    assert "has changed since this run was begun (other weights" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert open_run(folder).task("recall")  # what there is of it can still be read


def test_a_sweep_may_change_what_is_made_of_it(trained, tmp_path):
    recipe = adapted(f"{trained}:softmax", sweep={"over": {"options.depth": [1, 2], "train.learning_rate": [1e-3]}})
    done = run(recipe, out=tmp_path / "run")
    (record,) = done.records
    depth = done.sweep["options.depth"][record["trial"]] if "options.depth" in done.sweep else None
    assert load_model(checkpoint.newest(next(done.folder.glob("trainings/*")))).spec.depth in (1, 2)
    assert depth is None or depth in (1, 2)
    assert record["start"]["from"] == f"{trained}:softmax"


def test_the_key_is_from_wherever_it_is_written(trained, tmp_path):
    spec = ExperimentSpec.parse(adapted(f"{trained}:softmax", {"replace": [{"mixer": "gla"}]}))
    text = spec_text(spec).decode()
    assert "from: " in text
    assert "source:" not in text
    assert ExperimentSpec.parse(yaml.safe_load(text)) == spec
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny(tasks=RECALL)))
    changed = load_recipe(path, ["models={m: {}}", f"models.m.from={trained}:delta", "seeds=[0]"])
    assert changed.trainings()[0].start is not None


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ({"preset": "transformer"}, {}, "give either preset (a registered model's name), spec (a ModelSpec) or from"),
        ({"options": {"dept": 3}}, {}, "options.dept: unknown key of ModelSpec 'dept'; did you mean 'depth'?"),
        ({"replace": {"layers": "7", "mixer": "gla"}}, {}, "replace.layers: 7 is not among the 2 layers"),
        ({"replaced": {}}, {}, "models.m.replaced: unknown key; did you mean 'replace'? (known: preset, options, "
         "spec, from, replace"),
        ({"options": {"layers": ["gla"]}, "remove": [1]}, {}, "options.layers and replace, remove: one would undo"),
        ({"options": {"heads": 4}, "replace": {"mixer": "gla", "options": {"heads": 2}}}, {},
         "say it themselves (2); give replace: {options: {heads: 4}}"),
        ({"remove": [4]}, {}, "remove: 4 is not among the 2 blocks"),
        ({"init": "averaged"}, {}, "its start: init: 'averaged' is for attention layers"),
        ({"options": {"width": 12}}, {}, "its start: nothing of the source fits: no matrix has the same name"),
        ({}, {"tasks": {"r": tiny()["tasks"]["regression"]}}, "has read_in 'token', but the task needs 'vector'"),
        ({}, {"tasks": {"r": {"task": "associative_recall", "options": {"vocabulary": 18, "pairs": 2, "length": 8}}}},
         "has input_size 16, but the task needs 18; take another of the two, or give options: {input_size: null}"),
        ({}, {"train": {"freeze": ["blocks.7.*"]}}, "train.freeze: 'blocks.7.*' matches no parameter; did you mean"),
        ({}, {"train": {"optimizer": "torch.optim.LBFGS"}}, "torch.optim.LBFGS: asks for the loss again"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_the_first_step(trained, entry, changes, message):
    with pytest.raises(InputError) as caught:
        check(ExperimentSpec.parse({**adapted(f"{trained}:softmax", entry), **changes}), CPU)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sources_that_are_not_there_are_one_line(trained, tmp_path):
    for source, message in {
        f"{trained}:softmaxx": "unknown trained model 'softmaxx'; did you mean 'softmax'?",
        str(trained): "the run has 4 trained models; give one of their folders",
        str(tmp_path): "no trained model there; expected a run, RUN:MODEL",
    }.items():
        with pytest.raises(InputError) as caught:
            ExperimentSpec.parse(adapted(source))
        assert message in str(caught.value)
    half = trained / "trainings" / "recall.softmax.seed0"
    path = checkpoint.newest(half) / "training.json"
    record = read_record(path)
    write_record(path, {**record, "status": ""})
    with pytest.raises(InputError, match=r"its training has not finished \(step 3, interrupted\); go on with it"):
        ExperimentSpec.parse(adapted(half))
    with pytest.raises(InputError, match="init: is for a model that starts from a trained one"):
        ExperimentSpec.parse(tiny(models={"m": {**MODEL, "init": "zero"}}))


def test_a_transformers_folder_is_imported(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    recipe = adapted(tmp_path / "llama", {"replace": {"layers": "half", "mixer": "gated_delta_net"}})
    (training,) = ExperimentSpec.parse(recipe).trainings()
    assert [layer.mixer for layer in training.model.pattern()] == ["gated_delta_net", "attention"]
    assert training.model.pattern()[0].options["heads"] == 2
    done = run(recipe, out=tmp_path / "run")
    assert done.record["status"] == "finished"
    assert next(iter(done.models("recall")["m"].parameters())).dtype == torch.float32
    weights = next((tmp_path / "llama").glob("*.safetensors"))
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    assert weights.exists()
    with pytest.raises(InputError, match="has changed since this run was begun"):
        run(recipe, out=done.folder, resume=True)
