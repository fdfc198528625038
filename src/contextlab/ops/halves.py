"""Decays by channel within a chunk, by halves of blocks, in functions that autograd follows.

Inside a chunk the weight of token j for token i is sum over channels of q_i k_j exp(c_i - c_j), c the running sum of
the log decays, which no single factorisation into a part of i and a part of j keeps in range. So a chunk is halved
again and again: between the two halves of a block exp(c_i - c_mid) and exp(c_mid - c_j) are both at most 1, whatever
the decays, and every pair of tokens is parted by exactly one such middle. That is the matrix products of one quadratic
form in log2(chunk) levels, without the [L, L, K] differences of 2312.06635, section 4.3.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.ops.linear import by_blocks
from contextlab.ops.scan import linear_scan


def by_halves(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """What `ops.channel_decay` computes, differentiable any number of times.

    q, k, g: [B, T, H, K]. v: [B, T, H, V]. bonus: [B, H, K] or None. state: [B, H, K, V]. size: tokens a chunk, a power
    of two. Returns o [B, T, H, V] and the last state.
    """
    return by_blocks(partial(_block, size, bonus), (q, k, v, g), state, max(512 // size, 1) * size)


def _block(
    size: int, bonus: Tensor | None, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """The chunked form, from a state."""
    length = v.shape[1]
    count = -(-length // size)
    q, k, v, g = (
        F.pad(x, (0, 0, 0, 0, 0, count * size - length)).unflatten(1, (count, size)).transpose(2, 3).contiguous()
        for x in (q, k, v, g)
    )  # [B, N, H, L, .]; what is padded at the end has no decay and writes nothing
    weight = q * k if bonus is None else q * k * bonus[:, None, :, None]
    o, read, rest, total = _within(q, k, v, g, bonus is not None)
    o = o + weight.sum(-1, keepdim=True) * v
    write = (k * rest.exp()).mT @ v
    after, state_after = linear_scan(write, total.mT.expand_as(write), state)
    before = torch.cat((state.unsqueeze(1), after[:, :-1]), 1)
    o = o + (q * read.exp()) @ before
    return o.transpose(2, 3).flatten(1, 2)[:, :length], state_after


def _within(q: Tensor, k: Tensor, v: Tensor, g: Tensor, exclusive: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the tokens of a chunk read from each other, themselves excepted, by halves of blocks of 2, 4, ... tokens.

    q, k, g: [..., L, K], v: [..., L, V]. exclusive: whether a token reads before its own decay.
    Returns that ([..., L, V]); the log decay from the chunk's start to what each token reads, and from each token to
    the chunk's end ([..., L, K]); that of the whole chunk ([..., 1, K]). Sums grow with the blocks, and are no
    differences of longer ones, so that strong decays cost no precision.
    """
    o, half = torch.zeros_like(v), 1
    read, rest, total = torch.zeros_like(g) if exclusive else g, torch.zeros_like(g), g
    while half < v.shape[-2]:
        q_right, k_left, v_left = halves(q, half)[1], halves(k, half)[0], halves(v, half)[0]
        (read_left, read_right), (rest_left, rest_right) = halves(read, half), halves(rest, half)
        total_left, total_right = halves(total, 1)
        got = ((q_right * read_right.exp()) @ (k_left * rest_left.exp()).mT) @ v_left
        o = o + joined(torch.zeros_like(got), got)
        read = joined(read_left, read_right + total_left)
        rest = joined(rest_left + total_right, rest_right)
        total = (total_left + total_right).squeeze(-2)
        half *= 2
    return o, read, rest, total


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The left and right halves of the blocks of 2 `half` rows: [..., L, D] -> two [..., L / 2 half, half, D]."""
    left, right = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return left, right


def joined(left: Tensor, right: Tensor) -> Tensor:
    """left, right: [..., N, L, C] -> [..., 2 N L, C], pieces of L in turns; undoes `halves`."""
    return torch.stack((left, right), -3).flatten(-4, -2)
