"""Delta-rule mixers against the recurrences of their papers, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.mixers.recurrence import agrees, convolved, every_case, linear, normed, recurrence, rms, unit


def delta_rule(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """S_t = (I - beta k k^T) diag(alpha) S_(t-1) + beta k v^T, o_t = S_t^T q / sqrt(K) (2412.06464, eq. 10).

    q, k, alpha: [T, H, K]. v: [T, H, V]. beta: [T, H].
    """
    length, heads, key = k.shape
    eye = torch.eye(key, dtype=k.dtype)
    S, y = torch.zeros(heads, key, v.shape[-1], dtype=k.dtype), torch.zeros_like(v)
    for t in range(length):
        for h in range(heads):
            forgotten = eye - beta[t, h] * torch.outer(k[t, h], k[t, h])
            S[h] = forgotten @ (alpha[t, h][:, None] * S[h]) + beta[t, h] * torch.outer(k[t, h], v[t, h])
            y[t, h] = S[h].T @ q[t, h] / key**0.5
    return y


def heads_of(mixer: Any, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit queries and keys, and values, behind the convolution."""
    keys = mixer.heads * mixer.key
    q, k, v = convolved(mixer.conv, qkv, activation=True).split((keys, keys, mixer.heads * mixer.value), 1)
    q, k, v = (y.view(len(qkv), mixer.heads, -1) for y in (q, k, v))
    return unit(q), unit(k), v


@recurrence("delta_net", "gated_delta_net")
def delta_net(mixer: Any, x: Tensor) -> Tensor:
    heads, keys, values = mixer.heads, mixer.heads * mixer.key, mixer.heads * mixer.value
    projected = linear(mixer.in_proj, x)
    q, k, v = heads_of(mixer, projected[:, : 2 * keys + values])
    beta, rest = projected[:, 2 * keys + values :].split((heads, projected.shape[1] - 2 * keys - values - heads), 1)
    beta = beta.sigmoid() * (2 if mixer.given.get("allow_neg_eigval") else 1)
    gated = hasattr(mixer, "A_log")
    alpha = torch.ones(len(x), heads, dtype=x.dtype)
    if gated:  # 2412.06464, as Mamba-2: exp(-exp(A) softplus(a + dt))
        alpha = (-(mixer.A_log.exp()) * (1 + (rest[:, values:] + mixer.dt_bias).exp()).log()).exp()
    y = delta_rule(q, k, v, alpha[:, :, None].expand(-1, -1, mixer.key), beta)
    y = (rms(y, 1e-6) * mixer.norm.weight).flatten(1)
    return linear(mixer.out_proj, y * F.silu(rest[:, :values]) if gated else y)


@recurrence("kda")
def kda(mixer: Any, x: Tensor) -> Tensor:
    """2510.26692: the decay is of each channel, exp(-exp(A) softplus(.)), the output gate a sigmoid."""
    heads, keys, values = mixer.heads, mixer.heads * mixer.key, mixer.heads * mixer.value
    rank = mixer.decay_proj.in_features
    qkv, beta, decay, gate = linear(mixer.in_proj, x).split((2 * keys + values, heads, rank, rank), 1)
    q, k, v = heads_of(mixer, qkv)
    rate = (1 + (linear(mixer.decay_proj, decay) + mixer.dt_bias).exp()).log().view(len(x), heads, mixer.key)
    alpha = (-mixer.A_log.exp()[:, None] * rate).exp()
    y = delta_rule(q, k, v, alpha, beta.sigmoid() * (2 if mixer.given.get("allow_neg_eigval") else 1))
    y = (rms(y, 1e-5) * mixer.norm.weight).flatten(1)
    return linear(mixer.out_proj, y * linear(mixer.gate_proj, gate).sigmoid())


@recurrence("rwkv7")
def rwkv7(mixer: Any, x: Tensor) -> Tensor:
    """2503.14456, eqs. 3 to 20: S_t = S_(t-1) diag(w) - S k^ (a k^)^T + v k~^T, and a bonus r . (rho k~) v."""
    heads, size = mixer.heads, mixer.width // mixer.heads
    W_r, W_k, W_v = mixer.in_proj.weight.chunk(3)
    S, before, rows = torch.zeros(heads, size, size, dtype=x.dtype), torch.zeros_like(x[0]), []
    for now in x:
        for_r, for_k, for_v, for_w, for_a, for_g = (now + (before - now) * mu for mu in mixer.shift)
        r, k, v = W_r @ for_r, W_k @ for_k, W_v @ for_v
        w = (-math.exp(-0.5) * linear(mixer.decay_out, linear(mixer.decay_in, for_w).tanh()).sigmoid()).exp()
        a = linear(mixer.rate_out, linear(mixer.rate_in, for_a)).sigmoid()
        g = linear(mixer.gate_out, linear(mixer.gate_in, for_g).sigmoid())
        removed = (k * mixer.removal).view(heads, size)
        removed = removed / (removed.square().sum(-1, keepdim=True) + 1e-12).sqrt()
        replaced = (k * (1 + (a - 1) * mixer.replacement)).view(heads, size)
        r, v, w, a = (y.view(heads, size) for y in (r, v, w, a))
        y = torch.zeros(heads, size, dtype=x.dtype)
        for h in range(heads):
            erased = torch.outer(a[h] * removed[h], removed[h] @ S[h])
            S[h] = w[h][:, None] * S[h] - erased + torch.outer(replaced[h], v[h])
            y[h] = S[h].T @ r[h]
        y = normed(y, 64e-5).flatten() * mixer.norm_weight + mixer.norm_bias
        bonus = ((r * replaced * mixer.bonus).sum(-1, keepdim=True) * v).flatten()
        rows.append((y + bonus) * g)
        before = now
    return linear(mixer.out_proj, torch.stack(rows))


@every_case("delta")
def test_agrees_with_the_papers_recurrence(name: str, options: Mapping[str, Any]) -> None:
    agrees(name, options)
