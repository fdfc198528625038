"""mLSTM: linear attention with exponential input gates, kept in range by a running maximum.

With forget gate f_t = sigmoid, input gate exp(i_t) and a head's state C [K, V] and n [K] (2405.04517, eqs. 19-27),
    C_t = f_t C_{t-1} + exp(i_t) k_t v_t^T,  n_t = f_t n_{t-1} + exp(i_t) k_t,
    h_t = C_t^T q_t / max(|n_t . q_t|, 1).
Both are divided by exp(m_t), m_t = max(log f_t + m_{t-1}, i_t). The divided state has decay
exp(log f_t + m_{t-1} - m_t) <= 1 and input exp(i_t - m_t) <= 1, so it is `simple_gla` with n as one more column of
values; and m_t = c_t + max(m_0, max_j<=t (i_j - c_j)), c the running sum of log f, needs no loop.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops.linear import simple_gla, working_dtype
from contextlab.ops.precision import without_autocast

EPS = 1e-6
"""Added to the divided denominator, as in the published code."""
LOWEST = -1e4
"""What the log of a forget gate is raised to: an input gate would have to reach 10,000 for it to be noticed."""


@without_autocast
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    chunk_size: int = 32,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The mLSTM cell over a sequence.

    q, k: [B, T, H, K]. v: [B, T, H, V]. i, f: [B, T, H], input and forget gates before exp and sigmoid.
    scale: of the queries; K ** -0.5 by default.
    initial_state: (C and n as the last column, divided by exp(m), [B, H, K, V + 1]; m [B, H]) or None (zeros).
    output_final_state: also return the state after the last token. chunk_size: tokens per chunk.
    Returns (h [B, T, H, V], state (at least float32) or None).
    """
    if i.shape != v.shape[:3] or f.shape != v.shape[:3]:
        raise InputError(f"expected i and f {list(v.shape[:3])}, got {list(i.shape)} and {list(f.shape)}")
    work = working_dtype(v.dtype)
    i, log_f = i.to(work), F.logsigmoid(f.to(work))
    matrix, m0 = initial_state if initial_state is not None else (None, i.new_zeros(i.shape[0], i.shape[2]))
    if v.shape[1] == 0:
        empty = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1] + 1, dtype=work)
        return v, (empty if matrix is None else matrix, m0) if output_final_state else None
    # The maximum may lie thousands below the sums that it is made of, so both are in float64, and no sum is infinite.
    i, m0, log_f = i.double(), m0.double(), log_f.double().clamp_min(LOWEST)
    c = log_f.cumsum(1)
    m = c + torch.maximum(m0.unsqueeze(1), (i - c).cummax(1).values)
    decay = log_f + torch.cat((m0.unsqueeze(1), m[:, :-1]), 1) - m
    k = k * (i - m).exp().unsqueeze(-1).to(k.dtype)
    m = m.to(work)
    o, last = simple_gla(q, k, F.pad(v, (0, 1), value=1.0), decay, None, scale, matrix, output_final_state, chunk_size)
    denominator = torch.maximum(o[..., -1:].abs(), (-m).exp().unsqueeze(-1)) + EPS
    h = (o[..., :-1] / denominator).to(v.dtype)
    if not output_final_state:
        return h, None
    assert last is not None
    return h, (last, m[:, -1])


def naive_mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The recurrence that defines `mlstm`, one token after the other (2405.04517, eqs. 19 to 27).

    Arguments as there. Returns h [B, T, H, V] and the state, the matrix [B, H, K, V + 1] and the maximum [B, H].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shape = (*v.shape[::2][:2], k.shape[-1], v.shape[-1] + 1)
    S, m = (v.new_zeros(shape), v.new_zeros(shape[:2])) if initial_state is None else initial_state
    hs = []
    for t in range(v.shape[1]):
        log_f, before = F.logsigmoid(f[:, t]), m
        m = torch.maximum(log_f + before, i[:, t])
        write = k[:, t, :, :, None] * F.pad(v[:, t], (0, 1), value=1.0)[:, :, None, :]
        S = (log_f + before - m).exp()[..., None, None] * S + (i[:, t] - m).exp()[..., None, None] * write
        o = torch.einsum("bhkv,bhk->bhv", S, q[:, t] * scale)
        hs.append(o[..., :-1] / (torch.maximum(o[..., -1:].abs(), (-m).exp().unsqueeze(-1)) + EPS))
    return torch.stack(hs, 1), (S, m)
