"""A narrower residual stream: rotated to its principal directions, of which the last are cut (SliceGPT)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes, relative_error
from contextlab.convert.calibration import Calibration
from contextlab.convert.channels import hidden_of, narrows, of_hidden
from contextlab.errors import InputError
from contextlab.mixers.layers import is_plain
from contextlab.mixers.softmax.attention import Attention
from contextlab.models import LayerSpec, Model, ModelSpec
from contextlab.models.outline import without_memory
from contextlab.registry import register


@register("conversion", "slice", family="width", papers=("2401.15024",), cases=({}, {"ratio": 0.5}))
@dataclass(frozen=True)
class Slice(Conversion):
    """A share of the stream's directions is cut, so that all matrices that read or write it are narrower (SliceGPT).

    The norms' weights go into the layers that read them; then the stream may be rotated without any change (2401.15024,
    theorem 1), here to the principal directions of what the norms give, over all norms and tokens of the data. The
    directions of least variance are cut: rows of what writes the stream and columns of what reads it. Attention keeps
    its heads, an MLP its channels. The paper has a rotation for each block, and a matrix in each shortcut between two;
    here all blocks share one, so that shortcuts stay as they are and no matrix is added.

    Of models with RMSNorm and plain residuals whose blocks are attention (or none) and dense or gated MLPs. A tied
    read-out gets a matrix of its own, as it takes in the last norm.

    ratio: of the directions that are cut.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    nothing: ClassVar[Mapping[str, Any] | None] = {"ratio": 0.0}
    takes: ClassVar[tuple[str, ...]] = ("attention",)

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.25

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """With a smaller `width`, and heads and MLPs of the sizes that they have. Raises InputError where it cannot."""
        _check(spec)
        left = max(1, spec.width - round(self.ratio * spec.width))
        changed: dict[str, Any] = {"width": left, "tied": False, "read_out_bias": spec.read_out_bias and not spec.tied}
        if spec.norm_eps is not None:  # sums of squares are divided by fewer
            changed["norm_eps"] = spec.norm_eps * spec.width / left
        mlp = of_hidden(spec.mlp, left, hidden_of(spec, spec.mlp)) if narrows(spec.mlp) else spec.mlp
        outline: Any = without_memory(spec)
        if outline is None:
            raise InputError(
                "slice: a layer of this model cannot be made without memory, so what comes out is not known"
            )
        layers = [_kept(spec, *each, left) for each in zip(spec.pattern(), outline.blocks, strict=True)]
        data = {**spec.model_dump(), **changed, "mlp": mlp.model_dump()}
        own = [layer.model_dump() for layer in layers[: len(spec.layers)]]
        return ModelSpec.parse({**data, "layers": own})

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        assert data is not None
        planned = self.plan(model.spec)
        folded = copied(model)
        if model.spec.tied:
            head: Any = folded.read_out
            head.weight = nn.Parameter(head.weight.clone())
        sites = list(_sites(folded))
        for site in sites:
            for name in (*site.reads, *site.writes):
                if not is_plain(folded.get_submodule(name)):
                    raise InputError(f"slice: {name} is not stored densely; slice before other methods")
            for name in site.reads:
                reader: Any = folded.get_submodule(name)
                reader.weight.mul_(site.norm.weight)
            site.norm.weight.fill_(1)
        moments = data.inputs_of(folded, [site.reads[0] for site in sites])
        basis = principal(torch.stack(list(moments.values())).sum(0), planned.width)
        tensors = dict(folded.state_dict())
        lines = []
        made = Model(planned).to(basis.device, next(folded.parameters()).dtype).eval()
        for site in sites:
            moment = moments[site.reads[0]]
            for name in site.reads:
                before = tensors[f"{name}.weight"].double()
                narrow = before @ basis
                tensors[f"{name}.weight"] = narrow
                lines.append(_line(folded, made, name, *relative_error(before, narrow @ basis.T, moment)))
            for name in site.writes:
                lines.append(_written(folded, made, name, tensors, basis))
        for name in ("read_in", "positions"):
            part: Any = getattr(folded, name)
            if part is not None:
                lines.append(_written(folded, made, name, tensors, basis))
        for name, tensor in made.state_dict().items():
            if name.endswith("norm.weight") and tensors[name].shape != tensor.shape:
                tensors[name] = torch.ones_like(tensor)
        made.load_state_dict(tensors)
        for site in _sites(made):
            site.norm.weight.fill_((model.spec.width / planned.width) ** 0.5)
        return Converted(made, lines)


class _Site(NamedTuple):
    """A norm, the layers that read what it gives, and those that write what its block makes of it to the stream."""

    norm: Any
    reads: list[str]
    writes: list[str]


def _sites(model: Model) -> Iterator[_Site]:
    """The norms of a model in order, the last one that of the read-out."""
    for i, each in enumerate(model.blocks):
        block: Any = each
        mixing = isinstance(block.mixer, Attention)
        reads, writes = [f"blocks.{i}.mixer.qkv_proj"] * mixing, [f"blocks.{i}.mixer.out_proj"] * mixing
        if mixing and block.mixer.gate_proj is not None:
            reads.append(f"blocks.{i}.mixer.gate_proj")
        after = [f"blocks.{i}.mlp.up"], [f"blocks.{i}.mlp.out_proj"]
        if block.mlp is not None and block.mlp_norm is None:
            yield _Site(block.mixer_norm, reads + after[0], writes + after[1])
            continue
        if mixing:
            yield _Site(block.mixer_norm, reads, writes)
        if block.mlp is not None:
            yield _Site(block.mlp_norm, *after)
    yield _Site(model.read_out_norm, ["read_out"], [])


def principal(moment: Tensor, count: int) -> Tensor:
    """The `count` orthonormal directions [D, count] of most variance, the largest first, of a second moment [D, D]."""
    return torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :count]


def _written(folded: Model, made: Model, name: str, tensors: dict[str, Tensor], basis: Tensor) -> Change:
    """Narrow, in `tensors`, what writes the stream: an embedding [N, D], or a layer's weight [D, I] and bias [D]."""
    part: Any = folded.get_submodule(name)
    before = part.weight.double()
    if isinstance(part, nn.Embedding):
        tensors[f"{name}.weight"] = before @ basis
        error, of = relative_error(before, before @ basis @ basis.T)
        return _line(folded, made, name, error, of)
    tensors[f"{name}.weight"] = basis.T @ before
    if part.bias is not None:
        tensors[f"{name}.bias"] = basis.T @ part.bias.double()
    return _line(folded, made, name, *relative_error(before, basis @ (basis.T @ before)))


def _line(folded: Model, made: Model, name: str, error: float, of: str) -> Change:
    did = f"{folded.spec.width} directions are {made.spec.width}"
    return Change(name, did, error, of, *(module_nbytes(each.get_submodule(name)) for each in (folded, made)))


def _kept(spec: ModelSpec, layer: LayerSpec, block: Any, width: int) -> LayerSpec:
    """The layer in a stream of this width, with the heads and the hidden channels that it has."""
    found = layer.model_dump()
    mixer = block.mixer
    if isinstance(mixer, Attention):
        sizes = {"heads": mixer.heads, "kv_heads": mixer.kv_heads, "head_dim": mixer.head_dim}
        found["options"] = {**layer.options, **sizes}
    if layer.mlp is not None and narrows(layer.mlp):
        found["mlp"] = of_hidden(layer.mlp, width, hidden_of(spec, layer.mlp)).model_dump()
    return LayerSpec.parse(found)


def _check(spec: ModelSpec) -> None:
    """Raises InputError for a model that cannot be rotated, saying which part is why."""
    layers = spec.pattern()
    other = next((each.mixer for each in layers if each.mixer not in ("attention", "none")), None)
    kinds = {(each.mlp or spec.mlp).kind for each in layers if not narrows(each.mlp or spec.mlp)} - {"none"}
    apart = any(each.kv == "shared" or each.share is not None or each.with_input for each in layers)
    for wrong, what in (
        (spec.norm != "rms", f"norm {spec.norm!r}; it is for RMSNorm (norm: rms)"),
        (spec.residual != "plain", f"residual {spec.residual!r}; it is for plain ones"),
        (spec.pool is not None, f"a read-out that pools ({spec.pool}); it is for one prediction a token"),
        (spec.position == "sinusoidal", "sinusoidal positions, which are not rotated; it is for rope, learned, none"),
        (spec.atoms is not None, "shared atoms; it is for projections of each layer's own"),
        (spec.exit is not None, "early exits, which read out every layer; slice before `calm`"),
        (bool(spec.linear), "linear layers that are not stored densely; slice before other methods"),
        (other is not None, f"mixer {other!r}; it is for attention and MLPs"),
        (bool(kinds), f"MLPs of kind {', '.join(sorted(kinds))}; it is for dense and gated ones such as 'gelu'"),
        (apart, "layers that share parts or read the input; it is for layers of their own"),
        (any(each.skip is not None for each in layers), "layers that tokens may skip; slice before `mod`"),
    ):
        if wrong:
            raise InputError(f"slice: the model has {what}")
