"""Mamba-3's state-space layer: trapezoidal writing and a state that turns by data-dependent angles (2603.15569).

With alpha_t = exp(dt_t A_t), lambda_t in [0, 1] and the angles Theta_t = Theta_{t-1} + dt_t theta_t, the state
S [N, P] of a head obeys

    S_t = alpha_t S_{t-1} + (1 - lambda_t) dt_t alpha_t K_{t-1} x_{t-1}^T + lambda_t dt_t K_t x_t^T
    y_t = S_t^T Q_t + D x_t,     K_t = R(Theta_t) B_t,  Q_t = R(Theta_t) C_t

where R turns the pairs of dimensions (2j, 2j + 1) by their angles. Since Q_t . K_s depends on Theta_t - Theta_s only,
this is a complex state that decays and turns at each token, kept in a frame that turns with it. The formulas were
checked against the authors' published step-by-step reference.

The fast form: what K_t x_t^T adds to every later state is (lambda_t dt_t + (1 - lambda_{t+1}) dt_{t+1}) times its
decay, so one `simple_gla` does both terms; what the present read-out thereby sees too early is taken off again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops.linear import simple_gla, working_dtype
from contextlab.ops.position import rotate
from contextlab.ops.precision import without_autocast


class Mamba3State(NamedTuple):
    """What is kept after a token.

    matrix: S [B, H, N, P], at least float32. key: K_t [B, H, N], turned. value: x_t [B, H, P].
    angle: Theta_t modulo 2 pi, [B, H, M], at least float32; None without angles.
    """

    matrix: Tensor
    key: Tensor
    value: Tensor
    angle: Tensor | None


@without_autocast
def mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    mix: Tensor,
    theta: Tensor | None = None,
    D: Tensor | None = None,
    initial_state: Mamba3State | None = None,
    output_final_state: bool = False,
    chunk_size: int = 32,
) -> tuple[Tensor, Mamba3State | None]:
    """Mamba-3's single-input single-output state-space layer, in chunks.

    x: [B, T, H, P]. dt: [B, T, H] step sizes, >= 0. A: [B, T, H], <= 0. B: [B, T, H, N]. C: [B, T, H, N].
    mix: [B, T, H], lambda in [0, 1]: 1 writes the present token only (Mamba-2), 1/2 is the trapezoidal rule.
    theta: [B, T, H or 1, M] radians per unit of dt of the first M <= N / 2 pairs of dimensions; None for no turning.
    D: [H] skip weights or None. initial_state: of what was read before, or None.
    output_final_state: also return the state after the last token. chunk_size: tokens per chunk.
    Returns (y [B, T, H, P], final state or None).
    """
    _check(x, B, C, theta)
    work, before = working_dtype(x.dtype), initial_state
    dt, mix = dt.to(work), mix.to(work)
    angle = None
    if theta is not None:
        angle = _angles(dt, theta, None if before is None else before.angle)
        table = torch.stack((angle.cos(), angle.sin()), -1)
        B, C = rotate(B, table), rotate(C, table)
    late = dt * (1 - mix)  # the step by which a token writes the key and value of the one before it
    ahead = F.pad(late[:, 1:], (0, 0, 0, 1))
    matrix = None
    if before is not None:
        first = (late[:, 0].unsqueeze(-1) * before.key).unsqueeze(-1) * before.value.unsqueeze(-2)
        matrix = before.matrix + first
    v = x * (dt * mix + ahead).unsqueeze(-1).to(x.dtype)
    y, last = simple_gla(C, B, v, dt * A, None, 1.0, matrix, output_final_state, chunk_size)
    skip = -(C * B).sum(-1) * ahead
    y = torch.addcmul(y, x, (skip if D is None else skip + D).to(x.dtype).unsqueeze(-1))
    if last is None:
        return y, None
    return y, Mamba3State(last, B[:, -1], x[:, -1], None if angle is None else angle[:, -1])


def naive_mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    mix: Tensor,
    theta: Tensor | None = None,
    D: Tensor | None = None,
    initial_state: Mamba3State | None = None,
) -> tuple[Tensor, Mamba3State]:
    """The recurrence that defines `mamba3`, one token after the other (2603.15569).

    Arguments as there. Returns y [B, T, H, P] and the final state.
    """
    batch, _, heads, value = x.shape
    size = B.shape[-1]
    S, key, last, angle = initial_state or Mamba3State(
        x.new_zeros(batch, heads, size, value), x.new_zeros(batch, heads, size), x.new_zeros(batch, heads, value), None
    )
    if theta is not None and angle is None:
        angle = x.new_zeros(batch, heads, theta.shape[-1])
    ys = []
    for t in range(x.shape[1]):
        k, q = B[:, t], C[:, t]
        if theta is not None and angle is not None:
            angle = torch.remainder(angle + theta[:, t] * dt[:, t, :, None], 2 * math.pi)
            k, q = _turn(k, angle), _turn(q, angle)
        alpha = (dt[:, t] * A[:, t]).exp()
        beta, gamma = (1 - mix[:, t]) * dt[:, t] * alpha, mix[:, t] * dt[:, t]
        S = alpha[..., None, None] * S + beta[..., None, None] * key[..., None] * last[..., None, :]
        S = S + gamma[..., None, None] * k[..., None] * x[:, t, :, None, :]
        y = torch.einsum("bhnp,bhn->bhp", S, q)
        ys.append(y if D is None else y + D[:, None] * x[:, t])
        key, last = k, x[:, t]
    return torch.stack(ys, 1), Mamba3State(S, key, last, angle)


def _angles(dt: Tensor, theta: Tensor, start: Tensor | None) -> Tensor:
    """Theta_t modulo 2 pi: [B, T, H, M] in the dtype of dt.

    Summed in float64: in float32 the sum over a million tokens can be wrong by hundredths of a radian.
    """
    total = (dt.unsqueeze(-1) * theta.to(dt.dtype)).cumsum(1, dtype=torch.float64)
    if start is not None:
        total = total + start.unsqueeze(1)
    return total.remainder(2 * math.pi).to(dt.dtype)


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    """R(angle) x of one token. x: [B, H, N]. angle: [B, H, M]."""
    turned, rest = x.split((2 * angle.shape[-1], x.shape[-1] - 2 * angle.shape[-1]), -1)
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)
    return torch.cat((pairs.flatten(-2), rest), -1)


def _check(x: Tensor, B: Tensor, C: Tensor, theta: Tensor | None) -> None:
    if B.ndim != 4 or B.shape != C.shape or x.shape[:3] != B.shape[:3] or not x.shape[1]:
        shapes = f"{list(x.shape)}, {list(B.shape)}, {list(C.shape)}"
        raise InputError(f"expected x [B, T, H, P] and B, C [B, T, H, N], T at least 1, got {shapes}")
    if theta is not None and not 0 < 2 * theta.shape[-1] <= B.shape[-1]:
        raise InputError(f"{theta.shape[-1]} angles do not fit {B.shape[-1]} dimensions; at most {B.shape[-1] // 2} do")
