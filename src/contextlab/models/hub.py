"""Load a model: ours from a folder, or a Hugging Face checkpoint, by folder or hub name.

`load` gives every causal language model of `transformers` the surface of `contextlab.models.Model`: `forward`, `read`
with a `State` that is handed on, `generate`, `state_nbytes`, `flops`. Only safetensors are read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from contextlab.errors import InputError, ResourceError, nearest
from contextlab.files import read_json
from contextlab.lazy import without_bars, without_logs
from contextlab.models.draws import OwnDraws
from contextlab.models.hub_model import HuggingFaceModel
from contextlab.models.hub_state import HuggingFaceSpec
from contextlab.models.imports import native_model, native_spec
from contextlab.models.io import SPEC, load_model
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def load(
    source: str | Path,
    *,
    native: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Model | HuggingFaceModel:
    """Load a model from a folder or from the Hugging Face hub.

    source: a folder that `save_model` or `save_pretrained` wrote, a checkpoint's folder (config.json and safetensors),
        or a hub name such as "openai-community/gpt2".
    native: import a checkpoint's weights into our own stack (`contextlab.models.imports`) instead of running
        transformers' model; the logits are the same.
    dtype: of the weights; None keeps the checkpoint's.

    Raises InputError when there is nothing to load there, the architecture is unknown, tensors are missing, extra or
    misshapen, or the weights are pickled; ResourceError when `transformers` is not installed.
    """
    folder = Path(source)
    if (folder / SPEC).exists():
        model: Model | HuggingFaceModel = load_model(folder, device)
        return model if dtype is None else model.to(dtype)
    if not folder.exists():
        folder = downloaded(str(source))
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: no model there (expected config.json and *.safetensors, or {SPEC})")
    config_json = read_json(folder / "config.json")
    kind = config_json.get("model_type")
    _check_files(folder)
    transformers = _transformers()
    _known(transformers, str(folder), kind)
    try:
        with (
            without_logs(),
            without_bars(),
        ):  # transformers imports torchao where that is installed; `_check_tensors` says what matters
            theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or "auto",
                use_safetensors=True,
                # torch's grouped products of experts know no float64
                **({"experts_implementation": "eager"} if dtype == torch.float64 else {}),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InputError(f"{folder}: {_line(error)}") from error
    _check_tensors(folder, info)
    theirs = theirs.eval().to(device)
    if native:
        tensors = dict(theirs.state_dict())
        return native_model(theirs.config, tensors, str(folder)).to(device)
    return HuggingFaceModel(theirs)


def describe_checkpoint(folder: str | Path) -> HuggingFaceSpec:
    """What the checkpoint in a folder is, from its config.json alone. Raises InputError as `load` does."""
    transformers = _transformers()
    folder = Path(folder)
    kind = read_json(folder / "config.json").get("model_type")
    _known(transformers, str(folder), kind)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    text = config.get_text_config()
    return HuggingFaceSpec(kind=kind, config=config.to_dict(), input_size=text.vocab_size, output_size=text.vocab_size)


def native_spec_of(folder: str | Path) -> ModelSpec:
    """The spec that `load(folder, native=True)` gives, from config.json alone. Raises InputError as it does."""
    transformers = _transformers()
    folder = Path(folder)
    _check_files(folder)
    _known(transformers, str(folder), read_json(folder / "config.json").get("model_type"))
    return native_spec(transformers.AutoConfig.from_pretrained(folder, local_files_only=True), str(folder))


def build_checkpoint(spec: HuggingFaceSpec, *, seed: int = 0) -> HuggingFaceModel:
    """A Hugging Face model with freshly drawn parameters, for costs and tests; no global generator is touched."""
    transformers = _transformers()
    _known(transformers, spec.kind, spec.kind)
    config = transformers.AutoConfig.for_model(**{**spec.config, "model_type": spec.kind})
    with OwnDraws(seed):
        return HuggingFaceModel(transformers.AutoModelForCausalLM.from_config(config).eval())


def _known(transformers: Any, source: str, kind: Any) -> None:
    """Raises InputError, with the nearest name, when transformers has no causal language model of that type."""
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in mapping:
        near = nearest(str(kind), mapping)
        hint = f"; the nearest that is known is {near!r}" if near else ""
        raise InputError(f"{source}: transformers has no causal language model of type {kind!r}{hint}")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ResourceError(
            "Hugging Face checkpoints need the package transformers; pip install 'contextlab[hf]'"
        ) from None
    return transformers


def downloaded(name: str, **options: Any) -> Path:
    """The local folder of a hub name. options: of `huggingface_hub.snapshot_download`.

    Raises InputError when it is none, or cannot be had.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"{name}: neither a folder nor a hub name; expected for example 'openai-community/gpt2'")
    _transformers()
    from huggingface_hub import snapshot_download

    try:
        files = ["*.json", "*.safetensors", "*.model", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=files, **options))
    except Exception as error:  # the hub's client raises errors of many libraries
        raise InputError(
            f"{name}: no such folder{_near(name)}, and the hub gave no checkpoint ({_line(error)})"
        ) from error


def _near(name: str) -> str:
    """`; did you mean 'runs/mine'?` of a folder that is there."""
    path = Path(name)
    folders = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
    near = nearest(path.name, folders)
    return "" if near is None else f" (did you mean {str(path.parent / near)!r}?)"


def _check_files(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if pickled:
        raise InputError(
            f"{folder}: {pickled[0]} is a pickle, which can run any code when it is read, so it is refused; where you "
            "trust it, load it with transformers and call model.save_pretrained(folder), which writes safetensors"
        )
    raise InputError(f"{folder}: no weights there (expected *.safetensors)")


def _check_tensors(folder: Path, info: dict[str, Any]) -> None:
    misshapen = [f"{name} is {list(has)}, expected {list(due)}" for name, has, due in info.get("mismatched_keys", ())]
    parts = {
        "missing": sorted(info["missing_keys"]),
        "extra": sorted(info["unexpected_keys"]),
        "of another shape": sorted(misshapen),
    }
    faults = [
        f"{what}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for what, names in parts.items()
        if names
    ]
    if faults:
        raise InputError(f"{folder}: the tensors are not those of config.json; {'; '.join(faults)}")


def _line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
