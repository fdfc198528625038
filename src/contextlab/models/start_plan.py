"""What becomes of each tensor where a model starts from a trained one: carried over, new, dropped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from contextlab.errors import InputError, unknown
from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.models.blocks import Block, InputBlock
from contextlab.models.stack import Model

Init = Literal["fresh", "copied", "zero", "averaged"]
INITS: tuple[Init, ...] = ("fresh", "copied", "zero", "averaged")

AVERAGED = ("mixer.qkv_proj.weight", "mixer.qkv_proj.bias", "mixer.conv.weight", "mixer.conv.bias")
"""Tensors of an attention layer, the end of their names, whose rows are the heads of queries, keys and values."""
LAST = ("out_proj.weight", "out_proj.bias")
"""The projections that end a mixer and an MLP, as `Model` knows them."""


@dataclass(frozen=True)
class Plan:
    """What becomes of the tensors. Those that several names share, as a tied read-out's, stand under the first one.

    carried: name in the new model -> name in the source of the tensor that it starts with.
    new: names of the tensors that the source does not give.
    dropped: names of the source's tensors that are not used.
    averaged: of those carried, the ones that are averages over heads.
    zeroed: of all, the ones that start as zeros.
    sizes: numbers in a tensor, by its name in the new model, then by its name in the source.
    converted: names of the tensors that a conversion makes of the source's. by: the conversion.
    forms: linear form -> names of the weights of those carried that are kept as their nearest in it, not as they are.
    """

    carried: Mapping[str, str]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    averaged: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()
    sizes: tuple[Mapping[str, int], Mapping[str, int]] = ({}, {})
    converted: tuple[str, ...] = ()
    by: str = ""
    forms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of the new model's numbers that are carried over."""
        whole = sum(self.sizes[0].values())
        return sum(self.sizes[0][name] for name in self.carried) / max(1, whole)

    def lines(self) -> list[str]:
        """What was carried over, is new and was dropped, a line each; what there is none of has no line."""
        moved = [name for name, origin in self.carried.items() if name != origin]
        told = [f"carried over: {len(self.carried)} of {len(self.sizes[0])} tensors, {self.share:.1%} of the numbers"]
        for words, names in (
            ("from another place", moved),
            ("averaged over heads", self.averaged),
            ("zero at the start", self.zeroed),
            (f"converted by {self.by}", self.converted),
            *((f"not as they are but as the nearest {form}", names) for form, names in self.forms.items()),
            ("new", self.new),
            ("dropped", self.dropped),
        ):
            if names:
                told.append(f"{words}: {', '.join(gathered(names))}")
        return told


def gathered(names: Iterable[str]) -> list[str]:
    """Names of tensors in fewer words: blocks.0.mlp.up.weight and blocks.1.mlp.up.weight as blocks.{0,1}.mlp.up.weight.

    Whole parts are told by their names: blocks.0.mixer.* stands for several tensors of it.
    """
    parts: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        depth = 3 if words[0] == "blocks" else 1
        parts.setdefault(".".join(words[:depth]), []).append(name)
    short = [f"{part}.*" if len(members) > 1 else members[0] for part, members in parts.items()]
    rest: dict[str, list[str]] = {}
    for name in short:
        words = name.split(".")
        form = ".".join(["blocks", "{}", *words[2:]]) if words[0] == "blocks" else name
        rest.setdefault(form, []).append(words[1] if words[0] == "blocks" else "")
    return [
        form.replace("{}", numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}", 1)
        for form, numbers in rest.items()
    ]


def make_plan(model: Model, source: Model, init: str, blocks: Sequence[int | None] | None) -> Plan:
    if init not in INITS:
        raise InputError(unknown("init", init, INITS))
    places = block_places(model, source, blocks)
    added = [index for index, old in enumerate(places) if old is None]
    if init in ("copied", "zero") and not added:
        raise InputError(
            f"init: {init!r} is for blocks that the source does not have, and there are none; leave it out"
        )
    if init == "zero":
        _require_ends(model, added)
    there = [old for old in places if old is not None]
    own, theirs = saved_tensors(model), saved_tensors(source)
    aliases = _aliases(source)
    carried: dict[str, str] = {}
    averaged: list[str] = []
    for name, tensor in own.items():
        index = block_of(name)
        old = None if index is None else places[index]
        if index is not None and old is None and init in ("copied", "zero"):
            if name.split(".")[2] in ("mixer_residual", "mlp_residual"):
                continue  # they start as the plain residual, which a copy need not be
            old = there[index % len(there)]
        if index is not None and old is None:
            continue
        origin = name if index is None else _moved(name, old)
        found = theirs.get(aliases.get(origin, origin))
        if found is None:
            continue
        if found.shape == tensor.shape:
            carried[name] = aliases.get(origin, origin)
        elif init == "averaged" and name.endswith(AVERAGED) and _can_average(source, old, model, index):
            carried[name] = aliases.get(origin, origin)
            averaged.append(name)
    if init == "averaged" and not averaged:
        raise InputError(
            "init: 'averaged' is for attention layers with fewer key and value heads, and there are none; give them "
            "kv_heads, or leave it out"
        )
    if not any(own[name].ndim > 1 for name in carried):
        raise InputError("nothing of the source fits: no matrix has the same name and shape; expected a like model")
    used = set(carried.values())
    ends = [name for name in own if block_of(name) in added and is_end(model, name)] if init == "zero" else []
    return Plan(
        {name: origin for name, origin in carried.items() if name not in ends},
        tuple(name for name in own if name not in carried and name not in ends),
        tuple(name for name in theirs if name not in used),
        tuple(averaged),
        tuple(ends),
        ({name: each.numel() for name, each in own.items()}, {name: each.numel() for name, each in theirs.items()}),
    )


def block_places(model: Model, source: Model, blocks: Sequence[int | None] | None) -> list[int | None]:
    """For each block of the model the source's that it was."""
    depth, before = model.spec.depth, source.spec.depth
    if blocks is None:
        return [index if index < before else None for index in range(depth)]
    places = list(blocks)
    if len(places) != depth:
        raise InputError(f"blocks: {len(places)} places for a model of {depth} blocks; expected one for each")
    for old in places:
        if old is not None and not 0 <= old < before:
            raise InputError(f"blocks: the source has no block {old}; expected 0 to {before - 1}, or None")
    if all(old is None for old in places):
        raise InputError("blocks: none is the source's; expected at least one")
    return places


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that is saved, of any shape, once: those that several names share under the first."""
    aliases = _aliases(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}


def _aliases(model: nn.Module) -> dict[str, str]:
    """Other names of a parameter or buffer -> its first one."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if first.setdefault(id(tensor), name) != name:
            found[name] = first[id(tensor)]
    return found


def block_of(name: str) -> int | None:
    """The number of the block that a tensor is of, by its name."""
    words = name.split(".")
    return int(words[1]) if words[0] == "blocks" and len(words) > 2 else None


def _moved(name: str, block: int | None) -> str:
    _, _, rest = name.removeprefix("blocks.").partition(".")
    return f"blocks.{block}.{rest}"


# ---- heads that are averaged ----


def _can_average(source: Model, place: int | None, model: Model, index: int | None) -> bool:
    """Whether the key and value heads of a block of the model are means of those of a block of the source."""
    if place is None or index is None:
        return False
    old, new = source.blocks[place].mixer, model.blocks[index].mixer
    if not (isinstance(old, AttentionMixer) and isinstance(new, AttentionMixer)):
        return False
    if (old.heads, old.head_dim) != (new.heads, new.head_dim) or new.kv_heads >= old.kv_heads:
        return False
    if old.kv_heads % new.kv_heads:
        fits = [n for n in range(1, old.kv_heads) if old.kv_heads % n == 0]
        raise InputError(
            f"init: averaged: the {old.kv_heads} key and value heads of block {index} cannot be averaged to "
            f"{new.kv_heads}; expected kv_heads of {', '.join(map(str, fits))}"
        )
    return True


def attention_of(model: Model, name: str) -> AttentionMixer:
    """The attention layer that a tensor is of, by its name."""
    index = block_of(name)
    assert index is not None
    mixer = model.blocks[index].mixer
    assert isinstance(mixer, AttentionMixer)
    return mixer


def average_heads(tensor: Tensor, old: AttentionMixer, new: AttentionMixer) -> Tensor:
    """The rows of q as they are, then the means of groups of k's heads, then of v's.

    tensor: [(H + 2 Hkv) K, ...] -> [(H + 2 Hkv') K, ...].
    """
    size, group = old.head_dim, old.kv_heads // new.kv_heads
    q, rest = tensor[: old.heads * size], tensor[old.heads * size :]
    means = rest.unflatten(0, (2, new.kv_heads, group, size)).mean(2).flatten(0, 2)
    return torch.cat((q, means))


# ---- blocks that start as the identity ----


def is_end(model: Model, name: str) -> bool:
    """Whether a tensor of a block is of a projection that ends a part of it."""
    index = block_of(name)
    assert index is not None
    if isinstance(model.blocks[index], InputBlock):  # what is before the last one keeps gradients
        return name.removeprefix(f"blocks.{index}.") in LAST
    return name.endswith(LAST)


def _require_ends(model: Model, added: Sequence[int]) -> None:
    """Refuse blocks that are not the identity when their output projections are zero."""
    if model.spec.residual == "none":
        raise InputError("init: 'zero': blocks without a residual connection are never the identity; take 'copied'")
    for index in added:
        block = model.blocks[index]
        parts = {"mixer": getattr(block, "mixer", None), "mlp": getattr(block, "mlp", None)}
        for part, module in parts.items() if isinstance(block, Block) else ():
            if module is not None and not any(name.endswith(LAST) for name, _ in module.named_parameters()):
                raise InputError(
                    f"init: 'zero': the {part} of block {index} ({type(module).__name__}) has no output projection "
                    "(out_proj) that could be zero; take 'copied' or 'fresh'"
                )


def require_identity(model: Model, added: Sequence[int]) -> None:
    """Raises InputError for a block, of those added, that is not the identity."""
    for index in added:
        block = model.blocks[index]
        if block.reads_shared:
            continue  # attention, which ends in its out_proj, on keys that are not at hand here
        if not is_identity(model, index):
            kind = type(block.mixer).__name__
            raise InputError(
                f"init: 'zero': a block of mixer {kind} adds more than its output projection (out_proj) gives, so that "
                "it is never the identity; take 'copied' or 'fresh'"
            )


@torch.no_grad()
def is_identity(model: Model, index: int) -> bool:
    """Whether a block, which makes its own keys, leaves some random vectors as they are."""
    parameter = next(model.parameters())
    generator = torch.Generator(parameter.device).manual_seed(0)
    shape = (1, 4, model.spec.width)
    x = torch.randn(shape, generator=generator, dtype=parameter.dtype, device=parameter.device)
    tokens = torch.zeros(shape[:2], dtype=torch.int64, device=parameter.device)
    y, _ = model.blocks[index](x, None, None, False, x, tokens if model.spec.read_in == "token" else None)
    return torch.equal(x, y)
