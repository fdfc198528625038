"""Saved models: exact round trip; damage and mismatches are told in one line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from contextlab.errors import InputError
from contextlab.models import ModelSpec, build_model, load_model, save_model
from contextlab.models.io import compare_tensors, load_weights
from contextlab.testing.adapters import Int8, Lora, replace


@pytest.fixture
def saved(tmp_path):
    model = build_model("mambaformer", width=16, depth=2, read_in="token", input_size=9, output_size=9)
    save_model(model, tmp_path / "model")
    return model, tmp_path / "model"


def test_round_trip_is_exact(saved):
    model, folder = saved
    loaded = load_model(folder)
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens), loaded(tokens))
    assert loaded.spec == model.spec


def test_tied_weights_survive(tmp_path):
    model = build_model("transformer", width=16, depth=1, read_in="token", input_size=9, output_size=9, tied=True)
    loaded = load_model(save_model(model, tmp_path / "tied"))
    assert loaded.read_out.weight is loaded.read_in.weight
    assert torch.equal(loaded.read_in.weight, model.read_in.weight)


def other_model():
    return build_model("lstm", width=8, read_in="token", input_size=9, output_size=9, seed=1)


def test_saving_again_replaces_the_model_and_nothing_else(saved):
    _, folder = saved
    other = other_model()
    (folder / "thesis.tex").write_text("years of work")
    (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000001" / "model.json").write_text("{}")
    save_model(other, folder)
    assert load_model(folder).spec == other.spec
    assert torch.equal(load_model(folder).read_in.weight, other.read_in.weight)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "model.json", "model.safetensors", "thesis.tex"]
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert (folder / "checkpoints" / "step_00000001" / "model.json").read_text() == "{}"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_file_or_a_link_of_the_name_is_refused_and_stays(saved):
    model, folder = saved
    file, link, inside = folder.parent / "file", folder.parent / "link", folder.parent / "inside"
    file.write_text("mine")
    link.symlink_to(folder, target_is_directory=True)
    before = (folder / "model.json").read_bytes()
    with pytest.raises(InputError, match="file: is a file; expected a folder, or a name that is free"):
        save_model(other_model(), file)
    with pytest.raises(InputError, match="link: is a link; expected a folder, or a name that is free"):
        save_model(other_model(), link)
    assert file.read_text() == "mine"
    assert link.is_symlink()
    assert (folder / "model.json").read_bytes() == before
    (inside / "model.safetensors").mkdir(parents=True)
    save_model(model, folder)
    with pytest.raises(InputError, match=r"model.safetensors: is a folder; a saved model has a file of that name"):
        save_model(model, inside)
    assert [p.name for p in inside.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("call", range(4))
def test_a_process_that_dies_while_saving_leaves_the_old_model_or_the_new(saved, monkeypatch, call):
    """Death before the weights, before the JSON, before the weights' last name, and before the tidying."""
    model, folder = saved
    other, calls, real = other_model(), [], os.replace

    class Death(BaseException):
        pass

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) > call:
            raise Death
        real(*arguments)

    monkeypatch.setattr(os, "replace", dying)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a process that is killed tidies nothing up
    if call < 3:
        with pytest.raises(Death):
            save_model(other, folder)
    else:
        save_model(other, folder)
    monkeypatch.undo()
    expected = model if call < 2 else other
    loaded = load_model(folder)
    assert loaded.spec == expected.spec
    assert torch.equal(loaded.read_in.weight, expected.read_in.weight)
    save_model(other, folder)
    assert torch.equal(load_model(folder).read_in.weight, other.read_in.weight)
    left = {p.name for p in folder.iterdir() if re.search(r"model.safetensors\.[0-9a-f]{64}$", p.name)}
    assert not left


def test_files_of_two_models_are_no_model(saved):
    _, folder = saved
    twin = build_model("mambaformer", width=16, depth=2, read_in="token", input_size=9, output_size=9, seed=1)
    save_model(twin, folder.parent / "twin")
    (folder / "model.safetensors").write_bytes((folder.parent / "twin" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"model.safetensors: damaged: it has changed since it was written"):
        load_model(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
def test_a_flipped_byte_is_refused_and_its_file_named(tmp_path, file):
    folder = save_model(build_model("lstm", width=2, depth=1, input_size=2, output_size=1), tmp_path / "m")
    content = (folder / file).read_bytes()
    found = json.loads((folder / "model.json").read_text())
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (folder / file).write_bytes(damaged)
        if file == "model.json" and same_but_for_spaces(damaged, found):
            continue
        with pytest.raises(InputError) as caught:
            load_model(folder)
        assert str(folder / file) in str(caught.value)
        assert "\n" not in str(caught.value)


def same_but_for_spaces(text: bytes, expected: object) -> bool:
    try:
        return json.loads(text) == expected
    except ValueError:
        return False


def test_models_of_older_versions_are_read(saved):
    model, folder = saved
    data = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({k: data[k] for k in data if k in type(model.spec).model_fields}))
    assert torch.equal(load_model(folder).read_in.weight, model.read_in.weight)


def test_the_type_of_the_weights_is_kept(tmp_path):
    model = build_model("lstm", width=4, depth=1, input_size=2, output_size=1).double()
    loaded = load_model(save_model(model, tmp_path / "m"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_truncated_file_is_told(saved):
    _, folder = saved
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="corrupt or truncated safetensors file"):
        load_model(folder)


def test_nsa_of_before_it_had_keys_for_each_branch_is_told(tmp_path):
    layers = [{"mixer": "nsa"}]
    model = build_model(ModelSpec(width=16, depth=1, layers=layers, read_in="token", input_size=9, output_size=9))
    weights = {name: tensor for name, tensor in model.state_dict().items() if "_place" not in name}
    with pytest.raises(InputError, match="another model: it lacks .*; nsa was remade .*: train it again") as caught:
        load_weights(model, weights, "model.safetensors")
    assert "\n" not in str(caught.value)
    spec = json.loads((save_model(model, tmp_path) / "model.json").read_text())
    del spec["checksum"]
    spec["layers"] = [{"mixer": "nsa", "options": {"block": 32, "top_k": 2}}]
    (tmp_path / "model.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="top_k 2: a query reads 1 initial and 2 local blocks"):
        load_model(tmp_path)


def test_weights_of_another_model_are_told(saved):
    _, folder = saved
    spec = json.loads((folder / "model.json").read_text())
    del spec["checksum"]
    (folder / "model.json").write_text(json.dumps({**spec, "width": 32}))
    with pytest.raises(InputError, match="a checkpoint of another model"):
        load_model(folder)
    (folder / "model.json").write_text(json.dumps({**spec, "depth": 3}))
    with pytest.raises(InputError, match="it lacks 'blocks"):
        load_model(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(InputError, match="damaged or not JSON"):
        load_model(folder)
    for shape in ("[1]", '"text"', "null"):
        (folder / "model.json").write_text(shape)
        with pytest.raises(InputError, match=r"model.json: damaged: expected a mapping, found a"):
            load_model(folder)
    (folder / "model.json").write_text(json.dumps({**spec, "weights_sha256": 3}))
    with pytest.raises(InputError, match=r"model.json: damaged: 'weights_sha256' is no checksum"):
        load_model(folder)
    with pytest.raises(InputError, match="no model there"):
        load_model(folder / "nowhere")


def test_differences_of_tensors_are_told_in_full():
    found = {"a": torch.zeros(2), "bias1": torch.zeros(1), "c": torch.zeros(3)}
    told = compare_tensors({"a": [2], "bias": [1], "c": [4]}, found)
    assert told == (
        "it lacks 'bias'; it holds, and the model does not: 'bias1' (nearest: 'bias'); "
        "of another shape: 'c' is [3], expected [4]"
    )
    assert compare_tensors({"a": [2], "bias1": [1], "c": [3]}, found) == ""
    many = compare_tensors({f"w{i}": [1] for i in range(11)}, {})
    assert many == f"it lacks {', '.join(repr(f'w{i}') for i in range(8))} and 3 more"
    assert compare_tensors({f"w{i}": [1] for i in range(8)}, {}).endswith("'w7'")


@pytest.mark.parametrize("projection", ["residual", "linear"])
def test_names_of_older_versions_are_read(tmp_path, projection):
    layer = {"mixer": "shaped_attention", "options": {"projection": projection}}
    model = build_model({"width": 8, "depth": 1, "layers": [layer], "input_size": 3, "output_size": 3})
    weights, inner = dict(model.state_dict()), ".linear" if projection == "residual" else ""
    old = {}
    for name, tensor in weights.items():
        name = name.replace(f"mixer.values{inner}.weight", "mixer.qkv_proj.values.weight")
        name = name.replace("mixer.values.", "mixer.qkv_proj.values.")
        old[name.replace(f"mixer.out_proj{inner}.weight", "mixer.out_proj.weight")] = tensor + 1
    assert "blocks.0.mixer.qkv_proj.values.weight" in old
    assert "blocks.0.mixer.out_proj.weight" in old
    load_weights(model, old, "a test")
    for name, tensor in weights.items():
        torch.testing.assert_close(model.state_dict()[name], tensor)  # loaded in place
    assert all(tensor.equal(before) for tensor, before in zip(model.state_dict().values(), old.values(), strict=True))


def adapted(model):
    replace(model, "blocks.0.mixer.out_proj", Lora(model.blocks[0].mixer.out_proj))
    return model


def quantized(model):
    layer = model.blocks[0].mixer.out_proj
    layer.weight = torch.nn.Parameter(Int8.of(layer.weight.detach()), requires_grad=False)
    return model


class Peft(torch.nn.Module):
    def merge_and_unload(self):
        raise AssertionError("not asked for")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (adapted, "not as its spec says.*adapters are to be merged.*'blocks.0.mixer.out_proj.base_layer.weight'"),
        (quantized, "'blocks.0.mixer.out_proj.weight' is a Int8, which a saved model cannot hold"),
        (
            lambda model: Peft(),
            "save_model: expected a model of contextlab, got one in peft's Peft; save what merge_and",
        ),
        (lambda model: torch.nn.Linear(2, 2), "save_model: expected a model of contextlab, .* got"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_and_the_folder_stays(saved, change, said):
    _, folder = saved
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=said) as caught:
        save_model(change(other_model()), folder)
    assert "\n" not in str(caught.value)
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=said):
        save_model(change(other_model()), folder.parent / "new")


def test_an_adapted_model_is_saved_once_it_is_merged(tmp_path):
    model = adapted(other_model())
    torch.nn.init.normal_(model.blocks[0].mixer.out_proj.B)
    replace(model, "blocks.0.mixer.out_proj", model.blocks[0].mixer.out_proj.merged())
    again = load_model(save_model(model, tmp_path / "m"))
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
