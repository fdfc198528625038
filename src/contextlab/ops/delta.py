"""The (gated) delta rule in the chunked WY form: a state that corrects its own prediction error.

The state S [K, V] of a head obeys, with the decay a_t = exp(g_t),
    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,    o_t = scale S_t^T q_t,
which is one step of online gradient descent on |S^T k - v|^2 (2406.06484; with decay 2412.06464). How it is computed
in chunks: `ops.delta_engine`. Half precision is computed in float32. Documents packed by `cu_seqlens`:
`ops.by_document`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops import backend
from contextlab.ops.decays import chunk_sums
from contextlab.ops.delta_engine import corrected
from contextlab.ops.precision import without_autocast, working_dtype


@without_autocast
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule with a decay per head and token (2412.06464, eq. 10).

    q, k: [B, T, H, K]; keys of length <= 1 keep the state bounded. v: [B, T, H, V].
    g: [B, T, H] log decay, <= 0, -inf to forget all before, or None (no decay).
    beta: [B, T, H] writing strength in [0, 1], or up to 2 for negative eigenvalues (2411.12537).
    scale: of the queries; K ** -0.5 by default. initial_state: [B, H, K, V] or None (zeros).
    output_final_state: also return S after the last token. chunk_size: largest number of tokens in a chunk
        of the PyTorch form; a sequence is cut into chunks of nearly equal size. None: 32, or 16 where that is faster.
    Returns (o [B, T, H, V], final state [B, H, K, V] (at least float32) or None).
    """
    _check(q, k, v, beta, chunk_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = backend.choose("delta_rule" if g is None else "gated_delta_rule", k)
    if chosen.module is not None:
        return _fla_delta_rule(chosen.module, q, k, v, g, beta, scale, initial_state, output_final_state)
    dtype, work, length = v.dtype, working_dtype(v.dtype), v.shape[1]
    state = None if initial_state is None else initial_state.to(work)
    q, k, v, beta = q.to(work), k.to(work), v.to(work), beta.to(work)
    g = None if g is None else g.to(work)
    if length == 0:
        empty = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]) if state is None else state
        return v.to(dtype), empty if output_final_state else None
    if length == 1:
        o, last = _step(q * scale, k, v, g, beta, state)
        return o.to(dtype), last if output_final_state else None
    size = split(length, chunk_size or _chunk_size(length, max(k.shape[-1], v.shape[-1])))[1]
    c = v.new_zeros(1, 1, size, v.shape[2], dtype=torch.float64) if g is None else chunk_sums(g, size, work)
    o, last = corrected(q, k, v, c, beta, state, scale, size)
    return o.to(dtype), last if output_final_state else None


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule without decay (2406.06484, eq. 2).

    q, k: [B, T, H, K]. v: [B, T, H, V]. beta: [B, T, H]. Other arguments, result and errors as for `gated_delta_rule`.
    """
    return gated_delta_rule(q, k, v, None, beta, scale, initial_state, output_final_state, chunk_size)


def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence that defines `gated_delta_rule`, one token after the other (2412.06464, eq. 10).

    Arguments as there. Returns o [B, T, H, V] and the final state [B, H, K, V].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    os = []
    for t in range(v.shape[1]):
        S = S if g is None else g[:, t].exp()[..., None, None] * S
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + beta[:, t, :, None, None] * k[:, t, :, :, None] * error[..., None, :]
        os.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t] * scale))
    return torch.stack(os, 1), S


def delta_rule_flops(length: int, heads: int, key: int, value: int, chunk_size: int | None = None) -> int:
    """Multiply-adds x 2 that the chunked form does on one sequence, matrix products counted."""
    if length <= 1:
        return 6 * length * heads * key * value
    count, size = split(length, chunk_size or _chunk_size(length, max(key, value)))
    # k k^T, q k^T, the inverse by keys and by values, and the read of the chunk's own writes; the inverse itself
    per_token = 2 * size * (3 * key + 2 * value) + size * size // 3
    per_token += 6 * key * value  # what queries and what keys read of the state, and the write
    return count * size * heads * per_token


def split(length: int, chunk_size: int) -> tuple[int, int]:
    """(number of chunks, tokens a chunk): chunks of nearly equal size, at most `chunk_size`."""
    count = -(-length // chunk_size)
    return count, -(-length // count)


def _chunk_size(length: int, channels: int) -> int:
    """Within chunks small heads have most of their work, which grows with the chunk."""
    return 16 if channels <= 32 and length >= 64 else 32


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token by the recurrence itself."""
    k, error = k[:, 0], v[:, 0]
    if state is not None:
        state = state if g is None else state * g[:, 0].exp()[..., None, None]
        error = error - (k.unsqueeze(-2) @ state).squeeze(-2)
    S = (k * beta[:, 0].unsqueeze(-1)).unsqueeze(-1) * error.unsqueeze(-2)
    S = S if state is None else S + state
    return (q[:, 0].unsqueeze(-2) @ S).squeeze(-2).unsqueeze(1), S


def _check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, chunk_size: int | None) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != k.shape[:3] or beta.shape != v.shape[:3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v, beta))
        raise InputError(f"expected q, k [B, T, H, K], v [B, T, H, V] and beta [B, T, H], got {shapes}")
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, got {chunk_size}")


def _fla_delta_rule(
    fla: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same by flash-linear-attention's kernels; the gated one-token kernel has no backward."""
    gate = {} if g is None else {"g": g}
    name = "delta_rule" if g is None else "gated_delta_rule"
    single = q.shape[1] == 1 and not torch.is_grad_enabled()
    kernel = getattr(fla, f"fused_recurrent_{name}" if single else f"chunk_{name}")
    o, last = kernel(
        q=q,
        k=k,
        v=v,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        **gate,
    )
    return o, last
