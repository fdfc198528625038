"""The (gated) delta rule in the chunked WY form: a state that corrects its own prediction error.

The state S [K, V] of a head obeys, with the decay a_t = exp(g_t),
    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,    o_t = scale S_t^T q_t,
which is one step of online gradient descent on |S^T k - v|^2 (2406.06484; with decay 2412.06464). Inside a
chunk the corrections solve one unit lower-triangular system, whose inverse comes from block recursion; from
chunk to chunk the state passes by one matrix product. Half precision is computed in float32. `cu_seqlens` is
not supported here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops import backend
from contextlab.ops.linear import chunked, decay_gradient, decay_matrix, unchunked, working_dtype


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule with a decay per head and token (2412.06464, eq. 10).

    q, k: [B, T, H, K]; keys of length <= 1 keep the state bounded. v: [B, T, H, V].
    g: [B, T, H] log decay, <= 0, or None (no decay). beta: [B, T, H] writing strength in [0, 1], or up to 2
        for negative eigenvalues (2411.12537).
    scale: of the queries; K ** -0.5 by default. initial_state: [B, H, K, V] or None (zeros).
    output_final_state: also return S after the last token. chunk_size: largest number of tokens in a chunk
        of the PyTorch form; a sequence is cut into chunks of nearly equal size.
    Returns (o [B, T, H, V], final state [B, H, K, V] (at least float32) or None).
    """
    _check(q, k, v, beta, chunk_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = backend.choose("delta_rule" if g is None else "gated_delta_rule", k)
    if chosen.module is not None:
        return _fla_delta_rule(chosen.module, q, k, v, g, beta, scale, initial_state, output_final_state)
    dtype, work, length = v.dtype, working_dtype(v.dtype), v.shape[1]
    state = None if initial_state is None else initial_state.to(work)
    q, k, v, beta = (q * scale).to(work), k.to(work), v.to(work), beta.to(work)
    g = None if g is None else g.to(work)
    if length == 0:
        empty = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]) if state is None else state
        return v.to(dtype), empty if output_final_state else None
    if length == 1:
        o, last = _step(q, k, v, g, beta, state)
        return o.to(dtype), last if output_final_state else None
    count, size = split(length, chunk_size)
    batch, heads = v.shape[0], v.shape[2]
    inputs = [chunked(x, count, size).flatten(0, 1) for x in (q, k, v, beta.unsqueeze(-1))]
    c = v.new_zeros(1, 1, size)
    if g is not None:
        c = chunked(g.unsqueeze(-1), count, size).flatten(0, 1).squeeze(-1).cumsum(-1)
    flat = None if state is None else state.flatten(0, 1)
    o, last, *_ = _ChunkedDelta.apply(*inputs, c, flat, output_final_state)
    o = unchunked(o.unflatten(0, (batch, heads)), length).to(dtype)
    return o, last.unflatten(0, (batch, heads)) if output_final_state else None


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule without decay (2406.06484, eq. 2); arguments and result as for `gated_delta_rule`."""
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
    """The recurrence that defines `gated_delta_rule`, one token after the other. Returns (o, final state)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    os = []
    for t in range(v.shape[1]):
        S = S if g is None else g[:, t].exp()[..., None, None] * S
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + beta[:, t, :, None, None] * k[:, t, :, :, None] * error[..., None, :]
        os.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t] * scale))
    return torch.stack(os, 1), S


def delta_rule_flops(length: int, heads: int, key: int, value: int, chunk_size: int = 32) -> int:
    """Multiply-adds x 2 that the chunked form does on one sequence, matrix products counted."""
    if length <= 1:
        return 6 * length * heads * key * value
    count, size = split(length, chunk_size)
    # k k^T, q k^T, the inverse, its products with keys and values, and the read of the chunk's own writes
    per_token = 2 * size * (3 * key + 2 * value) + size * size // 3
    if count > 1:  # the chunk's transition, its write, the read of the state twice, and the pass from chunk to chunk
        per_token += 2 * key * (key + 3 * value) + 2 * key * key * value // size
    else:
        per_token -= 2 * size * key
    return count * size * heads * per_token


def split(length: int, chunk_size: int) -> tuple[int, int]:
    """(number of chunks, tokens a chunk): chunks of nearly equal size, at most `chunk_size`."""
    count = -(-length // chunk_size)
    return count, -(-length // count)


def unit_lower_inverse(A: Tensor, base: int = 16) -> Tensor:
    """(I + A)^-1 of strictly lower triangular A [..., L, L], by halves.

    The inverse of [[P, 0], [C, Q]] is [[P^-1, 0], [-Q^-1 C P^-1, Q^-1]].

    base: block size at which a triangular solve is the faster way. What is on and above A's diagonal is
        ignored.
    """
    size = A.shape[-1]
    if size <= base:
        eye = torch.eye(size, dtype=A.dtype, device=A.device)
        return torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
    half = size // 2
    top = unit_lower_inverse(A[..., :half, :half], base)
    low = unit_lower_inverse(A[..., half:, half:], base)
    corner = -(low @ (A[..., half:, :half] @ top))
    return torch.cat((F.pad(top, (0, size - half)), torch.cat((corner, low), -1)), -2)


class _ChunkedDelta(torch.autograd.Function):
    """All chunks at once.

    q, k: [X, N, L, K] with X = B H; v: [X, N, L, V]; beta: [X, N, L, 1]; c: cumulative log decay in a chunk,
    broadcastable to [X, N, L]; state: [X, K, V] or None. Returns (o, final state, saved for backward ...).

    With D_ij = exp(c_i - c_j): A = beta k k^T D (strictly lower), (U, W) = (I + A)^-1 beta (v, exp(c) k); a
    chunk writes the values U - W S, and S becomes exp(c_L) S + Kd^T (U - W S) with Kd = exp(c_L - c) k
    (2412.06464, section 3.3). The backward is by hand; its decay gradient is that of the linear engine,
    because S_t exp(-c_t) obeys the rule without decay and with values exp(-c_t) v_t.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, c: Tensor, state: Tensor | None, final: bool
    ) -> tuple[Tensor | None, ...]:
        passes, V = state is not None or v.shape[1] > 1, v.shape[-1]
        D, grow, to_end = decay_matrix(c), c.exp().unsqueeze(-1), (c[..., -1:] - c).exp().unsqueeze(-1)
        inverse = unit_lower_inverse((k * beta) @ k.mT * D)
        P = (q @ k.mT) * D
        right = torch.cat((v * beta, k * (grow * beta)), -1) if passes else v * beta
        UW = inverse @ right
        new, last, states = UW[..., :V], None, None
        if passes:
            S = torch.zeros_like(k[:, 0, 0]).unsqueeze(-1) * v[:, 0, :1] if state is None else state
            entering, written = [], []
            Kd, whole = (
                (k * to_end).mT.unbind(1),
                c[..., -1:].exp().unsqueeze(-1).expand(-1, len(k[0]), -1, -1),
            )
            for U, W, K, decay in zip(new.unbind(1), UW[..., V:].unbind(1), Kd, whole.unbind(1), strict=True):
                entering.append(S)
                written.append(torch.baddbmm(U, W, S, alpha=-1))
                S = torch.baddbmm(decay * S, K, written[-1])
            new, last, states = torch.stack(written, 1), S, torch.stack(entering, 1)
        elif final:
            last = ((k * to_end).mT @ new)[:, 0]
        o = P @ new
        if states is not None:
            o = torch.addcmul(o, q @ states, grow)
        return o, last, P, D, inverse, UW, new, states

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, beta, c, _, _ = inputs
        ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, beta, c, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Any) -> Any:
        q, k, v, beta, c, o, last, P, D, inverse, UW, new, states = ctx.saved_tensors
        do, V = torch.zeros_like(o) if do is None else do, v.shape[-1]
        grow, to_end = c.exp().unsqueeze(-1), (c[..., -1:] - c).exp().unsqueeze(-1)
        dnew = P.mT @ do
        after = dstate = None
        if states is not None:
            de = do * grow
            read = (q.mT @ de).unbind(1)
            dS = torch.zeros_like(states[:, 0]) if dlast is None else dlast
            leaving, dnews = [], []
            Kd, whole = (
                (k * to_end).unbind(1),
                c[..., -1:].exp().unsqueeze(-1).expand(-1, len(k[0]), -1, -1).unbind(1),
            )
            for n in reversed(range(len(read))):
                leaving.append(dS)
                dnews.append(torch.baddbmm(dnew[:, n], Kd[n], dS))
                dS = torch.baddbmm(torch.addcmul(read[n], whole[n], dS), UW[:, n, :, V:].mT, dnews[-1], alpha=-1)
            after, dnew, dstate = torch.stack(leaving[::-1], 1), torch.stack(dnews[::-1], 1), dS
        elif dlast is not None:
            after = dlast.unsqueeze(1)
            dnew = torch.addcmul(dnew, k @ after, to_end)
        dG = (do @ new.mT).mul_(D)
        dq, dk, dUW = dG @ k, dG.mT @ q, dnew
        if after is not None:
            dk = torch.addcmul(dk, new @ after.mT, to_end)
        if states is not None:
            dq = dq + de @ states.mT
            dUW = torch.cat((dnew, (dnew @ states.mT).neg_()), -1)
        dR = inverse.mT @ dUW  # of the right sides beta (v, exp(c) k)
        dv = dR[..., :V] * beta
        E = (dR @ UW.mT).mul_(D).tril(-1).neg_()  # of k k^T, before beta
        Ek = E @ k
        if states is not None:
            Ek = torch.addcmul(Ek, dR[..., V:], grow)
        dbeta = (dR[..., :V] * v).sum(-1, keepdim=True) + (Ek * k).sum(-1, keepdim=True)
        dk = torch.addcmul(dk, Ek, beta) + E.mT @ (k * beta)
        dc = None
        if ctx.needs_input_grad[4]:
            ends = states if states is not None or after is None else torch.zeros_like(after)
            dc = decay_gradient(do, o, dv, v, after, ends, last).sum_to_size(c.shape)
        return dq, dk, dv, dbeta, dc, dstate if ctx.needs_input_grad[5] else None, None


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


def _check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, chunk_size: int) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != k.shape[:3] or beta.shape != v.shape[:3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v, beta))
        raise InputError(f"expected q, k [B, T, H, K], v [B, T, H, V] and beta [B, T, H], got {shapes}")
    if chunk_size < 1:
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
