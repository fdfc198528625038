"""PoNet."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.encoder.base import Encoder, left_aligned
from contextlab.mixers.layers import Linear, multiplications
from contextlab.ops.softmax import softmax_attention
from contextlab.registry import register


@register(
    "mixer",
    "ponet",
    family="encoder",
    papers=("2110.02442",),
    cases=({}, {"heads": 2, "segment": 7, "local": 5}, {"heads": 3, "segment": 200, "local": 1}),
)
class PoNet(Encoder):
    """PoNet: pooling at three ranges in place of attention, O(T): y = W ((g + s) o + l).

    g: the attention of the mean query to all keys, which are the values too. s: the maximum over the token's segment.
    l: the maximum over the token's neighbours. o: a projection of the token itself. Segments are of equal length here,
    from each row's first real token on; the paper takes a text's sentences.

    width: size of a token's vector.
    heads: of the attention, a divisor of width.
    segment: tokens of a segment.
    local: tokens of the local maximum, the token in the middle; odd.
    """

    parallel_form = "pooling"

    def __init__(
        self, width: PositiveInt, heads: PositiveInt = 4, segment: PositiveInt = 16, local: PositiveInt = 3
    ) -> None:
        super().__init__(width)
        if local % 2 == 0:
            raise InputError(f"local must be odd, with the token in the middle, got {local}; {local + 1} is nearest")
        head_size(width, heads)
        self.heads, self.segment, self.local = heads, segment, local
        self.in_proj, self.out_proj = Linear(width, 5 * width), Linear(width, width)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Encoder.mix`."""
        length = x.shape[1]
        q, k, o, segment, local = self.in_proj(without_padding(x, mask)).chunk(5, -1)
        # Nothing is left of padding: zero in the mean's sum, -inf in the maxima, no key of the attention.
        tokens = length if mask is None else mask.sum(1, keepdim=True).clamp_min(1)
        mean = (q.sum(1) / tokens).unflatten(-1, (self.heads, -1)).unsqueeze(1)
        keys = k.unflatten(-1, (self.heads, -1))
        if mask is None:
            g = softmax_attention(mean, keys, keys, causal=False)
            segment = self._segments(segment)
            local = self._neighbours(local)
        else:
            real = mask.long() - 1  # 0 at real tokens, -1 at padding
            g = softmax_attention(
                mean, keys, keys, causal=False, q_position=torch.zeros_like(real[:, :1]), k_position=real
            )
            lowest = float("-inf")
            place = (torch.arange(length, device=x.device) - (~mask).sum(1, keepdim=True)).clamp_min(0)
            segment = self._segments(left_aligned(segment, mask, lowest))
            segment = without_padding(segment.gather(1, place.unsqueeze(-1).expand_as(segment)), mask)
            local = without_padding(self._neighbours(local.masked_fill(~mask.unsqueeze(-1), lowest)), mask)
        return self.out_proj((g.flatten(2) + segment) * o + local)

    def _segments(self, x: Tensor) -> Tensor:
        """[B, T, D]: the maximum over each segment, at each of its tokens."""
        length = x.shape[1]
        pieces = F.pad(x, (0, 0, 0, -length % self.segment), value=float("-inf")).unflatten(1, (-1, self.segment))
        return pieces.amax(2).repeat_interleave(self.segment, 1)[:, :length]

    def _neighbours(self, x: Tensor) -> Tensor:
        """[B, T, D]: the maximum over the tokens around each."""
        return F.max_pool1d(x.mT, self.local, stride=1, padding=self.local // 2).mT

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        return 2 * length * (multiplications(self.in_proj) + multiplications(self.out_proj) + 2 * self.width)
