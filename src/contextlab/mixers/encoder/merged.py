"""Attention over merged tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.encoder.base import Encoder, left_aligned
from contextlab.mixers.layers import Linear, multiplications
from contextlab.ops.softmax import softmax_attention
from contextlab.registry import register


@register(
    "mixer",
    "merged_attention",
    family="encoder",
    papers=("2210.09461",),
    cases=({}, {"ratio": 0.5, "heads": 2}, {"ratio": 0.2, "heads": 3}),
)
class MergedAttention(Encoder):
    """Attention to merged tokens: before it, the most alike pairs of keys and values become their means (ToMe).

    Tokens at even places are matched with the most alike (by the cosine of the keys, averaged over heads) at odd
    places, the best matches are merged, and the scores gain the log of the number of tokens that a key stands for
    (proportional attention). As a mixer it gives every token an output, so queries are not merged, and nothing stays
    merged for the next block, as it does in ToMe and MAELRE: of the attention's cost 1 - ratio is left, and the
    matching costs a quarter of one head's scores. Order is the model's to tell (position "learned" or "sinusoidal").

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    ratio: merged tokens over all, at most 0.5.
    """

    parallel_form = "attention"

    hard_choices: ClassVar[bool] = True  # what is merged with what

    def __init__(
        self, width: PositiveInt, heads: PositiveInt = 4, ratio: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    ) -> None:
        super().__init__(width)
        self.heads, self.size, self.ratio = heads, head_size(width, heads), ratio
        self.in_proj, self.out_proj = Linear(width, 3 * width), Linear(width, width)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Encoder.mix`."""
        q, k, v = self.in_proj(without_padding(x, mask)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if mask is not None:
            k, v = left_aligned(torch.cat((k, v), -1), mask).chunk(2, -1)
        k, v, stands_for, exists = merge_alike(k, v, self.ratio, None if mask is None else mask.sum(1))
        # q . k / sqrt(d) + log of the number, as one more dimension of both.
        bias = (stands_for.log() * self.size**0.5).to(k.dtype)[..., None, None].expand(-1, -1, self.heads, 1)
        places = None if mask is None else exists.long() - 1  # a key at -1 is seen by none
        y = softmax_attention(
            F.pad(q, (0, 1), value=1.0),
            torch.cat((k, bias), -1),
            v,
            scale=self.size**-0.5,
            causal=False,
            q_position=None if places is None else torch.zeros_like(q[:1, :, 0, 0], dtype=torch.int64),
            k_position=places,
        )
        return self.out_proj(y.flatten(2))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        projections = multiplications(self.in_proj) + multiplications(self.out_proj)
        keys = length - int(self.ratio * length)
        return 2 * length * projections + 4 * length * keys * self.width + 2 * (length // 2) ** 2 * self.size


def merge_alike(
    k: Tensor, v: Tensor, ratio: float, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge keys and values by bipartite soft matching (ToMe, 2210.09461).

    k: [B, T, H, K]. v: [B, T, H, V]. ratio: merged tokens over a row's tokens, at most 0.5, rounded down.
    tokens: [B] int64, each row's tokens, its first; None for all T.

    Returns keys [B, n, H, K], values [B, n, H, V], the number of tokens that each stands for [B, n] (float), and
    whether it exists [B, n] bool: rows with fewer tokens have fewer. n is the largest that a row has, or more.
    """
    batch, length, heads, _ = k.shape
    fewest = int(ratio * length)  # merged in every row
    if tokens is None:
        tokens = torch.full((batch,), length, device=k.device)
    elif length:
        fewest = int(ratio * int(tokens.amin()))
    place = torch.arange(length, device=k.device)
    real = place < tokens[:, None]
    if length < 2:
        return k, v, torch.ones_like(k[..., 0, 0]), real
    with torch.no_grad():
        unit = F.normalize(k.mean(2), dim=-1)
        alike = unit[:, 0::2] @ unit[:, 1::2].mT
        alike = alike.masked_fill(~(real[:, 0::2, None] & real[:, None, 1::2]), float("-inf"))
        best, match = alike.max(-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        merged = order.argsort(-1) < (ratio * tokens.double()).floor()[:, None]
        rest = order[:, fewest:]
        exists = torch.cat((((~merged) & real[:, 0::2]).gather(1, rest), real[:, 1::2]), 1)
        count = torch.ones_like(unit[:, 1::2, 0]).scatter_add(1, match, merged.to(unit.dtype))
        stands_for = torch.cat((torch.ones_like(rest, dtype=count.dtype), count), 1)
    both = torch.cat((k, v), -1).flatten(2)
    even, odd = both[:, 0::2], both[:, 1::2]
    into = match.unsqueeze(-1).expand(even.shape)
    odd = odd.scatter_add(1, into, even.masked_fill(~merged.unsqueeze(-1), 0)) / count.unsqueeze(-1)
    both = torch.cat((even.gather(1, rest.unsqueeze(-1).expand(-1, -1, even.shape[-1])), odd), 1)
    k, v = both.unflatten(-1, (heads, -1)).split((k.shape[-1], v.shape[-1]), -1)
    return k, v, stands_for, exists
