"""Truncated singular value decompositions: of the weight, and of the weight as its inputs see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes, relative_error
from contextlab.convert.calibration import Calibration
from contextlab.convert.layers import chosen_layers, passed_over, planned_layers, read_by_block
from contextlab.convert.low_rank.base import Factored, factors
from contextlab.models import Model, ModelSpec
from contextlab.registry import register

LEAST = 1e-12
"""Of the largest eigenvalue: below it a direction counts as one that no input has."""


@register("conversion", "svd", family="low-rank", papers=("2403.07378",), cases=({}, {"rank": 3}))
@dataclass(frozen=True)
class Svd(Factored):
    """Each weight's nearest of a given rank, by truncated SVD; nothing is read.

    Layers that would take no fewer numbers so stay dense, and the lines say so; that all would is refused.

    rank: values between the two matrices.
    ratio: in place of a rank, the share of each layer's numbers that the two may take, below 1; default 0.5.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    """

    def root(self, weight: Tensor, moment: Tensor | None, sizes: Tensor | None) -> tuple[None, None]:
        """See `Factored.root`: the weight [O, I] as it is."""
        return None, None


@register("conversion", "asvd", family="low-rank", papers=("2312.05821",), cases=({}, {"rank": 3, "alpha": 1.0}))
@dataclass(frozen=True)
class Asvd(Factored):
    """SVD of the weight with its columns scaled by how large their inputs are (ASVD, 2312.05821, section 3.2).

    S is diagonal, S_ii = mean |x_i|^alpha over all tokens. The paper then searches a rank for each layer; here all have
    one rank, or one ratio.

    rank: values between the two matrices.
    ratio: in place of a rank, the share of each layer's numbers that the two may take, below 1; default 0.5.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    alpha: how much sizes count.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    alpha: Annotated[float, Field(ge=0, le=2)] = 0.5

    def sizes_of(self, data: Calibration, model: Model, names: list[str]) -> dict[str, Tensor]:
        """See `Factored.sizes_of`: mean |x_i|, [I]."""
        return data.mean_sizes_of(model, names)

    def root(self, weight: Tensor, moment: Tensor | None, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Factored.root`: a diagonal, [I]; of an input that is always zero the smallest other size, or 1."""
        assert sizes is not None
        some = sizes[sizes > 0]
        scale = torch.where(sizes > 0, sizes, some.min() if len(some) else 1.0) ** self.alpha
        return scale, 1 / scale


@register("conversion", "svd_llm", family="low-rank", papers=("2403.07378",), cases=({}, {"rank": 3}))
@dataclass(frozen=True)
class SvdLlm(Factored):
    """SVD of the weight as its inputs see it: of all factors of the rank, the layer's outputs lose least (SVD-LLM).

    With S S^T = X^T X the squared error of the outputs is the sum of the squared singular values of W S that are cut
    (2403.07378, theorem 3.2). S is the root by eigenvectors in place of the paper's Cholesky factor: the same product,
    and there where inputs do not fill the space, too.

    rank: values between the two matrices.
    ratio: in place of a rank, the share of each layer's numbers that the two may take, below 1; default 0.5.
    layers: names of the linear layers, with * for any part: "blocks.*.mlp.*".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def root(self, weight: Tensor, moment: Tensor | None, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Factored.root`: [I, I]."""
        assert moment is not None
        values, vectors = torch.linalg.eigh(moment)
        seen = values > LEAST * values[-1].clamp_min(0)
        size = values.clamp_min(0).sqrt()
        return vectors * size, (vectors * torch.where(seen, 1 / size, 0.0)).T


@register("conversion", "laser", family="low-rank", papers=("2312.13558",), cases=({"layers": "blocks.2.mlp.*"},))
@dataclass(frozen=True)
class Laser(Conversion):
    """One matrix or a few become their nearest of small rank, stored densely (LASER, 2312.13558): no byte is saved.

    The paper finds that some, mostly late MLP matrices, make the model better so; which, it searches by the loss on
    data, as `contextlab shrink --data` tells it.

    layers: names of the linear layers, with * for any part.
    keep: share of the largest possible rank that is kept, rounded down; at least 1.
    """

    layers: str
    keep: Annotated[float, Field(gt=0, le=1)] = 0.1

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """The same spec. Raises InputError where no layer is meant."""
        planned_layers(spec, self.layers)
        return spec

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        made = copied(model)
        found, lines = chosen_layers(made, self.layers), passed_over(made, self.layers)
        for names, moments in read_by_block(made, found, data):
            for name in names:
                layer, before = found[name], found[name].weight.double().clone()
                rank = max(1, int(self.keep * min(before.shape) + 1e-9))
                up, down = factors(before, rank)
                layer.weight.copy_(up @ down)
                error, of = relative_error(before, layer.weight, moments.get(name))
                size = module_nbytes(layer)
                lines.append(Change(name, f"rank {rank} of {min(before.shape)}, dense", error, of, size, size))
        return Converted(made, lines)
