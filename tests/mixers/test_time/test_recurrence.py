"""Memories that are fitted while they read, against the updates of their papers, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.mixers.recurrence import agrees, convolved, every_case, linear, normed, recurrence, rms, turned, unit


def inner(mixer: Any, weights: list[Tensor], h: int, x: Tensor) -> Tensor:
    """2407.04620, section 2.7: f(x) = x + LN(g(x)), g linear or a two-layer MLP."""
    z = x @ weights[0] + weights[1][0]
    if len(weights) == 4:
        z = F.gelu(z, approximate="tanh") @ weights[2] + weights[3][0]
    return x + normed(z, 1e-6) * mixer.gain[h] + mixer.bias[h]


@recurrence("ttt_linear", "ttt_mlp")
def ttt(mixer: Any, x: Tensor) -> Tensor:
    """2407.04620, eqs. 5 to 7: W_t = W_b - sum of eta grad l(W_b; k_s) over the mini-batch's tokens up to t.

    l = |f(k) - v|^2 / 2, eta = (learning rate / D) sigmoid(theta . x), times a learned share of the place.
    """
    heads, size, batch = mixer.heads, mixer.head_dim, mixer.given["batch_tokens"]
    largest = mixer.given.get("learning_rate", 0.1 if hasattr(mixer, "W1") else 1.0)
    qkv, rate = linear(mixer.in_proj, x).split((3 * heads * size, heads), 1)
    q, k, v = qkv.view(len(x), 3, heads, size).unbind(1)
    names = ("W1", "b1", "W2", "b2") if hasattr(mixer, "W1") else ("W", "b")
    y = torch.zeros_like(q)
    for h in range(heads):
        weights = [getattr(mixer, name)[h].detach() for name in names]
        for first in range(0, len(x), batch):
            start, total = [w.clone() for w in weights], [torch.zeros_like(w) for w in weights]
            for t in range(first, min(first + batch, len(x))):
                place = t - first
                with torch.enable_grad():
                    own = [w.clone().requires_grad_() for w in start]
                    loss = (inner(mixer, own, h, turned(k[t, h], place)) - v[t, h]).square().sum() / 2
                    steps = torch.autograd.grad(loss, own)
                eta = largest / size * (rate[t, h] + mixer.rate_bias[h]).sigmoid()
                total = [a + eta * b for a, b in zip(total, steps, strict=True)]
                share = mixer.share[place].clamp_min(0)
                weights = [a - share * b for a, b in zip(start, total, strict=True)]
                y[t, h] = inner(mixer, weights, h, turned(q[t, h], place))
    return linear(mixer.out_proj, normed(y.flatten(1), 1e-6) * mixer.norm_weight)


@recurrence("titans")
def titans(mixer: Any, x: Tensor) -> Tensor:
    """2501.00663, eqs. 9 to 14: S = eta S - theta grad |M^T k - v|^2 / 2, M = alpha M + S."""
    heads, key, value = mixer.heads, mixer.key, mixer.value
    qkv, gate, theta, m, g = linear(mixer.in_proj, x).split(
        (heads * (2 * key + value), heads * value, heads, heads, heads), 1
    )
    q, k, v = convolved(mixer.conv, qkv, activation=True).split((heads * key, heads * key, heads * value), 1)
    q, k, v = (part.view(len(x), heads, -1) for part in (q, k, v))
    q, k, y = unit(q), unit(k), torch.zeros_like(v)
    M, S = (torch.zeros(heads, key, value, dtype=x.dtype) for _ in range(2))
    for t in range(len(x)):
        for h in range(heads):
            surprise = torch.outer(k[t, h], M[h].T @ k[t, h] - v[t, h])
            step, momentum, kept = (
                (part[t, h] + mixer.gate_bias[n, h]).sigmoid() for n, part in enumerate((theta, m, g))
            )
            S[h] = momentum * S[h] - step * surprise
            M[h] = kept * M[h] + S[h]
            y[t, h] = M[h].T @ q[t, h] / key**0.5
    return linear(mixer.out_proj, (rms(y, 1e-6) * mixer.norm.weight).flatten(1) * F.silu(gate))


@recurrence("mesa_net")
def mesa_net(mixer: Any, x: Tensor) -> Tensor:
    """2506.05233, eqs. 7 to 9: o = H^T (G + Lambda)^-1 q, G = sum of decayed beta k k^T, H likewise of k v^T."""
    heads, size = mixer.heads, mixer.key
    inner_size = heads * size
    qk, v, beta, g = linear(mixer.in_proj, x).split((2 * inner_size, inner_size, heads, heads), 1)
    q, k = convolved(mixer.conv, qk, activation=True).view(len(x), 2, heads, size).unbind(1)
    q, k, v = unit(q), unit(k), v.view(len(x), heads, size)
    ridge = (1 + mixer.ridge.exp()).log() + 0.25
    G, H = (torch.zeros(heads, size, size, dtype=x.dtype) for _ in range(2))
    y = torch.zeros_like(v)
    for t in range(len(x)):
        for h in range(heads):
            weight, kept = (beta[t, h] + mixer.gate_bias[0, h]).sigmoid(), (g[t, h] + mixer.gate_bias[1, h]).sigmoid()
            G[h] = kept * G[h] + weight * torch.outer(k[t, h], k[t, h])
            H[h] = kept * H[h] + weight * torch.outer(k[t, h], v[t, h])
            y[t, h] = H[h].T @ torch.linalg.solve(G[h] + torch.diag(ridge[h]), q[t, h])
    return linear(mixer.out_proj, (rms(y, 1e-5) * mixer.norm.weight).flatten(1))


def orthogonal(x: Tensor, steps: int) -> Tensor:
    """Muon's Newton-Schulz iteration: 3.4445 X - 4.7750 X X^T X + 2.0315 (X X^T)^2 X, from X / |X|."""
    x = x / (x.square().sum() + 1e-14).sqrt()
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


@recurrence("atlas")
def atlas(mixer: Any, x: Tensor) -> Tensor:
    """2505.23735: S = eta S - theta sum over the window of gamma_i grad |M_b^T phi(k_i) - v_i|^2 / 2, M = alpha M + S.

    M_b is the memory that the mini-batch begins with; S goes through Muon's iteration where it is used.
    """
    heads, size, given = mixer.heads, mixer.head_dim, mixer.given
    batch, window, muon = given.get("batch_tokens", 16), given.get("window", 4), given.get("muon_steps", 5)
    degree, width = given.get("degree", 2), heads * size
    q, k, v, gamma, theta, m, g = linear(mixer.in_proj, x).split((width, width, width, heads, heads, heads, heads), 1)
    q, k, v = (part.view(len(x), heads, size) for part in (q, k, v))

    def phi(y: Tensor, h: int) -> Tensor:
        y = y / y.square().sum().sqrt()
        parts = [torch.ones(1, dtype=y.dtype), y]
        if degree == 2:
            pairs = [(y[a] * y[b] * (1.0 if a == b else 2**0.5)) for a in range(size) for b in range(a, size)]
            parts.append(torch.stack(pairs))
        z = torch.cat([c * part for c, part in zip(mixer.coefficients[h], parts, strict=True)])
        return z / z.square().sum().sqrt()

    y = torch.zeros_like(q)
    for h in range(heads):
        keys = [phi(k[t, h], h) for t in range(len(x))]
        M = torch.zeros(len(keys[0]), size, dtype=x.dtype)
        S = torch.zeros_like(M)
        for t in range(len(x)):
            if t % batch == 0:
                start = M.clone()
            rate = (theta[t, h] + mixer.gate_bias[0, h]).sigmoid() / (1 if muon else window * batch)
            S = (m[t, h] + mixer.gate_bias[1, h]).sigmoid() * S
            for i in range(max(0, t - window + 1), t + 1):
                S = S - rate * gamma[i, h].sigmoid() * torch.outer(keys[i], start.T @ keys[i] - v[i, h])
            step = mixer.step[h] * orthogonal(S, muon) if muon else S
            M = (g[t, h] + mixer.gate_bias[2, h]).sigmoid() * M + step
            y[t, h] = M.T @ phi(q[t, h], h)
    return linear(mixer.out_proj, (rms(y, 1e-6) * mixer.norm.weight).flatten(1))


@recurrence("titans_mac")
def titans_mac(mixer: Any, x: Tensor) -> Tensor:
    """2501.00663, eqs. 21 to 25: attention over persistent tokens, what the memory recalls and the segment's tokens.

    The memory then learns from the attention's outputs, and what it answers to them gates them.
    """
    heads, size, segment = mixer.heads, mixer.head_dim, mixer.given["segment"]
    width = heads * size
    q, k, v = linear(mixer.qkv_proj, x).view(len(x), 3, heads, size).unbind(1)
    asked = linear(mixer.recall_proj, x).view(len(x), heads, size)
    asked = asked / asked.square().sum(-1, keepdim=True).sqrt()
    M, S = (torch.zeros(heads, size, size, dtype=x.dtype) for _ in range(2))
    persistent = mixer.given.get("persistent", 4)
    rows = []
    for first in range(0, len(x), segment):
        start, context = M.clone(), []
        for t in range(first, min(first + segment, len(x))):
            recalled = torch.stack([start[h].T @ asked[t, h] for h in range(heads)]).flatten()
            context.append(linear(mixer.context_proj, recalled).view(2, heads, size))
            y = torch.zeros(heads, size, dtype=x.dtype)
            for h in range(heads):
                keys = [mixer.persistent[n, 0, h] for n in range(persistent)]
                values = [mixer.persistent[n, 1, h] for n in range(persistent)]
                for s in range(first, t + 1):
                    keys += [turned(context[s - first][0, h], s - first), turned(k[s, h], s - first)]
                    values += [context[s - first][1, h], v[s, h]]
                scores = torch.stack(keys) @ turned(q[t, h], t - first) / size**0.5
                y[h] = scores.softmax(0) @ torch.stack(values)
            parts = linear(mixer.memory_proj, y.flatten())
            mq, mk, mv = parts[: 3 * width].view(3, heads, size)
            gates = (parts[3 * width :].view(3, heads) + mixer.gate_bias).sigmoid()
            answer = torch.zeros_like(y)
            for h in range(heads):
                key, query = mk[h] / mk[h].norm(), mq[h] / mq[h].norm()
                S[h] = gates[1, h] * S[h] - gates[0, h] * torch.outer(key, M[h].T @ key - mv[h])
                M[h] = gates[2, h] * M[h] + S[h]
                answer[h] = M[h].T @ query
            gate = (rms(answer.flatten(), 1e-6) * mixer.gate_norm.weight).sigmoid()
            rows.append(rms(y.flatten(), 1e-6) * mixer.norm.weight * gate)
    return linear(mixer.out_proj, torch.stack(rows))


@every_case("test-time")
def test_agrees_with_the_papers_updates(name: str, options: Mapping[str, Any]) -> None:
    agrees(name, options)
