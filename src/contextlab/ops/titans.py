"""Titans' neural memory with a matrix for a memory: gradient descent with momentum and forgetting, token by token.

The memory M [K, V] of a head learns to map keys to values. For every token it takes a step against the gradient of
|M^T k - v|^2 / 2 at itself, with momentum ("surprise") S (2501.00663):
    S_t = exp(m_t) S_{t-1} - theta_t k_t (M_{t-1}^T k_t - v_t)^T,
    M_t = exp(g_t) M_{t-1} + S_t,    o_t = scale M_t^T q_t.
The paper trains in parallel by taking all gradients of a chunk at the chunk's first memory. Here they are taken where
the recurrence takes them: with a matrix for a memory everything is linear, and inside a chunk the errors solve one unit
lower-triangular system, as in the delta rule (which this is without momentum). Without momentum's matrix the weight of
a token for a later one is exp(c_t - c_s); with it, it is the sum over the tokens between of momentum up to there and
decay from there on: the product of the two triangular matrices of decays. The paper's deep memories are left out.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.decays import decay_matrix, log_decays
from contextlab.ops.linear import by_blocks, working_dtype
from contextlab.ops.precision import without_autocast
from contextlab.ops.triangular import unit_lower_inverse


@without_autocast
def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    m: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor | None]:
    """A matrix memory trained by gradient descent with momentum and forgetting while it is read.

    q, k: [B, T, H, K]; keys of length <= 1 keep the memory bounded. v: [B, T, H, V].
    theta: [B, T, H] rate of a step, in [0, 1]. m: [B, T, H] log of the momentum, <= 0 (the paper's eta).
    g: [B, T, H] log of what is kept, <= 0 (the paper's 1 - alpha).
    scale: of the queries; K ** -0.5 by default. initial_state: [B, H, 2, K, V], M and S, or None (zeros).
    output_final_state: also return M and S after the last token. chunk_size: largest number of tokens in a chunk.
    Returns (o [B, T, H, V], final state [B, H, 2, K, V] (at least float32) or None).
    """
    if q.shape != k.shape or q.ndim != 4 or v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise InputError(
            f"expected q, k [B, T, H, K] and v [B, T, H, V], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    for name, x in (("theta", theta), ("m", m), ("g", g)):
        if x.shape != k.shape[:3]:
            raise InputError(f"expected {name} [B, T, H] = {list(k.shape[:3])}, got {list(x.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, work = v.dtype, working_dtype(v.dtype)
    batch, length, heads, value = v.shape
    if initial_state is None:
        state = v.new_zeros(batch, heads, 2 * k.shape[-1], value, dtype=work)
    else:
        state = initial_state.to(work).flatten(2, 3)
    tensors = [(q * scale).to(work), *(x.to(work) for x in (k, v, theta, m, g))]
    if length == 0:
        return v.to(dtype), state.unflatten(2, (2, -1)) if output_final_state else None
    o, state = by_blocks(partial(_blocks, chunk_size), tensors, state, max(512 // chunk_size, 1) * chunk_size)
    return o.to(dtype), state.unflatten(2, (2, -1)) if output_final_state else None


def _blocks(chunk_size: int, state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A block of tokens [B, T, H, ...]: whole chunks, then what is left over as a shorter one."""
    length = inputs[0].shape[1]
    whole = length // chunk_size * chunk_size
    outputs = []
    for first, last, size in ((0, whole, chunk_size), (whole, length, length - whole)):
        if last > first:
            parts = [x[:, first:last].transpose(1, 2).unflatten(2, (-1, size)) for x in inputs]
            o, state = _chunks(state, *parts)
            outputs.append(o.flatten(2, 3).transpose(1, 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state


def naive_titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    m: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence that defines `titans`, one token after the other (2501.00663, eqs. 9 to 14).

    Arguments as there. Returns o [B, T, H, V] and the final state [B, H, 2, K, V], memory and momentum.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if initial_state is None:
        initial_state = v.new_zeros(v.shape[0], v.shape[2], 2, k.shape[-1], v.shape[-1])
    M, S = initial_state.unbind(2)
    os = []
    for t in range(v.shape[1]):
        error = torch.einsum("bhkv,bhk->bhv", M, k[:, t]) - v[:, t]
        step = theta[:, t, :, None, None] * k[:, t].unsqueeze(-1) * error.unsqueeze(-2)
        S = m[:, t].exp()[..., None, None] * S - step
        M = g[:, t].exp()[..., None, None] * M + S
        os.append(torch.einsum("bhkv,bhk->bhv", M, q[:, t] * scale))
    return torch.stack(os, 1), torch.stack((M, S), 2)


def titans_flops(length: int, heads: int, key: int, value: int, chunk_size: int = 32) -> int:
    """Multiply-adds x 2 of the chunked form on one sequence, matrix products counted."""
    total = 0
    for count, size in ((length // chunk_size, chunk_size), (1, length % chunk_size)):
        products = size * size * (2 * key + 2 * key + value + size + size // 3)  # q k, k k; the system; its read
        states = 6 * size * key * value + 4 * size * key * key + 4 * key * key * value  # reads, transition, pass
        total += 2 * count * (products + states) if size else 0
    return heads * total


def _chunks(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, m: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """state [B, H, 2 K, V], M above S; q, k [B, H, N, L, K], v [B, H, N, L, V], theta, m, g [B, H, N, L]."""
    c, h = (log_decays(x, k.dtype).cumsum(-1) for x in (g, m))
    keep, carry = (x.exp().to(k.dtype) for x in (c, h))  # of what the chunk begins with: M's decay, S's momentum
    decay, momentum = decay_matrix(c, k.dtype), decay_matrix(h, k.dtype)
    weight = decay @ momentum  # of s's step in M_t
    surprise = (decay @ carry.unsqueeze(-1)).squeeze(-1)  # of the chunk's first S in M_t
    # M before each token: the row above, and the chunk's first M for the first token.
    before = torch.cat((torch.zeros_like(weight[..., :1, :]), weight[..., :-1, :]), -2)
    keep_before = torch.cat((torch.ones_like(keep[..., :1]), keep[..., :-1]), -1)
    surprise_before = torch.cat((torch.zeros_like(keep[..., :1]), surprise[..., :-1]), -1)
    inverse = unit_lower_inverse(before * (k @ k.mT) * theta.unsqueeze(-2))
    errors = inverse @ torch.cat((k * keep_before.unsqueeze(-1), k * surprise_before.unsqueeze(-1)), -1)  # of the state
    known = inverse @ v  # the errors are errors @ state - known
    step = theta.unsqueeze(-1) * k
    last, faded = weight[..., -1, :, None] * step, momentum[..., -1, :, None] * step
    steps = torch.cat((last, faded), -1).mT  # [.., 2 K, L]: what an error does to M and to S
    size = k.shape[-1]
    eye = torch.eye(size, dtype=k.dtype, device=k.device)
    zero = torch.zeros_like(eye).expand(*keep.shape[:-1], size, size)
    kept, added, left = (x[..., -1, None, None] * eye for x in (keep, surprise, carry))
    transition = torch.cat((torch.cat((kept, added), -1), torch.cat((zero, left), -1)), -2) - steps @ errors
    write = steps @ known
    states = []
    for n in range(k.shape[2]):
        states.append(state)
        state = transition[:, :, n] @ state + write[:, :, n]
    starts = torch.stack(states, 2)
    read = weight * (q @ k.mT) * theta.unsqueeze(-2)
    own = torch.cat((q * keep.unsqueeze(-1), q * surprise.unsqueeze(-1)), -1)
    return (own - read @ errors) @ starts + read @ known, state
