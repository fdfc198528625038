"""Log decays: sums of them that lose no digits, and what decays from one token to another."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def log_decays(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Log decays g <= 0, -inf too, as float64 that may be summed: exp of a difference of sums keeps all its digits.

    g: [B, T, H] or [B, T, H, K]. dtype: in which decays will be used. What is so low that exp gives zero there is
    raised to a value where it still does, or the sums would lose digits, and infinities their differences.
    """
    return g.double().clamp_min(-800.0 if dtype == torch.float64 else -200.0)


def chunk_sums(g: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Running sums of log decays g [B, T, H] within each chunk of L = `size` tokens: [B, N, L, H], float64.

    What is padded at the end does not decay. dtype: as for `log_decays`.
    """
    g = F.pad(log_decays(g, dtype), (0, 0, 0, -g.shape[1] % size))
    return g.unflatten(1, (-1, size)).cumsum(2)


def decay_matrix(c: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(c_i - c_j) for j <= i, else 0. c: [..., L] float64, falling. Returns [..., L, L] of `dtype`."""
    mask = torch.ones(c.shape[-1], c.shape[-1], dtype=torch.bool, device=c.device).triu(1)
    return _differences(_parts(c, dtype)).masked_fill_(mask, -math.inf).exp_()


def _parts(c: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """c, below float64 in two parts, so that differences need no large tensor of float64."""
    high = c.to(dtype)
    return (high,) if dtype == c.dtype else (high, (c - high).to(dtype))


def _differences(parts: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
    """c_i - c_j of the parts of c."""
    high, *rest = parts
    between = torch.sub(high.unsqueeze(-1), high.unsqueeze(-2), out=out)
    for low in rest:
        between.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))
    return between


class Decays:
    """Decays of all chunks, laid as the engine wants them.

    c: sums of log decays within chunks, broadcastable to [B, N, L, H]; kept as [N or 1, B or 1, G, R, L].
    """

    def __init__(self, c: Tensor, groups: int, dtype: torch.dtype, count: int, batch: int) -> None:
        self.dtype = dtype
        self._parts: tuple[Tensor, ...] = ()
        self.c = c.unflatten(3, (groups, -1)).permute(1, 0, 3, 4, 2)
        end = self.c[..., -1:]
        self._start, self._end, self._whole = (
            x.exp().to(dtype).transpose(3, 4).unsqueeze(-1).expand(count, batch, -1, -1, -1, -1)
            for x in (self.c, end - self.c, end)
        )

    def start(self, first: int, count: int) -> Tensor:
        """From the start of its chunk to each token: [count, B, G, L, R, 1]."""
        return self._start[first : first + count]

    def end(self, first: int, count: int) -> Tensor:
        """From each token to the end of its chunk: [count, B, G, L, R, 1]."""
        return self._end[first : first + count]

    def whole(self, n: int) -> Tensor:
        """Over chunk n: [B, G, 1, R, 1]."""
        return self._whole[n]

    def columns(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """`start` and `end` of all chunks, [N X, L, 1] with X = B G, and `whole` of each, [X, 1, 1]. R must be 1."""
        start, end, whole = (x.flatten(0, 2).squeeze(-1) for x in (self._start, self._end, self._whole))
        return start, end, whole.unflatten(0, (len(self._whole), -1)).unbind()

    def between(self, masks: Tensor, first: int, count: int, at: int) -> Tensor:
        """Between the tokens of `count` chunks from `first` on, as `decay_matrix`, put into `masks` from `at` on.

        masks: [N or 1, B or 1, G, R, L, L]. They are computed once where all chunks are alike.
        """
        many = len(self.c) > 1
        if first and not many:
            return masks
        if not self._parts:
            self._parts = _parts(self.c, self.dtype)
        found, part = (masks[at : at + count], slice(first, first + count)) if many else (masks, slice(None))
        # The same as `decay_matrix`, but not for autograd: exp of -inf is slow, and what is above could overflow.
        _differences(tuple(x[part] for x in self._parts), found).clamp_max_(0).exp_()
        found.tril_()
        return found


def each_its_decays(size: int, in_dims: Any, inputs: Any, masks: int | None = None) -> tuple[Any, Any]:
    """Under vmap, decays that are the same for all sequences become each one's own: c, the input after q, k and v.

    masks: which input holds what was kept of them, [N or 1, B or 1, ...]; None: none does.
    """
    v, c = inputs[2:4]
    if c is None:
        return in_dims, inputs
    c = c.expand(size, *c.shape) if in_dims[3] is None else c.movedim(in_dims[3], 0)
    batch = (v if in_dims[2] is None else v.select(in_dims[2], 0)).shape[0]
    inputs = (*inputs[:3], c.expand(-1, batch, -1, -1, -1), *inputs[4:])
    if masks is not None and in_dims[masks] is None:  # only the gradients are mapped
        kept = inputs[masks]
        inputs = (*inputs[:masks], kept.expand(-1, batch, *kept.shape[2:]), *inputs[masks + 1 :])
    return (*in_dims[:3], 0, *in_dims[4:]), inputs
