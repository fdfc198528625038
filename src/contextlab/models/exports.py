"""Our models in the form of transformers: config.json and safetensors that its own classes load; the imports' way back.

What a model is decides whether one of their architectures holds it, not where it came from: Llama, Mistral, Qwen2,
Qwen3 and Gemma. transformers itself is not needed to write it. Logits agree as those of an import do; Gemma's gains and
embedding are rounded once more, in the weights' dtype.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.files import plain_os_errors, read_json
from contextlab.mixers.layers import RMSNorm, is_plain
from contextlab.mixers.softmax.attention import Attention
from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.mixers.softmax.sliding_window import SlidingWindow
from contextlab.models.export_config import ExportPlan, export_config
from contextlab.models.hub import downloaded
from contextlab.models.io import SPEC, require_own
from contextlab.models.outline import without_memory
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model
from contextlab.ops.position import halves_of_pairs
from contextlab.tokenizer import FILES

THEIRS = "transformers"
"""Folder beside a saved model of ours that holds it in their form."""
CARRIED = (
    *FILES, "generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip
"""Files beside a checkpoint's weights that hold for what is made of it, too."""


def save_transformers(model: Model, folder: str | Path, like: str | Path | None = None) -> str:
    """Write a model as transformers would have saved it. Returns the architecture, such as "llama".

    folder: made where it is not there; config.json and model.safetensors are written.
    like: a checkpoint's folder, whose tokenizer and generation config are copied, and whose special tokens and longest
        sequence are kept; of the architectures that can hold the model, its own is taken where it is one.

    Raises InputError where none of the architectures can hold the model; it says what stands in the way.
    """
    source = None if like is None else Path(like)
    told = read_json(source / "config.json") if source is not None and (source / "config.json").exists() else {}
    config, tensors = transformers_form(model, told)
    folder = Path(folder)
    with plain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in CARRIED if source is not None else ():
            if (source / name).is_file():  # type: ignore[operator]
                shutil.copyfile(source / name, folder / name)  # type: ignore[operator]
        save_file(
            {name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return str(config["model_type"])


def check_exportable(spec: ModelSpec) -> None:
    """Raises InputError where no architecture of transformers can hold a model of this spec, whatever its weights.

    Biases may still stand in the way; and of a model that cannot be made without memory nothing is said.
    """
    model = without_memory(spec)
    if model is not None:
        _kinds(_planned(model))


def origin_of(source: str | Path) -> Path | None:
    """The checkpoint in transformers' form that a model is, or that lies beside it; None where there is none.

    source: a folder, or a name on the hub that has been loaded from there.
    """
    folder = Path(source)
    if not folder.exists():
        return downloaded(str(source)) if ":" not in str(source) else None
    found = folder / THEIRS if (folder / SPEC).exists() else folder
    return found if (found / "config.json").exists() else None


def transformers_form(model: Model, like: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model's config.json and tensors, of any shape, by their names in transformers.

    like: another config.json, of which special tokens, the longest sequence and, where it fits, the type are taken.

    Raises InputError as `save_transformers` does.
    """
    require_own(model, "save_transformers")
    like = like or {}
    plan = _planned(model)
    kinds = _kinds(plan)
    kind = like["model_type"] if like.get("model_type") in kinds else kinds[0]
    tensors, left = _tensors(model, plan, kind)
    for name, tensor in left.items():
        if bool(tensor.any()):
            raise InputError(f"{name} has no place in transformers' {kind}")
    return export_config(model.spec, plan, kind, tensors, like), tensors


def _planned(model: Model) -> ExportPlan:
    spec = model.spec
    _require(spec)
    facts: list[tuple[Any, ...]] = []
    windows = []
    for i, layer in enumerate(spec.pattern()):
        if layer.kv == "shared" or layer.share is not None or layer.with_input:
            raise InputError(f"layer {i} shares keys or weights with another, or reads the model's input")
        if layer.skip is not None:
            raise InputError(f"layer {i} lets only some tokens through (skip)")
        block: Any = model.blocks[i]
        mixer, mlp = block.mixer, block.mlp
        if type(mixer) not in (Attention, SlidingWindow):
            raise InputError(f"layer {i} is {layer.mixer!r}, not attention")
        if mlp is None:
            raise InputError(f"layer {i} has no MLP")
        _require_attention(mixer, i)
        gate = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}.get((layer.mlp or spec.mlp).kind)
        if gate is None or (gate != "silu" and mlp.form != "tanh"):
            raise InputError(f"layer {i} has the MLP {(layer.mlp or spec.mlp).kind!r}, not swiglu or geglu with tanh")
        if not all(map(is_plain, (mixer.qkv_proj, mixer.out_proj, mlp.up, mlp.out_proj))):
            raise InputError(f"weights of layer {i} are stored in few bits, packed or in factors")
        windows.append(mixer.window if isinstance(mixer, SlidingWindow) else None)
        norm = None if mixer.q_norm is None else _eps(mixer.q_norm, mixer.qkv_proj.weight.dtype)
        facts.append(
            (mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.rope_base, mixer.rope_scaling, norm,
             mlp.out_proj.in_features, gate)
        )  # fmt: skip
    names = (
        "heads", "kv_heads", "head_dim", "rope_base", "rope_scaling", "qk_norm", "width of the MLP", "kind of MLP"
    )  # fmt: skip
    for what, values in zip(names, zip(*facts, strict=True), strict=True):
        if len(set(values)) > 1:
            raise InputError(f"layers differ in {what}: {_listed(values)}")
    if not is_plain(model.read_out) or type(model.read_in) is not nn.Embedding:
        raise InputError("read_in or read_out is stored in few bits, packed or in factors")
    mixers: list[AttentionMixer] = [block.mixer for block in model.blocks]  # type: ignore[misc]
    eps = _eps(model.read_out_norm, mixers[0].qkv_proj.weight.dtype)
    if facts[0][5] not in (None, eps):
        raise InputError(f"norm_eps of queries and keys is {facts[0][5]:g}, that of the model {eps:g}")
    return ExportPlan(
        mixers[0], tuple(windows), facts[0][6], facts[0][7],
        any(_nonzero(each.qkv_proj.bias) for each in mixers), any(_nonzero(each.out_proj.bias) for each in mixers), eps,
    )  # fmt: skip


def _require(spec: ModelSpec) -> None:
    """Refuse what no layer tells."""
    needed = {
        "read_in": "token", "pool": None, "block": "sequential", "residual": "plain", "atoms": None, "loops": 1,
        "norm": "rms", "exit": None,
    }  # fmt: skip
    for key, wanted in needed.items():
        if getattr(spec, key) != wanted:
            raise InputError(f"{key} is {getattr(spec, key)!r}, not {wanted!r}")
    if spec.position not in ("rope", "none"):  # "none" may stand beside layers that say "rope"
        raise InputError(f"position is {spec.position!r}, not 'rope'")
    if spec.input_size != spec.output_size:
        raise InputError(f"it reads {spec.input_size} tokens and answers with {spec.output_size}")


def _require_attention(mixer: AttentionMixer, layer: int) -> None:
    amiss = {
        f"position {mixer.position!r}": mixer.position != "rope",
        "rope_fraction": mixer.rotary != mixer.head_dim,
        "output_gate": mixer.gate_proj is not None,
        "short_conv": mixer.conv is not None,
        "plain_tokens": mixer.plain_tokens > 0,
        "rope_scaling 'p_rope'": mixer.rope_scaling is not None and mixer.rope_scaling.kind == "p_rope",
    }
    if isinstance(mixer, SlidingWindow):
        amiss |= {"sinks": mixer.sinks > 0, "dilation": mixer.dilation > 1}
    if found := [name for name, has in amiss.items() if has]:
        raise InputError(f"layer {layer} has {found[0]}")


def _kinds(plan: ExportPlan) -> list[str]:
    """The architectures that can hold the model, the plainest first. Raises InputError where none can."""
    normed, windows = plan.mixer.q_norm is not None, set(plan.windows)
    gelu, sizes = plan.gate != "silu", len(windows - {None})
    whole = plan.mixer.width % plan.mixer.heads == 0
    can = {
        "llama": not gelu and not normed and windows == {None} and whole,  # which transformers asks of it alone
        "mistral": not gelu and not normed and len(windows) == 1 and not (plan.bias or plan.out_bias),
        "qwen2": not gelu and not normed and sizes <= 1 and not plan.out_bias,
        "qwen3": not gelu and normed and sizes <= 1,
        "gemma": gelu and not normed and windows == {None},
    }
    found = [kind for kind, fits in can.items() if fits]
    if found:
        return found[::-1] if plan.bias and not plan.out_bias else found  # Qwen2 stores no biases of the output
    if sizes > 1:
        raise InputError(f"layers have windows of several sizes: {_listed(sorted(windows - {None}))}")
    if not (gelu or normed or whole) and windows == {None}:
        raise InputError(
            f"its width {plan.mixer.width} is no multiple of its {plan.mixer.heads} heads, and it has biases"
        )
    what = "windows" if windows != {None} else "normed queries and keys"
    beside = "MLPs of GELU" if gelu else "biases"
    raise InputError(f"it has {what} beside {beside}")


def _tensors(model: Model, plan: ExportPlan, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Their tensors, and those of ours, of any shape, that they have no place for."""
    left = {name: each.detach().cpu() for name, each in model.state_dict().items()}
    mixer, gemma = plan.mixer, kind == "gemma"
    size = mixer.head_dim
    rows = [mixer.heads * size, mixer.kv_heads * size, mixer.kv_heads * size]
    by_bias = kind == "qwen2" or (kind != "mistral" and (plan.bias or plan.out_bias))

    def halves(each: Tensor) -> Tensor:
        return halves_of_pairs(each.unflatten(0, (-1, size)).movedim(1, -1), size).movedim(-1, 1).flatten(0, 1)

    def gain(name: str) -> Tensor:
        weight = left.pop(name)
        return weight - 1 if gemma else weight

    read_in = left.pop("read_in.weight")
    read_out = left.pop("read_out.weight", read_in)
    found = {"model.embed_tokens.weight": read_in, "model.norm.weight": gain("read_out_norm.weight")}
    if gemma:
        root = torch.tensor(model.spec.width**0.5, dtype=torch.float32).to(read_in.dtype)
        tied = torch.equal(read_in, read_out * root)
        found["model.embed_tokens.weight"] = read_out if tied else read_in / root
    else:
        tied = model.spec.tied
    if not tied:
        found["lm_head.weight"] = read_out.clone()
    for i in range(model.spec.depth):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        parts = left.pop(f"{ours}mixer.qkv_proj.weight").split(rows)
        out = left.pop(f"{ours}mixer.out_proj.weight")
        made = dict(zip(("q", "k", "v", "o"), (halves(parts[0]), halves(parts[1]), parts[2], out), strict=True))
        found |= {f"{theirs}self_attn.{name}_proj.weight": each for name, each in made.items()}
        if by_bias:
            bias = left.pop(f"{ours}mixer.qkv_proj.bias", out.new_zeros(sum(rows))).split(rows)
            made = {"q": halves(bias[0]), "k": halves(bias[1]), "v": bias[2]}
            if kind != "qwen2":
                made["o"] = left.pop(f"{ours}mixer.out_proj.bias", out.new_zeros(out.shape[0]))
            found |= {f"{theirs}self_attn.{name}_proj.bias": each for name, each in made.items()}
        if mixer.q_norm is not None:
            for name in ("q_norm", "k_norm"):
                found[f"{theirs}self_attn.{name}.weight"] = halves(left.pop(f"{ours}mixer.{name}.weight"))
        found[f"{theirs}input_layernorm.weight"] = gain(f"{ours}mixer_norm.weight")
        found[f"{theirs}post_attention_layernorm.weight"] = gain(f"{ours}mlp_norm.weight")
        gate, up = left.pop(f"{ours}mlp.up.weight").chunk(2)
        found |= {f"{theirs}mlp.gate_proj.weight": gate, f"{theirs}mlp.up_proj.weight": up}
        found[f"{theirs}mlp.down_proj.weight"] = left.pop(f"{ours}mlp.out_proj.weight")
    return found, left


def _eps(norm: nn.Module, dtype: torch.dtype) -> float:
    """What a norm adds to the mean square; PyTorch's default is the dtype's precision."""
    if not isinstance(norm, RMSNorm):
        raise InputError(f"it has the norm {type(norm).__name__}, not RMSNorm")
    eps = norm.eps
    return torch.finfo(dtype).eps if eps is None else float(eps)


def _nonzero(bias: Tensor | None) -> bool:
    """Whether there is a bias that does something; of one in outline nothing is known, and it may be all zeros."""
    return bias is not None and not bias.is_meta and bool(bias.any())


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
