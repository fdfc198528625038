"""Attention to multi-head latent attention: one low-rank latent and one rotary key a token for all heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.convert.base import Conversion, Converted
from contextlab.convert.calibration import Calibration
from contextlab.convert.mixing import LayerChoice, attention_of, changes_of, choose, rebuilt, with_layers
from contextlab.errors import InputError
from contextlab.mixers.layers import is_plain
from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.mixers.softmax.latent import LatentAttention
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model
from contextlab.registry import register


@register(
    "conversion",
    "mla",
    family="kv",
    papers=("2502.14837", "2502.07864"),
    cases=({"rank": 8}, {"rank": 4, "layers": [0]}, {}),
)
@dataclass(frozen=True)
class Mla(Conversion):
    """Keys and values of all heads become linear maps of one latent, by a joint singular value decomposition.

    Rotary positions cannot be behind such a map. As in TransMLA (2502.07864, section 4) they are kept in one rotary key
    for all heads: for each pair of dimensions that turns together, the heads' keys are complex numbers z_1, ..., z_G,
    and their first principal component is kept rotating, which is the best that one key can do; a phase of each head
    goes into its queries. The rest of the keys loses its positions and joins the latent, as in MHA2MLA (2502.14837).
    Principal components and decomposition are those of the inputs in the calibration data, or of white inputs without.

    Exact at full rank for attention without positions, and with rotary ones where there is one key head, or where the
    heads' keys differ by a factor of each pair only. Else what the positions of the rest were worth is lost until the
    model is trained on.

    rank: size of the latent; default all that there is, at most the width. TransMLA's balance of keys and values is
        done: both are scaled to the same mean square before the decomposition.
    layers: which attention layers: "all", "half" (the last of each two stays) or numbers such as "0,2,4".
    """

    takes: ClassVar[tuple[str, ...] | None] = ("attention",)

    rank: PositiveInt | None = None
    layers: LayerChoice = "all"

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Conversion.plan`."""
        changes = {}
        for i in choose(spec, self.layers, kinds=("attention",)):
            old, layer = attention_of(spec, i), spec.pattern()[i]
            refuse(old, i)
            turned, base = _rotary(old)
            full = min(old.width, 2 * old.kv_heads * old.head_dim)
            if self.rank is not None and self.rank > full:
                raise InputError(f"rank {self.rank} is more than keys and values of layer {i} have; the most is {full}")
            options: dict[str, Any] = {
                "heads": old.heads, "head_dim": old.head_dim, "rope_dim": turned, "rank": self.rank or full,
                "rope_base": base, "latent_norm": False,
            }  # fmt: skip
            changes[i] = layer.model_copy(update={"mixer": "mla", "options": options})
        return with_layers(spec, changes)

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        layers = choose(model.spec, self.layers, kinds=("attention",))
        new = rebuilt(model, self.plan(model.spec), layers, generator)
        names = [f"blocks.{i}.mixer.qkv_proj" for i in layers]
        moments: dict[str, Tensor] = {} if data is None else data.inputs_of(model, names)
        words = {}
        for i, name in zip(layers, names, strict=True):
            old, made = model.blocks[i].mixer, new.blocks[i].mixer
            assert isinstance(old, AttentionMixer)
            assert isinstance(made, LatentAttention)
            kept, rotary = fill(old, made, moments.get(name))
            words[i] = f"to latents of {made.rank}, {kept:.2%} of keys and values kept" + (
                f"; {rotary:.2%} of the rotary keys in one" if made.rope_dim else ""
            )
        return Converted(new, changes_of(model, new, words, data))


def refuse(old: AttentionMixer, layer: int) -> None:
    """Raises InputError for attention that `mla` has no like of."""
    scaling = old.rope_scaling
    amiss = {
        f"position {old.position!r}": old.position not in ("rope", "none"),
        "qk_norm": old.q_norm is not None,
        "biases": old.qkv_proj.bias is not None,
        "output_gate": old.gate_proj is not None,
        "short_conv": old.conv is not None,
        f"rope_scaling {scaling.kind if scaling else ''!r}": scaling is not None and scaling.kind != "p_rope",
    }
    if found := [name for name, has in amiss.items() if has]:
        raise InputError(
            f"mla: layer {layer} has {found[0]}, which latent attention has not; expected plain attention with rotary "
            "positions or none; 'gqa' and 'window' take it as it is"
        )


def _rotary(old: AttentionMixer) -> tuple[int, float]:
    """Dimensions of a head that really turn, and the base by which so many of `mla` turn as they do."""
    if not old.rotary:
        return 0, 10000.0
    scaling = old.rope_scaling
    turned = old.rotary if scaling is None else 2 * math.floor(scaling.keep * (old.rotary // 2) + 1e-6)
    return turned, old.rope_base ** (turned / old.rotary)


def fill(old: AttentionMixer, made: LatentAttention, moment: Tensor | None) -> tuple[float, float]:
    """Write an attention as latent attention. Returns the shares of squares that are kept, of latents and rotary keys.

    moment: X^T X [width, width] of the attention's inputs X; None takes the identity.
    """
    if not (is_plain(old.qkv_proj) and is_plain(old.out_proj)):
        raise InputError("mla: expected plain linear layers; merge adapters and convert before quantizing")
    weight = old.qkv_proj.weight.double()
    heads, groups, size, turned = old.heads, old.kv_heads, old.head_dim, made.rope_dim
    each = heads // groups
    q, k, v = weight.split([heads * size, groups * size, groups * size])
    q, k, v = q.view(heads, size, -1), k.view(groups, size, -1), v.view(groups, size, -1)
    moment = torch.eye(old.width, dtype=torch.float64, device=weight.device) if moment is None else moment
    root = _root(moment.to(weight.device))

    rotary_kept, q_rope, k_rope, rest = 1.0, q[:, :0], k[0, :0], k.clone()
    if turned:
        z = torch.complex(k[:, 0:turned:2], k[:, 1:turned:2]).transpose(0, 1)  # [pairs, groups, width]
        seen = z @ root.to(z.dtype)
        u, s, _ = torch.linalg.svd(seen, full_matrices=False)
        first = u[..., :1]  # [pairs, groups, 1]
        main = first.mH @ z  # [pairs, 1, width], the key that goes on turning
        rotary_kept = _share(s[:, :1].square(), s.square())
        k_rope = torch.stack((main.real, main.imag), 2).flatten(0, 2)  # rows: real, imaginary of each pair
        lost = z - first @ main
        rest[:, 0:turned:2], rest[:, 1:turned:2] = lost.real.transpose(0, 1), lost.imag.transpose(0, 1)
        # Re(conj(q) u main) = Re(conj(conj(u) q) main): the phase and size of each group go into its queries.
        phase = first.squeeze(-1).T.conj().repeat_interleave(each, 0)  # [heads, pairs]
        zq = torch.complex(q[:, 0:turned:2], q[:, 1:turned:2]) * phase.unsqueeze(-1)
        q_rope = torch.stack((zq.real, zq.imag), 2).flatten(1, 2)

    keys, values = rest.flatten(0, 1), v.flatten(0, 1)
    balance = _size(values, root) / max(_size(keys, root), 1e-12)
    balance = balance if balance > 0 else 1.0
    joint = torch.cat((keys * balance, values)) @ root
    u, s, _ = torch.linalg.svd(joint, full_matrices=False)
    u, kept = u[:, : made.rank], _share(s[: made.rank].square(), s.square())
    latent = u.T @ torch.cat((keys * balance, values))  # the projection on the directions that are kept
    up_k, up_v = (u[: len(keys)] / balance).view(groups, size, -1), u[len(keys) :].view(groups, size, -1)
    up = torch.cat((up_k, up_v), 1).repeat_interleave(each, 0)

    # `mla` divides scores by the root of all of a query's dimensions.
    scale = math.sqrt((size + turned) / size)
    weights = made.state_dict()
    weights["q_up.weight"].copy_(torch.cat((q, q_rope), 1).flatten(0, 1) * scale)
    weights["kv_down.weight"].copy_(torch.cat((_rows(latent, made.rank), k_rope)))
    weights["kv_up.weight"].copy_(_rows(up.flatten(0, 1).T, made.rank).T)
    weights["out_proj.weight"].copy_(old.out_proj.weight)
    return kept, rotary_kept


def _rows(matrix: Tensor, count: int) -> Tensor:
    """[n, m] with rows of zeros up to `count`."""
    return torch.cat((matrix, matrix.new_zeros(count - len(matrix), matrix.shape[1])))


def _root(moment: Tensor) -> Tensor:
    """The symmetric root of a second moment [I, I], by which outputs count; its scale means nothing."""
    values, vectors = torch.linalg.eigh(moment / moment.diagonal().mean().clamp_min(1e-30))
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _size(rows: Tensor, root: Tensor) -> float:
    return float((rows @ root).square().mean().sqrt())


def _share(part: Tensor, whole: Tensor) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total > 0 else 1.0
