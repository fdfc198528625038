"""Linformer."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.mixers.base import head_size
from contextlab.mixers.encoder.base import Encoder, left_aligned
from contextlab.mixers.layers import Linear, multiplications
from contextlab.ops.softmax import softmax_attention
from contextlab.registry import register


@register(
    "mixer",
    "linformer",
    family="encoder",
    papers=("2006.04768",),
    cases=(
        {"max_length": 160, "projected": 7},
        {"max_length": 150, "projected": 12, "heads": 3, "sharing": "none"},
        {"max_length": 400, "projected": 5, "heads": 2, "sharing": "key_value"},
    ),
)
class Linformer(Encoder):
    """Linformer: softmax attention to a few learned sums of the keys and values, O(T) for sequences up to a length.

    head = softmax(Q (E K)^T / sqrt(d)) (F V), with E and F [projected, max_length] learned. E and F have a
    column for each position, counted from a row's first real token, so they hold the order of the tokens as well.

    width: size of a token's vector.
    max_length: longest sequence, in real tokens.
    projected: k, the sums that take the keys' and the values' places.
    heads: number of heads, a divisor of width.
    sharing: E and F of each head ("none"), of all heads ("headwise"), or one matrix for both ("key_value").
    """

    parallel_form = "attention"

    def __init__(
        self,
        width: PositiveInt,
        max_length: PositiveInt = 512,
        projected: PositiveInt = 64,
        heads: PositiveInt = 4,
        sharing: Literal["none", "headwise", "key_value"] = "headwise",
    ) -> None:
        super().__init__(width)
        self.heads, self.size, self.max_length = heads, head_size(width, heads), max_length
        self.in_proj, self.out_proj = Linear(width, 3 * width), Linear(width, width)
        # [E or both E and F, heads or 1 for all, k, max_length]
        shape = (1 if sharing == "key_value" else 2, heads if sharing == "none" else 1, projected, max_length)
        self.sums = nn.Parameter(torch.randn(shape) * max_length**-0.5)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Encoder.mix`. Raises InputError when a sequence has more than max_length tokens."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, self.size)).unbind(2)
        kv = torch.stack((k, v), 1)  # [B, 2, T, H, d]
        longest = x.shape[1]
        if mask is not None:
            kv = left_aligned(torch.cat((k, v), -1), mask).unflatten(-1, (2, -1)).movedim(-2, 1)
            if longest > self.max_length:
                longest = int(mask.sum(1).amax())
        if longest > self.max_length:
            raise InputError(f"linformer: a sequence of {longest} tokens does not fit max_length {self.max_length}")
        sums = self.sums[..., :longest].expand(2, self.heads, -1, -1)
        k, v = torch.einsum("chkt,bcthd->bckhd", sums, kv[:, :, :longest]).unbind(1)
        return self.out_proj(softmax_attention(q, k, v, causal=False).flatten(2))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        projections = multiplications(self.in_proj) + multiplications(self.out_proj)
        return 2 * length * (projections + 4 * self.width * self.sums.shape[2])
