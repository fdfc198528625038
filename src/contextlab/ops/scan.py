"""The elementwise linear recurrence and the selective scan of state-space models, without a loop over time.

h_t = exp(g_t) h_{t-1} + x_t is computed in two levels: the positions of all chunks one after the other, all chunks
at once, and then the states from chunk to chunk. That is four passes over memory and 2 sqrt(T) steps. Decays enter
only as exp of sums of g <= 0, so nothing overflows and nothing is divided.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from contextlab.errors import InputError
from contextlab.ops.linear import working_dtype
from contextlab.ops.precision import without_autocast


@without_autocast
def linear_scan(x: Tensor, g: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = exp(g_t) h_{t-1} + x_t, elementwise; differentiable any number of times.

    x: [B, T, ...] float or complex, T at least 1. g: [B, T, ...] log decay, of x's shape and dtype, real part <= 0.
    initial_state: h_0, [B, ...], or None (zeros).
    Returns (h [B, T, ...], the last h [B, ...]).
    """
    if x.shape != g.shape or x.ndim < 2 or x.shape[1] < 1 or x.dtype != g.dtype:
        raise InputError(
            f"expected x and g [B, T, ...] of one shape and dtype, T at least 1, got {x.dtype} {list(x.shape)} "
            f"and {g.dtype} {list(g.shape)}"
        )
    h0 = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
    flat, channels = x.shape[:2], math.prod(x.shape[2:])
    h: Tensor = _LinearScan.apply(x.reshape(*flat, channels), g.reshape(*flat, channels), h0.reshape(-1, channels))
    h = h.view(x.shape)
    return h, h[:, -1]


def naive_linear_scan(x: Tensor, g: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence that defines `linear_scan`, one token after the other.

    x, g, initial_state: as there. Returns h [B, T, ...] and the last of them [B, ...].
    """
    h, hs = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state, []
    for t in range(x.shape[1]):
        h = g[:, t].exp() * h + x[:, t]
        hs.append(h)
    return torch.stack(hs, 1), h


@without_autocast
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    block: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mamba's scan: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t (2312.00752, alg. 2).

    x, dt: [B, T, E], dt >= 0. A: [E, N], < 0. B, C: [B, T, N]. D: [E] or None. initial_state: [B, E, N] or None.
    output_final_state: also return h after the last token.
    block: tokens whose states [B, block, E, N] are held at once; the backward computes them again. By default as
        many, 8 to 256, as stay within 4 MB or so: larger temporaries cost more to get than to fill.
    Returns (y [B, T, E], final state [B, E, N] (at least float32) or None). Half precision is computed in float32.
    """
    if dt.shape != x.shape or B.shape != C.shape or B.shape[:2] != x.shape[:2] or A.shape != (x.shape[-1], B.shape[-1]):
        shapes = ", ".join(str(list(t.shape)) for t in (x, dt, A, B, C))
        raise InputError(f"expected x, dt [B, T, E], A [E, N] and B, C [B, T, N], got {shapes}")
    if block is None:
        block = max(8, min(256, 2**20 // max(1, x.shape[0] * A.numel())))
    if block < 1:
        raise InputError(f"block must be at least 1, got {block}")
    dtype, work = x.dtype, working_dtype(x.dtype)
    x, dt, A, B, C = (t.to(work) for t in (x, dt, A, B, C))
    A = A.t()
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(work).mT
    # vmap does not take the hooks by which `checkpoint` works: under it all states are kept
    again = torch.is_grad_enabled() and x.shape[1] > block and not torch._C._are_functorch_transforms_active()
    ys = []
    for xs, dts, Bs, Cs in zip(*(t.split(block, 1) for t in (x, dt, B, C)), strict=True):
        if again:
            y, h = checkpoint(_selective_block, xs, dts, Bs, Cs, A, h, use_reentrant=False)
        else:
            y, h = _selective_block(xs, dts, Bs, Cs, A, h)
        ys.append(y)
    y = torch.cat(ys, 1) if ys else x
    y = y if D is None else torch.addcmul(y, x, D.to(work))
    return y.to(dtype), h.mT if output_final_state else None


def naive_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence that defines `selective_scan`, one token after the other (2312.00752, algorithm 2).

    Arguments as there. Returns y [B, T, E] and the final state [B, E, N].
    """
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
    ys = []
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1) + (0 if D is None else D * x[:, t]))
    return torch.stack(ys, 1), h


def _selective_block(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Some tokens; A [N, E] and h [B, N, E], so that sums over N run along contiguous channels."""
    hs, h = linear_scan((dt * x).unsqueeze(2) * B.unsqueeze(3), dt.unsqueeze(2) * A, h)
    return (hs * C.unsqueeze(3)).sum(2), h


class _LinearScan(torch.autograd.Function):
    """x, g: [B, T, C]; h0: [B, C]. Its backward is the same scan, run from the end."""

    @staticmethod
    def forward(x: Tensor, g: Tensor, h0: Tensor) -> Tensor:
        batch, length, channels = x.shape
        if length == 1:
            return torch.addcmul(x, g.exp(), h0.unsqueeze(1))
        if length <= 16:  # one chunk: the recurrence itself
            decay, h = g.exp(), x.clone(memory_format=torch.contiguous_format)
            h[:, 0].addcmul_(decay[:, 0], h0)
            for t in range(1, length):
                h[:, t].addcmul_(decay[:, t], h[:, t - 1])
            return h
        size = min(64, math.ceil(math.sqrt(length)))
        pad = -length % size
        # Positions in a chunk first: a step then reads and writes contiguous memory.
        x, g = (
            (F.pad(t, (0, 0, 0, pad)) if pad else t)
            .reshape(batch, -1, size, channels)
            .permute(2, 0, 1, 3)
            .clone(memory_format=torch.contiguous_format)
            for t in (x, g)
        )
        h, decay = x, g.exp()  # h within its chunk, in place of x
        total = torch.empty_like(decay)  # the decay since the chunk's start
        total[0] = decay[0]
        for t in range(1, size):
            h[t].addcmul_(decay[t], h[t - 1])
            torch.mul(total[t - 1], decay[t], out=total[t])
        carried, carry = torch.empty_like(h[0]), h0
        for n in range(h.shape[2]):
            carried[:, n] = carry
            carry = torch.addcmul(h[-1, :, n], total[-1, :, n], carry)
        h.addcmul_(total, carried)
        return h.permute(1, 2, 0, 3).flatten(1, 2)[:, :length].contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, g, h0 = inputs
        ctx.save_for_backward(g, h0, output)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dh: Tensor) -> Any:
        g, h0, h = ctx.saved_tensors
        # D_t = dh_t + conj(exp(g_{t+1})) D_{t+1} is the gradient of x
        later = torch.cat((g[:, 1:], torch.zeros_like(g[:, :1])), 1)
        D = _LinearScan.apply(dh.flip(1), later.conj().resolve_conj().flip(1), torch.zeros_like(h0)).flip(1)
        decay = g.exp()
        before = torch.cat((h0.unsqueeze(1), h[:, :-1]), 1)
        return D, D * (decay * before).conj(), (D[:, 0] * decay[:, 0].conj()) if ctx.needs_input_grad[2] else None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Tensor) -> tuple[Tensor, int]:
        """One more batch dimension is as many more sequences."""
        size = info.batch_size
        whole = [
            (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip(inputs, in_dims, strict=True)
        ]
        return _LinearScan.apply(*whole).unflatten(0, (size, -1)), 0
