"""Checkpoints: folders `step_00000500/`, there whole or not at all, from which training goes on exactly.

Each holds the model's two files (`models.load_model` reads it), `training.safetensors` (the rest)
and `training.json` (step, seed, spec, task, history), with checksums of all. No pickle is written or read.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.files import atomic_folder, make_folder, read_record, read_tensors, write_record, write_tensors
from contextlab.models.io import WEIGHTS, load_model, load_weights, read_description, read_weights, write_model
from contextlab.models.stack import Model
from contextlab.spec import picture

TENSORS, RECORD = "training.safetensors", "training.json"
DIGEST = "tensors_sha256"
KEYS: dict[str, type | tuple[type, ...]] = {
    "step": int, "status": str, "is": dict, "seconds": (int, float), "tokens": int, "pending": list, "history": list
}  # fmt: skip
"""Of the record, with their types."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds beside the model's weights.

    tensors: name -> tensor, of the optimiser and the generators.
    record: plain data: `step`, `history`, what the training `is` (model, task, spec, seed, device), ...
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def newest(folder: Path) -> Path | None:
    """The last checkpoint in a folder, None when there is none."""
    return next(iter(_steps(folder)), None)


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by their steps, in rising order."""
    return {step_of(path): path for path in reversed(_steps(folder))}


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint's folder, by its name."""
    return re.fullmatch(r"step_\d{8,}", path.name) is not None and path.is_dir()


def holds_checkpoints_alone(folder: Path) -> bool:
    """Whether all files in a folder, and in folders within, are of checkpoints, half-written ones counted."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(
        path.is_dir() and not path.is_symlink() and (_is_checkpoint_part(path) or holds_checkpoints_alone(path))
        for path in folder.iterdir()
    )


def _is_checkpoint_part(path: Path) -> bool:
    return re.fullmatch(r"(\.old-)?step_\d{8,}|\.step_\d{8,}\..*", path.name) is not None


def prepare(folder: Path) -> None:
    """Create the folder and remove what a killed process left half-written in it."""
    make_folder(folder)
    for path in (*folder.glob(".step_*"), *folder.glob(".old-step_*")):
        shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint. One whose removal is cut short is no checkpoint any more; `prepare` and `clear` end it."""
    hidden = path.with_name(f".old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove all checkpoints in a folder, where there is one."""
    for path in _steps(folder):
        remove(path)
    for path in folder.glob(".old-step_*"):
        shutil.rmtree(path, ignore_errors=True)


def write(
    folder: Path,
    model: Any,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    beside: Callable[[Path], None] | None = None,
    keep_all: bool = False,
) -> Path:
    """Write the checkpoint of `record["step"]`; of those before it the last one stays, or all. Returns its folder.

    tensors: of any shape. beside: writes other files into the folder. keep_all: whether all before it stay.
    """
    path = folder / f"step_{record['step']:08d}"
    with atomic_folder(path) as temporary:
        write_model(model, temporary)
        if beside is not None:
            beside(temporary)
        digest = write_tensors(temporary / TENSORS, dict(tensors))
        write_record(temporary / RECORD, {**record, DIGEST: digest})
    for older in [] if keep_all else _steps(folder, below=record["step"])[1:]:
        shutil.rmtree(older, ignore_errors=True)
    return path


def read(path: Path, model: Any, identity: Mapping[str, Any], expected: Mapping[str, Tensor]) -> Checkpoint:
    """Read a checkpoint and load the weights into the model.

    identity: what the training must be the continuation of; compared with what was written.
    expected: tensors that must be there, of the same shape.

    Raises InputError when a file is damaged (offering the checkpoint before it), or the checkpoint is of another
    training (saying what differs).
    """
    try:
        record = read_record(path / RECORD, KEYS)
        tensors = read_tensors(path / TENSORS, record.pop(DIGEST, None))
        model_spec, digest = read_description(path)
        weights = read_weights(path, digest)
    except InputError as error:
        raise InputError(f"{error}; {remedy(path)}") from None
    written = {**record["is"], "model": model_spec}
    for where, was, now in differences(written, dict(identity)):
        raise InputError(
            f"{path}: a checkpoint of another training: {where} was {picture(was)}, now {picture(now)}; "
            "resume with the same settings, remove it, or choose another folder"
        )
    for name, tensor in expected.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise InputError(
                f"{path / TENSORS}: a checkpoint of another model: {name!r} differs in shape or is missing"
            )
    load_weights(model, weights, str(path / WEIGHTS))
    return Checkpoint(tensors, record)


def load(path: Path, device: torch.device | str = "cpu") -> Model:
    """The model of a checkpoint, without the rest. Raises InputError when a file is damaged, as `read` does."""
    try:
        return load_model(path, device)
    except InputError as error:
        raise InputError(f"{error}; {remedy(path)}") from None


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


def remedy(path: Path) -> str:
    """What to do about a damaged checkpoint, in words: go on from the one before it, where there is one."""
    before = _steps(path.parent, below=step_of(path))
    return f"delete the folder {path} to " + (f"go on from {before[0].name}" if before else "train again")


def _steps(folder: Path, below: float = math.inf) -> list[Path]:
    """The checkpoints of steps below `below`, the newest first."""
    found = [path for path in folder.glob("step_*") if is_checkpoint(path) and step_of(path) < below]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(path.name.removeprefix("step_"))
