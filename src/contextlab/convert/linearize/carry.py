"""What an attention layer's weights become in a mixer of another kind: queries, keys, values and output projection.

Most recurrences read queries, keys and values as attention does, and mixers here make them in one matrix whose first
rows they are. Mamba-2 reads the query as C, the key as B and the value as x (2405.21060; 2408.15237).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from contextlab import registry
from contextlab.errors import InputError
from contextlab.mixers.layers import is_plain
from contextlab.mixers.softmax.base import AttentionMixer


@dataclass(frozen=True)
class Target:
    """How a mixer holds what attention has.

    options: its options -> the attribute of the attention whose value they take, or a number.
    order: of the rows of its input projection. after: multiples of the heads' size that stand before them.
    square: whether its heads must fill the model's width. sized: whether its state's sides are the heads' sizes, which
    they are not behind a feature map.
    """

    options: Mapping[str, str | int]
    order: tuple[str, str, str] = ("q", "k", "v")
    after: int = 0
    square: bool = False
    sized: bool = True


HEADS = {"heads": "heads", "head_dim": "head_dim"}
TARGETS: dict[str, Target] = {
    "linear_attention": Target({"heads": "heads"}, square=True, sized=False),
    "lightning_attention": Target({"heads": "heads"}, square=True),
    "retention": Target({"heads": "heads", "expand_v": 1}, square=True),
    "gla": Target({"heads": "heads", "key_dim": "head_dim"}, square=True),
    "delta_net": Target(HEADS),
    "gated_delta_net": Target(HEADS),
    "kda": Target(HEADS),
    "supra": Target(HEADS),
    "rwkv7": Target({"heads": "heads"}, square=True),
    "mamba2": Target(
        {**HEADS, "state_size": "head_dim", "groups": "heads", "expand": 1}, ("v", "k", "q"), after=1, square=True
    ),
}
"""Mixers whose input projection takes queries, keys and values."""


@dataclass
class Carried:
    """What became of a layer's weights, as words for a person."""

    kept: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = {"carried": self.kept, "new": self.new, "dropped": self.dropped}
        return "; ".join(f"{what} {', '.join(names)}" for what, names in parts.items() if names)


def check_mixer(name: str, given: Mapping[str, Any]) -> registry.Entry:
    """The mixer of this name. Raises InputError where attention cannot become it, or it has no such options."""
    entry = registry.lookup("mixer", name)
    factory: Any = entry.factory
    if not factory.causal or factory.reads_tokens:
        why = "reads both ways" if not factory.causal else "reads token ids"
        raise InputError(f"{name!r} {why}, so attention cannot become it; take one of {', '.join(TARGETS)}")
    entry.check(given, path=name, given=("width",))
    return entry


def target_options(
    name: str, given: Mapping[str, Any], layer: Mapping[str, Any], old: AttentionMixer
) -> dict[str, Any]:
    """The options of the mixer `name` in place of the attention `old`: those given, then what the weights ask for.

    layer: the attention layer's own options, which mixers that know them keep.
    Raises InputError where the mixer cannot take the weights whatever its options.
    """
    entry = check_mixer(name, given)
    known = {each.name for each in entry.parameters}
    options = {key: value for key, value in layer.items() if key in known}
    inner = old.heads * old.head_dim
    if (target := TARGETS.get(name)) is not None:
        if target.square and inner != old.width:
            takes = ", ".join(key for key, other in TARGETS.items() if not other.square)
            raise InputError(
                f"{name}: its heads fill the width {old.width}, the teacher's {old.heads} heads of {old.head_dim} are "
                f"{inner} wide; take one of {takes}"
            )
        options |= {key: getattr(old, of) if isinstance(of, str) else of for key, of in target.options.items()}
    else:
        options |= {key: getattr(old, key) for key in ("heads", "kv_heads", "head_dim") if key in known}
    if "short_conv" in known and old.conv is not None:  # at least as wide as the teacher's
        usual = next(each.default for each in entry.parameters if each.name == "short_conv")
        options["short_conv"] = max(usual, old.conv.weight.shape[1])
    return {**options, **given}


def check_target(name: str, old: AttentionMixer, new: nn.Module) -> None:
    """Raises InputError where a mixer, which may be without memory, cannot take the weights of an attention."""
    target = TARGETS.get(name)
    if target is None:
        if "out_proj.weight" not in _alike(old, new) or len(_alike(old, new)) < 2:
            raise InputError(
                f"{name!r} cannot take the weights of attention: it has no projections of their shapes; take one of "
                f"{', '.join(TARGETS)}"
            )
        _check_conv(name, old, new)
        return
    heads, key, value = (int(getattr(new, what)) for what in ("heads", "key", "value"))
    if heads != old.heads or (target.sized and not key == value == old.head_dim):
        raise InputError(
            f"{name}: {heads} heads with keys of {key} and values of {value} cannot take the teacher's {old.heads} "
            f"heads of {old.head_dim}; leave these options out"
        )
    _check_conv(name, old, new)


def _check_conv(name: str, old: AttentionMixer, new: nn.Module) -> None:
    """Raises InputError where a mixer's short convolution cannot hold that of an attention."""
    conv = getattr(new, "conv", None)
    if old.conv is not None and conv is not None and conv.weight.shape[1] < old.conv.weight.shape[1]:
        raise InputError(
            f"{name}: short_conv {conv.weight.shape[1]} is narrower than the teacher's; use "
            f"{old.conv.weight.shape[1]} or more"
        )


def _alike(old: nn.Module, new: nn.Module) -> list[str]:
    """Names of the tensors that both have in one shape."""
    theirs = old.state_dict()
    return [name for name, tensor in new.state_dict().items() if name in theirs and theirs[name].shape == tensor.shape]


@torch.no_grad()
def carry(name: str, old: AttentionMixer, new: nn.Module) -> Carried:
    """Copy an attention's weights into a mixer that `check_target` has allowed. Returns what became of them.

    What is new starts as it is drawn, but for short convolutions, which start as the teacher's, or pass each token on.
    """
    for part in ("qkv_proj", "out_proj"):
        if not is_plain(getattr(old, part)):
            raise InputError(f"{part}: expected a plain linear layer; merge adapters and convert before quantizing")
    theirs, ours = old.state_dict(), new.state_dict()
    found = Carried()
    if name not in TARGETS:
        found.kept = _alike(old, new)
        for each in found.kept:
            ours[each].copy_(theirs[each])
        taps, conv = theirs.get("conv.weight"), ours.get("conv.weight")
        if conv is not None and "conv.weight" not in found.kept and len(conv) == len(theirs["qkv_proj.weight"]):
            conv.zero_()
            if taps is None:
                conv[:, -1] = 1  # the token itself
            else:
                conv[:, -taps.shape[1] :] = taps
                found.kept.append("conv.weight")
        found.new = [each for each in ours if each not in found.kept]
        found.dropped = [each for each in theirs if each not in found.kept]
        if old.position not in ("none", getattr(new, "position", old.position)):
            found.dropped.insert(0, f"positions ({old.position})")
        return found
    target = TARGETS[name]
    rows = heads_of(old, theirs["qkv_proj.weight"])
    size = old.heads * old.head_dim
    start = target.after * size
    in_proj = ours["in_proj.weight"]
    for place, part in enumerate(target.order):
        in_proj[start + place * size : start + (place + 1) * size] = rows[part]
    found.kept += ["q, k, v", "out_proj"]
    ours["out_proj.weight"].copy_(theirs["out_proj.weight"])
    conv = ours.get("conv.weight")
    taps = theirs.get("conv.weight")
    if conv is not None:
        conv[: 3 * size] = 0
        if taps is None:
            conv[: 3 * size, -1] = 1  # the token itself
        else:
            by_part = heads_of(old, taps)
            for place, part in enumerate(target.order):
                conv[place * size : (place + 1) * size, -taps.shape[1] :] = by_part[part]
            found.kept.append("short_conv")
    if name == "rwkv7":  # r, k and v are made of the token itself, as the teacher's
        ours["shift"][:3] = 0
    taken = {"in_proj.weight", "out_proj.weight"} | ({"conv.weight"} if taps is not None else set())
    rest = [] if in_proj.shape[0] == 3 * size else ["the other rows of in_proj"]
    found.new = rest + sorted({each.removesuffix(".weight") for each in ours if each not in taken})
    found.dropped = _dropped(old, conv is None and taps is not None, bool(getattr(new, "rotary", 0)))
    return found


def heads_of(old: AttentionMixer, rows: Tensor) -> dict[str, Tensor]:
    """Rows [(H + 2 Hkv) d, ...] of q, k and v, a key and a value for every query head: [H d, ...] each."""
    sizes = [count * old.head_dim for count in (old.heads, old.kv_heads, old.kv_heads)]
    q, k, v = rows.split(sizes)

    def each(part: Tensor) -> Tensor:
        return part.unflatten(0, (old.kv_heads, -1)).repeat_interleave(old.heads // old.kv_heads, 0).flatten(0, 1)

    return {"q": q, "k": each(k), "v": each(v)}


def _dropped(old: AttentionMixer, conv: bool, rotary: bool) -> list[str]:
    """What attention had and the mixer has not, in words. rotary: whether that one turns queries and keys, too."""
    words = {
        f"positions ({old.position})": old.position not in ("none", "rope" if rotary else ""),
        "biases": old.qkv_proj.bias is not None,
        "qk_norm": old.q_norm is not None,
        "output_gate": old.gate_proj is not None,
        "short_conv": conv,
    }
    return [name for name, had in words.items() if had]
