"""Models of a recipe that learn from a teacher, or are conversions of it: trained, resumed, recorded, refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from typer.testing import CliRunner

from contextlab import open_run, run
from contextlab.cli.commands import app
from contextlab.convert import convert
from contextlab.convert.objective import NewMixers, taught
from contextlab.convert.students import Layers
from contextlab.convert.teacher import Distil
from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.check import check
from contextlab.experiments.distill import learning
from contextlab.experiments.folder import spec_text
from contextlab.experiments.stages import load_stages
from contextlab.experiments.starts import new_model, require_same_sources, sources
from contextlab.experiments.together import groups
from contextlab.files import read_record
from contextlab.mixers.delta.delta_net import GatedDeltaNet
from contextlab.models import build_model, load_model, save_model
from contextlab.tasks import build_task
from contextlab.training import checkpoint, train
from contextlab.training.schedule import Turns
from contextlab.training.spec import TrainSpec
from tests.experiments.test_run import MODEL, same_results, tiny

RECALL = {"recall": tiny()["tasks"]["recall"]}
SMALL = {"width": 8, "depth": 2, "heads": 2}
CPU = torch.device("cpu")


def staged(**changes):
    """A transformer, two conversions of it that learn its attention, then its predictions; and itself beside them."""
    base = {
        "name": "cheaper",
        "tasks": RECALL,
        "train": {"steps": 3, "batch": 4, "log_every": 1, "checkpoint_every": 1},
        "evaluate": {"prompts": 8, "batch": 8, "splits": ["train"]},
        "seeds": [1],
        "stages": {
            "base": {"seeds": [0, 1], "models": {"softmax": {**MODEL, "options": SMALL}}},
            "attention": {
                "distill": {"teacher": "base:softmax", "attention": 1},
                "models": {
                    "one_key": {"from": "base:softmax", "convert": "gqa:kv_heads=1"},
                    "delta": {"from": "base:softmax", "convert": "gated_delta_net:layers=half"},
                },
            },
            "logits": {
                "distill": {"teacher": "base:softmax", "logits": 1, "hidden": 0.5, "task": 0.5, "temperature": 2},
                "models": {
                    "teacher": {"from": "base:softmax", "train": {"steps": 0}},
                    "one_key": {"from": "attention:one_key"},
                    "delta": {"from": "attention:delta", "distill": {"teacher": "base:softmax", "logits": 1}},
                },
            },
        },
    }
    return {**base, **changes}


@pytest.fixture(autouse=True, scope="module")
def _without_report():
    """Half of such a run is its page, which tests/report has tests of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("contextlab.experiments.closing.build_report", lambda *args, **_: args[4].write_text(""))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run; tests leave it as it is."""
    return run(staged(), out=tmp_path_factory.mktemp("whole") / "run").folder.parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved transformer for the recall task."""
    training = ExperimentSpec.parse(tiny(tasks=RECALL, models={"m": {**MODEL, "options": SMALL}})).trainings()[0]
    save_model(build_model(training.model, seed=5), tmp_path_factory.mktemp("teacher") / "saved")
    return str(tmp_path_factory.getbasetemp() / "teacher0" / "saved")


def weights(folder, stage, model, seed=1):
    return load_model(checkpoint.newest(folder / stage / "trainings" / f"recall.{model}.seed{seed}")).state_dict()


def record(folder, stage, model, seed=1):
    return read_record(folder / stage / "trainings" / f"recall.{model}.seed{seed}" / "record.json")


def test_attention_trains_the_replaced_mixers_alone_and_predictions_all(whole):
    base, taught, last = (weights(whole, *each) for each in
                          [("base", "softmax"), ("attention", "delta"), ("logits", "delta")])  # fmt: skip
    kept = {name for name in base if name in taught and torch.equal(base[name], taught[name])}
    assert kept == {name for name in base if not name.startswith("blocks.0.mixer.")}
    assert not any(torch.equal(taught[name], last[name]) for name in base if name in taught)
    teacher = weights(whole, "logits", "teacher")
    assert all(torch.equal(base[name], teacher[name]) for name in base)
    assert len(record(whole, "logits", "teacher")["history"]["loss"]) == 1
    assert [record(whole, "logits", "teacher")[key] for key in ("status", "steps")] == ["finished", 0]


def test_each_seed_learns_from_the_teacher_of_its_seed_and_records_tell(whole):
    found = record(whole, "logits", "one_key")
    assert found["distill"]["folder"].endswith("base/trainings/recall.softmax.seed1/step_00000003")
    assert found["distill"]["told"].startswith("hidden, logits at temperature 2, task (weights 0.5, 1, 0.5) of ")
    before = found["start"]["before"]
    assert before["start"]["convert"] == "gqa:kv_heads=1"
    assert before["distill"]["told"].startswith("attention of ")
    told = before["start"]["told"]
    assert told[0].startswith("carried over: 12 of 16 tensors")
    assert told[1:2] == ["converted by gqa:kv_heads=1: blocks.{0,1}.mixer.*"]
    assert told[2].startswith("blocks.0.mixer: 2 key heads to 1, averaged")
    sources = read_record(whole / "logits" / "record.json")["sources"]
    digest = read_record(checkpoint.newest(whole / "base/trainings/recall.softmax.seed1") / "model.json")
    assert sources["recall.one_key.seed1 (teacher)"]["weights_sha256"] == digest["weights_sha256"]
    assert "recall.delta.seed1 (teacher)" not in read_record(whole / "attention" / "record.json")["sources"]


def killed(whole, folder, stage, model):
    """A copy of the run in which a training was killed after its second step of three, and nothing tells of the end."""
    shutil.copytree(whole, folder)
    training = folder / stage / "trainings" / f"recall.{model}.seed1"
    for name in ("record.json", "results.parquet"):
        (training / name).unlink()
    shutil.rmtree(checkpoint.newest(training))
    assert checkpoint.newest(training).name == "step_00000002"
    return folder


def gone_on_exactly(whole, folder, stage, model):
    before, after = weights(whole, stage, model), weights(folder, stage, model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert record(folder, stage, model)["history"]["loss"] == record(whole, stage, model)["history"]["loss"]


def test_a_killed_training_of_predictions_goes_on_bit_for_bit_where_the_run_has_been_moved(whole, tmp_path):
    folder = killed(whole, tmp_path / "moved", "logits", "one_key")
    done = run(folder / "stages.yaml", out=folder, resume=True)
    gone_on_exactly(whole, folder, "logits", "one_key")
    assert same_results(done.results, open_run(whole / "logits").results)
    assert str(folder) in record(folder, "logits", "one_key")["distill"]["folder"]


def test_a_killed_training_of_attention_goes_on_bit_for_bit(whole, tmp_path):
    folder = killed(whole, tmp_path / "copy", "attention", "delta")
    run(folder / "attention" / "experiment.yaml", out=folder / "attention", resume=True)
    gone_on_exactly(whole, folder, "attention", "delta")


def test_a_teacher_that_has_changed_is_refused(saved, tmp_path):
    teacher = shutil.copytree(saved, tmp_path / "teacher")
    recipe = tiny(tasks=RECALL, models={"m": {"from": saved, "distill": {"teacher": str(teacher), "logits": 1}}})
    before = ExperimentSpec.parse(recipe).trainings()
    known = sources(before)
    save_model(build_model(load_model(teacher).spec, seed=9), teacher)
    now = sources(ExperimentSpec.parse(recipe).trainings())
    with pytest.raises(InputError, match=r"recall.m.seed0 \(teacher\) learns from .* which has changed since this run"):
        require_same_sources("run", known, now)
    with pytest.raises(InputError, match="teacher: has changed since this run looked at it"):
        before[0].teaching.source.load()


def test_a_worker_reads_the_same_trainings_from_the_run_folder(saved):
    models = {"a": {"from": saved, "convert": "gqa:kv_heads=1"}, "b": {"from": saved, "distill": {"task": 1}}}
    spec = ExperimentSpec.parse(tiny(tasks=RECALL, models=models, distill={"logits": 1, "temperature": 3}))
    again = ExperimentSpec.parse(yaml.safe_load(spec_text(spec)))
    assert [each.teaching for each in again.trainings()] == [each.teaching for each in spec.trainings()]
    assert [each.teaching.distil.temperature for each in spec.trainings()] == [3, 1]
    assert [each.start.convert for each in again.trainings()] == ["gqa:kv_heads=1", None]
    jobs = [each.job for each in spec.trainings()]
    assert groups(ExperimentSpec.parse(tiny(tasks=RECALL, models={"b": models["b"]}, seeds=[0, 1])), jobs) == []


@pytest.mark.parametrize("to", ["gqa:kv_heads=1", "gated_delta_net:layers=half", "window:window=3,sinks=1"])
def test_a_conversion_is_the_one_of_the_library(saved, to):
    (training,) = ExperimentSpec.parse(tiny(tasks=RECALL, models={"m": {"from": saved, "convert": to}})).trainings()
    expected = convert(load_model(saved), to, training.tasks["recall"], budget=0).model
    found, told = new_model(training)
    assert told["start"]["convert"] == to
    assert found.spec == training.model == expected.spec
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_the_new_mixers_alone_are_run_and_saved_with_the_rest(saved):
    torch.manual_seed(0)
    teacher = load_model(saved).double()
    student = convert(teacher, "gated_delta_net", budget=0).model
    inputs = torch.randn(2, 5, 16, dtype=torch.float64)
    whole, alone = NewMixers(student, [0, 1]), Layers(student, [0, 1])
    first, second = inputs.chunk(2, -1)
    naive = torch.cat([student.blocks[i].mixer(x)[0] for i, x in enumerate((first, second))], -1)
    assert torch.equal(whole(inputs), naive)
    assert torch.equal(alone(inputs), naive)
    assert set(whole.state_dict()) == set(student.state_dict())


def test_matrices_are_learned_by_the_replaced_mixers_alone(saved):
    entry = {"from": saved, "convert": "window_linear:window=2,layers=half", "distill": {"matrix": 1}}
    spec = ExperimentSpec.parse(tiny(tasks=RECALL, models={"m": entry}))
    check(spec, CPU)
    (training,) = spec.trainings()
    assert training.teaching.words().startswith("matrix of ")
    begun, _ = new_model(training)
    made, _ = new_model(training)
    with learning(made, training, CPU) as (module, tasks):
        train(module, tasks, training.train)
    ours = made.state_dict()
    moved = {name for name, each in begun.state_dict().items() if not torch.equal(each, ours[name])}
    assert moved
    assert all(name.startswith("blocks.0.mixer.") for name in moved)
    assert not any("out_proj" in name for name in moved)  # which has no part in the matrices
    x = torch.randn(2, 5, 8)
    wanted = begun.blocks[0].mixer.mixing(x).transpose(1, 2).flatten(2)
    assert torch.equal(NewMixers(begun, [0], matrices=True)(x), wanted)


@torch.no_grad()
def test_a_teacher_reads_the_prompts_of_a_curriculum(saved):
    teacher, task = load_model(saved), build_task("associative_recall", **RECALL["recall"]["options"])
    grows = TrainSpec.parse({"steps": 4, "curriculum": {"pairs": {"start": 1, "end": 2, "every": 2}}})
    with taught(load_model(saved), teacher, [task], Distil(logits=1, hidden=1)) as (_, wrapped):
        turns = Turns(wrapped, grows)
        for step, pairs in ((0, 1), (3, 2)):
            prompt = turns(step).sample(4, torch.Generator().manual_seed(0))
            plain = task.replace(pairs=pairs).sample(4, torch.Generator().manual_seed(0))
            assert torch.equal(prompt.inputs, plain.inputs)
            assert torch.equal(prompt.hidden["teacher"][..., : task.output_size], teacher(plain.inputs))
        assert (wrapped[0].metric, wrapped[0].chance()) == (task.metric, task.chance())


def test_a_taught_model_that_is_good_enough_ends_its_training(saved, tmp_path):
    train = {"steps": 4, "batch": 4, "curriculum": {"pairs": {"start": 1, "end": 2, "every": 2}},
             "until": {"at_least": 0.0, "every": 2, "prompts": 4}}  # fmt: skip
    models = {"m": {"from": saved, "distill": {"logits": 1, "hidden": 1}}}
    run(ExperimentSpec.parse(tiny(tasks=RECALL, models=models, train=train)), out=tmp_path / "run")
    told = read_record(tmp_path / "run" / "trainings" / "recall.m.seed0" / "record.json")
    assert told["steps"] == 2


def refused(models, **changes):
    recipe = tiny(tasks=RECALL, models=models, **changes)
    with pytest.raises(InputError) as caught:
        check(ExperimentSpec.parse(recipe), CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ({"distill": {"attention": 1}}, {}, "attention: is learned by layers that were replaced, and all are"),
        ({"distill": {"attention": 1, "logits": 1}}, {}, "logits cannot stand beside it"),
        ({"distill": {"matrix": 1}}, {}, "matrix: is learned by layers that were replaced, and all are"),
        (
            {"distill": {"matrix": 1}, "convert": "gated_delta_net"}, {},
            "matrix: layer 0, 'gated_delta_net', does not tell by which matrices it mixes",
        ),
        (
            {"distill": {"attention": 1}, "convert": "gqa:kv_heads=1"}, {"train": {"until": {"at_least": 0.9}}},
            "train.until: attention answers no prompts, so nothing is scored",
        ),
        (
            {"distill": {"logits": 1}}, {"train": {"curriculum": {"pears": {"start": 1, "end": 2, "every": 1}}}},
            "unknown option 'pears' of AssociativeRecall; did you mean 'pairs'?",
        ),
        ({"distill": {"atention": 1}}, {}, "models.m.distill.atention: unknown key; did you mean 'attention'?"),
        ({"distill": {"teacher": "nowhere"}}, {}, "all weights are 0: give one of attention, "),
        ({"distill": {"teacher": "nowhere/at/all/x", "logits": 1}}, {}, "models.m (for task recall): distill.teacher"),
        ({"distill": {"logits": -1}}, {}, "models.m.distill.logits: input should be greater than or equal to 0"),
        ({"distill": {"logits": 1}}, {"train": {"examples": 9}}, "train.examples: cannot stand beside"),
        (
            {"distill": {"attention": 1}, "convert": "gqa:kv_heads=1"},
            {"train": {"freeze": ["read_*"]}},
            "train.freeze: attention trains the replaced mixers alone",
        ),
        ({"distill": {"hidden": 1}, "options": {"depth": 3}}, {}, "hidden: the teacher's depth is 2, the model's 3"),
        ({"distill": {"attention": 1}, "convert": "share_kv:every=2"}, {}, "cannot be run alone; take logits"),
        ({"convert": "gqa:kv_heads=3"}, {}, "convert 'gqa:kv_heads=3': kv_heads 3 does not divide the 2 key heads"),
        ({"convert": "gqqa"}, {}, "unknown conversion or mixer 'gqqa'; did you mean 'gqa'?"),
        ({"convert": "window:window=4,count=1"}, {}, "would be found by data; give it layers"),
        ({"convert": "gqa", "remove": [0]}, {}, "convert and remove: the conversion says what each part starts from"),
        ({"convert": "gqa", "options": {"depth": 1}}, {}, "options.depth: convert changes the trained model as it is"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused_before_the_first_step(saved, entry, changes, message, monkeypatch):
    monkeypatch.setattr(GatedDeltaNet, "tells_mixing", False)  # all that attention becomes do
    assert message in refused({"m": {"from": saved, **entry}}, **changes)


def test_a_fresh_model_needs_its_teacher_and_steps(saved):
    fresh = {**MODEL, "options": SMALL}
    assert "distill.teacher: the model starts fresh" in refused({"m": {**fresh, "distill": {"logits": 1}}})
    assert "convert: is for a model that starts from" in refused({"m": {**fresh, "convert": "gqa"}})
    assert "train.steps: 0 is for a model that starts from" in refused({"m": {**fresh, "train": {"steps": 0}}})
    wider = {**fresh, "options": {**SMALL, "width": 16}, "distill": {"teacher": saved, "logits": 1}}
    check(ExperimentSpec.parse(tiny(tasks=RECALL, models={"m": wider})), CPU)  # predictions can be learned all the same
    other = {"recall": {**RECALL["recall"], "options": {**RECALL["recall"]["options"], "vocabulary": 20}}}
    with pytest.raises(InputError, match=r"m \(for task recall\): distill: the teacher is of (other|another)"):
        check(ExperimentSpec.parse(tiny(tasks=other, models={"m": wider})), CPU)


def test_stages_are_tried_and_teachers_told_before_the_first_is_begun(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(staged(), sort_keys=False))
    said = " ".join(CliRunner().invoke(app, ["run", str(path), "--check"]).output.split())
    assert "delta starts from base:softmax: carried over: 14 of 20 tensors" in said
    assert "one_key, delta learn: attention of base:softmax" in said
    bad = json.loads(json.dumps(staged()))
    bad["stages"]["logits"]["distill"]["teacher"] = "bass:softmax"
    with pytest.raises(InputError, match=r"stages.logits: models.one_key .*distill.teacher: "):
        load_stages(bad).each(lambda _, spec: check(spec, CPU))
    bad["stages"]["logits"]["distill"]["teacher"] = "base:sofmax"
    with pytest.raises(InputError, match=r"distill.teacher: unknown model of stage base 'sofmax'"):
        load_stages(bad).each(lambda _, spec: check(spec, CPU))
