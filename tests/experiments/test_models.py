"""Models by where they lie."""

from __future__ import annotations

import shutil

import pytest
import torch

from contextlab.cli.cost import model_spec
from contextlab.errors import InputError
from contextlab.experiments import find_model
from contextlab.experiments.models import find_spec
from contextlab.models import save_model
from tests.experiments.test_run import tiny


@pytest.mark.filterwarnings("ignore")
def test_runs_trainings_checkpoints_and_saved_models_are_found(tmp_path, finished):
    folder = finished(tiny(), tmp_path / "run").folder
    trainings = sorted((folder / "trainings").iterdir())
    assert len(trainings) == 4
    with pytest.raises(InputError, match="has 4 trained models; give one of their folders: .*trainings/"):
        find_model(folder)
    name, model, tokenizer = find_model(trainings[0])
    assert (name, tokenizer, model.training) == (trainings[0].name, None, False)
    checkpoint = next(trainings[0].glob("step_*"))
    again = find_model(checkpoint)
    assert again[0] == trainings[0].name
    save_model(model, tmp_path / "saved")
    for other in (again[1], find_model(tmp_path / "saved")[1]):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=rf"model.safetensors: damaged: .*; delete the folder {checkpoint} to train"):
        find_model(trainings[0])
    weights.write_bytes(whole)
    assert model_spec(str(checkpoint), []) == model.spec  # what `contextlab cost` reads
    for each in trainings[1:]:
        shutil.rmtree(each)
    assert find_model(folder)[0] == "run"
    shutil.rmtree(checkpoint)
    with pytest.raises(InputError, match="no training of this run has a checkpoint yet"):
        find_model(folder)


def test_a_recipe_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("models: {m: {preset: transformer}}\n")
    for text in ("broken.yaml", "broken.yaml:m", "missing.yaml:m"):
        with pytest.raises(InputError) as caught:
            find_spec(text)
        assert str(caught.value).count(text.partition(":")[0]) == 1
