"""Saved models: exact round trip; damage and mismatches are told in one line."""

from __future__ import annotations

import json

import pytest
import torch

from contextlab.errors import InputError
from contextlab.models import build_model, load_model, save_model


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


def test_saving_again_replaces_the_whole(saved):
    _, folder = saved
    other = build_model("lstm", width=8, read_in="token", input_size=9, output_size=9)
    save_model(other, folder)
    assert load_model(folder).spec == other.spec
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_truncated_file_is_told(saved):
    _, folder = saved
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="corrupt or truncated safetensors file"):
        load_model(folder)


def test_weights_of_another_model_are_told(saved):
    _, folder = saved
    spec = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**spec, "width": 32}))
    with pytest.raises(InputError, match="a checkpoint of another model"):
        load_model(folder)
    (folder / "model.json").write_text(json.dumps({**spec, "depth": 3}))
    with pytest.raises(InputError, match="it lacks 'blocks"):
        load_model(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(InputError, match="damaged or not JSON"):
        load_model(folder)
    with pytest.raises(InputError, match="no model there"):
        load_model(folder / "nowhere")
