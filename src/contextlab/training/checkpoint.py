"""Checkpoints: folders `step_00000500/`, there whole or not at all, from which training goes on exactly.

Each holds the model's two files (`models.load_model` reads it), `training.safetensors` (the rest)
and `training.json` (step, seed, spec, task, history). No pickle is written or read.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from contextlab.errors import InputError
from contextlab.files import atomic_folder, make_folder, read_json, read_tensors, write_json, write_tensors
from contextlab.models.io import SPEC, WEIGHTS, load_weights, write_model
from contextlab.spec import describe

TENSORS, RECORD = "training.safetensors", "training.json"


class Checkpoint(NamedTuple):
    """What a checkpoint holds beside the model's weights.

    tensors: name -> tensor, of the optimiser and the generators.
    record: plain data: `step`, `history`, what the training `is` (model, task, spec, seed, device), ...
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def newest(folder: Path) -> Path | None:
    """The last checkpoint in a folder, None when there is none."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return max(found, key=_step, default=None)


def prepare(folder: Path) -> None:
    """Create the folder and remove what a killed process left half-written in it."""
    make_folder(folder)
    for path in (*folder.glob(".step_*"), *folder.glob(".old-step_*")):
        shutil.rmtree(path, ignore_errors=True)


def write(folder: Path, model: Any, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `record["step"]`, tensors of any shape, and remove older ones. Returns its folder."""
    path = folder / f"step_{record['step']:08d}"
    with atomic_folder(path) as temporary:
        write_model(model, temporary)
        write_tensors(temporary / TENSORS, dict(tensors))
        write_json(temporary / RECORD, dict(record))
    for older in folder.glob("step_*"):
        if older != path and re.fullmatch(r"step_\d{8,}", older.name):
            shutil.rmtree(older, ignore_errors=True)
    return path


def read(path: Path, model: Any, identity: Mapping[str, Any], expected: Mapping[str, Tensor]) -> Checkpoint:
    """Read a checkpoint and load the weights into the model.

    identity: what the training must be the continuation of; compared with what was written.
    expected: tensors that must be there, of the same shape.

    Raises InputError when a file is damaged, or the checkpoint is of another training (saying what differs).
    """
    try:
        record = read_json(path / RECORD)
        if not isinstance(record, dict) or not {"step", "is", "history", "pending"} <= record.keys():
            raise InputError(f"{path / RECORD}: damaged: it lacks keys that every checkpoint has")
        written = {**record["is"], "model": read_json(path / SPEC)}
        weights, tensors = read_tensors(path / WEIGHTS), read_tensors(path / TENSORS)
    except InputError as error:
        raise InputError(f"{error}; delete the folder {path} to train again") from None
    for where, was, now in differences(written, dict(identity)):
        raise InputError(
            f"{path}: a checkpoint of another training: {where} was {describe(was)}, now {describe(now)}; "
            "resume with the same settings or choose another folder"
        )
    for name, tensor in expected.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise InputError(
                f"{path / TENSORS}: a checkpoint of another model: {name!r} differs in shape or is missing"
            )
    load_weights(model, weights, str(path / WEIGHTS))
    return Checkpoint(tensors, record)


def differences(was: Any, now: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Where two trees of plain data differ: (path, value in the first, value in the second)."""
    if isinstance(was, dict) and isinstance(now, dict):
        found = []
        for key in {**was, **now}:
            found += differences(was.get(key), now.get(key), f"{where}.{key}" if where else str(key))
        return found
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return [d for i, (a, b) in enumerate(zip(was, now, strict=True)) for d in differences(a, b, f"{where}.{i}")]
    return [] if was == now else [(where, was, now)]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
