"""Linear attention with a decay for each channel of the key: GLA and RWKV-6.

The state S [K, V] of a head obeys S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T. How it is computed in chunks:
`ops.channel_decay`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.channel_decay import channel_decay
from contextlab.ops.precision import without_autocast, working_dtype


@without_autocast
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention: o_t = scale S_t^T q_t (2312.06635, eq. 3).

    q, k: [B, T, H, K]. v: [B, T, H, V]. g: [B, T, H, K] log decay, <= 0.
    scale: of the queries; K ** -0.5 by default. initial_state: [B, H, K, V] or None (zeros).
    output_final_state: also return S after the last token. chunk_size: tokens a chunk, a power of two.
    Returns (o [B, T, H, V], final state [B, H, K, V] (at least float32) or None).
    """
    return _per_channel(q, k, v, g, None, scale, initial_state, output_final_state, chunk_size)


@without_autocast
def rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-6's memory: o_t = scale (S_{t-1} + diag(u) k_t v_t^T)^T r_t (2404.05892, eqs. 16 and 17).

    The token reads the state before its own decay, and itself through the bonus u.

    r, k: [B, T, H, K]. v: [B, T, H, V]. w: [B, T, H, K] log decay, <= 0. u: [H, K].
    scale: of r; 1 by default, as in the paper. Other arguments and result as for `gla`.
    """
    return _per_channel(r, k, v, w, u, 1.0 if scale is None else scale, initial_state, output_final_state, chunk_size)


def naive_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence that defines `gla`, one token after the other.

    Arguments as there. Returns o [B, T, H, V] and the final state [B, H, K, V].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    os = []
    for t in range(v.shape[1]):
        S = g[:, t].exp().unsqueeze(-1) * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        os.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t] * scale))
    return torch.stack(os, 1), S


def naive_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence that defines `rwkv6`, one token after the other.

    Arguments as there. Returns o [B, T, H, V] and the final state [B, H, K, V].
    """
    scale = 1.0 if scale is None else scale
    S = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    os = []
    for t in range(v.shape[1]):
        written = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        os.append(torch.einsum("bhkv,bhk->bhv", S + u.unsqueeze(-1) * written, r[:, t] * scale))
        S = w[:, t].exp().unsqueeze(-1) * S + written
    return torch.stack(os, 1), S


def gla_flops(length: int, heads: int, key: int, value: int, chunk_size: int = 32) -> int:
    """Multiply-adds x 2 of the chunked form on one sequence, matrix products counted."""
    if length <= 1:
        return 4 * length * heads * key * value
    count, size = _split(length, chunk_size)
    within = (size - 1) * (key + value)  # half of the quadratic form, less the diagonal
    return count * size * heads * (within + 4 * key * value)


def _per_channel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    final: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    _check(q, k, v, g, chunk_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, work = v.dtype, working_dtype(v.dtype)
    batch, length, heads, value = v.shape
    q, k, v, g = q.to(work), k.to(work), v.to(work), g.to(work)
    bonus = None if u is None else u.to(work)
    state = v.new_zeros(batch, heads, k.shape[-1], value) if initial_state is None else initial_state.to(work)
    if length == 0:
        return v.to(dtype), state if final else None
    if length == 1:
        o, state = _step(q[:, 0] * scale, k[:, 0], v[:, 0], g[:, 0], bonus, state)
        return o.unsqueeze(1).to(dtype), state if final else None
    o, state = channel_decay(q, k, v, g, bonus, state, scale, _split(length, chunk_size)[1])
    return o.to(dtype), state if final else None


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token by the recurrence itself; q, k, g [B, H, K], v [B, H, V]."""
    written = k.unsqueeze(-1) * v.unsqueeze(-2)
    after = state * g.exp().unsqueeze(-1) + written
    seen = after if bonus is None else state + bonus.unsqueeze(-1) * written
    return (q.unsqueeze(-2) @ seen).squeeze(-2), after


def _split(length: int, chunk_size: int) -> tuple[int, int]:
    """(number of chunks, tokens a chunk): the smallest power of two that holds all, at most `chunk_size`."""
    size = min(chunk_size, 1 << (length - 1).bit_length())
    return -(-length // size), size


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk_size: int) -> None:
    if q.ndim != 4 or q.shape != k.shape or g.shape != k.shape or v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v, g))
        raise InputError(f"expected q, k and g [B, T, H, K] and v [B, T, H, V], got q, k, v, g {shapes}")
    if chunk_size < 2 or chunk_size & (chunk_size - 1):
        raise InputError(
            f"chunk_size must be a power of two, at least 2, got {chunk_size}; 32 is the nearest common one"
        )
