"""n-gram heads: attention whose weights are given by the tokens themselves."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.mixers.base import Mixer
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear, multiplications
from contextlab.registry import register
from contextlab.state import KVState, State, tensor_bytes

BLOCK = 512  # queries whose matches are held at once


@register("mixer", "ngram", family="static", papers=("2401.12973",), cases=({}, {"n": 2}, {"n": 3}))
class NGram(Mixer):
    """n-gram head: each token reads the mean of what came after earlier occurrences of the last n tokens.

    y_t = V mean of x_{j+1} over all j + 1 < t with tokens j-n+1 .. j equal to t-n+1 .. t, plus U x_t; the mean of
    nothing is zero. Which tokens are read is exact and not learned, so that it needs the token ids and works in models
    that read tokens.

    width: size of a token's vector.
    n: tokens that must agree; 1 reads what followed the same token.
    """

    parallel_form = "attention"
    reads_tokens: ClassVar[bool] = True

    def __init__(self, width: PositiveInt, n: PositiveInt = 1) -> None:
        super().__init__(width)
        self.n = n
        self.v_proj, self.own_proj = Linear(width, width), Linear(width, width)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        keep_state: bool = True,
        tokens: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. tokens: [B, T] int64, the ids, >= 0."""
        assert tokens is not None
        length = x.shape[1]
        if mask is not None:
            tokens = tokens.masked_fill(~mask, -1)  # matches nothing
        ids, values = tokens[..., None, None], without_padding(x, mask).unsqueeze(2)
        before = state if isinstance(state, KVState) else KVState.empty(ids[:, :0], values[:, :0])
        after = before.append(ids, values, mask) if keep_state or before.length else None
        read = tokens if after is None else after.cached()[0][..., 0, 0]
        seen = values[:, :, 0] if after is None else after.cached()[1][:, :, 0]
        parts = []
        for first in range(before.length, before.length + length, BLOCK):
            match = self._matches(read, first, min(first + BLOCK, before.length + length)).to(x.dtype)
            parts.append(match @ seen[:, : match.shape[2]] / match.sum(-1, keepdim=True).clamp_min(1))
        found = torch.cat(parts, 1) if parts else x
        return self.v_proj(found) + self.own_proj(x), after if keep_state else None

    def _matches(self, ids: Tensor, first: int, last: int) -> Tensor:
        """[B, last - first, last - 1] bool: whether a query first .. last - 1 reads a token 0 .. last - 2."""
        n, count = self.n, last - first
        reach = min(n - 1, first)
        rows = ids[:, first - reach : last].unsqueeze(2)
        same = (rows == ids[:, None, : last - 1]) & (rows >= 0)
        same = F.pad(same, (0, 0, n - 1 - reach, 0))  # before the first token nothing agrees
        found = same[:, n - 1 :]
        for i in range(1, n):
            found = found & F.pad(same[:, n - 1 - i : n - 1 - i + count], (i, 0))[..., : last - 1]
        found = F.pad(found, (1, 0))[..., : last - 1]  # read the token after
        queries = torch.arange(first, last, device=ids.device)[:, None]
        return found & (torch.arange(last - 1, device=ids.device) < queries)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: ids and vectors of all tokens."""
        ids = tensor_bytes(batch, KVState.capacity(length), dtype=torch.int64)
        return ids + KVState.bytes_at(length, batch, 1, 0, self.width, dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        return 2 * length * 2 * multiplications(self.v_proj) + length * (length - 1) * self.width
