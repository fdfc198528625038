"""`convert`: from a model and a few words to another model and its record."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from contextlab import registry
from contextlab.convert import Distil, Gqa, Linearize, Stage, convert
from contextlab.convert.conversion import OTHER_NAMES, read_target
from contextlab.convert.divergence import compare, held_out
from contextlab.errors import InputError
from contextlab.models import load_model
from contextlab.tasks import build_task

from .teachers import same, teacher, tokens

TASK = build_task("associative_recall", vocabulary=12, pairs=3, length=16)
FAST = {"prompts": 8, "train": {"batch": 4}}


def test_a_model_and_what_was_done_to_it_are_saved(tmp_path):
    model = teacher().float()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    found = convert(model, "gated_delta_net:short_conv=2", TASK, layers="half", budget=4, lengths=(8, 64), **FAST)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    theirs = {each.data_ptr() for each in (*model.parameters(), *model.buffers())}
    assert not theirs & {each.data_ptr() for each in (*found.model.parameters(), *found.model.buffers())}
    assert found.layers == [0]
    assert [stage.name for stage in found.stages] == ["attention", "logits"]
    assert found.tokens == 4 * 4 * 16
    assert found.state[64][1] < found.state[64][0] == model.state_nbytes(64)
    folder = found.save(tmp_path / "new", source="here")
    loaded = load_model(folder).eval()
    assert torch.equal(loaded(tokens()), found.model(tokens()))
    record = json.loads((folder / "convert.json").read_text())
    assert record["source"] == "here"
    assert record["options"] == {"mixer": "gated_delta_net", "layers": "half", "mixer_options": {"short_conv": 2}}
    assert record["compared"][0]["after"] == found.compared[0].after
    assert record["weights"][1] == sum(each.nbytes for each in loaded.state_dict().values())


def test_what_needs_no_training_needs_no_data():
    model = teacher()
    found = convert(model, "window:window=32")
    assert (found.stages, found.compared, found.layers) == ([], [], [0, 1])
    same(model, found.model, 1e-12)


@torch.no_grad()
def test_teacher_and_student_are_compared_on_the_same_prompts():
    model = teacher()
    (found,) = convert(model, Gqa(kv_heads=1), TASK, prompts=40).compared
    assert (found.metric, found.prompts) == ("accuracy", 40)
    itself = compare(model, model, TASK, 40)
    assert (itself.divergence, itself.agreement) == (0.0, 1.0)
    assert itself.before == itself.after == found.before
    assert 0 < found.divergence < math.log(12) * 10
    assert 0 < found.agreement < 1
    numbers = build_task("linear_regression", dimensions=3, examples=5)
    from contextlab.models import build_model

    reads = build_model({"width": 16, "depth": 1, "heads": 2, "input_size": 7, "output_size": 1}).eval()
    real = compare(reads, reads, numbers, 8)
    assert (real.divergence, math.isnan(real.agreement)) == (0.0, True)


def test_text_is_measured_on_documents_that_no_training_shows(tmp_path):
    (tmp_path / "notes.txt").write_text("A line of text that is long enough to be read.\n" * 40)
    task = build_task("language_modelling", length=32, corpus=str(tmp_path / "notes.txt"))
    assert held_out(task).part == "test"
    assert held_out(TASK) is TASK


@torch.no_grad()
def test_the_layers_are_chosen_that_cost_least():
    """Two of three layers add nothing: nothing is lost where they become others."""
    model = teacher(depth=3)
    for i in (0, 2):
        model.blocks[i].mixer.out_proj.weight.zero_()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    found = convert(model, "gla", TASK, layers="auto:2", budget=0, prompts=8)
    assert found.layers == [0, 2]
    assert [(each.layer, each.chosen) for each in found.choices] == [(0, True), (1, False), (2, True)]
    assert found.choices[1].divergence > 1e-3 > max(found.choices[i].divergence for i in (0, 2))
    same(model, found.model, 1e-9)
    assert len(found.lines) == 2
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_chosen_layers_keep_what_they_learned_before_the_choice(tmp_path):
    def run(folder):
        return convert(teacher().float(), "kda", TASK, layers="auto:1", budget=4, folder=folder, **FAST)

    once, again = run(tmp_path / "a"), run(tmp_path / "a")
    assert [stage.steps for stage in once.stages] == [2, 2]
    weights = again.model.state_dict()
    assert all(torch.equal(weights[name], each) for name, each in once.model.state_dict().items())


def test_stages_can_be_given():
    stages = [Stage("hidden", Distil(hidden=1.0)), Stage("task", Distil(task=1.0), share=2)]
    found = convert(teacher().float(), "hedgehog", TASK, stages=stages, budget=3, **FAST)
    assert [(stage.name, stage.steps) for stage in found.stages] == [("hidden", 1), ("task", 2)]


def test_shared_keys_heal_from_predictions():
    found = convert(teacher().float(), "share_kv", TASK, budget=2, **FAST)
    assert [stage.name for stage in found.stages] == ["logits"]
    with pytest.raises(InputError, match="layer 1 reads another's keys, so that it cannot learn attention alone"):
        convert(teacher().float(), "share_kv", TASK, stages=[Stage("a", Distil(attention=1.0))], budget=2, **FAST)


def test_names_of_mixers_and_of_methods_are_read():
    made = read_target("kda:short_conv=2", [0])
    assert made == Linearize(mixer="kda", mixer_options={"short_conv": 2}, layers=[0])
    assert read_target("gqa:kv_heads=2,layers=half") == Gqa(kv_heads=2, layers="half")


def test_layers_are_told_once():
    for layers in ([0], "0", "auto:1", "gates:1"):
        with pytest.raises(InputError, match="layers: told twice, .*; leave one out") as found:
            convert(teacher().float(), "gqa:layers=half", TASK, layers=layers, budget=0)
        assert "\n" not in str(found.value)
    with pytest.raises(InputError, match="layers: told twice"):
        read_target("gqa", [0], {"layers": "all"})


def test_names_of_papers_lead_to_conversions_that_are_made():
    assert not set(OTHER_NAMES) & {*registry.names("conversion"), *registry.names("mixer")}
    for name in OTHER_NAMES.values():
        assert read_target(name).name == name.partition(":")[0]


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("gated_delta", {}, "unknown conversion or mixer 'gated_delta'"),
        ("MQA", {}, "to: 'MQA' is called 'gqa:kv_heads=1' here"),
        ("magnitude", {}, "'magnitude' makes weights smaller: use `contextlab shrink --method magnitude`"),
        ("kda", {}, "linearize: trains for 600 steps, on what? give data"),
        ("gqa", {"budget": 5}, "gqa: trains for 5 steps, on what?"),
        ("kda", {"budget": -1}, "budget: expected steps, at least 0, got -1"),
        ("kda", {"budget": 1, "data": TASK}, "budget: 1 steps are too few for the stages attention, logits"),
        ("kda", {"layers": "auto", "data": TASK}, "layers: expected auto:N, for example auto:2, got 'auto'"),
        ("kda", {"layers": "auto:3", "data": TASK}, "layers: auto:3 is more than the 2 that can change; use all"),
        ("gqa", {"layers": "auto:1"}, "layers auto: are chosen by what the model answers; give data"),
        ("share_kv", {"layers": "auto:1", "data": TASK}, "share_kv: its layers change together"),
        ("kda", {"data": build_task("associative_recall")}, "input_size"),
        (Gqa(), {"layers": [0]}, "gqa: is made already; give its options and layers where it is made"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(to, options, message):
    given = {**options}
    with pytest.raises(InputError) as error:
        convert(teacher(), to, given.pop("data", None), **given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_page_names_every_paper_that_goes_by_another_name():
    page = (Path(__file__).parents[2] / "docs" / "convert.md").read_text()
    told = page[page.index("Papers by other names") :].split("\n\n")[0].lower()
    for name, target in OTHER_NAMES.items():
        assert name.replace("_", " ") in told, name
        assert "`" + target.partition(":")[0] in told, target
