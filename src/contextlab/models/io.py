"""Save and load models: `model.safetensors` + `model.json` in a folder; no pickle is ever read.

`model.json` holds the ModelSpec, the SHA-256 of the weights' file and a checksum of itself, so that the two files
cannot be of different models without notice.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError, nearest
from contextlab.files import (
    file_digest,
    own_folder,
    pack_tensors,
    plain_os_errors,
    present,
    read_record,
    read_tensors,
    short,
    write_atomic,
    write_record,
)
from contextlab.models.build import empty_model
from contextlab.models.outline import without_memory
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model
from contextlab.spec import describe

WEIGHTS, SPEC = "model.safetensors", "model.json"
DIGEST = "weights_sha256"
WRAPPED = "model."
"""Before each tensor's name where the model was saved as one of transformers, which looks for names as in memory."""


def save_model(model: Model, folder: str | Path, weights: dict[str, Tensor] | None = None) -> Path:
    """Write the model's two files into `folder`, and leave all others there as they are. Returns the folder.

    weights: the tensors to be written, each in its parameter's shape [...]; None: the model's own. Their names may all
        begin with `WRAPPED`.

    Whenever the process dies, `load_model` finds the old model or the new one. Raises InputError where a file or a link
    bears the folder's name, and for a model that could not be loaded again: one with adapters or quantized weights in
    it, or of another library.
    """
    require_own(model, "save_model")
    folder = own_folder(Path(folder))
    for name in (WEIGHTS, SPEC):
        if (folder / name).is_dir():
            raise InputError(f"{short(folder / name)}: is a folder; a saved model has a file of that name")
    weights = dict(model.state_dict()) if weights is None else weights
    _require_loadable(model, weights)
    write_model(model, folder, weights)
    return folder


def write_model(model: Model, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the model's two files into an existing folder (for checkpoints, which add files of their own).

    weights: the tensors to be written, each in its parameter's shape [...]; None: the model's own.
    """
    data = pack_tensors(dict(model.state_dict()) if weights is None else weights)
    digest = hashlib.sha256(data).hexdigest()
    waiting = folder / _waiting(digest)
    write_atomic(waiting, data)
    # From the next line on the folder holds the new model: `load_model` takes the weights that the JSON names, under
    # their temporary name if the process dies before they get their own.
    write_record(folder / SPEC, {**model.spec.model_dump(mode="json"), DIGEST: digest})
    with plain_os_errors(folder / WEIGHTS):
        os.replace(waiting, folder / WEIGHTS)
        for path in folder.glob(f".{WEIGHTS}.*"):  # of a process that died
            if re.fullmatch(r"[0-9a-f]{64}", path.name.removeprefix(f".{WEIGHTS}.")):
                path.unlink(missing_ok=True)


def unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of any shape by the names that `Model` gives them, where all may bear `WRAPPED` before theirs."""
    wrapped = all(name.startswith(WRAPPED) for name in weights)
    return {name.removeprefix(WRAPPED) if wrapped else name: each for name, each in weights.items()}


def require_own(model: Any, call: str) -> None:
    """Raises InputError, which names `call`, unless the model is one of ours, which a ModelSpec describes."""
    if isinstance(model, Model):
        return
    if hasattr(model, "merge_and_unload"):
        raise InputError(
            f"{call}: expected a model of contextlab, got one in peft's {type(model).__name__}; save what "
            "merge_and_unload() returns, or the adapter by its own save_pretrained"
        )
    raise InputError(f"{call}: expected a model of contextlab, from build_model or load_model, got {describe(model)}")


def _require_loadable(model: Model, weights: dict[str, Tensor]) -> None:
    """Raises InputError unless `load_model` could put these weights into a model made from the spec."""
    for name, tensor in weights.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise InputError(
                f"{name!r} is a {type(tensor).__name__}, which a saved model cannot hold; save the model before its "
                "weights are quantized or distributed, and quantize it again when it is loaded"
            )
    described = without_memory(model.spec)
    if described is None:
        return
    shapes = {name: list(tensor.shape) for name, tensor in described.state_dict().items()}
    faults = compare_tensors(shapes, unwrapped(weights))
    if faults:
        raise InputError(
            f"the model is not as its spec says, so that it could not be loaded again (adapters are to be merged "
            f"before it is saved): {faults}"
        )


def _waiting(digest: str) -> str:
    """The weights' name until the JSON that belongs to them is written."""
    return f".{WEIGHTS}.{digest}"


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> Model:
    """Load a model. Raises InputError when the folder holds none, or a file is damaged or does not fit the spec."""
    folder = Path(folder)
    if not present(folder / SPEC):
        raise InputError(f"{short(folder)}: no model there (expected {SPEC} and {WEIGHTS})")
    data, digest = read_description(folder)
    spec = ModelSpec.parse(data, str(folder / SPEC))
    weights = read_weights(folder, digest)
    model = empty_model(spec)
    saved_in = [each.dtype for each in weights.values() if each.is_floating_point()]
    if saved_in:
        model = model.to(saved_in[0])
    load_weights(model, weights, str(folder / WEIGHTS))
    return model.to(device)


def read_description(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The ModelSpec of a saved model, as data, and its weights' SHA-256 (None in files of older versions)."""
    data = read_record(folder / SPEC)
    digest = data.pop(DIGEST, None)
    if digest is not None and not isinstance(digest, str):
        raise InputError(f"{short(folder / SPEC)}: damaged: {DIGEST!r} is no checksum")
    return data, digest


def weights_digest(folder: Path) -> str:
    """The SHA-256 of a saved model's weights; they are read only where files of older versions do not tell it.

    Raises InputError where there are none.
    """
    digest = read_description(folder)[1]
    waiting = folder / _waiting(digest or "")
    path = waiting if digest is not None and waiting.exists() else folder / WEIGHTS
    if not present(path):
        raise InputError(f"{short(path)}: no such file")
    return digest or file_digest(path)


def read_weights(folder: Path, digest: str | None) -> dict[str, Tensor]:
    """The tensors of a saved model, of any shape, by the names that `Model` gives them.

    digest: as `read_description` gives it. Raises InputError when they are damaged.
    """
    waiting = folder / _waiting(digest or "")
    weights = read_tensors(waiting if digest is not None and waiting.exists() else folder / WEIGHTS, digest)
    return unwrapped(weights)


def load_weights(model: Model, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights, each in the shape of the parameter it is named after, into a model.

    Raises InputError that says how they differ when they are of another model.
    """
    own = model.state_dict()
    weights = {_present_name(name, own, weights): tensor for name, tensor in weights.items()}
    faults = compare_tensors({name: list(tensor.shape) for name, tensor in own.items()}, weights)
    if faults:
        older = (words for part, words in REMADE.items() if any(part in n and n not in weights for n in own))
        raise InputError("; ".join((f"{source}: a checkpoint of another model: {faults}", *older)))
    model.load_state_dict(weights)


RENAMED = (
    ("mixer.qkv_proj.values.weight", "mixer.values.linear.weight"),
    ("mixer.qkv_proj.values.", "mixer.values."),
    ("mixer.out_proj.weight", "mixer.out_proj.linear.weight"),
)
"""Parts of names that parameters of older versions bear, and what they are called now (shaped attention)."""

REMADE = {
    "mixer.key_place": "nsa was remade with keys and values for each branch (see CHANGELOG.md): train it again, or "
    "load it with the version that saved it",
}
"""Parts of names that a mixer got when it became another, and what to do with weights of before, which lack them."""


def _present_name(name: str, own: Container[str], weights: Container[str]) -> str:
    """The name that a parameter saved as `name` has in the model; the same where nothing fits better."""
    if name not in own:
        for old, new in RENAMED:
            renamed = name.replace(old, new)
            if renamed in own and renamed not in weights:
                return renamed
    return name


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
