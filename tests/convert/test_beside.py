"""`contextlab.convert.beside`: LoRA in the healing of layers that are stored as a form."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model, build_task, load_model, registry, save_model
from contextlab.convert import shrink
from contextlab.convert.beside import put_beside
from contextlab.convert.heal import heal_model, heal_spec
from contextlab.errors import InputError
from contextlab.mixers.forms.adapted import Adapted
from contextlab.models import ModelSpec
from contextlab.models.forms import formed_layers

TASK = build_task("linear_regression", dimensions=2, examples=4)
SIZES = {"input_size": TASK.input_size, "output_size": TASK.output_size, "read_in": TASK.read_in}
SPEC = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2, **SIZES}
FORMS = [(name, options) for name in registry.names("linear") for options in registry.lookup("linear", name).cases]


def model_of(*linear):
    torch.manual_seed(0)
    return build_model(ModelSpec.parse({**SPEC, "linear": list(linear)}, "model")).eval()


def read(model):
    prompt = TASK.sample(4, torch.Generator().manual_seed(1))
    return model(prompt.inputs.to(next(model.parameters()).dtype)).detach()


@pytest.mark.parametrize(("name", "options"), FORMS, ids=lambda each: each if isinstance(each, str) else "")
def test_adapters_stand_beside_every_form_and_are_all_that_is_trained(name, options, tmp_path):
    model = model_of({"layers": "blocks.1.*", "form": name, "options": options})
    before, state = read(model), {key: each.clone() for key, each in model.state_dict().items()}
    lora = {"targets": "blocks.1.*", **({} if name == "adapted" else {"rank": 2})}  # one that is there keeps its rank
    training, lines = put_beside(model, heal_spec({"steps": 3, "batch": 8, "warmup": 1, "lora": lora}))
    assert torch.equal(read(model), before), "B is zero"
    assert {line.layer for line in lines} == set(formed_layers(model))
    assert all(isinstance(each, Adapted) for each in formed_layers(model).values())
    began = {key: each.clone() for key, each in model.state_dict().items()}
    heal_model(model, [TASK], training)
    changed = {key for key, each in model.state_dict().items() if not torch.equal(each, began[key])}
    assert changed == {f"{each.layer}.{factor}" for each in lines for factor in ("up", "down")}
    assert not torch.equal(read(model), before)
    save_model(model, tmp_path / "healed")
    torch.testing.assert_close(read(load_model(tmp_path / "healed").eval()), read(model), rtol=0, atol=0)
    assert sum(line.bytes_after - line.bytes_before for line in lines) == model.weight_nbytes - sum(
        each.nbytes for each in state.values()
    )
    again, lines = put_beside(model, heal_spec({"steps": 1, "lora": lora}))
    assert all("trained on" in line.did for line in lines) or name == "adapted"
    assert again.lora is None


@pytest.mark.parametrize(
    ("method", "kind"),
    [("rtn:bits=4,group=8", "int"), ("svd:rank=4", "low_rank"), ("magnitude:pattern=2:4,packed=true", "sparse")],
)
def test_shrunk_layers_are_healed_by_lora(method, kind):
    pytest.importorskip("peft")
    heal = {"steps": 30, "batch": 16, "learning_rate": 0.02, "lora": {"rank": 2, "alpha": 4}}
    found = shrink(build_model(SPEC), [f"{method},layers=*.mlp.*"], TASK, heal=heal)
    assert found.losses["healed"] < found.losses["converted"]
    assert found.steps[-1].method == "lora"
    assert {line.did for line in found.lines[len(found.steps[0].lines) :]} == {f"an adapter of rank 2 beside {kind}"}
    assert found.bytes_after == found.model.weight_nbytes
    assert type(found.model.blocks[0].mixer.qkv_proj).__name__ == "Linear", "dense layers' adapters are merged"


def test_alpha_is_that_of_lora():
    model = model_of({"layers": "*", "form": "int"})
    put_beside(model, heal_spec({"steps": 1, "lora": {"rank": 2, "alpha": 6}}))
    layer = model.blocks[0].mlp.up
    torch.nn.init.normal_(layer.up)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), layer.inner(x) + 3 * (x @ layer.down.T @ layer.up.T))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dora": True}, "heal.lora.dora: needs dense layers, and .* is stored as int; leave dora out"),
        ({"rank": 999}, "heal.lora.rank: 999 is more than any matrix of these layers has; expected at most 16"),
        ({"targets": "blocks.0.nothing"}, "heal.lora.targets: 'blocks.0.nothing' matches no linear layer"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(options, message, monkeypatch):
    monkeypatch.setattr("contextlab.convert.calibration.Calibration.loss", lambda *_: pytest.fail("read already"))
    with pytest.raises(InputError, match=message):
        shrink(build_model(SPEC), "rtn", TASK, heal={"steps": 1, "lora": options})


def test_factors_of_ia3_need_dense_layers():
    told = r"heal.ia3.targets: blocks.* is stored as int, which no adapter can be merged into; .*--heal-with lora"
    with pytest.raises(InputError, match=told):
        shrink(build_model(SPEC), "rtn", TASK, heal={"steps": 1, "ia3": {}})


@pytest.mark.parametrize("lora", [{"rank": 3}, {"alpha": 5.0}, {"rank": 2, "alpha": 5.0}])
def test_an_adapter_that_is_there_is_trained_on_as_it_is_or_refused(lora):
    entry = {"layers": "*", "form": "adapted", "options": {"rank": 2, "alpha": 6.0, "form": "int"}}
    with pytest.raises(InputError, match="has an adapter of rank 2 that counts 3 times already.*leave rank and alpha"):
        shrink(model_of(entry), "drop_blocks:count=1", TASK, heal={"steps": 1, "lora": lora})
    for same in ({}, {"rank": 2}, {"alpha": 6.0, "rank": 2}):
        assert put_beside(model_of(entry), heal_spec({"steps": 1, "lora": same}))[1]


def test_low_bits_need_no_peft(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    found = shrink(build_model(SPEC), "rtn", TASK, heal={"steps": 1, "batch": 4, "lora": {"rank": 1}})
    assert found.healed is not None
