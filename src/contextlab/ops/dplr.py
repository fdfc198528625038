"""States that decay channel by channel and are corrected too: RWKV-7's diagonal plus low rank, and Kimi's delta rule.

The state S [K, V] of a head obeys
    S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    o_t = scale S_t^T q_t        (2503.14456)
or, for KDA, S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T (2510.26692), which is the
former with a = k exp(g), b = -beta k and keys beta k. Inside a chunk what is written, u_t = a_t^T S_{t-1}, solves one
unit lower-triangular system as in the delta rule (`ops.delta`); the pairwise products, weighted by the decays between
two tokens, come from halving the chunk again and again as in `ops.gla`, so that no exponent is positive and strong
decays cost no precision. From chunk to chunk the state passes by one matrix product. Half precision is computed in
float32. Documents packed by `cu_seqlens`: `ops.by_document`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops import backend
from contextlab.ops.halves import halves, joined
from contextlab.ops.linear import by_blocks, working_dtype
from contextlab.ops.precision import without_autocast
from contextlab.ops.triangular import unit_lower_inverse


@without_autocast
def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor | None]:
    """A decay for each channel of the key, plus a transition of rank one (RWKV-7, 2503.14456).

    q, k, a, b: [B, T, H, K]; a reads the state before its decay, b is where that is written. RWKV-7 has a = -k^ and
        b = k^ * rate with k^ of unit length. v: [B, T, H, V]. g: [B, T, H, K] log decay, <= 0.
    scale: of the queries; K ** -0.5 by default. initial_state: [B, H, K, V] or None (zeros).
    output_final_state: also return S after the last token. chunk_size: tokens a chunk, a power of two.
    Returns (o [B, T, H, V], final state [B, H, K, V] (at least float32) or None).
    """
    _check(v, chunk_size, q=q, k=k, a=a, b=b, g=g)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = backend.choose("dplr_delta_rule", k)
    if chosen.module is not None:
        kernel: Any = chosen.module.chunk_dplr_delta_rule
        o, last = kernel(q, k, v, a, b, g, scale, initial_state, output_final_state)
        return o, last
    dtype, work = v.dtype, working_dtype(v.dtype)
    q, k, v, a, b, g = ((q * scale).to(work), k.to(work), v.to(work), a.to(work), b.to(work), g.to(work))
    state = _start(v, k, initial_state)
    if v.shape[1] <= 1:
        if v.shape[1]:
            read = (a[:, 0].unsqueeze(-2) @ state).squeeze(-2)  # before the decay
            state = g[:, 0].exp().unsqueeze(-1) * state + _outer(b[:, 0], read) + _outer(k[:, 0], v[:, 0])
            v = (q[:, 0].unsqueeze(-2) @ state).squeeze(-2).unsqueeze(1)
        return v.to(dtype), state if output_final_state else None
    o, last = by_blocks(partial(_dplr, chunk_size), (q, k, v, a, b, g), state)
    return o.to(dtype), last if output_final_state else None


def _dplr(
    chunk_size: int, state: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """The chunked form, from a state."""
    length, heads = v.shape[1:3]
    q, k, v, a, b, g = _chunks(chunk_size, q, k, v, a, b, g)
    gram, reads, rest, total = _weighted([(a, True), (q, False)], [b, k], g)
    (ab, ak), (qb, qk) = gram
    a_read, q_read = reads
    inverse = unit_lower_inverse(-ab)
    own = inverse @ (ak @ v)  # u of the chunk's own tokens; u = own + W S
    W = inverse @ (a * a_read.exp())
    ends = rest.exp()
    kept = (b * ends).mT
    states, last = _pass_on(total, kept @ W, kept @ own + (k * ends).mT @ v, state)
    u = own + W @ states
    o = qb @ u + qk @ v + (q * q_read.exp()) @ states
    return _whole(o, length, heads), last


@without_autocast
def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor | None]:
    """Kimi delta attention: the delta rule on a state that decays channel by channel (2510.26692).

    q, k: [B, T, H, K]; keys of length <= 1 keep the state bounded. v: [B, T, H, V]. g: [B, T, H, K] log decay, <= 0.
    beta: [B, T, H] writing strength in [0, 1], or up to 2 for negative eigenvalues (2411.12537).
    Other arguments and result as for `dplr_delta_rule`.
    """
    _check(v, chunk_size, q=q, k=k, g=g)
    if beta.shape != v.shape[:3]:
        raise InputError(f"expected beta [B, T, H] = {list(v.shape[:3])}, got {list(beta.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = backend.choose("kda", k)
    if chosen.module is not None:
        kernel: Any = chosen.module.chunk_kda
        o, last = kernel(q, k, v, g, beta, scale, initial_state, output_final_state)
        return o, last
    dtype, work = v.dtype, working_dtype(v.dtype)
    q, k, v, g, beta = ((q * scale).to(work), k.to(work), v.to(work), g.to(work), beta.to(work).unsqueeze(-1))
    state = _start(v, k, initial_state)
    if v.shape[1] <= 1:
        if v.shape[1]:
            state = g[:, 0].exp().unsqueeze(-1) * state
            error = v[:, 0] - (k[:, 0].unsqueeze(-2) @ state).squeeze(-2)
            state = state + _outer(k[:, 0] * beta[:, 0], error)
            v = (q[:, 0].unsqueeze(-2) @ state).squeeze(-2).unsqueeze(1)
        return v.to(dtype), state if output_final_state else None
    o, last = by_blocks(partial(_kda, chunk_size), (q, k, v, g, beta), state)
    return o.to(dtype), last if output_final_state else None


def _kda(
    chunk_size: int, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The chunked form, from a state."""
    length, heads = v.shape[1:3]
    q, k, v, g, beta = _chunks(chunk_size, q, k, v, g, beta)
    ((kk,), (qk,)), (read, _), rest, total = _weighted([(k, False), (q, False)], [k], g)
    grow = read.exp()
    inverse = unit_lower_inverse(beta * kk)
    own = inverse @ (beta * v)  # what is written is own + W S
    W = inverse @ (k * grow * -beta)
    kept = (k * rest.exp()).mT
    states, last = _pass_on(total, kept @ W, kept @ own, state)
    o = qk @ (own + W @ states) + (q * grow) @ states
    return _whole(o, length, heads), last


def naive_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence that defines `dplr_delta_rule`, one token after the other.

    Arguments as there. Returns o [B, T, H, V] and the final state [B, H, K, V].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S = _start(v, k, initial_state)
    os = []
    for t in range(v.shape[1]):
        read = torch.einsum("bhkv,bhk->bhv", S, a[:, t])
        S = g[:, t].exp().unsqueeze(-1) * S + _outer(b[:, t], read) + _outer(k[:, t], v[:, t])
        os.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t] * scale))
    return torch.stack(os, 1), S


def naive_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence that defines `kda`, one token after the other.

    Arguments as there. Returns o [B, T, H, V] and the final state [B, H, K, V].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S = _start(v, k, initial_state)
    os = []
    for t in range(v.shape[1]):
        S = g[:, t].exp().unsqueeze(-1) * S
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + _outer(k[:, t] * beta[:, t].unsqueeze(-1), error)
        os.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t] * scale))
    return torch.stack(os, 1), S


def kda_flops(length: int, heads: int, key: int, value: int, chunk_size: int = 32) -> int:
    """Multiply-adds x 2 of the chunked form of `kda` on one sequence, matrix products counted."""
    return _flops(length, heads, key, value, chunk_size, 2, 1)


def dplr_flops(length: int, heads: int, key: int, value: int, chunk_size: int = 32) -> int:
    """Multiply-adds x 2 of the chunked form of `dplr_delta_rule` on one sequence, matrix products counted."""
    return _flops(length, heads, key, value, chunk_size, 4, 3)


def _flops(length: int, heads: int, key: int, value: int, chunk_size: int, products: int, reads: int) -> int:
    """products: [L, L] weighted products of keys; reads: [L, L] by [L, V] beside the solution of the system."""
    if length <= 1:
        return (6 if products == 2 else 8) * length * heads * key * value
    size = min(chunk_size, 1 << (length - 1).bit_length())
    count = -(-length // size)
    per_token = (size - 1) * key * products + size * size // 3 + 2 * size * (key + value) + 2 * size * value * reads
    per_token += 2 * key * (key + 3 * value) + (2 * key * value if products == 4 else 0) + 2 * key * key * value // size
    return count * size * heads * per_token


def _weighted(
    rows: list[tuple[Tensor, bool]], columns: list[Tensor], g: Tensor
) -> tuple[list[list[Tensor]], list[Tensor], Tensor, Tensor]:
    """Products of rows and columns, each channel weighted by the decay between the two tokens, by halves.

    rows: x [..., L, K], and whether it reads the state before its token's own decay; then its product with the
        token's own column is left out, too.
    columns: y [..., L, K]. g: [..., L, K] log decays.
    Returns for each row and column the lower triangle [..., L, L] (what is above it is zero); for each row the log
    decay from the chunk's start to what it reads; that from each token to the chunk's end; the chunk's [..., 1, K].
    """
    reads = [torch.zeros_like(g) if exclusive else g for _, exclusive in rows]
    rest, total, half = torch.zeros_like(g), g, 1
    grams = [
        [(y.new_zeros(y.shape[:-1]) if exclusive else (x * y).sum(-1))[..., None, None] for y in columns]
        for x, exclusive in rows
    ]  # [..., blocks, tokens of a block, tokens of a block]
    while half < g.shape[-2]:
        rest_left, rest_right = halves(rest, half)
        fade = rest_left.exp()
        lefts = torch.cat([halves(y, half)[0] * fade for y in columns], -2)  # [..., blocks, half * columns, K]
        split = [halves(read, half) for read in reads]
        rights = torch.cat(
            [halves(x, half)[1] * right.exp() for (x, _), (_, right) in zip(rows, split, strict=True)], -2
        )
        if half == 1:  # products of few vectors: sums are faster than matrix products
            crosses = (rights.unsqueeze(-2) * lefts.unsqueeze(-3)).sum(-1)
        else:
            crosses = rights @ lefts.mT
        for i, row in enumerate(crosses.split(half, -2)):
            for j, cross in enumerate(row.split(half, -1)):
                first, second = grams[i][j].unflatten(-3, (-1, 2)).unbind(-3)
                above = torch.zeros_like(cross)
                grams[i][j] = torch.cat((torch.cat((first, above), -1), torch.cat((cross, second), -1)), -2)
        total_left, total_right = halves(total, 1)
        reads = [joined(left, right + total_left) for left, right in split]
        rest = joined(rest_left + total_right, rest_right)
        total = (total_left + total_right).squeeze(-2)
        half *= 2
    return [[gram.squeeze(-3) for gram in row] for row in grams], reads, rest, total


def _pass_on(total: Tensor, transition: Tensor, write: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S' = (diag(exp(total)) + transition) S + write from chunk to chunk.

    total: [N, X, 1, K]. transition: [N, X, K, K]. write: [N, X, K, V]. state: [B, H, K, V].
    Returns the states before each chunk [N, X, K, V] and the last one [B, H, K, V].
    """
    shape, decay = state.shape, total.exp().mT
    S, states = state.flatten(0, 1), []
    for n in range(len(write)):
        states.append(S)
        S = torch.baddbmm(torch.addcmul(write[n], decay[n], S), transition[n], S)
    return torch.stack(states), S.view(shape)


def _chunks(chunk_size: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """[B, T, H, D] each -> [N, B H, L, D] with zeros after the end, which neither decay nor write."""
    length = inputs[0].shape[1]
    size = min(chunk_size, 1 << (length - 1).bit_length())
    count = -(-length // size)
    return tuple(
        F.pad(x, (0, 0, 0, 0, 0, count * size - length))
        .unflatten(1, (count, size))
        .permute(1, 0, 3, 2, 4)
        .contiguous()
        .flatten(1, 2)
        for x in inputs
    )


def _whole(o: Tensor, length: int, heads: int) -> Tensor:
    """[N, B H, L, V] -> [B, T, H, V]."""
    return o.unflatten(1, (-1, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _start(v: Tensor, k: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    return initial_state.to(v.dtype)


def _check(v: Tensor, chunk_size: int, **keys: Tensor) -> None:
    shape = next(iter(keys.values())).shape
    if v.ndim != 4 or len(shape) != 4 or v.shape[:3] != shape[:3] or any(x.shape != shape for x in keys.values()):
        shapes = ", ".join(str(list(x.shape)) for x in (*keys.values(), v))
        raise InputError(f"expected {', '.join(keys)} [B, T, H, K] and v [B, T, H, V], got {shapes}")
    if chunk_size < 2 or chunk_size & (chunk_size - 1):
        raise InputError(
            f"chunk_size must be a power of two, at least 2, got {chunk_size}; 32 is the nearest common one"
        )
