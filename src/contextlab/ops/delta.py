"""The (gated) delta rule in the chunked WY form: a state that corrects its own prediction error.

The state S [K, V] of a head obeys, with the decay a_t = exp(g_t),
    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,    o_t = scale S_t^T q_t,
which is one step of online gradient descent on |S^T k - v|^2 (2406.06484; with decay 2412.06464). Inside a
chunk the corrections solve one unit lower-triangular system, whose inverse comes from block recursion; from
chunk to chunk the state passes by one matrix product. Half precision is computed in float32. Documents
packed by `cu_seqlens`: `ops.by_document`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops import backend
from contextlab.ops.linear import decay_matrix, log_decays, working_dtype
from contextlab.ops.precision import without_autocast


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
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule with a decay per head and token (2412.06464, eq. 10).

    q, k: [B, T, H, K]; keys of length <= 1 keep the state bounded. v: [B, T, H, V].
    g: [B, T, H] log decay, <= 0, -inf to forget all before, or None (no decay).
    beta: [B, T, H] writing strength in [0, 1], or up to 2 for negative eigenvalues (2411.12537).
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
    q, k, v, beta = q.to(work), k.to(work), v.to(work), beta.to(work)
    g = None if g is None else g.to(work)
    if length == 0:
        empty = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]) if state is None else state
        return v.to(dtype), empty if output_final_state else None
    if length == 1:
        o, last = _step(q * scale, k, v, g, beta, state)
        return o.to(dtype), last if output_final_state else None
    count, size = split(length, chunk_size)
    batch, heads = v.shape[0], v.shape[2]
    inputs = [_chunks(x, count, size) for x in (q, k, v, beta.unsqueeze(-1))]
    c = v.new_zeros(1, 1, size, dtype=torch.float64)
    if g is not None:
        c = _chunks(log_decays(g, work).unsqueeze(-1), count, size).squeeze(-1).cumsum(-1)
    flat = None if state is None else state.flatten(0, 1)
    o, last, *_ = _ChunkedDelta.apply(*inputs, c, flat, scale, output_final_state)
    o = o.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length].to(dtype)
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
    """All chunks, one after the other, so that what a step needs stays in the processor's cache.

    q, k: [N, X, L, K] with X = B H; v: [N, X, L, V]; beta: [N, X, L, 1]; c: float64 sums of log decays in a
    chunk, broadcastable to [N, X, L]; state: [X, K, V] or None. Returns (o, final state, saved for backward ...).

    With D_ij = exp(c_i - c_j): A = beta k k^T D (strictly lower), (U, W) = (I + A)^-1 beta (v, exp(c) k); a
    chunk writes the values U - W S, and S becomes exp(c_L) S + Kd^T (U - W S) with Kd = exp(c_L - c) k
    (2412.06464, section 3.3).
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, c: Tensor, state: Tensor | None, scale: float, final: bool
    ) -> tuple[Tensor | None, ...]:
        passes, D = state is not None or len(v) > 1, decay_matrix(c, v.dtype)
        grow, to_end, whole = _decays(c, len(v), v.dtype)
        inverse = unit_lower_inverse((k * beta) @ k.mT * D)
        P = (q @ k.mT).mul_(D).mul_(scale)
        last = states = W = None
        new = inverse @ (v * beta)  # U, which becomes U - W S in place
        if not passes:
            if final:
                last = ((k * to_end).mT @ new)[0]
            return P @ new, last, P, D, inverse, W, new, states
        W = inverse @ (k * (grow * beta))
        Kd, o = (k * to_end).mT, torch.empty_like(v)
        states = v.new_empty(len(v) + 1, v.shape[1], k.shape[-1], v.shape[-1])
        states[0] = 0 if state is None else state
        for n, S in enumerate(states[:-1]):
            new[n].baddbmm_(W[n], S, alpha=-1)
            torch.baddbmm((q[n] @ S).mul_(scale * grow[n]), P[n], new[n], out=o[n])
            torch.baddbmm(whole[n] * S, Kd[n], new[n], out=states[n + 1])
        return o, states[-1].clone(), P, D, inverse, W, new, states

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, beta, c, _, ctx.scale, _ = inputs
        ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, beta, c, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Any) -> Any:
        o = ctx.saved_tensors[5]
        do = torch.zeros_like(o) if do is None else do
        gradients = _ChunkedDeltaBackward.apply(*ctx.saved_tensors, do, dlast, ctx.scale, *ctx.needs_input_grad[4:6])
        return *gradients, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _folded(_ChunkedDelta, info.batch_size, in_dims, inputs, (1, 1, 1, 1, 1, 0), (1, 0, *[1] * 6))


class _ChunkedDeltaBackward(torch.autograd.Function):
    """The backward, by hand; a function of its own so that it too can be mapped.

    With R the gradient of the right side beta v, that of beta exp(c) k is -R S^T, and that of A is
    -R (U - W S)^T. The decay's gradient is that of the linear engine (`ops.linear.decay_gradient`), because
    S_t exp(-c_t) obeys the rule without decay and with values exp(-c_t) v_t.
    """

    @staticmethod
    @without_autocast
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        c: Tensor,
        o: Tensor,
        last: Tensor | None,
        P: Tensor,
        D: Tensor,
        inverse: Tensor,
        W: Tensor | None,
        new: Tensor,
        states: Tensor | None,
        do: Tensor,
        dlast: Tensor | None,
        scale: float,
        decay: bool,
        initial: bool,
    ) -> tuple[Tensor | None, ...]:
        grow, to_end, whole = _decays(c, len(v), v.dtype)
        buffer = torch.zeros_like if states is None else torch.empty_like
        dnew, dq, dk, Ek = P.mT @ do, buffer(q), buffer(k), buffer(k)
        ends, dS = v.new_zeros(v.shape[:2]), dlast  # ends: <dS, S> of the state S after each chunk
        if states is None:
            if dlast is not None and last is not None:
                dnew.addcmul_(k @ dlast, to_end)
                torch.mul(new @ dlast.mT, to_end, out=dk)
                ends[0] = (dlast * last).sum((-2, -1))
            dR = inverse.mT @ dnew
        else:
            assert W is not None
            dR, Kd = torch.empty_like(dnew), k * to_end
            dS = torch.zeros_like(states[0]) if dlast is None else dlast
            for n in reversed(range(len(v))):
                S, de = states[n], do[n] * (scale * grow[n])
                ends[n] = (dS * states[n + 1]).sum((-2, -1))
                dnew[n].baddbmm_(Kd[n], dS)
                torch.bmm(inverse[n].mT, dnew[n], out=dR[n])
                torch.mul(new[n] @ dS.mT, to_end[n], out=dk[n])
                torch.bmm(de, S.mT, out=dq[n])
                torch.mul(dR[n] @ S.mT, -grow[n], out=Ek[n])
                dS = (whole[n] * dS).baddbmm_(q[n].mT, de).baddbmm_(W[n].mT, dnew[n], alpha=-1)
        dG = (do @ new.mT).mul_(D).mul_(scale)
        E = (dR @ new.mT).mul_(D).tril_(-1).neg_()  # of k k^T, before beta
        for out, a, b in ((dq, dG, k), (dk, dG.mT, q), (Ek, E, k), (dk, (E * beta).mT, k)):
            out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
        dk.addcmul_(Ek, beta)
        share = _row_products(dR, v)
        dbeta = (share + _row_products(Ek, k)).unsqueeze(-1)
        dc = None
        if decay:
            dc = _row_products(do, o) - beta.squeeze(-1) * share
            dc[..., -1] += ends
            dc = dc.sum_to_size(c.shape)
        return dq, dk, dR.mul_(beta), dbeta, dc, dS if initial else None

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing: it is not differentiated again."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        axes = (1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0)
        return _folded(_ChunkedDeltaBackward, info.batch_size, in_dims, inputs, axes, (1, 1, 1, 1, 1, 0))


def _decays(c: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """exp(c) and exp(c_L - c) [N, X or 1, L, 1], and exp(c_L) [N, X or 1, 1, 1], for N = `count` chunks."""
    c = c.expand(count, -1, -1).unsqueeze(-1)
    end = c[..., -1:, :]
    return c.exp().to(dtype), (end - c).exp().to(dtype), end.exp().to(dtype)


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a b over the last dimension, one chunk after the other: no large temporary."""
    return torch.stack([(x * y).sum(-1) for x, y in zip(a, b, strict=True)])


def _folded(
    function: Any, size: int, in_dims: Any, inputs: Any, axes: tuple[int, ...], out_axes: tuple[int, ...]
) -> tuple[Any, Any]:
    """One more batch dimension of `size` is so many more sequences; every output gets it.

    axes, out_axes: where the sequences lie in the inputs (what follows them is passed on) and outputs.
    """
    given = [
        x.movedim(dim, axis)
        if dim is not None
        else x.unsqueeze(axis).expand(*x.shape[:axis], size, *x.shape[axis:])
        if isinstance(x, Tensor)
        else x
        for x, dim, axis in zip(inputs, in_dims, axes, strict=False)
    ]
    rows = given[0].shape[2]  # q is the first: [N, size, X, L, K]
    # Decays that are the same for all sequences become each one's own.
    given = [
        x.expand(*x.shape[: axis + 1], rows, *x.shape[axis + 2 :]).flatten(axis, axis + 1)
        if isinstance(x, Tensor)
        else x
        for x, axis in zip(given, axes, strict=True)
    ]
    outputs = function.apply(*given, *inputs[len(axes) :])
    split_up = [
        y.unflatten(axis, (size, rows)) if isinstance(y, Tensor) else None
        for y, axis in zip(outputs, out_axes, strict=True)
    ]
    return tuple(split_up), tuple(axis if y is not None else None for y, axis in zip(split_up, out_axes, strict=True))


def _chunks(x: Tensor, count: int, size: int) -> Tensor:
    """[B, T, H, D] -> contiguous [count, B H, size, D], zeros after the end."""
    pad = count * size - x.shape[1]
    x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
    return x.unflatten(1, (count, size)).permute(1, 0, 3, 2, 4).contiguous().flatten(1, 2)


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
