"""Fewer attention heads: those that matter least are cut out, and what is left makes up for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes, relative_error
from contextlab.convert.calibration import Calibration
from contextlab.convert.channels import refitted
from contextlab.convert.depth.blocks import may_go, of_layers, set_blocks
from contextlab.errors import InputError
from contextlab.mixers.layers import is_plain
from contextlab.mixers.softmax.attention import Attention
from contextlab.models import LayerSpec, Model, ModelSpec
from contextlab.models.blocks import make_mixer
from contextlab.models.outline import without_memory
from contextlab.registry import register


@register(
    "conversion",
    "heads",
    family="width",
    papers=("1905.09418", "2312.11983"),
    cases=({"share": 0.5}, {"share": 0.5, "refit": False}),
)
@dataclass(frozen=True)
class Heads(Conversion):
    """A share of each attention layer's heads is cut out, with their keys and values: less state, too.

    A head is worth the norm of what it adds to the layer's output, over all tokens: what the output loses where it
    alone is cut. Query heads that share a key head go with it. Then the projection out is solved anew, by least squares
    against the outputs as they were (the papers train gates, or add a bias). Of layers of mixer "attention" with more
    than one key head, positions "rope" or "none", and keys and weights of their own; others stay as they are.

    share: of the key heads that are cut, rounded to whole ones; one at least is left.
    refit: solve the projection out anew.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    nothing: ClassVar[Mapping[str, Any] | None] = {"share": 0.0}
    takes: ClassVar[tuple[str, ...]] = ("attention",)

    share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    refit: bool = True

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """With fewer `heads` and `kv_heads`. Raises InputError where no layer can lose any."""
        return self._planned(spec, self._left(spec))

    def _left(self, spec: ModelSpec) -> dict[int, tuple[int, int, int]]:
        """By a block's number: query heads, key heads and their size, as they are to be."""
        outline = without_memory(spec)
        found: dict[int, tuple[int, int, int]] = {}
        pattern, alone, able = spec.pattern(), may_go(spec), 0
        for i, block in enumerate(outline.blocks if outline is not None else ()):
            mixer = getattr(block, "mixer", None)
            own = i in alone and pattern[i].kv == "own" and pattern[i].share is None
            if own and type(mixer) is Attention and mixer.kv_heads > 1 and mixer.position in ("rope", "none"):
                left = max(1, mixer.kv_heads - round(self.share * mixer.kv_heads))
                able = max(able, mixer.kv_heads)
                if left < mixer.kv_heads:
                    matrices = (mixer.qkv_proj, mixer.out_proj, mixer.gate_proj)
                    if not all(is_plain(each) for each in matrices if each is not None):
                        raise InputError(
                            f"heads: blocks.{i}.mixer is not stored densely; cut heads before other methods"
                        )
                    found[i] = left * (mixer.heads // mixer.kv_heads), left, mixer.head_dim
        if not able:
            raise InputError(
                "heads: no layer of mixer 'attention' with several key heads, position 'rope' or 'none', and keys and "
                "weights of its own"
            )
        if self.share and not found:
            raise InputError(
                f"heads: share {self.share:g} of {able} key heads is none of them; the least that cuts one is "
                f"{1 / able:.3g}"
            )
        return found

    def _planned(self, spec: ModelSpec, left: Mapping[int, tuple[int, int, int]]) -> ModelSpec:
        if not left:
            return spec
        layers = spec.pattern()
        for i, (heads, kv_heads, head_dim) in left.items():
            sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
            layers[i] = LayerSpec.parse({**layers[i].model_dump(), "options": {**layers[i].options, **sizes}})
        return of_layers(spec, layers)

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`: block by block, each by what the blocks before it, with fewer heads, give it."""
        assert data is not None
        left = self._left(model.spec)
        planned = self._planned(model.spec, left)
        made, lines, data = copied(model), [], data.onward()
        for i, (_, count, _) in left.items():
            mixer: Any = made.blocks[i].mixer
            name = f"blocks.{i}.mixer.out_proj"
            moment = data.inputs_of(made, [name])[name]
            before, size = mixer.out_proj.weight.double(), module_nbytes(mixer)
            per = before.shape[1] // mixer.kv_heads
            stays = kept_groups(before, moment, per, count)
            columns = (stays[:, None] * per + torch.arange(per, device=stays.device)).flatten()
            weight = refitted(before, moment, columns) if self.refit else before[:, columns]
            padded = torch.zeros_like(before).index_copy(1, columns, weight)
            error, of = relative_error(before, padded, moment)
            layer = planned.pattern()[i]
            new = make_mixer(planned, layer, mixer.width, layer).to(before.device, mixer.out_proj.weight.dtype)
            new.load_state_dict(_cut(mixer, stays, columns, weight))
            holder: Any = getattr(made.blocks[i], "body", made.blocks[i])
            holder.mixer = new.eval()
            did = f"{mixer.kv_heads} key heads are {count}"
            lines.append(Change(f"blocks.{i}.mixer", did, error, of, size, module_nbytes(new)))
        set_blocks(made, planned, list(made.blocks))
        return Converted(made, lines)


def kept_groups(weight: Tensor, moment: Tensor, per: int, count: int) -> Tensor:
    """The numbers of the `count` groups of `per` columns each that add most to the output, int64 [count] in order.

    weight: [O, I]. moment: [I, I], of the inputs.
    """
    groups = weight.shape[1] // per
    blocks = moment.view(groups, per, groups, per).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, per, per]
    parts = weight.view(-1, groups, per).transpose(0, 1)  # [groups, O, per]
    worth = ((parts @ blocks) * parts).sum((1, 2))
    return worth.argsort(descending=True, stable=True)[:count].sort().values


def _cut(mixer: Any, stays: Tensor, columns: Tensor, out: Tensor) -> dict[str, Tensor]:
    """The tensors of the mixer with the key heads `stays` [count] alone, and its projection out as given."""
    d, inner = mixer.head_dim, mixer.heads * mixer.head_dim
    keys = (stays[:, None] * d + torch.arange(d, device=stays.device)).flatten()
    rows = torch.cat((columns, inner + keys, inner + mixer.kv_heads * d + keys))  # of q, k, v
    found = {}
    for name, tensor in mixer.state_dict().items():
        if name == "out_proj.weight":
            found[name] = out.to(tensor.dtype)
        elif name.startswith(("qkv_proj.", "conv.")):
            found[name] = tensor[rows]
        elif name.startswith("gate_proj."):
            found[name] = tensor[columns]
        else:
            found[name] = tensor
    return found
