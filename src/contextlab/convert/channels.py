"""Narrower MLPs: hidden channels that matter least are cut out, and what is left makes up for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from contextlab import registry
from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes, relative_error
from contextlab.convert.calibration import Calibration
from contextlab.errors import InputError
from contextlab.mixers.layers import Linear, is_plain
from contextlab.models import MlpSpec, Model, ModelSpec
from contextlab.models.mlp import FeedForward, StructuredLinear, hidden_width
from contextlab.models.outline import without_memory
from contextlab.registry import register

RIDGE = 1e-8
"""Of the mean of the moments' diagonal, so that channels that say the same can be solved for."""


@register(
    "conversion",
    "channels",
    family="width",
    papers=("2312.11983", "1707.06342"),
    cases=({}, {"share": 0.5, "refit": False}),
)
@dataclass(frozen=True)
class Channels(Conversion):
    """A share of each MLP's hidden channels is cut out: the MLP is narrower, and faster everywhere.

    A channel h_j is worth ||h_j|| ||w_j||, with w_j its column of the matrix out: what the MLP's output loses where it
    alone is cut (the structured form of Wanda that 2312.11983 compares with). Then the matrix out is solved anew, by
    least squares against the outputs as they were (1707.06342, eq. 7). Of dense and gated MLPs; others stay.

    share: of the channels that are cut.
    refit: solve the matrix out anew.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    nothing: ClassVar[Mapping[str, Any] | None] = {"share": 0.0}

    share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    refit: bool = True

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """With the MLPs' `ratio` made smaller. Raises InputError where no MLP can be narrowed."""
        layers = [layer.mlp or spec.mlp for layer in spec.pattern()]
        if not any(narrows(mlp) for mlp in layers):
            kinds = sorted({mlp.kind for mlp in layers})
            raise InputError(f"channels: cuts dense and gated MLPs such as 'gelu', the model has {', '.join(kinds)}")
        outline = without_memory(spec)
        for name, mlp in () if outline is None else _mlps(outline):
            _require_dense(name, mlp)
        changed = {"mlp": self._narrower(spec, spec.mlp).model_dump()}
        own = [
            layer.model_dump() | ({} if layer.mlp is None else {"mlp": self._narrower(spec, layer.mlp).model_dump()})
            for layer in spec.layers
        ]
        return ModelSpec.parse({**spec.model_dump(), **changed, "layers": own})

    def _narrower(self, spec: ModelSpec, mlp: MlpSpec) -> MlpSpec:
        if not narrows(mlp) or not self.share:
            return mlp
        return of_hidden(mlp, spec.width, self._left(hidden_of(spec, mlp)))

    def _left(self, hidden: int) -> int:
        return max(1, hidden - round(self.share * hidden))

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`: block by block, each by what the narrowed blocks before it give."""
        assert data is not None
        made, lines, data = copied(model), [], data.onward()
        for name, mlp in _mlps(made):
            out = mlp.out_proj
            _require_dense(name, mlp)
            moment = data.inputs_of(made, [f"{name}.out_proj"])[f"{name}.out_proj"]
            before, size = out.weight.double(), module_nbytes(mlp)
            stays = kept_channels(before, moment, self._left(out.in_features))
            weight = refitted(before, moment, stays) if self.refit else before[:, stays]
            padded = torch.zeros_like(before).index_copy(1, stays, weight)
            error, of = relative_error(before, padded, moment)
            parts = mlp.up.weight.unflatten(0, (-1, out.in_features))[:, stays].flatten(0, 1)
            mlp.up, mlp.out_proj = _linear(parts), _linear(weight.to(out.weight.dtype))
            did = f"{out.in_features} channels are {len(stays)}"
            lines.append(Change(name, did, error, of, size, module_nbytes(mlp)))
        made.spec = self.plan(model.spec)
        return Converted(made, lines)


def kept_channels(weight: Tensor, moment: Tensor, count: int) -> Tensor:
    """The numbers of the `count` channels that are worth most, int64 [count] in order.

    weight: [O, H], the matrix out. moment: [H, H], of the hidden channels.
    """
    worth = moment.diagonal().clamp_min(0).sqrt() * weight.double().norm(dim=0)
    return worth.argsort(descending=True, stable=True)[:count].sort().values


def refitted(weight: Tensor, moment: Tensor, stays: Tensor) -> Tensor:
    """The matrix [O, count] that makes of the channels that stay what is nearest to the outputs of all of them.

    weight: [O, H]. moment: [H, H], M = H^T H. stays: [count] int64. It solves V M[stays, stays] = W M[:, stays].
    """
    own = moment[stays][:, stays]
    diagonal = own.diagonal().mean().clamp_min(1e-30)
    damped = own + RIDGE * diagonal * torch.eye(len(stays), dtype=own.dtype, device=own.device)
    wanted = weight.double() @ moment[:, stays]
    return torch.linalg.solve(damped, wanted.T).T


def hidden_of(spec: ModelSpec, mlp: MlpSpec) -> int:
    """The hidden channels of a dense MLP in a model."""
    return hidden_width(spec.width, mlp.options.get("ratio", spec.mlp_ratio), _gated(mlp))


def of_hidden(mlp: MlpSpec, width: int, hidden: int) -> MlpSpec:
    """The dense MLP with so many hidden channels, in a stream of this width."""
    ratio = hidden / width * (3 / 2 if _gated(mlp) else 1)
    assert hidden_width(width, ratio, _gated(mlp)) == hidden
    return MlpSpec(kind=mlp.kind, options={**mlp.options, "ratio": ratio})


def _gated(mlp: MlpSpec) -> bool:
    gated: bool = registry.lookup("mlp", mlp.kind).factory.gated  # type: ignore[attr-defined]
    return gated


def narrows(mlp: MlpSpec) -> bool:
    """Whether an MLP of this spec has channels that can be cut."""
    if mlp.kind == "none":
        return False
    factory = registry.lookup("mlp", mlp.kind).factory
    dense = mlp.options.get("structure", "dense") == "dense"
    return isinstance(factory, type) and issubclass(factory, FeedForward) and dense


def _mlps(model: Model) -> Iterator[tuple[str, Any]]:
    """The dense MLPs of a model, by name, each once."""
    for name, module in model.named_modules():
        if isinstance(module, FeedForward) and not isinstance(module.up, StructuredLinear):
            yield name, module


def _require_dense(name: str, mlp: Any) -> None:
    if not (isinstance(mlp.out_proj, nn.Linear) and is_plain(mlp.out_proj) and is_plain(mlp.up)):
        raise InputError(f"channels: {name} is not stored densely; cut channels before other methods")


def _linear(weight: Tensor) -> Linear:
    """A linear layer without bias with this weight [O, I]."""
    made = Linear(weight.shape[1], weight.shape[0]).to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made
