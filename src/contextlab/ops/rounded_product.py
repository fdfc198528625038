"""The three products of a linear layer that is trained in few bits: all that is multiplied is rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contextlab.ops.precision import without_autocast
from contextlab.ops.rounding import noise_of, straight_through

Rounds = Callable[[Tensor, Tensor | None], Tensor]
"""(rows [R, D], noise [R, D] in [0, 1) or None for the nearest) -> the rows rounded, each by itself."""


def rounded_product(x: Tensor, weight: Tensor, read: Tensor, dense: Tensor, rounds: Rounds, seed: int) -> Tensor:
    """read @ dense.T, with gradients that are products of rounded numbers, too (2505.19115).

    Forward: inputs and weights as they are given, rounded. Backward, with a gradient g [N, O] of the answers: that of
    the inputs is S(g) R(weight^T)^T, that of the weight S(g^T) S(x^T)^T, where R rounds to the nearest and S at random,
    right on average. Rows are rounded along what a product sums over, so that blocks are of outputs in the one and of
    tokens in the other, as where hardware multiplies blocks. Gradients pass straight through all rounding.

    x: [..., I] and weight: [O, I], floats. read, dense: the same, rounded. rounds: see `Rounds`. seed: of S, whose draw
    is a hash as of a weight's (`rounding.noise_of`). Returns [..., O].
    """
    y: Tensor = _Product.apply(x, weight, read, dense, rounds, seed)
    return y


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, read: Tensor, dense: Tensor, rounds: Rounds, seed: int) -> Tensor:
        return torch.nn.functional.linear(read, dense)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, _, ctx.rounds, ctx.seed = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(dy.dtype, weight.dtype)
        rows, drows, full = x.flatten(0, -2).to(wide), dy.flatten(0, -2).to(wide), weight.to(wide)

        def chance(rows: Tensor, which: int) -> Tensor:
            rows = rows.contiguous()
            return straight_through(ctx.rounds(rows, noise_of(rows, 4 * ctx.seed + which)), rows)

        dx = dweight = None
        if ctx.needs_input_grad[0]:
            nearest = straight_through(ctx.rounds(full.t(), None), full.t())  # [I, O]
            dx = (chance(drows, 1) @ nearest.t()).view_as(x).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (chance(drows.t(), 2) @ chance(rows.t(), 3).t()).to(weight.dtype)
        return dx, dweight, None, None, None, None
