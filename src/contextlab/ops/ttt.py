"""Test-time training: the state is a small model, and a mini-batch of tokens is a step of gradient descent on it.

The inner model is f(x) = x + LN(g(x)), g linear or a two-layer MLP, and its loss for a token |f(k) - v|^2 / 2
(2407.04620). All gradients of a mini-batch are taken at the model that it begins with; token t is answered by the model
that has taken the steps of the tokens up to t. The dual form computes those answers without making the models: matrix
products over the mini-batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.ops.precision import without_autocast

EPS = 1e-6


class InnerNorm(NamedTuple):
    """Gain and bias [H, D] of the inner model's layer norm."""

    gain: Tensor
    bias: Tensor


@without_autocast
def ttt_linear(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, W: Tensor, b: Tensor, norm: InnerNorm
) -> tuple[Tensor, Tensor, Tensor]:
    """One mini-batch of TTT-Linear, g(x) = x W + b, in the dual form.

    q, k, v: [B, H, S, D]. rate: [B, H, S, S], lower triangular: row t is the rates at which the tokens' steps are
        taken for the answer to t; the last row is taken for good. W: [B, H, D, D], b: [B, H, 1, D]: their dtype is
        worked in.
    Returns the answers [B, H, S, D] and W and b after the mini-batch.
    """
    dtype = v.dtype
    q, k, v, rate = (x.to(W.dtype) for x in (q, k, v, rate))
    error = _gradient(k @ W + b, v - k, norm)
    z = q @ W + b - (rate * (q @ k.mT)).tril() @ error - rate.tril() @ error
    last = rate[..., -1:, :].mT
    answers = (q + _normed(z, norm)).to(dtype)
    return answers, W - (last * k).mT @ error, b - (last * error).sum(-2, keepdim=True)


@without_autocast
def ttt_mlp(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, W: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], norm: InnerNorm
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """One mini-batch of TTT-MLP, g(x) = gelu(x W1 + b1) W2 + b2, in the dual form.

    W: W1 [B, H, D, M] and W2 [B, H, M, D]. b: b1 [B, H, 1, M] and b2 [B, H, 1, D]. Others as for `ttt_linear`.
    Returns the answers [B, H, S, D] and W and b after the mini-batch.
    """
    (W1, W2), (b1, b2), dtype = W, b, v.dtype
    q, k, v, rate = (x.to(W1.dtype) for x in (q, k, v, rate))
    rates = rate.tril()
    hidden = k @ W1 + b1
    active = _gelu(hidden)
    error = _gradient(active @ W2 + b2, v - k, norm)
    inner = error @ W2.mT * _gelu_slope(hidden)
    h = _gelu(q @ W1 + b1 - (rates * (q @ k.mT)) @ inner - rates @ inner)
    z = h @ W2 + b2 - (rates * (h @ active.mT)) @ error - rates @ error
    last = rate[..., -1:, :].mT
    weights = W1 - (last * k).mT @ inner, W2 - (last * active).mT @ error
    biases = b1 - (last * inner).sum(-2, keepdim=True), b2 - (last * error).sum(-2, keepdim=True)
    return (q + _normed(z, norm)).to(dtype), weights, biases


def naive_ttt(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, weights: list[Tensor], norm: InnerNorm
) -> tuple[Tensor, list[Tensor]]:
    """What defines both for one head: gradients by autograd, a model for every token.

    q, k, v: [S, D]. rate: [S, S]. weights: [W, b] or [W1, b1, W2, b2]. norm: [D] each.
    Returns the answers [S, D] and the weights after the mini-batch.
    """

    def model(x: Tensor, p: list[Tensor]) -> Tensor:
        z = x @ p[0] + p[1] if len(p) == 2 else _gelu(x @ p[0] + p[1]) @ p[2] + p[3]
        return x + F.layer_norm(z, z.shape[-1:], norm.gain, norm.bias, EPS)

    steps = []
    with torch.enable_grad():
        for s in range(len(k)):
            p = [w.detach().requires_grad_() for w in weights]
            loss = (model(k[s : s + 1], p) - v[s : s + 1]).square().sum() / 2
            steps.append(torch.autograd.grad(loss, p))

    def after(t: int) -> list[Tensor]:
        return [w - sum(rate[t, s] * steps[s][i] for s in range(t + 1)) for i, w in enumerate(weights)]

    return torch.cat([model(q[t : t + 1], after(t)) for t in range(len(q))]), after(len(q) - 1)


def _normed(z: Tensor, norm: InnerNorm) -> Tensor:
    """LN(z) for z [B, H, S, D]."""
    return F.layer_norm(z, z.shape[-1:], eps=EPS) * norm.gain.unsqueeze(-2) + norm.bias.unsqueeze(-2)


def _gradient(z: Tensor, target: Tensor, norm: InnerNorm) -> Tensor:
    """The gradient of |LN(z) - target|^2 / 2 in z."""
    size = z.shape[-1]
    centred = z - z.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    unit = centred * inverse
    outer = (unit * norm.gain.unsqueeze(-2) + norm.bias.unsqueeze(-2) - target) * norm.gain.unsqueeze(-2)
    along = (outer * unit).sum(-1, keepdim=True)
    return (outer - (outer.sum(-1, keepdim=True) + unit * along) / size) * inverse


def _gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, as in the published code of TTT-MLP."""
    return F.gelu(x, approximate="tanh")


def _gelu_slope(x: Tensor) -> Tensor:
    """The derivative of GELU's tanh form."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    bend = inner.tanh()
    return 0.5 * (1 + bend) + 0.5 * x * (1 - bend.square()) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x.square())
