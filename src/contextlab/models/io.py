"""Save and load models: `model.safetensors` + `model.json` in a folder; no pickle is ever read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from contextlab.errors import InputError, nearest
from contextlab.files import atomic_folder, read_json, read_tensors, write_json, write_tensors
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model, build_model

WEIGHTS, SPEC = "model.safetensors", "model.json"


def save_model(model: Model, folder: str | Path) -> Path:
    """Write the model to `folder` (replaced as a whole, atomically). Returns the folder."""
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        write_model(model, temporary)
    return folder


def write_model(model: Model, folder: Path) -> None:
    """Write the model's two files into an existing folder (for checkpoints, which add files of their own)."""
    write_tensors(folder / WEIGHTS, dict(model.state_dict()))
    write_json(folder / SPEC, model.spec.model_dump(mode="json"))


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> Model:
    """Load a model. Raises InputError when the folder holds none, or a file is damaged or does not fit the spec."""
    folder = Path(folder)
    if not (folder / SPEC).exists():
        raise InputError(f"{folder}: no model there (expected {SPEC} and {WEIGHTS})")
    spec = ModelSpec.parse(read_json(folder / SPEC), str(folder / SPEC))
    model = build_model(spec)
    load_weights(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return model.to(device)


def load_weights(model: Model, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights into a model. Raises InputError that says how they differ when they are of another model."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise InputError(f"{source}: a checkpoint of another model: it lacks {name!r}")
        if weights[name].shape != tensor.shape:
            raise InputError(
                f"{source}: a checkpoint of another model: {name!r} is {list(weights[name].shape)}, "
                f"expected {list(tensor.shape)}"
            )
    for name in weights:
        if name not in own:
            raise InputError(
                f"{source}: a checkpoint of another model: it holds {name!r}, which this model lacks "
                f"(nearest: {nearest(name, own)!r})"
            )
    model.load_state_dict(weights)
