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
    weights = read_tensors(folder / WEIGHTS)
    model = build_model(spec)
    if weights:
        model = model.to(next(iter(weights.values())).dtype)  # as they were saved
    load_weights(model, weights, str(folder / WEIGHTS))
    return model.to(device)


def load_weights(model: Model, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights, each in the shape of the parameter it is named after, into a model.

    Raises InputError that says how they differ when they are of another model.
    """
    own = model.state_dict()
    faults = compare_tensors({name: list(tensor.shape) for name, tensor in own.items()}, weights)
    if faults:
        raise InputError(f"{source}: a checkpoint of another model: {faults}")
    model.load_state_dict(weights)


def compare_tensors(wanted: dict[str, list[int]], found: dict[str, Tensor]) -> str:
    """How tensors of any shape differ from the shapes that are wanted by name, in one line; "" when they do not."""
    missing = [repr(name) for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    unknown = [f"{name!r} (nearest: {near!r})" if (near := nearest(name, wanted)) else repr(name) for name in extra]
    misshapen = [
        f"{name!r} is {list(found[name].shape)}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and list(found[name].shape) != shape
    ]
    parts = {"it lacks": missing, "it holds, and the model does not:": unknown, "of another shape:": misshapen}
    return "; ".join(
        f"{what} {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for what, names in parts.items()
        if names
    )
