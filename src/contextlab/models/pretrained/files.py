"""`save_pretrained` and `from_pretrained`: their keywords, and the folder that they write and read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from contextlab.errors import InputError, nearest, unknown
from contextlab.files import write_atomic
from contextlab.models.hub import downloaded
from contextlab.models.io import SPEC, WRAPPED, compare_tensors, load_model, load_weights, save_model
from contextlab.models.pretrained.config import ContextlabConfig

if TYPE_CHECKING:
    from contextlab.models.pretrained.causal_lm import ContextlabForCausalLM
    from contextlab.models.stack import Model

REMOTE = "modeling_contextlab.py"
REMOTE_TEXT = '''"""Where transformers finds this model's classes where contextlab is installed but not yet imported.

It is run with trust_remote_code=True only.
"""

from contextlab.models.pretrained import ContextlabConfig, ContextlabForCausalLM

__all__ = ["ContextlabConfig", "ContextlabForCausalLM"]
'''

# Keywords with the values that change nothing here; any other value is refused. A callable takes a value and says.
SAVING: dict[str, Any] = {
    "push_to_hub": (False, None),
    "safe_serialization": (True, None),
    "save_function": callable,  # accelerate's and torch's: the file is written by us in any case
    "max_shard_size": (None, "50GB"),
    "variant": (None,),
    "token": (None,),
    "save_peft_format": (True,),
    "save_original_format": (True,),
    "distributed_checkpoint": (False,),
    "repo_id": (None,),
    "commit_message": (None,),
    "private": (None,),
}
LOADING: dict[str, Any] = {
    "quantization_config": (None,),
    "load_in_8bit": (False, None),
    "load_in_4bit": (False, None),
    "attn_implementation": (None,),
    "experts_implementation": (None,),
    "use_safetensors": (True, None),
    "weights_only": (True, None),
    "ignore_mismatched_sizes": (False, None),
    "low_cpu_mem_usage": (True, False, None),
    "trust_remote_code": (True, False, None),  # asked of the auto classes; here is no code to run
    "adapter_kwargs": lambda value: not (value or {}).get("_adapter_model_path"),
    "adapter_name": (None, "default"),
    "gguf_file": (None,),
    "variant": (None,),
    "from_tf": (False, None),
    "from_flax": (False, None),
    "tp_plan": (None,),
    "tp_size": (None,),
    "distributed_config": (None,),
    "device_mesh": (None,),
    "max_memory": (None,),
    "offload_folder": (None,),
    "offload_state_dict": (None, False),
    "offload_buffers": (False, None),
    "key_mapping": (None,),
    "fusion_config": (None,),
    "disable_mmap": (None, False, True),
    "use_kernels": (False, None),
    "kernel_config": (None,),
    "strict": (True, None),
    "code_revision": (None,),
    "_from_auto": (True, False),
    "_from_pipeline": lambda value: True,
    "_commit_hash": lambda value: True,
}
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
SERVED_LOADING = (
    "config", "dtype", "torch_dtype", "device_map", "output_loading_info", "state_dict", "generation_config",
    "subfolder", *HUB,
)  # fmt: skip
INSTEAD = {
    "push_to_hub": "save, then huggingface_hub.upload_folder(folder_path=..., repo_id=...)",
    "safe_serialization": "weights are always safetensors",
    "max_shard_size": "one file is written",
    "quantization_config": "load it, then quantize the model, for example by torchao's quantize_",
    "load_in_8bit": "load it, then quantize the model, for example by torchao's quantize_",
    "load_in_4bit": "load it, then quantize the model, for example by torchao's quantize_",
    "attn_implementation": "contextlab.ops.use_backend chooses how our layers compute",
    "adapter_kwargs": "load an adapter by peft.AutoPeftModelForCausalLM.from_pretrained(folder)",
    "use_safetensors": "weights are always safetensors",
    "weights_only": "weights are always safetensors, which hold nothing else",
}


def check_keywords(call: str, given: Mapping[str, Any], neutral: Mapping[str, Any], served: tuple[str, ...]) -> None:
    """Raises InputError for a keyword that is not known, or that has a value which would have to change something."""
    for name, value in given.items():
        if name not in neutral:
            raise InputError(f"{call}: {unknown('keyword', name, [*served, *(n for n in neutral if n[0] != '_')])}")
        allowed = neutral[name]
        fine = allowed(value) if callable(allowed) else any(value is each or value == each for each in allowed)
        if not fine:
            instead = INSTEAD.get(name)
            expected = "" if callable(allowed) else f"; it can be {allowed[0]!r} only, or left out"
            raise InputError(
                f"{call}: {name} is not taken for a model of contextlab" + (f": {instead}" if instead else expected)
            )


def save(wrapped: ContextlabForCausalLM, folder: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write config.json, generation_config.json, `REMOTE` and the files of `save_model`; others in the folder stay.

    state_dict: weights in place of the model's own, each in its parameter's shape [...].
    """
    if getattr(wrapped, "_hf_peft_config_loaded", False):
        raise InputError(
            "save_pretrained: the model has an adapter inside; put it in by peft.get_peft_model, whose save_pretrained "
            "writes the adapter and whose merge_and_unload gives a model to be saved here"
        )
    own = wrapped.state_dict()
    weights = own if state_dict is None else dict(state_dict)
    if state_dict is not None:
        shapes = {name: list(each.shape) for name, each in own.items()}
        plain = weights and not any(name.startswith(WRAPPED) for name in weights)  # of the model within
        named = {WRAPPED + name: each for name, each in weights.items()} if plain else weights
        faults = compare_tensors(shapes, named)
        if faults:
            raise InputError(f"save_pretrained: state_dict is of another model: {faults}")
        weights = named
    save_model(wrapped.model, folder, weights)
    config = wrapped.config
    config.architectures = [type(wrapped).__name__]
    config.dtype = next(iter(weights.values())).dtype
    ours = {"AutoConfig": type(config), "AutoModelForCausalLM": type(wrapped)}
    module = REMOTE.removesuffix(".py")
    config.auto_map = {
        **(getattr(config, "auto_map", None) or {}),
        **{name: f"{module}.{each.__name__}" for name, each in ours.items()},
    }
    config.save_pretrained(folder)
    write_atomic(folder / REMOTE, REMOTE_TEXT.encode())
    if wrapped.generation_config is not None:
        wrapped.generation_config.save_pretrained(folder)


def folder_of(name: str | Path | None, subfolder: str, hub: Mapping[str, Any]) -> Path:
    """The local folder of a folder's or a hub's name. hub: keywords of `HUB`."""
    if name is None:
        raise InputError(
            "from_pretrained: expected a folder or a hub name, got None; ContextlabForCausalLM(config) draws"
        )
    folder = Path(name)
    if not folder.exists():
        folder = downloaded(str(name), **{key: value for key, value in hub.items() if value is not None})
    return folder / subfolder if subfolder else folder


def model_in(folder: Path, state_dict: Mapping[str, Tensor] | None, dtype: torch.dtype | None) -> Model:
    """The model of a folder, with weights of its own or those of `state_dict`, each in its parameter's shape [...]."""
    model = load_model(folder)
    if state_dict is not None:
        load_weights(model, {k.removeprefix(WRAPPED): v for k, v in state_dict.items()}, "state_dict")
    return model.eval() if dtype is None else model.to(dtype).eval()


def config_in(
    folder: Path, given: Any, model: Model, fields: dict[str, Any]
) -> tuple[ContextlabConfig, dict[str, Any]]:
    """The configuration of a folder, and the keywords that are no fields of it.

    given: one in its place, or where it is. fields: keywords; those that bear a field's name change it.
    """
    spec = model.spec.model_dump(mode="json")
    if isinstance(given, ContextlabConfig):
        config, left = given, fields
    else:
        source = folder if given is None else Path(given)
        if (source / "config.json").exists() or source.is_file():
            read: Any = ContextlabConfig.from_pretrained(source, return_unused_kwargs=True, **fields)
            config, left = read
        else:  # written by `save_model`
            config, left = ContextlabConfig(spec), fields
    if type(model.spec).parse(config.spec, "config: spec") != model.spec:
        raise InputError(f"{folder}: config.json is of another model than {SPEC}; save the model again")
    config.follow(spec)
    config._name_or_path = str(folder)
    return config, left


def dtype_of(dtype: Any, torch_dtype: Any) -> torch.dtype | None:
    """The dtype that is asked for, under whichever name; None keeps the file's."""
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise InputError("dtype and torch_dtype are two names of one argument; give dtype")
    wanted = torch_dtype if dtype is None else dtype
    if wanted is None or wanted == "auto" or isinstance(wanted, torch.dtype):
        return wanted if isinstance(wanted, torch.dtype) else None
    names = ("float16", "bfloat16", "float32", "float64")
    found = getattr(torch, str(wanted).removeprefix("torch."), None)
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    near = nearest(str(wanted), names)
    raise InputError(
        f"dtype: expected 'auto' or one of {', '.join(names)}, got {wanted!r}"
        + (f"; the nearest is {near!r}" if near else "")
    )


def device_of(device_map: Any) -> torch.device | None:
    """The one device that a device map names; None where none is given."""
    if device_map is None:
        return None
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) == 1:
        (one,) = devices
        if one == "auto":
            return torch.accelerator.current_accelerator() or torch.device("cpu")
        try:
            return torch.device(one)
        except (RuntimeError, TypeError):
            pass
    raise InputError(
        "device_map: a model of contextlab is on one device: expected 'auto', 'cpu', 'cuda:0' or the like, got "
        f"{device_map!r}"
    )


def generation_in(folder: Path, config: ContextlabConfig) -> GenerationConfig:
    """How to generate: as the folder says, else as the configuration does."""
    if (folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)
