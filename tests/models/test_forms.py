"""Linear forms in whole models: built, saved, loaded, counted, on every mixer and MLP; and what is refused."""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from contextlab import registry
from contextlab.errors import InputError
from contextlab.mixers.forms import LinearForm
from contextlab.mixers.layers import Linear
from contextlab.models import (
    LinearSpec,
    Model,
    ModelSpec,
    build_model,
    linear_layers,
    load_model,
    pack_forms,
    save_model,
    weight_nbytes,
    with_forms,
)
from contextlab.models.forms import formed
from contextlab.models.start import plan_start, start_model
from contextlab.tasks import build_task
from contextlab.testing.forms import all_kinds
from contextlab.training import optim, train

TOKENS = torch.arange(11)[None] % 7
SMALL: dict[str, Any] = {"width": 24, "depth": 1, "read_in": "token", "input_size": 7, "output_size": 7}
EVERY = {"layers": "*", "form": "int", "options": {"bits": 4}}


def dealt(spec: ModelSpec, shift: int) -> ModelSpec:
    """The spec with a form for each linear layer, one kind after another."""
    kinds = all_kinds()
    names = linear_layers(build_model(spec), ends=True)
    linear = [
        {"layers": name, "form": kinds[(at + shift) % len(kinds)][0], "options": kinds[(at + shift) % len(kinds)][1]}
        for at, name in enumerate(names)
    ]
    return ModelSpec.parse({**spec.model_dump(), "linear": linear})


MIXERS = [(entry, {"layers": [{"mixer": entry.name, "options": dict(entry.cases[0])}], "mlp": "none"})
          for entry in registry.entries("mixer")]  # fmt: skip
MLPS = [(entry, {"mlp": {"kind": entry.name, "options": dict(entry.cases[0])}}) for entry in registry.entries("mlp")]


@pytest.mark.parametrize(("at", "changes"), [(i, c) for i, (_, c) in enumerate([*MIXERS, *MLPS])],
                         ids=[entry.name for entry, _ in [*MIXERS, *MLPS]])  # fmt: skip
def test_every_mixer_and_mlp_is_saved_loaded_and_counted_with_forms(at: int, changes: dict[str, Any], tmp_path) -> None:
    spec = dealt(ModelSpec.parse({**SMALL, **changes}), at)
    model = build_model(spec, seed=at).eval()
    assert spec.linear
    assert all(isinstance(model.get_submodule(each.layers), LinearForm) for each in spec.linear)
    loaded = load_model(save_model(model, tmp_path / "m")).eval()
    assert loaded.spec == spec
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert weight_nbytes(spec) == model.weight_nbytes == loaded.weight_nbytes == held
    assert weight_nbytes(spec, torch.bfloat16) == loaded.bfloat16().weight_nbytes


def test_the_first_entry_that_names_a_layer_counts_and_the_ends_must_be_named() -> None:
    linear = [
        {"layers": "blocks.0.mlp.*", "form": "dense"},
        {"layers": "blocks.*.mlp.up", "form": "ternary"},
        EVERY,
    ]
    model = build_model("transformer", **{**SMALL, "depth": 2}, linear=linear)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, LinearForm)}
    assert kinds == {
        "blocks.0.mixer.qkv_proj": "Integers",
        "blocks.0.mixer.out_proj": "Integers",
        "blocks.1.mixer.qkv_proj": "Integers",
        "blocks.1.mixer.out_proj": "Integers",
        "blocks.1.mlp.up": "Ternary",
        "blocks.1.mlp.out_proj": "Integers",
    }
    named = build_model("transformer", **SMALL, linear=[{**EVERY, "layers": "read_out"}])
    assert [n for n, m in named.named_modules() if isinstance(m, LinearForm)] == ["read_out"]


def test_a_built_model_has_the_forms_nearest_to_the_dense_one_that_the_seed_draws() -> None:
    dense = build_model("transformer", **SMALL, seed=3)
    model = build_model("transformer", **SMALL, linear=[EVERY], seed=3)
    for name, layer in linear_layers(dense).items():
        form = model.get_submodule(name)
        assert isinstance(form, LinearForm)
        wanted = type(form).of(layer.weight.detach(), bits=4)
        assert torch.equal(form.dense(), wanted.dense())


def test_a_model_without_forms_is_saved_as_before_there_were_any(tmp_path) -> None:
    spec = build_model("transformer", **SMALL).spec
    assert "linear" not in spec.model_dump()
    assert "linear" not in json.loads(spec.model_dump_json())
    folder = save_model(build_model(spec), tmp_path / "m")
    assert "linear" not in json.loads((folder / "model.json").read_text())
    assert load_model(folder).spec.linear == ()


def test_forms_given_to_a_model_make_a_new_one_and_leave_the_old(tmp_path) -> None:
    model = build_model("gated_delta_net" if "gated_delta_net" in registry.names("model") else "transformer", **SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"bits": 8, "group": None}
    factory = registry.lookup("linear", "int").factory
    forms = {n: factory.of(layer.weight.detach(), **options) for n, layer in linear_layers(model).items()}
    made = with_forms(model, forms, [LinearSpec(layers="*", form="int", options=options)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, LinearForm) for module in model.modules())
    assert made.get_submodule(next(iter(forms))) is forms[next(iter(forms))]
    loaded = load_model(save_model(made, tmp_path / "m"))
    with torch.no_grad():
        assert torch.equal(made(TOKENS), loaded(TOKENS))
    again = with_forms(made, {"read_out": factory.of(made.read_out.weight.detach(), made.read_out.bias.detach())},
                       [LinearSpec(layers="read_out", form="int")])  # fmt: skip
    assert len(again.spec.linear) == 2
    load_model(save_model(again, tmp_path / "again"))


def test_layers_that_are_shared_share_their_form(tmp_path) -> None:
    layers = [{"mixer": "attention", "share": "s"}, {"mixer": "attention", "share": "s"}]
    spec = ModelSpec.parse({**SMALL, "depth": 2, "layers": layers, "linear": [EVERY]})
    model = build_model(spec)
    assert model.blocks[0].mixer.qkv_proj is model.blocks[1].mixer.qkv_proj
    assert isinstance(model.blocks[1].mixer.qkv_proj, LinearForm)
    loaded = load_model(save_model(model, tmp_path / "m"))
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_models_in_half_precision_are_loaded_in_it(tmp_path) -> None:
    model = build_model("transformer", **SMALL, linear=[EVERY]).bfloat16()
    loaded = load_model(save_model(model, tmp_path / "m"))
    assert loaded.blocks[0].mixer.qkv_proj.dtype == torch.bfloat16
    assert loaded.blocks[0].mixer.qkv_proj.codes.dtype == torch.uint8


def test_what_a_form_trains_is_muons_and_packed_weights_are_nobodys() -> None:
    linear = [{"layers": "*.mixer.*", "form": "ternary", "options": {"latent": True}}, {**EVERY, "layers": "*.mlp.*"}]
    model = build_model("transformer", **SMALL, linear=linear)
    assert optim.matrices(model) == {"blocks.0.mixer.qkv_proj.weight", "blocks.0.mixer.out_proj.weight"}
    assert not [name for name, _ in model.named_parameters() if ".mlp." in name and "norm" not in name]


@pytest.mark.parametrize(
    ("linear", "words"),
    [
        ([{**EVERY, "layers": "blocks.*.mpl.up"}], r"'blocks.\*.mpl.up' names no linear layer of this model; did you"),
        ([{**EVERY, "form": "int4"}], "unknown linear form 'int4'; did you mean 'int'"),
        ([{**EVERY, "options": {"bit": 4}}], "unknown option 'bit' of linear 'int'; did you mean 'bits'"),
        ([{**EVERY, "options": {"inputs": 4}}], "inputs is the layer's own"),
        ([{"layers": "*", "form": "dense", "options": {"bits": 4}}], "the form 'dense' has none"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_in_one_line(linear: list, words: str) -> None:
    with pytest.raises(InputError, match=words) as told:
        build_model("transformer", **SMALL, linear=linear)
    assert "\n" not in str(told.value)


def test_forms_that_do_not_fit_are_refused() -> None:
    model = build_model("transformer", **SMALL)
    factory = registry.lookup("linear", "int").factory
    layer = model.blocks[0].mlp.up
    form = factory.of(layer.weight.detach())
    spec = LinearSpec(layers="blocks.0.mlp.up", form="int")

    def refused(forms: dict[str, nn.Module], specs: list[LinearSpec], words: str) -> None:
        with pytest.raises(InputError, match=words):
            with_forms(model, forms, specs)

    refused({"blocks.0.mlp.upp": form}, [spec], "did you mean 'blocks.0.mlp.up'")
    refused({"blocks.0.mlp.out_proj": form}, [spec], "maps 96 to 24, its form 24 to 96")
    refused({"blocks.0.mlp.up": form}, [], "the specs say that blocks.0.mlp.up is dense, but it is given Integers")
    refused({}, [spec], "the specs say that blocks.0.mlp.up is int, but it is given no form")
    four = LinearSpec(layers="blocks.0.mlp.up", form="int", options={"bits": 4})
    refused({"blocks.0.mlp.up": form}, [four], "is not the int that the specs describe")


def test_latent_weights_are_packed_into_a_model_that_answers_the_same(tmp_path) -> None:
    options = {"latent": True, "rounding": "stochastic", "bits": 4}
    linear = [{"layers": "*.mixer.*", "form": "int", "options": options}, {**EVERY, "layers": "*.up"}]
    model = build_model("transformer", **SMALL, linear=linear)
    packed = pack_forms(model)
    assert [dict(each.options) for each in packed.spec.linear] == [{"bits": 4}, {"bits": 4}]
    assert packed.weight_nbytes == weight_nbytes(packed.spec) < model.weight_nbytes
    torch.testing.assert_close(packed(TOKENS), model.eval()(TOKENS))
    loaded = load_model(save_model(packed, tmp_path / "m"))
    assert torch.equal(loaded(TOKENS), packed(TOKENS))
    assert model.blocks[0].mixer.qkv_proj.latent
    with pytest.raises(InputError, match="no linear layer of the model has a latent weight"):
        pack_forms(packed)


def test_a_tied_read_out_has_no_form() -> None:
    assert "read_out" not in linear_layers(build_model("transformer", **SMALL, tied=True), ends=True)
    assert "read_out" in linear_layers(build_model("transformer", **SMALL), ends=True)


def test_the_model_class_itself_places_forms() -> None:
    model = Model(ModelSpec.parse({**SMALL, "linear": [EVERY]}))
    assert isinstance(model.blocks[0].mixer.qkv_proj, LinearForm)


def test_a_dense_model_is_the_start_of_one_with_forms() -> None:
    source = build_model("transformer", **SMALL, seed=5)
    spec = ModelSpec.parse({**source.spec.model_dump(), "linear": [EVERY]})
    started = start_model(spec, source)
    assert started.model.spec == spec
    assert not started.new
    assert plan_start(spec, source.spec).carried == started.carried
    for name, layer in linear_layers(source).items():
        wanted = registry.lookup("linear", "int").factory.of(layer.weight, bits=4)
        assert torch.equal(started.model.get_submodule(name).dense(), wanted.dense())


def test_a_latent_model_is_trained_and_goes_on_bit_for_bit(tmp_path) -> None:
    linear = [
        {"layers": "*.mixer.*", "form": "ternary", "options": {"latent": True, "activations": 8}},
        {"layers": "*.up", "form": "nvfp4", "options": {"latent": True, "rounding": "stochastic"}},
        {"layers": "*", "form": "low_rank", "options": {"rank": 6}},
    ]
    task = build_task("linear_regression", dimensions=2, examples=6)
    spec = ModelSpec.parse({"width": 16, "depth": 1, "heads": 2, "linear": linear}).for_task(task)
    wanted = {"steps": 12, "batch": 16, "learning_rate": 3e-3, "matrix_learning_rate": 3e-3, "checkpoint_every": 0}
    whole = build_model(spec)
    start = {name: each.clone() for name, each in whole.state_dict().items()}
    result = train(whole, task, wanted)
    assert float(result.history["loss"].iloc[-1]) < float(result.history["loss"].iloc[0])
    changed = [name for name, each in whole.state_dict().items() if not torch.equal(each, start[name])]
    assert {name for name in start if name.endswith((".weight", ".up", ".down"))} <= set(changed)
    train(build_model(spec), task, wanted, folder=tmp_path, pause=5)
    resumed = build_model(spec)
    train(resumed, task, wanted, folder=tmp_path, resume=True)
    after = resumed.state_dict()
    assert all(torch.equal(each, after[name]) for name, each in whole.state_dict().items())


@pytest.mark.parametrize(
    "layers",
    [
        ["attention", "gla"],
        [{"mixer": "attention", "share": "a"}],
        [{"mixer": "attention", "with_input": True, "share": "a"}, {"mixer": "attention", "with_input": True}],
    ],
)
@pytest.mark.parametrize("names", ["*", "blocks.1.*", "*.up"])
def test_one_block_after_another_gets_its_forms(layers: list[Any], names: str) -> None:
    """The same as all at once, and never are two blocks dense together."""
    spec = ModelSpec(**{**SMALL, "depth": 4}, heads=2, layers=layers)
    entries = [{"layers": each, "form": "int", "options": {"bits": 4}} for each in (names, "read_out")]
    try:
        at_once = formed(Model(spec), [LinearSpec(**each) for each in entries])
    except InputError:  # a block that stands in two places is named by the first
        with pytest.raises(InputError, match="names no linear layer"):
            Model(ModelSpec.parse({**spec.model_dump(), "linear": entries}), empty_forms=True)
        return
    alive: list[weakref.ref[Any]] = []
    most = [0]

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        if type(module) is Linear and name == "weight":
            alive.append(weakref.ref(module))
            most[0] = max(most[0], len({id(each()) for each in alive if each() is not None}))

    with torch.nn.modules.module.register_module_parameter_registration_hook(count):
        made = Model(at_once.spec, empty_forms=True)
    assert {n: x.shape for n, x in made.state_dict().items()} == {n: x.shape for n, x in at_once.state_dict().items()}
    assert {n: type(x) for n, x in made.named_modules()} == {n: type(x) for n, x in at_once.named_modules()}
    if names == "*":
        dense = [sum(type(x) is Linear for x in block.modules()) for block in Model(spec).blocks]
        assert most[0] <= max(dense) + 1  # of one block, or the read-out
