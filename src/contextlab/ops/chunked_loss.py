"""Position-wise work in pieces of the sequence, with recomputation: the Mini-Sequence Transformer (2407.15892)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from contextlab.errors import InputError
from contextlab.ops.dense import dense
from contextlab.ops.linear import working_dtype
from contextlab.ops.precision import without_autocast


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignored: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int = 1024,
) -> Tensor:
    """The cross-entropy of logits `hidden @ weight.T + bias`, of which only those of one piece are held at a time.

    Mini-Sequence Transformer's read-out (2407.15892): logits are computed piece by piece, and once more on the way
    back. Beside hidden and weight only one number a token is kept, in place of one for each symbol. It costs the
    logits' matrix product a second time and is exact: pieces change nothing but the order of the sums. Unlike the
    paper's, pieces are cut from all tokens of the batch in a row, so that rows need no common length, and the
    gradient of the weight is summed in place. Gradients are of first order.

    hidden: [..., D]. weight: [V, D]. targets: [...] int64. bias: [V] or None.
    ignored: the target of tokens that do not count.
    reduction: the mean over the tokens that count (nan where there is none), their sum, or none.
    chunk: tokens of a piece.

    Returns a scalar, or [...] with zeros at ignored tokens; float32 at least.
    """
    if chunk < 1:
        raise InputError(f"chunk must be at least 1, got {chunk}")
    if targets.shape != hidden.shape[:-1] or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise InputError(
            f"expected hidden [..., D], weight [V, D] and targets [...], got {list(hidden.shape)}, "
            f"{list(weight.shape)} and {list(targets.shape)}"
        )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise InputError(f"expected hidden and weight of one dtype, got {hidden.dtype} and {weight.dtype}")
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, bias, targets.flatten(), ignored, chunk)
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / (targets != ignored).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignored: int, chunk: int
    ) -> Tensor:
        """hidden: [N, D]. targets: [N]. Returns each token's loss [N]."""
        # What autocast makes of a matrix product.
        kind = hidden.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        total = hidden.new_empty(len(hidden), dtype=working_dtype(half))  # log of the sum of exp(logits)
        loss = torch.empty_like(total)
        counts = targets != ignored
        index = targets.where(counts, 0)
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            logits = _logits(hidden[part].to(half), weight.to(half), None if bias is None else bias.to(half))
            total[part] = logits.logsumexp(-1)
            loss[part] = total[part] - logits.gather(-1, index[part, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, index, counts, total)
        ctx.half, ctx.chunk = half, chunk
        return loss.masked_fill_(~counts, 0)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, index, counts, total = ctx.saved_tensors
        gradient = gradient.masked_fill(~counts, 0)
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if to_hidden else None
        d_weight = weight.new_zeros(weight.shape, dtype=working_dtype(weight.dtype)) if to_weight else None
        d_bias = bias.new_zeros(bias.shape, dtype=working_dtype(bias.dtype)) if to_bias else None
        used, shift = weight.to(ctx.half), None if bias is None else bias.to(ctx.half)
        for first in range(0, len(hidden), ctx.chunk):
            part = slice(first, first + ctx.chunk)
            tokens = hidden[part].to(ctx.half)
            d_logits = _logits(tokens, used, shift).sub_(total[part, None]).exp_()
            d_logits.scatter_add_(1, index[part, None], d_logits.new_full((len(tokens), 1), -1))
            d_logits.mul_(gradient[part, None])
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(ctx.half)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ used
            if d_weight is not None:
                if d_weight.dtype == ctx.half:
                    d_weight.addmm_(d_logits.T, tokens)
                else:
                    d_weight += d_logits.T @ tokens
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32 at least, in a buffer of their own."""
    return dense(hidden, weight, bias).to(working_dtype(hidden.dtype))


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor, chunk: int = 1024) -> Tensor:
    """`function(x)`, for a function of each token alone such as an MLP, piece by piece of the sequence.

    Mini-Sequence Transformer's MLP (2407.15892): what the function holds inside is held for one piece at a time, and
    computed a second time on the way back. A function that looks at several tokens gives something else in pieces:
    so does the balancing term of a mixture of experts.

    x: [B, T, D]. chunk: tokens of a row in a piece. Returns what the function gives for x, [B, T, ...].
    """
    if chunk < 1:
        raise InputError(f"chunk must be at least 1, got {chunk}")
    if not torch.is_grad_enabled():
        return torch.cat([function(piece) for piece in x.split(chunk, 1)], 1)
    return torch.cat([checkpoint(function, piece, use_reentrant=False) for piece in x.split(chunk, 1)], 1)
