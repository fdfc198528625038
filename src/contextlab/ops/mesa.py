"""The mesa layer: every token is answered by the ridge regression of all values on all keys so far.

o_t = H_t^T (G_t + diag(lambda))^-1 q_t with G_t = exp(g_t) G_{t-1} + beta_t k_t k_t^T and
H_t = exp(g_t) H_{t-1} + beta_t k_t v_t^T (2309.05858; 2506.05233). The systems of all tokens are solved at once by
conjugate gradients (2506.05233): G_t x_t is linear attention with x for queries and k for both keys and values, so no
G_t is ever made but at the ends of chunks. Gradients go through the solution, not through the iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contextlab.errors import InputError
from contextlab.ops.decays import log_decays
from contextlab.ops.linear import simple_gla, working_dtype
from contextlab.ops.precision import without_autocast


@without_autocast
def mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    ridge: Tensor,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    steps: int = 30,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Ridge regression in the state, for all tokens at once.

    q, k: [B, T, H, K]. v: [B, T, H, V]. g: [B, T, H] log decay, <= 0. beta: [B, T, H] weight of a token, >= 0.
    ridge: [H, K] strength of the ridge, > 0. initial_state: G [B, H, K, K] and H [B, H, K, V], or None (zeros).
    steps: of conjugate gradients; K of them solve exactly but for rounding, and fewer where the ridge is strong.
    Returns (o [B, T, H, V], final state (at least float32) or None).
    """
    if q.shape != k.shape or q.ndim != 4 or v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise InputError(
            f"expected q, k [B, T, H, K] and v [B, T, H, V], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if ridge.shape != k.shape[2:]:
        raise InputError(f"expected ridge [H, K] = {list(k.shape[2:])}, got {list(ridge.shape)}")
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    dtype, work = v.dtype, working_dtype(v.dtype)
    q, k, v, g, beta, ridge = (x.to(work) for x in (q, k, v, g, beta, ridge))
    G, H = (None, None) if initial_state is None else (x.to(work) for x in initial_state)
    weighted = k * beta.unsqueeze(-1)

    def times(x: Tensor) -> Tensor:
        """(G_t + ridge) x_t."""
        return simple_gla(x, k, weighted, g, None, 1.0, G)[0] + ridge * x

    with torch.no_grad():
        x = conjugate_gradients(times, q, steps)
    if torch.is_grad_enabled():
        x = _Solved.apply(q - times(x), x, times, steps)
    o, H_after = simple_gla(x, weighted, v, g, None, 1.0, H, output_final_state)
    if not output_final_state:
        return o.to(dtype), None
    assert H_after is not None
    total = log_decays(g, work).flip(1).cumsum(1).flip(1)
    left = torch.cat((total[:, 1:], torch.zeros_like(total[:, :1])), 1)  # from each token to the end
    G_after = torch.einsum("bthk,bthj->bhkj", weighted * left.exp().to(work).unsqueeze(-1), k)
    if G is not None:
        G_after = G_after + G * total[:, 0].exp().to(work)[..., None, None]
    return o.to(dtype), (G_after, H_after)


def naive_mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    ridge: Tensor,
    initial_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What defines `mesa`, one token after the other, each system solved directly.

    Arguments as there. Returns o [B, T, H, V] and the final state (G [B, H, K, K], H [B, H, K, V]).
    """
    if initial_state is None:
        G = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], k.shape[-1])
        H = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    else:
        G, H = initial_state
    os = []
    for t in range(v.shape[1]):
        decay, weighted = g[:, t].exp()[..., None, None], (k[:, t] * beta[:, t].unsqueeze(-1)).unsqueeze(-1)
        G = decay * G + weighted * k[:, t].unsqueeze(-2)
        H = decay * H + weighted * v[:, t].unsqueeze(-2)
        x = torch.linalg.solve(G + torch.diag_embed(ridge), q[:, t])
        os.append(torch.einsum("bhkv,bhk->bhv", H, x))
    return torch.stack(os, 1), (G, H)


def conjugate_gradients(times: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """x [..., K] with times(x) = b, by conjugate gradients from zero.

    times: a symmetric positive definite map of the last dimension. b: [..., K]. steps: iterations; K are exact.
    """
    x, r = torch.zeros_like(b), b
    p, size = r, r.square().sum(-1, keepdim=True)
    tiny = torch.finfo(b.dtype).tiny
    for _ in range(steps):
        y = times(p)
        alpha = size / (p * y).sum(-1, keepdim=True).clamp_min(tiny)
        x = x + alpha * p
        r = r - alpha * y
        before, size = size, r.square().sum(-1, keepdim=True)
        p = r + size / before.clamp_min(tiny) * p
    return x


class _Solved(torch.autograd.Function):
    """x itself, which solves times(x) = b; backward, the gradient in the residual b - times(x) is solved for, too."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, times: Callable[[Tensor], Tensor], steps: int) -> Tensor:
        ctx.times, ctx.steps = times, steps
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return conjugate_gradients(ctx.times, gradient, ctx.steps), None, None, None
