"""Linear attention and its gated kin against the recurrences of their papers, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.mixers.recurrence import agrees, convolved, every_case, linear, normed, recurrence, rms, turned


def weight(mixer: Any, q: Tensor, k: Tensor, head: int, distance: int) -> Tensor:
    """What a key weighs for a query, phi(q) . phi(k), by the feature map's name."""
    size, feature = q.shape[0], mixer.feature
    kind = type(feature).__name__
    if kind == "FeatureMap":
        function = {
            "elu1": lambda x: torch.where(x > 0, x + 1, x.exp()),
            "relu": lambda x: x.clamp_min(0),
            "silu": lambda x: x / (1 + (-x).exp()),
            "identity": lambda x: x,
        }[mixer.given.get("feature_map", "elu1")]
        return function(q) @ function(k)
    if kind == "Taylor":  # 2402.18668, eq. 4
        s = q @ k / size**0.5
        return 1 + s + s**2 / 2
    if kind == "ReBased":  # 2402.10644, section 4
        q = normed(q, 1e-5) * feature.q_norm.weight + feature.q_norm.bias
        k = normed(k, 1e-5) * feature.k_norm.weight + feature.k_norm.bias
        return (q @ k) ** 2 / size
    if kind == "Hedgehog":  # 2402.04347, eq. 5
        q, k = q @ feature.q_weight[head], k @ feature.k_weight[head]
        return q.softmax(0) @ k.softmax(0) + (-q).softmax(0) @ (-k).softmax(0)
    if kind == "Performer":  # 2009.14794, lemma 1; a factor of the query alone keeps its largest feature at 1
        directions = feature.directions[head]
        q, k = q / size**0.25, k / size**0.25
        of_q, of_k = directions @ q - q @ q / 2, directions @ k - k @ k / 2
        return ((of_q - of_q.max()).exp() * of_k.exp()).sum() / len(directions)
    assert kind == "CosFormer"  # 2202.08791, eq. 10
    return q.clamp_min(0) @ k.clamp_min(0) * math.cos(math.pi * distance / (2 * feature.period))


@recurrence("linear_attention")
def linear_attention(mixer: Any, x: Tensor) -> Tensor:
    """2006.16236, eqs. 7 to 9: the weighted mean of the values so far, or the sum over sqrt(d) or the tokens."""
    size = mixer.width // mixer.heads
    qkv = convolved(mixer.conv, linear(mixer.in_proj, x), activation=False)
    key = (qkv.shape[1] - mixer.width) // (2 * mixer.heads)
    q, k = qkv[:, : -mixer.width].view(len(x), 2, mixer.heads, key).unbind(1)
    v = qkv[:, -mixer.width :].view(len(x), mixer.heads, size)
    y = torch.zeros(len(x), mixer.heads, size, dtype=x.dtype)
    for t in range(len(x)):
        for h in range(mixer.heads):
            weights = torch.stack([weight(mixer, q[t, h], k[s, h], h, t - s) for s in range(t + 1)])
            y[t, h] = weights @ v[: t + 1, h]
            if mixer.normalise:
                floor = 1e-2 if type(mixer.feature).__name__ == "ReBased" else 1e-6
                y[t, h] /= weights.sum() + floor
            else:
                y[t, h] /= key**0.5 * (max(t, 1) if mixer.mean else 1)
    return linear(mixer.out_proj, y.flatten(1))


@recurrence("lightning_attention")
def lightning_attention(mixer: Any, x: Tensor) -> Tensor:
    """2401.04658: S_t = exp(-2^(-8 h / H)) S_(t-1) + k_t v_t^T for head h = 1 .. H."""
    heads, size = mixer.heads, mixer.width // mixer.heads
    projected = linear(mixer.in_proj, x)
    qkv, gate = projected[:, : 3 * mixer.width], projected[:, 3 * mixer.width :]
    q, k, v = convolved(mixer.conv, qkv, activation=True).view(len(x), 3, heads, size).unbind(1)
    S, y = torch.zeros(heads, size, size, dtype=x.dtype), torch.zeros(len(x), heads, size, dtype=x.dtype)
    for t in range(len(x)):
        for h in range(heads):
            S[h] = math.exp(-(2 ** (-8 * (h + 1) / heads))) * S[h] + torch.outer(k[t, h], v[t, h])
            y[t, h] = S[h].T @ q[t, h] / size**0.5
    return linear(mixer.out_proj, rms(y.flatten(1), 1e-6) * mixer.norm.weight * gate.sigmoid())


@recurrence("retention")
def retention(mixer: Any, x: Tensor) -> Tensor:
    """2307.08621, eqs. 6 and 8: rotated q and k, decays 1 - 2^(-5 - h), a group norm and a swish gate."""
    heads, key = mixer.heads, mixer.width // mixer.heads
    projected = linear(mixer.in_proj, x)
    gate = projected[:, -mixer.inner :]
    qkv = convolved(mixer.conv, projected[:, : -mixer.inner], activation=False)
    q, k = qkv[:, : 2 * mixer.width].view(len(x), 2, heads, key).unbind(1)
    v = qkv[:, 2 * mixer.width :].view(len(x), heads, -1)
    S = torch.zeros(heads, key, v.shape[-1], dtype=x.dtype)
    y = torch.zeros_like(v)
    for t in range(len(x)):
        for h in range(heads):
            S[h] = (1 - 2.0 ** (-5 - h)) * S[h] + torch.outer(turned(k[t, h], t), v[t, h])
            y[t, h] = S[h].T @ turned(q[t, h], t) / key**0.5
    return linear(mixer.out_proj, normed(y, 1e-6).flatten(1) * F.silu(gate))


@recurrence("gla")
def gla(mixer: Any, x: Tensor) -> Tensor:
    """2312.06635, eqs. 3 and 4, section 4.4: S_t = diag(alpha_t) S_(t-1) + k_t v_t^T, alpha = sigmoid(.)^(1/tau)."""
    heads, key, value = mixer.heads, mixer.key, mixer.width // mixer.heads
    keys = heads * key
    projected = linear(mixer.in_proj, x)
    qkv, gate, low = projected.split((2 * keys + mixer.width, mixer.width, mixer.decay_proj.in_features), 1)
    qkv = convolved(mixer.conv, qkv, activation=mixer.conv is not None)
    q, k, v = qkv.split((keys, keys, mixer.width), 1)
    alpha = linear(mixer.decay_proj, low).sigmoid() ** (1 / mixer.gate_scale)
    S, y = torch.zeros(heads, key, value, dtype=x.dtype), torch.zeros(len(x), heads, value, dtype=x.dtype)
    for t in range(len(x)):
        for h in range(heads):
            own_k, own_v = slice(h * key, (h + 1) * key), slice(h * value, (h + 1) * value)
            S[h] = alpha[t, own_k, None] * S[h] + torch.outer(k[t, own_k], v[t, own_v])
            y[t, h] = S[h].T @ q[t, own_k] / key**0.5
    return linear(mixer.out_proj, (rms(y, 1e-6) * mixer.norm.weight).flatten(1) * F.silu(gate))


@recurrence("hgrn2")
def hgrn2(mixer: Any, x: Tensor) -> Tensor:
    """2404.07904, section 3: S_t = diag(f_t) S_(t-1) + (1 - f_t) v_t^T, f = b + (1 - b) sigmoid(.)."""
    heads, size, bound = mixer.heads, mixer.width // mixer.heads, mixer.lower_bound
    projected = convolved(mixer.conv, linear(mixer.in_proj, x), activation=False)
    q, forget, v = projected.view(len(x), 3, heads, size).unbind(1)
    S, y = torch.zeros(heads, size, size, dtype=x.dtype), torch.zeros(len(x), heads, size, dtype=x.dtype)
    for t in range(len(x)):
        for h in range(heads):
            f = bound + (1 - bound) * forget[t, h].sigmoid()
            S[h] = f[:, None] * S[h] + torch.outer(1 - f, v[t, h])
            y[t, h] = S[h].T @ F.silu(q[t, h]) / size**0.5
    return linear(mixer.out_proj, rms(y.flatten(1), 1e-6) * mixer.norm.weight)


@recurrence("rwkv6")
def rwkv6(mixer: Any, x: Tensor) -> Tensor:
    """2404.05892, eqs. 9 to 19: ddlerp, decays exp(-exp(.)) of each channel, a bonus u for the token itself."""
    heads, size = mixer.heads, mixer.width // mixer.heads
    matrices = mixer.in_proj.weight.view(4, mixer.width, mixer.width)
    shift_in = mixer.shift_in.weight.view(5, -1, mixer.width)
    S, before = torch.zeros(heads, size, size, dtype=x.dtype), torch.zeros_like(x[0])
    rows = []
    for now in x:
        first = now + (before - now) * mixer.shift[0]
        mixed = [
            now + (before - now) * (mixer.shift[n + 1] + (shift_in[n] @ first).tanh() @ mixer.shift_out[n])
            for n in range(5)
        ]
        w = (-((mixer.decay + (mixer.decay_in.weight @ mixed[0]).tanh() @ mixer.decay_out).exp())).exp()
        r, k, v, g = (matrix @ part for matrix, part in zip(matrices, mixed[1:], strict=True))
        r, k, v, w = (y.view(heads, size) for y in (r, k, v, w))
        y = torch.zeros(heads, size, dtype=x.dtype)
        for h in range(heads):
            written = torch.outer(k[h], v[h])
            y[h] = (S[h] + mixer.bonus[h][:, None] * written).T @ r[h]
            S[h] = w[h][:, None] * S[h] + written
        rows.append((normed(y, 64e-5).flatten() * mixer.norm_weight) * F.silu(g))
        before = now
    return linear(mixer.out_proj, torch.stack(rows))


@recurrence("log_linear_attention")
def log_linear_attention(mixer: Any, x: Tensor) -> Tensor:
    """2506.04761, eqs. 5 and 9: sum over s of lambda_t^(level) exp(sum of g) (q_t . k_s) v_s.

    In a Fenwick tree s is in the bucket of t's highest binary digit in which the two places differ.
    """
    heads, size, levels = mixer.heads, mixer.head_dim, mixer.levels
    inner = heads * size
    qkv, gate, decay, weights = linear(mixer.in_proj, x).split((3 * inner, inner, heads, heads * levels), 1)
    q, k, v = qkv.view(len(x), 3, heads, size).unbind(1)
    g = (decay + mixer.decay_bias).sigmoid().log()
    share = F.softplus(mixer.level_scale * weights.view(len(x), heads, levels))
    y = torch.zeros(len(x), heads, size, dtype=x.dtype)
    for t in range(len(x)):
        for h in range(heads):
            for s in range(t + 1):
                level = min((t ^ s).bit_length(), levels - 1)
                kept = g[s + 1 : t + 1, h].sum().exp()
                y[t, h] += share[t, h, level] * kept * (q[t, h] @ k[s, h]) / size**0.5 * v[s, h]
    return linear(mixer.out_proj, (rms(y, 1e-6) * mixer.norm.weight).flatten(1) * F.silu(gate))


@recurrence("rodimus")
def rodimus(mixer: Any, x: Tensor) -> Tensor:
    """2410.06577, section 3: S_t = exp(-g tau) S_(t-1) + (k g^tau) v_t^T, the unit key and gated values."""
    S = torch.zeros(mixer.key, mixer.value, dtype=x.dtype)
    up, gate = linear(mixer.in_proj, x).chunk(2, 1)
    u, rows = up if mixer.conv is None else convolved(mixer.conv, up, activation=True), []
    for t in range(len(x)):
        q, k, g, tau = linear(mixer.select_proj, u[t]).chunk(4)
        g, tau = (1 + g.exp()).log(), tau.sigmoid()
        k = k / k.norm() * g**tau
        v = linear(mixer.gate_out, linear(mixer.gate_in, up[t])).sigmoid() * up[t]
        S = (-g * tau).exp()[:, None] * S + torch.outer(k, v)
        o = (S.T @ q / mixer.key**0.5 + u[t] * mixer.residual) * F.silu(gate[t])
        rows.append(rms(o, 1e-5) * mixer.norm_weight)
    return linear(mixer.out_proj, torch.stack(rows))


@every_case("linear")
def test_agrees_with_the_papers_recurrence(name: str, options: Mapping[str, Any]) -> None:
    agrees(name, options)
