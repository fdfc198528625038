"""ATLAS' memory: gradient descent on a window of tokens (the Omega rule), with momentum, forgetting and Muon.

The memory M [K, V] of a head learns to map keys to values. Each token's step goes against the gradient of the weighted
errors of the last c tokens, not of its own alone (2505.23735):
    S_t = exp(m_t) S_{t-1} - rate_t sum_{t-c < i <= t} gate_i k_i (M'^T k_i - v_i)^T,
    M_t = exp(g_t) M_{t-1} + gain step(S_t),    o_t = M_t^T q_t.
M' is the memory that the mini-batch begins with, as in the paper's parallel form. step is S_t itself (OmegaNet with
momentum) or, with Muon, S_t made near orthogonal by Newton-Schulz iterations. Window 1 and mini-batches of one token
without Muon are Titans. The paper's deep memories are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.decays import decay_matrix, log_decays
from contextlab.ops.precision import without_autocast


@without_autocast
def atlas(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    m: Tensor,
    g: Tensor,
    gate: Tensor,
    M: Tensor,
    S: Tensor,
    window: int = 1,
    muon_steps: int = 0,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One mini-batch of L tokens, with the P >= window - 1 tokens before it.

    q: [B, H, L, K]. k: [B, H, P + L, K]. v: [B, H, P + L, V]. rate, m, g: [B, H, L]; m and g are logs, <= 0.
    gate: [B, H, P + L], the weight of a token's error; 0 where there was none.
    M, S: [B, H, K, V], memory and momentum that the mini-batch begins with.
    window: c, the tokens whose errors make a step. muon_steps: Newton-Schulz iterations; 0 for plain steps.
    gain: [H], by which the steps are multiplied, or None (1).
    Returns the answers [B, H, L, V] and M and S after the mini-batch.
    """
    dtype = M.dtype
    if muon_steps:
        # Newton-Schulz enlarges what is small, five steps 485 times: also rounding errors where S has no direction.
        q, k, v, rate, m, g, gate, M, S = (x.double() for x in (q, k, v, rate, m, g, gate, M, S))
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    if past < window - 1:
        raise InputError(f"a window of {window} needs {window - 1} tokens before the mini-batch, got {past}")
    c, h = (log_decays(x, M.dtype).cumsum(-1) for x in (g, m))
    decay, momentum = decay_matrix(c, M.dtype), decay_matrix(h, M.dtype)
    keep, carry = (x.exp().to(M.dtype).unsqueeze(-1) for x in (c, h))
    pushed = momentum @ (rate.unsqueeze(-1) * _seen(length, past, window, q) * gate.unsqueeze(-2))  # [.., L, P + L]
    error = k @ M - v
    last = S * carry[..., -1:, :] - (pushed[..., -1:, :].mT * k).mT @ error
    if gain is not None:
        decay = decay * gain[:, None, None]
    if muon_steps:
        # All momenta of the mini-batch: Newton-Schulz is not linear, so they have to be made one by one.
        steps = carry.unsqueeze(-1) * S.unsqueeze(2)
        steps = steps - torch.einsum("bhln,bhnk,bhnv->bhlkv", pushed, k, error)
        steps = newton_schulz(steps, muon_steps)
        o = keep * (q @ M) + _read(decay, q, steps)
        after = keep[..., -1:, :] * M + torch.einsum("bhl,bhlkv->bhkv", decay[..., -1, :], steps)
        return o.to(dtype), after.to(dtype), last.to(dtype)
    weight, surprise = decay @ pushed, decay @ carry
    o = keep * (q @ M) + surprise * (q @ S) - (weight * (q @ k.mT)) @ error
    after = keep[..., -1:, :] * M + surprise[..., -1:, :] * S - (weight[..., -1:, :].mT * k).mT @ error
    return o, after, last


def naive_atlas(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    m: Tensor,
    g: Tensor,
    gate: Tensor,
    M: Tensor,
    S: Tensor,
    window: int = 1,
    muon_steps: int = 0,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What defines `atlas` (2505.23735): token by token, each gradient from its own window.

    Arguments as for `atlas`, q [B, H, L, K], k [B, H, P + L, K], v [B, H, P + L, V]. Returns the answers [B, H, L, V]
    and M and S [B, H, K, V] after the mini-batch.
    """
    past, start, os = k.shape[2] - q.shape[2], M, []
    for t in range(q.shape[2]):
        S = m[..., t].exp()[..., None, None] * S
        for i in range(past + t - window + 1, past + t + 1):
            error = torch.einsum("bhkv,bhk->bhv", start, k[:, :, i]) - v[:, :, i]
            weight = (rate[..., t] * gate[..., i])[..., None, None]
            S = S - weight * k[:, :, i].unsqueeze(-1) * error.unsqueeze(-2)
        step = newton_schulz(S, muon_steps) if muon_steps else S
        M = g[..., t].exp()[..., None, None] * M + (step if gain is None else step * gain[:, None, None])
        os.append(torch.einsum("bhkv,bhk->bhv", M, q[:, :, t]))
    return torch.stack(os, 2), M, S


def newton_schulz(x: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Muon's quintic iteration: x [..., K, V] with its singular values moved to about 1 (0.7 to 1.2 after five steps).

    The singular vectors stay; zero stays zero. Coefficients: those of the Muon optimiser.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.square().sum((-2, -1), keepdim=True) + eps**2).sqrt()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _seen(length: int, past: int, window: int, like: Tensor) -> Tensor:
    """[L, P + L]: 1 where a token's window holds a token."""
    distance = torch.arange(past, past + length, device=like.device)[:, None]
    distance = distance - torch.arange(past + length, device=like.device)
    return ((distance >= 0) & (distance < window)).to(like.dtype)


def _read(decay: Tensor, q: Tensor, steps: Tensor) -> Tensor:
    """The answers of all memories sum_s decay_ts steps_s to their own q_t: [B, H, L, V]."""
    seen = (decay @ steps.flatten(-2)).unflatten(-1, steps.shape[-2:])
    return (q.unsqueeze(-2) @ seen).squeeze(-2)
