"""Linear attention with scalar decay: one chunked engine for RetNet, Lightning Attention and Mamba-2 (SSD).

The state S [K, V] of a head obeys S_t = exp(g_t) S_{t-1} + k_t v_t^T and is read as o_t = scale S_t^T q_t.
The fast form computes the tokens of a chunk from each other by masked matrix products and passes S from
chunk to chunk (2312.06635, section 4; 2405.21060, section 6). Decays enter only as exp of differences that
are <= 0, so nothing overflows; their sums are kept in float64 (`log_decays`), so that a decay of any size, -inf
too, costs later tokens no digits. Half precision is computed in float32. Documents packed
by `cu_seqlens`: `ops.by_document`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops import backend
from contextlab.ops.precision import without_autocast, working_dtype

SINGLE_CHUNK = 128
"""Sequences up to this length are one quadratic chunk: cheaper than passing states at training lengths.

To measure it again: `python benchmarks/ops.py`.
"""


@without_autocast
def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention whose state decays by one scalar per head and token.

    q: [B, T, G, K]. k: [B, T, G, K]. v: [B, T, H, V]; H is a multiple of G, heads of a group share q and k.
    g: [B, T, H] log decay, <= 0, or None; -inf forgets all before. g_gamma: [H] constant log decay, <= 0, or
        None; g and g_gamma add up.
    scale: of the queries; K ** -0.5 by default. initial_state: [B, H, K, V] or None (zeros).
    output_final_state: also return S after the last token. chunk_size: tokens per chunk of the PyTorch form.
    Returns (o [B, T, H, V], final state [B, H, K, V] (at least float32) or None).
    """
    _check(q, k, v, chunk_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = backend.choose("simple_gla", k)
    if chosen.module is not None:
        return _fla_simple_gla(chosen.module, q, k, v, g, g_gamma, scale, initial_state, output_final_state)
    dtype, work = v.dtype, working_dtype(v.dtype)
    batch, length, heads, value = v.shape
    state = None if initial_state is None else initial_state.to(work)
    q, k, v = (q * scale).to(work), k.to(work), v.to(work)
    if length == 0:
        return v.new_empty(v.shape, dtype=dtype), _unchanged(k, v, state) if output_final_state else None
    if length == 1:
        o, last = _step(q, k, v, _decay_step(g, g_gamma, work), state)
        return o.to(dtype), last if output_final_state else None
    count, size = split(length, chunk_size)
    groups = q.shape[2]
    shape = (batch, groups, heads // groups, count, size)
    qc, kc = chunked(q, count, size).unsqueeze(2), chunked(k, count, size).unsqueeze(2)
    vc = chunked(v, count, size).view(*shape, value)
    c = _cumulative(g, g_gamma, shape, length, v)
    grouped = None if state is None else state.unflatten(1, (groups, -1))
    o, last, *_ = _ChunkedGLA.apply(qc, kc, vc, c, grouped, output_final_state)
    o = unchunked(o.flatten(1, 2), length).to(dtype)
    return o, last.flatten(1, 2) if output_final_state else None


def naive_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence that defines `simple_gla`, one token after the other.

    Arguments as there. Returns o [B, T, H, V] and the final state [B, H, K, V].
    """
    heads, repeat = v.shape[2], v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(repeat, 2) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S = v.new_zeros(v.shape[0], heads, k.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    os = []
    for t in range(v.shape[1]):
        decay = (0 if g is None else g[:, t]) + (v.new_zeros(heads) if g_gamma is None else g_gamma)
        S = decay.exp()[..., None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        os.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t] * scale))
    return torch.stack(os, 1), S


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention without decay or denominator (2006.16236, eq. 9 without its z).

    q, k: [B, T, H, K]. v: [B, T, H, V]. Other arguments, result and errors as for `simple_gla`.
    """
    return simple_gla(q, k, v, None, None, scale, initial_state, output_final_state)


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """RetNet's retention: decay gamma_h = 1 - 2^(-5-h) (2307.08621, eqs. 5 and 8), or the g_gamma given.

    g_gamma: [H] log decay or None. Other arguments, shapes and result as for `simple_gla`.
    """
    gamma = retention_decay(v.shape[2], v.device) if g_gamma is None else g_gamma
    return simple_gla(q, k, v, None, gamma, scale, initial_state, output_final_state)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int = 0,
    layers: int = 1,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Lightning attention: decays exp(-slope_h), slopes as ALiBi's (2307.14995, eq. 8).

    q, k: [B, T, H, K]. v: [B, T, H, V].
    layer, layers: index of the layer and their number; deeper layers decay less.
    Other arguments, result and errors as for `simple_gla`.
    """
    gamma = lightning_decay(v.shape[2], v.device, layer, layers)
    return simple_gla(q, k, v, None, gamma, scale, initial_state, output_final_state)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2's state-space layer: S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, y_t = S_t^T C_t + D x_t.

    x: [B, T, H, P]. dt: [B, T, H] step sizes, >= 0. A: [H], < 0. B: [B, T, G, N]. C: [B, T, G, N]; H a
        multiple of G.
    D: [H] skip weights or None. initial_state: [B, H, N, P] or None. Source: 2405.21060, sections 5 and 6.
    Returns (y [B, T, H, P], final state [B, H, N, P] or None).
    """
    v = x * dt.unsqueeze(-1).to(x.dtype)
    y, last = simple_gla(C, B, v, dt * A, None, 1.0, initial_state, output_final_state, chunk_size)
    return y if D is None else torch.addcmul(y, x, D.to(x.dtype).unsqueeze(-1)), last


def retention_decay(heads: int, device: torch.device | None = None) -> Tensor:
    """log(1 - 2^(-5-h)) for h = 0 .. heads-1: [H] float32 (2307.08621, eq. 8)."""
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, dtype=torch.float64, device=device)))).float()


def lightning_decay(heads: int, device: torch.device | None = None, layer: int = 0, layers: int = 1) -> Tensor:
    """-2^(-8h/H) (1 - layer/layers) for h = 1 .. H: [H] float32 log decays (2307.14995, eq. 8)."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64, device=device) / heads)
    return (-slopes * (1 - layer / layers)).float()


def simple_gla_flops(length: int, heads: int, key: int, value: int, chunk_size: int = 64) -> int:
    """Multiply-adds x 2 of the chunked form of `simple_gla` on one sequence, matrix products counted."""
    if length <= 1:
        return 4 * length * heads * key * value
    count, size = split(length, chunk_size)
    within = 2 * size * (key + value)
    return count * size * heads * (within + (4 * key * value if count > 1 else 0))


# ---- the engine ----


class _ChunkedGLA(torch.autograd.Function):
    """All chunks at once.

    q, k: [B, G, 1, N, L, K]; v: [B, G, R, N, L, V]; c: cumulative log decay, broadcastable to
    [B, G, R, N, L]; state: [B, G, R, K, V] or None. Returns (o, final state, saved for backward ...).

    The backward is by hand because autograd would keep and re-read many [L, L] temporaries. For the decay it
    uses that o_i is proportional to exp(c_i) and depends on v_j only by exp(-c_j) v_j: so
    dc = do . o - dv . v, and the state after the chunk adds <dS, S> at the last token.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, c: Tensor, state: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        D = decay_matrix(c, v.dtype)
        P = (q @ k.mT) * D
        o = P @ v
        passes, last, states = state is not None or v.shape[3] > 1, None, None
        if passes or final:
            U = k.mT @ (v * _column(c[..., -1:] - c, v.dtype))
            states, last = scan(U, c[..., -1], state)
        if passes and states is not None:
            o = torch.addcmul(o, q @ states, _column(c, v.dtype))
        return o, last, P, D, states

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, c, _, _ = inputs
        o, last, P, D, states = output
        ctx.mark_non_differentiable(*(x for x in (P, D, states) if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, c, o, last, P, D, states)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Any) -> Any:
        q, k, v, c, o, last, P, D, states = ctx.saved_tensors
        need_c, need_state = ctx.needs_input_grad[3:5]
        do = torch.zeros_like(o) if do is None else do
        dG = ((do @ v.mT) * D).sum(2, keepdim=True)  # of the scores q k^T, heads of a group together
        dq, dk, dv = dG @ k, dG.mT @ q, P.mT @ do
        dstate = after = None
        if states is not None:
            de, to_end = do * _column(c, v.dtype), _column(c[..., -1:] - c, v.dtype)
            # the same scan, run backwards: gradients of the state after each chunk, then of the first state
            flipped, dstate = scan((q.mT @ de).flip(3), c[..., -1].flip(-1), dlast)
            after = flipped.flip(3)
            dq = dq + (de @ states.mT).sum(2, keepdim=True)
            dk = dk + ((v * to_end) @ after.mT).sum(2, keepdim=True)
            dv = torch.addcmul(dv, k @ after, to_end)
        dc = None
        if need_c:
            dc = decay_gradient(do, o, dv, v, after, states, last).sum_to_size(c.shape)
        return dq, dk, dv, dc, dstate if need_state else None, None


def decay_gradient(
    do: Tensor,
    o: Tensor,
    dv: Tensor,
    v: Tensor,
    after: Tensor | None,
    states: Tensor | None,
    last: Tensor | None,
) -> Tensor:
    """dc = do . o - dv . v, plus <dS, S> of the state S after a chunk at its last token: [..., N, L]."""
    dc = (do * o).sum(-1) - (dv * v).sum(-1)
    if after is not None and states is not None and last is not None:
        between = (after[..., :-1, :, :] * states[..., 1:, :, :]).sum((-2, -1))
        ends = torch.cat((between, (after[..., -1, :, :] * last).sum((-2, -1)).unsqueeze(-1)), -1)
        dc = torch.cat((dc[..., :-1], (dc[..., -1] + ends).unsqueeze(-1)), -1)
    return dc


def log_decays(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Log decays g <= 0, -inf too, as float64 that may be summed: exp of a difference of sums keeps all its digits.

    g: [B, T, H] or [B, T, H, K]. dtype: in which decays will be used. What is so low that exp gives zero there is
    raised to a value where it still does, or the sums would lose digits, and infinities their differences.
    """
    return g.double().clamp_min(-800.0 if dtype == torch.float64 else -200.0)


def decay_matrix(c: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(c_i - c_j) for j <= i, else 0. c: [..., L] float64, falling. Returns [..., L, L] of `dtype`.

    Below float64 c is taken in two parts, so that only small tensors are of float64.
    """
    mask = torch.ones(c.shape[-1], c.shape[-1], dtype=torch.bool, device=c.device).triu(1)
    high = c.to(dtype)
    between = high.unsqueeze(-1) - high.unsqueeze(-2)
    if dtype != c.dtype:
        low = (c - high).to(dtype)
        between.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))
    return between.masked_fill_(mask, -math.inf).exp_()


def _column(c: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(c) of `dtype`, [..., L, 1], to scale rows by."""
    return c.exp().to(dtype).unsqueeze(-1)


def scan(U: Tensor, d: Tensor, state: Tensor | None, block: int = 32) -> tuple[Tensor, Tensor]:
    """S_{n+1} = exp(d_n) S_n + U_n over chunks n, a block of chunks by one matrix product: linear in N.

    U: [..., N, K, V]. d: float64 log decays <= 0, broadcastable to [..., N]. state: [..., K, V] or None (zeros).
    Returns the states before each chunk [..., N, K, V] and the last one [..., K, V].
    """
    count, K, V = U.shape[-3:]
    S = torch.zeros_like(U[..., 0, :, :]) if state is None else state
    if count == 1:
        return S.unsqueeze(-3), torch.addcmul(U[..., 0, :, :], _column(d[..., -1:], U.dtype), S)
    d = log_decays(d, U.dtype).expand(*d.shape[:-1], count)
    before = []
    for n in range(0, count, block):
        m = min(block, count - n)
        L = decay_matrix(F.pad(d[..., n : n + m], (1, 0)).cumsum(-1), U.dtype)
        stack = torch.cat((S.unsqueeze(-3), U[..., n : n + m, :, :]), -3)
        states = (L @ stack.flatten(-2)).unflatten(-1, (K, V))
        before.append(states[..., :-1, :, :])
        S = states[..., -1, :, :]
    return torch.cat(before, -3) if len(before) > 1 else before[0], S.contiguous()


def _step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token by the recurrence itself. decay: [B or 1, H] or None."""
    repeat = v.shape[2] // k.shape[2]
    q, k = (x[:, 0].repeat_interleave(repeat, 1) if repeat > 1 else x[:, 0] for x in (q, k))
    S = k.unsqueeze(-1) * v[:, 0].unsqueeze(-2)
    if state is not None:
        S = S + (state if decay is None else state * decay.exp()[..., None, None])
    return (q.unsqueeze(-2) @ S).squeeze(-2).unsqueeze(1), S


def _decay_step(g: Tensor | None, g_gamma: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if g is None:
        return None if g_gamma is None else g_gamma.to(dtype)[None]
    step = g[:, 0].to(dtype)
    return step if g_gamma is None else step + g_gamma.to(dtype)


def _cumulative(g: Tensor | None, g_gamma: Tensor | None, shape: tuple[int, ...], length: int, like: Tensor) -> Tensor:
    """Sums of log decays in each chunk, float64, broadcastable to shape [B, G, R, N, L]; padding does not decay."""
    _, groups, repeat, count, size = shape
    c = like.new_zeros(1, 1, 1, 1, size, dtype=torch.float64)
    if g_gamma is not None:
        at = torch.arange(count * size, device=like.device).view(count, size)
        at = at.clamp(max=length - 1) - at[:, :1] + 1
        at = at if count * size > length else at[:1]
        c = log_decays(g_gamma, like.dtype).view(1, groups, repeat, 1, 1) * at
    if g is not None:
        c = c + chunked(log_decays(g, like.dtype).unsqueeze(-1), count, size).squeeze(-1).view(shape).cumsum(-1)
    return c


def by_blocks(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor], state: Tensor, size: int = 512
) -> tuple[Tensor, Tensor]:
    """`function(state, *inputs)` on blocks of tokens, the state handed on, so that temporaries stay in the caches.

    inputs: [B, T, ...] each, T >= 1. function: returns what the tokens answer [B, block, ...] and the state after them.
    Returns the answers of all and the last state.
    """
    outputs = []
    for block in zip(*(x.split(size, 1) for x in inputs), strict=True):
        o, state = function(state, *block)
        outputs.append(o)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state


def split(length: int, chunk_size: int, single: int = SINGLE_CHUNK) -> tuple[int, int]:
    """(number of chunks, tokens a chunk): one chunk when the sequence is short."""
    if length <= max(single, chunk_size) and chunk_size >= min(length, 64):
        return 1, length
    return -(-length // chunk_size), chunk_size


def chunked(x: Tensor, count: int, size: int) -> Tensor:
    """[B, T, H, D] -> contiguous [B, H, count, size, D], zeros after the end."""
    pad = count * size - x.shape[1]
    x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
    return x.transpose(1, 2).contiguous().unflatten(2, (count, size))


def unchunked(o: Tensor, length: int) -> Tensor:
    """[B, H, count, size, D] -> [B, T, H, D]."""
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _unchanged(k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    return v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]) if state is None else state


def _check(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:2] != k.shape[:2]:
        raise InputError(
            f"expected q, k [B, T, G, K] and v [B, T, H, V], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if v.shape[2] % k.shape[2]:
        raise InputError(f"{v.shape[2]} heads of v are not a multiple of {k.shape[2]} heads of q and k")
    if chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, got {chunk_size}")


def _fla_simple_gla(
    fla: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same by flash-linear-attention's kernels, which want as many heads of q and k as of v."""
    repeat = v.shape[2] // k.shape[2]
    if repeat > 1:
        q, k = q.repeat_interleave(repeat, 2), k.repeat_interleave(repeat, 2)
    if g is not None and g_gamma is not None:
        g, g_gamma = g + g_gamma, None
    kernel = fla.fused_recurrent_simple_gla if q.shape[1] == 1 else fla.chunk_simple_gla
    o, last = kernel(
        q=q,
        k=k,
        v=v,
        g=g,
        g_gamma=g_gamma,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )
    return o, last
