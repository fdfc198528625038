"""Short causal depthwise convolution, as recurrent mixers use it before their state."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops.precision import without_autocast


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: Literal["silu"] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Each channel's weighted sum of its last W tokens: y_t = sum_i weight[:, i] x_{t-W+1+i} + bias.

    x: [B, T, C]. weight: [C, W], the newest token last. bias: [C] or None.
    initial_state: [B, W-1, C], the last inputs read before, oldest first; None means zeros.
    output_final_state: also return the last W-1 inputs, [B, W-1, C], in a buffer of their own.
    activation: "silu" or None, applied to the output.
    Returns (y [B, T, C], final state or None).
    """
    width = weight.shape[1]
    if weight.shape[0] != x.shape[-1]:
        raise InputError(f"causal_conv: weight has {weight.shape[0]} channels, x has {x.shape[-1]}")
    if initial_state is None:
        padded = F.pad(x, (0, 0, width - 1, 0))
    else:
        padded = torch.cat((initial_state.to(x.dtype), x), 1)
    weight = weight.to(x.dtype)
    if x.shape[1] == 1:
        y = (padded * weight.T).sum(1, keepdim=True)
    else:
        y = _ShiftedSum.apply(padded, weight)
    if bias is not None:
        y = y + bias.to(x.dtype)
    if activation == "silu":
        y = F.silu(y)
    # clone: a slice would keep the whole padded input alive
    return y, padded[:, x.shape[1] :].clone() if output_final_state else None


def naive_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of `causal_conv`: a window that slides over the tokens.

    Arguments as for `causal_conv`. Returns y [B, T, C] and the last inputs [B, W-1, C].
    """
    batch, length, channels = x.shape
    window = x.new_zeros(batch, weight.shape[1] - 1, channels) if initial_state is None else initial_state
    ys = []
    for t in range(length):
        window = torch.cat((window, x[:, t : t + 1]), 1)
        ys.append(torch.einsum("bwc,cw->bc", window, weight) + (0 if bias is None else bias))
        window = window[:, 1:]
    return torch.stack(ys, 1), window


class _ShiftedSum(torch.autograd.Function):
    """W shifted multiply-adds in the [..., B, T, C] layout: no transposition, one pass per tap each way.

    padded: [..., B, T + W - 1, C]. weight: [..., C, W], with the same leading dimensions: one convolution for each.
    """

    @staticmethod
    def forward(padded: Tensor, weight: Tensor) -> Tensor:
        length = padded.shape[-2] - weight.shape[-1] + 1
        taps = _taps(weight)
        y = padded[..., :length, :] * taps[0]
        for i in range(1, len(taps)):
            y.addcmul_(padded[..., i : i + length, :], taps[i])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        padded, weight = ctx.saved_tensors
        length, width = dy.shape[-2], weight.shape[-1]
        dx = dw = None
        if ctx.needs_input_grad[0]:
            taps = _taps(weight)
            dx = F.pad(dy * taps[0], (0, 0, 0, width - 1))
            for i in range(1, width):
                dx[..., i : i + length, :].addcmul_(dy, taps[i])
        if ctx.needs_input_grad[1]:
            dw = torch.stack([(dy * padded[..., i : i + length, :]).sum((-3, -2)) for i in range(width)], -1)
        return dx, dw

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Tensor) -> tuple[Tensor, int]:
        """One more dimension in front, of both."""
        size = info.batch_size
        padded, weight = (
            x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(inputs, in_dims, strict=True)
        )
        return _ShiftedSum.apply(padded, weight), 0


def _taps(weight: Tensor) -> tuple[Tensor, ...]:
    """[..., C, W] as W factors [..., 1, 1, C] of inputs [..., B, T, C]; of one convolution [C]."""
    return weight.unbind(-1) if weight.ndim == 2 else weight.unsqueeze(-3).unsqueeze(-3).unbind(-1)
