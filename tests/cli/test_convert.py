"""`contextlab convert`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from contextlab.cli.converted import title_of
from contextlab.mixers.linear.gla import GatedLinearAttention
from contextlab.models import load_model, save_model

from ..convert.teachers import teacher, tokens
from ..models.checkpoints import V, checkpoint

DATA = "associative_recall:vocabulary=12,pairs=3,length=16"


def test_the_command_writes_a_model_and_tells_what_it_cost(call, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    save_model(teacher().float(), tmp_path / "old")
    arguments = ("convert", "old", "--to", "gated_delta_net", "--layers", "half", "--data", DATA, "--budget", "4")
    code, out, err = call(*arguments, "--prompts", "8", "--set", "batch=4", "--out", "new", "--lengths", "8,1k")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for words in (
        "attention",
        "logits",
        "associative_recall",
        "state at 1,024 tokens",
        "top-1",
        "prefill of 256 tokens",
        "Model and record: new",
    ):
        assert words in out
    record = json.loads((tmp_path / "new" / "convert.json").read_text())
    assert record["layers"] == [0]
    assert not (tmp_path / "new.stages").exists()
    made = load_model(tmp_path / "new")
    assert [layer.mixer for layer in made.spec.pattern()] == ["gated_delta_net", "attention"]


def test_a_conversion_without_training_is_exact_where_it_can_be(call, tmp_path):
    model = teacher().float()
    save_model(model, tmp_path / "old")
    code, out, _ = call("convert", "old", "--to", "window:window=32,sinks=0", "--out", "new", "--time", "0")
    assert (code, "window of 32 tokens" in out, "window:window=32,sinks=0\n" in out) == (0, True, True)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "new").eval()(tokens()), model(tokens()))


def test_stages_are_read_and_what_is_wrong_is_told_in_one_line(call, tmp_path, monkeypatch):
    monkeypatch.setattr(GatedLinearAttention, "tells_mixing", False)  # all that attention becomes do
    save_model(teacher().float(), tmp_path / "old")
    start = ("convert", "old", "--to", "gla", "--data", DATA, "--prompts", "4", "--set", "batch=4", "--time", "0")
    code, _, _ = call(
        *start, "--budget", "3", "--stage", "attention=1", "--stage", "logits=1,task=0.5,temperature=2,share=2",
        "--out", "new",
    )  # fmt: skip
    assert code == 0
    assert json.loads((tmp_path / "new" / "convert.json").read_text())["stages"][1]["steps"] == 2
    for more, message in (
        (("--stage", "attention=1,logits=1"), "so logits cannot stand beside it"),
        (("--stage", "logits=1,shares=2"), "--stage: unknown key 'shares'; did you mean 'share'? (known: attention, "),
        (("--stage", "logits=1,share=0"), "share and learning_rate are numbers above 0"),
        (("--stage", "logits=1,trains=some"), "trains is new"),
        (("--stage", "logits=1,rank=2"), "rank is of adapters; add trains=lora"),
        (("--stage", "logits=1,trains=lora,targets=[in_proj, gone]"), "'blocks.*.mixer.gone' matches no linear"),
        (("--budget", "1"), "budget: 1 steps are too few"),
        (("--layers", "7"), "layers: 7 is out of range"),
        (("--set", "bach=4"), "did you mean 'batch'"),
        (("--stage", "logits=1,share=true"), "share and learning_rate are numbers above 0"),
        # also where layers are chosen by data, for which the first stage is trained
        (
            ("--layers", "auto:1", "--stage", "attention=1", "--stage", "task=1,trains=lora,rank=999"),
            "stage task: lora.rank: 999 is more than any matrix of these layers has; expected at most 16",
        ),
        (("--layers", "gates:1", "--budget", "9", "--stage", "attention=1", "--stage", "matrix=1"), "matrix: layer 0"),
    ):
        code, _, err = call(*start, *more, "--out", "other")
        assert (code, message in err, err.count("\n")) == (2, True, 1), err
        assert not list(tmp_path.glob("other*"))
    code, _, err = call(*start, "--out", "new")
    assert (code, "is there already" in err) == (2, True)


def test_after_a_stage_that_diverged_other_settings_begin_anew(call, tmp_path):
    save_model(teacher().float(), tmp_path / "old")
    start = ("convert", "old", "--to", "gla", "--data", DATA, "--prompts", "4", "--budget", "4", "--time", "0")
    code, _, err = call(*start, "--set", "batch=4", "--set", "learning_rate=1e20", "--out", "new")
    assert (code, "try a smaller learning_rate" in err) == (2, True), err
    assert not (tmp_path / "new.stages").exists()
    code, _, err = call(*start, "--set", "batch=4", "--set", "learning_rate=0.001", "--out", "new")
    assert (code, err) == (0, "")


def test_the_folder_of_the_stages_is_removed_only_where_it_holds_nothing_else(call, tmp_path):
    save_model(teacher().float(), tmp_path / "old")
    start = ("convert", "old", "--to", "gqa:kv_heads=1", "--time", "0", "--out")
    notes = tmp_path / "new.stages" / "1-attention" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    code, _, err = call(*start, "new")
    assert (code, err.count("\n"), "new.stages: is there already, and holds other things" in err) == (2, 1, True)
    assert notes.read_text() == "mine"
    assert not (tmp_path / "new").exists()
    left = tmp_path / "other.stages" / "1-attention" / "step_00000004" / "model.json"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    assert call(*start, "other")[0] == 0
    assert not (tmp_path / "other.stages").exists()


def test_what_was_made_is_saved_before_it_is_timed(call, tmp_path, monkeypatch):
    from contextlab.evaluation import cost_pair

    save_model(teacher().float(), tmp_path / "old")
    start = ("convert", "old", "--to", "gqa:kv_heads=1", "--out")
    code, _, err = call(*start, "new", "--time", "2147483647")
    assert (code, "not enough memory" in err, err.count("\n"), (tmp_path / "new").exists()) == (2, True, 1, False)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cost_pair, "time_pair", stopped)
    assert call(*start, "new")[0] != 0
    assert load_model(tmp_path / "new").spec.pattern()[0].options["kv_heads"] == 1


def test_a_recipes_model_says_what_layers_become(call, tmp_path):
    save_model(teacher().float(), tmp_path / "old")
    layers = {"keep": ["attention", "sliding_window"], "deep": ["attention"]}
    models = "".join(
        f"  {name}: {{spec: {{width: 8, depth: {2 if name == 'keep' else 3}, heads: 2, layers: {json.dumps(each)}}}}}\n"
        for name, each in layers.items()
    )
    task = "  recall: {task: associative_recall, options: {vocabulary: 12, pairs: 3, length: 16}}\n"
    (tmp_path / "mine.yaml").write_text(f"name: mine\ntasks:\n{task}models:\n{models}train: {{steps: 1}}\n")
    start = ("convert", "old", "--time", "0", "--to")
    code, out, err = call(*start, "mine.yaml:keep", "--out", "new")
    assert (code, err) == (0, "")
    assert "window of 64 tokens" in out
    assert "like:mixers=[attention,sliding_window],layers=all" in out
    assert [each.mixer for each in load_model(tmp_path / "new").spec.pattern()] == ["attention", "sliding_window"]
    assert call(*start, "new", "--out", "again")[0] == 0  # as a saved model has them
    for to, message in (
        ("mine.yaml", "mine.yaml: has the models deep, keep; give one as mine.yaml:MODEL"),
        ("mine.yaml:deep", "to: the other model has 3 layers, this one 2"),
        ("mine.yaml:kep", "did you mean 'keep'"),
        ("none.yaml", "none.yaml: no such file"),
        ("gatd_delta_net", "did you mean 'gated_delta_net'"),
    ):
        code, _, err = call(*start, to, "--out", "other")
        assert (code, message in err, err.count("\n")) == (2, True, 1), err


def test_a_folder_of_transformers_comes_back_as_one(call, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", minversion="5.20")
    monkeypatch.setenv("COLUMNS", "80")
    theirs = checkpoint("qwen2", tmp_path / "theirs", torch.float32)
    code, out, err = call("convert", "theirs", "--to", "window:window=32,sinks=0", "--out", "new", "--time", "8")
    assert code == 0, err
    assert "For transformers, as qwen2: new/transformers" in out
    assert "decode of a token after them" in out
    assert max(map(len, out.splitlines())) <= 80
    record = json.loads((tmp_path / "new" / "convert.json").read_text())
    assert record["transformers"] == {"architecture": "qwen2"}
    assert [each["what"] for each in record["times"]] == ["prefill", "decode"]
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "transformers").eval()
    x = torch.randint(3, V, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(x, use_cache=False).logits
        for logits in (load_model(tmp_path / "new").eval()(x), made(x).logits):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    # What was made of it is known to come from there, too, and what they cannot hold is told.
    code, out, _ = call("shrink", "new", "--method", "magnitude", "--out", "zeros", "--time", "0")
    assert (code, "For transformers, as qwen2: zeros/transformers" in out, "times as long" in out) == (0, True, False)
    code, out, _ = call("shrink", "zeros", "--method", "rtn:bits=8", "--out", "bits", "--time", "0")
    assert (code, "Not written for transformers: weights of layer 0 are stored" in out) == (0, True)
    assert not (tmp_path / "bits" / "transformers").exists()
    record = json.loads((tmp_path / "bits" / "shrink.json").read_text())
    assert (list(record["transformers"]), record["times"], len(record["state"])) == (["why_not"], [], 2)
    # Asked for, it is refused before the work; what weights alone can tell, after it, and nothing is lost.
    code, out, err = call("shrink", "zeros", "--method", "rtn:bits=8", "--transformers", "--out", "other")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "transformers: cannot hold what comes out: weights of layer 0 are stored in few bits" in err
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr("contextlab.convert.saving.check_exportable", lambda _: None)
    code, out, err = call(
        "shrink", "zeros", "--method", "rtn:bits=8", "--transformers", "--out", "other", "--time", "0"
    )
    assert (code, err.count("\n")) == (2, 1), err
    assert "transformers: not written in that form, as weights of layer 0 are stored in few bits, packed or in" in err
    assert "our own form is in other" in err
    load_model(tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert nowhere --to mqa --out new", "to: 'mqa' is called 'gqa:kv_heads=1' here"),
        ("convert nowhere --to gated_delta_net:short_con=2 --data d --out new", "did you mean 'short_conv'?"),
        ("convert nowhere --to gru --out new", "trains for 600 steps, on what?"),
        ("convert nowhere --to gqa --set batch=4 --out new", "budget: gqa trains for 0 steps unless told"),
        ("convert nowhere --to gqa --set bach=4 --budget 9 --out new", "did you mean 'batch'?"),
        ("convert nowhere --to gqa --layers auto:x --out new", "layers: expected auto:N"),
        ("convert nowhere --to gqa --data nedle:depth=1 --out new", "did you mean 'needle'?"),
        ("convert nowhere --to gqa --data needle:dept=1 --out new", "did you mean 'depth'?"),
        ("shrink nowhere --method wand --out new", "did you mean 'wanda'?"),
        ("shrink nowhere --method rtn:bits=3 --out new", "bits: "),
        ("shrink nowhere --method wanda --out new", "wanda: needs data to calibrate on"),
        ("shrink nowhere --method rtn --heal-with lora --out new", "of how many steps?"),
        ("merge nowhere other --method slrp --out new", "did you mean 'slerp'?"),
        ("compress nowhere --policy snapkv:windw=2 --budget 10%", "did you mean 'window'?"),
        ("compress nowhere --policy snapkv --budget 10% --task nedle", "did you mean 'needle'?"),
        ("compress nowhere --weights wanda", "wanda: needs data to calibrate on"),
        ("advise nowhere --memory 1MB --length 1k --weights rtn:bit=4", "did you mean 'bits'?"),
        ("advise nowhere --memory 1MB --length 1k --policy snapkv:windw=2", "did you mean 'window'?"),
        ("generate nowhere --data nedle", "there is no file 'nedle'"),
    ],
)
def test_names_and_options_are_told_before_a_model_is_looked_for(call, arguments, message):
    code, _, err = call(*arguments.split())
    assert (code, message in err, err.count("\n")) == (2, True, 1), err


def test_a_title_is_what_a_user_would_type():
    assert title_of("average", {"weights": (0.5, 0.5)}) == "average:weights=[0.5,0.5]"
    assert title_of("gptq", {"group": None, "rotate": True}) == "gptq:group=null,rotate=true"
    assert title_of("stack", {}) == "stack"
