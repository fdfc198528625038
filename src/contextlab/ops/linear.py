"""Linear attention with scalar decay: one chunked engine for RetNet, Lightning Attention and Mamba-2 (SSD).

The state S [K, V] of a head obeys S_t = exp(g_t) S_{t-1} + k_t v_t^T and is read as o_t = scale S_t^T q_t.
The fast form computes the tokens of a chunk from each other by masked matrix products and passes S from
chunk to chunk (2312.06635, section 4; 2405.21060, section 6). Decays enter only as exp of differences that
are <= 0, so nothing overflows; their sums are kept in float64 (`log_decays`), so that a decay of any size, -inf
too, costs later tokens no digits. Half precision is computed in float32. Documents packed
by `cu_seqlens`: `ops.by_document`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops import backend
from contextlab.ops.decays import chunk_sums, log_decays
from contextlab.ops.precision import without_autocast, working_dtype
from contextlab.ops.scalar_decay import scalar_decay

SINGLE_CHUNK = 128
"""Sequences up to this length are one chunk in a graph of torch, where the number of chunks must be known."""


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
    chunk_size: int = 32,
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
    length = v.shape[1]
    state = None if initial_state is None else initial_state.to(work)
    q, k, v = q.to(work), k.to(work), v.to(work)
    if length == 0:
        return v.new_empty(v.shape, dtype=dtype), _unchanged(k, v, state) if output_final_state else None
    if length == 1:
        o, last = _step(q * scale, k, v, _decay_step(g, g_gamma, work), state)
        return o.to(dtype), last if output_final_state else None
    count, size = split(length, chunk_size)
    c = _cumulative(g, g_gamma, length, count, size, work)
    o, final = scalar_decay(q, k, v, c, state, scale, count, size, output_final_state)
    return o.to(dtype), final


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
    chunk_size: int = 32,
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


def simple_gla_flops(length: int, heads: int, key: int, value: int, chunk_size: int = 32) -> int:
    """Multiply-adds x 2 of the chunked form of `simple_gla` on one sequence, matrix products counted."""
    if length <= 1:
        return 4 * length * heads * key * value
    count, size = split(length, chunk_size)
    within = 2 * size * (key + value)
    return count * size * heads * (within + (4 * key * value if count > 1 else 0))


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


def _cumulative(
    g: Tensor | None, g_gamma: Tensor | None, length: int, count: int, size: int, dtype: torch.dtype
) -> Tensor | None:
    """Sums of log decays in each chunk, float64, broadcastable to [B, N, L, H]; padding does not decay."""
    c = None
    if g_gamma is not None:
        at = torch.arange(count * size, device=g_gamma.device).view(1, count, size, 1)
        at = at.clamp(max=length - 1) - at[:, :, :1] + 1
        c = log_decays(g_gamma, dtype) * (at if count * size > length else at[:, :1])
    if g is not None:
        sums = chunk_sums(g, size, dtype)
        c = sums if c is None else c + sums
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


def split(length: int, chunk_size: int) -> tuple[int, int]:
    """(number of chunks, tokens a chunk): one chunk when the sequence is short.

    In a graph of torch up to `SINGLE_CHUNK` tokens are short: then one graph serves all these lengths.
    """
    most = max(SINGLE_CHUNK, chunk_size) if torch.compiler.is_compiling() else chunk_size
    return (1, length) if length <= most else (-(-length // chunk_size), chunk_size)


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
