"""Models by where they lie."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.cli import main
from contextlab.cli.cost import model_spec
from contextlab.errors import InputError
from contextlab.experiments import find_model
from contextlab.experiments.models import find_spec
from contextlab.files import read_tensors
from contextlab.models import build_model, save_model
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


@pytest.mark.parametrize("command", [("compress", "--weights", "rtn"), ("advise", "--memory", "1MB", "--length", "8")])
def test_a_command_loads_a_model_once(command, tmp_path, monkeypatch):
    """It is found by its name, and in our own stack, in one go; then a task of more tokens than it knows is refused."""
    save_model(build_model("transformer", read_in="token", input_size=8, output_size=8), tmp_path / "small")
    read: list[Path] = []

    def once(path: Path, *rest: Any) -> dict[str, Tensor]:
        read.append(path)
        if len(read) > 1:
            pytest.fail("it is read again")
        return read_tensors(path, *rest)

    monkeypatch.setattr("contextlab.models.io.read_tensors", once)
    monkeypatch.setattr(
        sys,
        "argv",
        ["contextlab", command[0], str(tmp_path / "small"), *command[1:], "--task", "associative_recall:vocabulary=64"],
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert read == [tmp_path / "small" / "model.safetensors"]


def test_a_recipe_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("models: {m: {preset: transformer}}\n")
    for text in ("broken.yaml", "broken.yaml:m", "missing.yaml:m"):
        with pytest.raises(InputError) as caught:
            find_spec(text)
        assert str(caught.value).count(text.partition(":")[0]) == 1
