"""`contextlab.convert.shrink` and the command: methods in a row, healing with zeros kept, records, refusals."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from contextlab import build_model, build_task, load_model, save_model
from contextlab.convert import Calibration, build_conversion, merge, shrink
from contextlab.convert.layers import linear_layers
from contextlab.convert.variants import read_variants
from contextlab.errors import InputError, ResourceError
from contextlab.files import read_record
from contextlab.testing.conversions import calibration, small_model
from tests.cli.conftest import call  # noqa: F401

TASK = "linear_regression:dimensions=2,examples=4"


def regressor():
    task = build_task("linear_regression", dimensions=2, examples=4)
    sizes = {"input_size": task.input_size, "output_size": task.output_size, "read_in": task.read_in}
    return build_model({"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2, **sizes})


def zeros(model):
    return {name: layer.weight == 0 for name, layer in linear_layers(model).items()}


def test_several_methods_are_done_one_after_the_other():
    model = small_model()
    found = shrink(model, ["magnitude:share=0.25,layers=blocks.0.*", "magnitude:pattern=2:4"], calibration())
    by_hand = build_conversion("magnitude", pattern="2:4")(
        build_conversion("magnitude", share=0.25, layers="blocks.0.*")(model, calibration()).model, calibration()
    )
    for name, tensor in by_hand.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor)
    assert [step.options for step in found.steps] == [{"share": 0.25, "layers": "blocks.0.*"}, {"pattern": "2:4"}]
    assert found.losses == {"before": calibration().loss(model), "converted": calibration().loss(found.model)}
    assert found.bytes_before == found.bytes_after


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_zeros_stay_zero_while_a_model_is_healed(decay):
    model = regressor()
    plain = shrink(model, "magnitude", TASK, pattern="2:4").model
    heal = {"steps": 12, "batch": 8, "learning_rate": 0.01, "weight_decay": decay}
    found = shrink(model, "magnitude", TASK, heal=heal, pattern="2:4")
    before, after = zeros(plain), zeros(found.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(plain.blocks[0].mlp.up.weight, found.model.blocks[0].mlp.up.weight)
    assert found.healed.steps == 12
    assert found.losses["healed"] < found.losses["converted"]
    assert not any(p._backward_hooks for p in found.model.parameters())
    assert not found.model.training
    packed = shrink(model, "magnitude", TASK, heal=heal, pattern="2:4", packed=True).model
    for name, zero in before.items():
        assert torch.equal(packed.get_submodule(name).dense() == 0, zero)
    with pytest.raises(InputError, match="optimizer 'muon' moves weights that are zero; use 'adamw'"):
        shrink(model, "magnitude", TASK, heal={"steps": 1, "optimizer": "muon"})


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapters_heal_and_are_merged(kind):
    pytest.importorskip("peft")
    model = regressor()
    plain = shrink(model, "magnitude", TASK, pattern="2:4")
    heal = {"steps": 12, "batch": 8, "learning_rate": 0.02, kind: {} if kind == "ia3" else {"rank": 2}}
    found = shrink(model, "magnitude", TASK, heal=heal, pattern="2:4")
    before, after = zeros(plain.model), zeros(found.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert found.losses["healed"] < found.losses["converted"]
    changed = {name for name, each in plain.model.state_dict().items()
               if not torch.equal(each, found.model.state_dict()[name])}  # fmt: skip
    assert changed <= {f"{name}.weight" for name in before}
    assert "blocks.1.mixer.qkv_proj.weight" in changed
    assert type(found.model.blocks[0].mlp.up) is type(model.blocks[0].mlp.up)
    if kind == "ia3":
        return
    dense = shrink(model, "channels", TASK, heal=heal).model  # nothing is zero: LoRA as it is
    assert not any(zero.any() for zero in zeros(dense).values())
    for method, options, message in (
        ("magnitude", {"dora": True}, "heal.lora: dora and keep_zeros"),
        ("channels", {"targets": "blocks.0.attention"}, "heal.lora.targets: 'blocks.0.attention' matches no"),
    ):
        with pytest.raises(InputError, match=message):
            shrink(model, method, TASK, heal={"steps": 1, "lora": options})


def test_zeros_that_cannot_stay_are_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(Calibration, "loss", lambda *_: pytest.fail("it was read already"))
    for heal in ({"optimizer": "muon"}, {"lora": {"dora": True}}):
        with pytest.raises(InputError, match="heal"):
            shrink(regressor(), "magnitude", TASK, heal={"steps": 1, **heal})


def test_a_missing_peft_is_told_before_the_work(monkeypatch):
    monkeypatch.setattr(Calibration, "loss", lambda *_: pytest.fail("it was read already"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ResourceError, match=r"^heal.ia3: needs the package peft; pip install 'contextlab"):
        shrink(regressor(), "magnitude", TASK, heal={"steps": 1, "ia3": {}})


def test_unknown_methods_are_compared_with_those_that_can_be_meant():
    with pytest.raises(InputError) as shrinks:
        shrink(regressor(), "avrage")
    with pytest.raises(InputError) as merges:
        merge(regressor(), "avrage")
    assert "average" not in str(shrinks.value)
    assert "hedgehog" not in str(shrinks.value)
    assert "did you mean 'average'? (known: average, expand, slerp, stack, task_arithmetic, ties)" in str(merges.value)


def test_what_cannot_be_done_is_refused_in_one_line():
    model = regressor()
    for call_, message in (
        (lambda: shrink(model, []), "expected a method such as 'magnitude', got none"),
        (lambda: shrink(model, "magnitud"), "unknown method 'magnitud'; did you mean 'magnitude'?"),
        (lambda: shrink(model, "magnitude:share=2"), "share: input should be less than 1"),
        (lambda: shrink(model, ["magnitude", "magnitude"], share=0.1), "options share are of which method?"),
        (lambda: shrink(model, build_conversion("magnitude"), share=0.1), "is made already"),
        (lambda: shrink(model, "magnitude", heal=3), "heal: on what? give data"),
        (lambda: shrink(model, "magnitude", "no_file.txt"), "there is no file 'no_file.txt', and unknown task"),
        (
            lambda: shrink(model, "magnitude", "copy"),
            "data copy: the model's read_in is 'vector', the task needs 'token'",
        ),
        (lambda: shrink(model, "magnitude", TASK, heal={"step": 3}), "heal.step: unknown key; did you mean 'steps'?"),
        (lambda: shrink(model.blocks[0], "magnitude"), "shrink: expected a model of contextlab"),
        (
            lambda: shrink(model, ["magnitude", "magnitude:layers=x"]),
            "magnitude: layers: no linear layer is called 'x'",
        ),
        (lambda: shrink(model, "hedgehog"), "what it makes must be trained; use `contextlab convert --to hedgehog`"),
        (lambda: shrink(model, "gla"), "'gla' is a mixer: use `contextlab convert --to gla`"),
        (lambda: shrink(model, "average"), "average: makes no model smaller; use `contextlab merge`"),
        (lambda: read_variants(model, ["rtn", "rtn:bits=4"]), "weights: rtn:bits=4 is given twice (it is rtn)"),
    ):
        with pytest.raises(InputError) as found:
            call_()
        assert message in str(found.value)
        assert "\n" not in str(found.value)


def test_the_command_writes_a_model_and_a_record(call, tmp_path):  # noqa: F811
    model = regressor()
    save_model(model, tmp_path / "mine")
    arguments = ["shrink", "mine", "--method", "magnitude:pattern=2:4", "--data", TASK, "--heal", "3", "--out", "small"]
    code, out, err = call(*arguments)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert "blocks.*.mlp.up" in out
    assert "0.5 of the weights are zero" in out
    assert "healing: 3 steps" in out
    made = load_model(tmp_path / "small")
    assert all(float(zero.float().mean()) == 0.5 for zero in zeros(made).values())
    record = read_record(tmp_path / "small" / "shrink.json")
    assert json.loads(json.dumps(record)) == record
    assert record["source"] == "mine"
    assert len(record["steps"][0]["lines"]) == len(linear_layers(model))
    assert set(record["losses"]) == {"before", "converted", "healed"}
    assert [each["what"] for each in record["times"]] == ["prefill", "decode"]
    assert (record["compared"][0]["prompts"], "transformers" in record) == (64, False)
    assert record["state"]["1024"] == [model.state_nbytes(1024)] * 2
    again = [*arguments[:-1], "lora", "--heal-with"]
    for way, message in (
        ("lorra", "unknown way to heal 'lorra'; did you mean 'lora'?"),
        ("full:a=1", "has no options"),
    ):
        code, _, err = call(*again, way)
        assert code == 2
        assert message in err
    code, _, err = call(*arguments[:4], "--heal-with", "lora", "--out", "lora")
    assert code == 2
    assert "'lora' of how many steps? give --heal" in err
    code, _, err = call(*arguments)
    assert code == 2
    assert "small: is there already; remove it or choose another name" in err


def test_a_transformers_checkpoint_is_imported(call, tmp_path):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "llama")
    code, _, err = call("shrink", "llama", "--method", "magnitude:share=0", "--out", "small")
    assert code == 0, err
    x = torch.arange(9)[None]
    torch.testing.assert_close(load_model(tmp_path / "small").eval()(x), theirs(x).logits, rtol=1e-4, atol=1e-5)


def test_text_is_data(call, tmp_path):  # noqa: F811
    spec = {"width": 16, "depth": 1, "heads": 2, "input_size": 256, "output_size": 256, "read_in": "token"}
    save_model(build_model({**spec, "position": "learned", "max_length": 32}), tmp_path / "mine")
    (tmp_path / "notes.txt").write_text("A line of text that is long enough to be read.\n" * 40)
    code, out, err = call("shrink", "mine", "--method", "magnitude", "--data", "notes.txt", "--out", "small")
    assert code == 0, err
    assert "training loss on language_modelling: before" in out
