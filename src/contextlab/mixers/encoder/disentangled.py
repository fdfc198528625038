"""Disentangled attention: what a token is and where it is are projected apart (DeBERTa, LTG-BERT)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.encoder.base import Encoder
from contextlab.mixers.layers import Linear, is_plain, multiplications
from contextlab.ops.softmax import attend
from contextlab.registry import register

CHUNK = 1024  # queries whose scores are held at once


@register(
    "mixer",
    "disentangled_attention",
    family="encoder",
    papers=("2303.09859", "2006.03654"),
    cases=(
        {},
        {"buckets": 8, "max_distance": 20, "heads": 3, "shared": False, "bias": True},
        {"buckets": 2, "max_distance": 5, "terms": "content_to_position", "output_norm": True, "bias": True},
        {"buckets": 16, "terms": "position_to_content", "position_norm": False, "heads": 2},
    ),
)
class DisentangledAttention(Encoder):
    """DeBERTa's disentangled attention of every token to every token, as LTG-BERT uses it.

    The score of key j for query i is (q_i k_j + q_i K_d + Q_d k_j) / sqrt(3 head_dim), with d the bucket of i - j and
    K_d and Q_d projections of that bucket's learned embedding. Near distances have a bucket each, far ones share
    buckets on a logarithmic scale. From LTG-BERT's code come `position_norm` and `output_norm`; there the embeddings
    are the same in all layers, here each layer has its own. Its gated MLP with a norm inside is not part of the mixer.

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    buckets: even; distances up to half of it have their own bucket, and there are 2 buckets - 1 embeddings.
    max_distance: tokens; the last bucket begins here at the latest and holds all beyond. More than buckets / 2 + 1.
    terms: content to position is q_i K_d, position to content is Q_d k_j; with one of them the scale is
        1 / sqrt(2 head_dim).
    shared: project positions with the matrices of queries and keys; False gives them their own.
    position_norm: LayerNorm on the embeddings of distances.
    output_norm: LayerNorm on the output.
    bias: whether the projections have biases.
    """

    parallel_form = "attention"
    trains_alone = "PyTorch's attention under vmap gives a learned bias no gradient on a CPU"

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        buckets: PositiveInt = 32,
        max_distance: PositiveInt = 512,
        terms: Literal["both", "content_to_position", "position_to_content"] = "both",
        shared: bool = True,
        position_norm: bool = True,
        output_norm: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(width)
        if buckets % 2:
            raise InputError(f"buckets must be even, got {buckets}; the nearest that fits is {buckets + 1}")
        if max_distance <= buckets // 2 + 1:
            raise InputError(
                f"max_distance must be more than buckets / 2 + 1 = {buckets // 2 + 1}, got {max_distance}; "
                f"the nearest that fits is {buckets // 2 + 2}"
            )
        self.heads, self.size, self.buckets, self.max_distance = heads, head_size(width, heads), buckets, max_distance
        self.to_position, self.to_content = terms != "position_to_content", terms != "content_to_position"
        self.scale = (self.size * (1 + self.to_position + self.to_content)) ** -0.5
        self.in_proj = Linear(width, 3 * width, bias=bias)  # rows: of q, of k, of v
        self.out_proj = Linear(width, width, bias=bias)
        self.distances = nn.Parameter(torch.randn(2 * buckets - 1, width) * 0.5)
        self.position_norm = nn.LayerNorm(width, eps=1e-7) if position_norm else None
        self.output_norm = nn.LayerNorm(width, eps=1e-7) if output_norm else None
        # Rows: of Q_d, of K_d, as far as there are both.
        rows = (self.to_position + self.to_content) * width
        self.position_proj = None if shared else Linear(width, rows, bias=bias)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Encoder.mix`."""
        length = x.shape[1]
        q, k, v = self.in_proj(without_padding(x, mask)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        place = torch.arange(length, device=x.device)
        bucket = log_buckets(place, self.buckets, self.max_distance)
        bucket = self.buckets - 1 + torch.cat((-bucket.flip(0), bucket[1:]))  # of distances from 1 - T on
        q_places, k_places = self._places()
        # The products with all embeddings, [B, H, T, 2 buckets - 1], from which each pair of tokens picks one.
        content = None if k_places is None else torch.einsum("bihd,rhd->bhir", q, k_places) * self.scale
        position = None if q_places is None else torch.einsum("bjhd,rhd->bhjr", k, q_places) * self.scale
        outputs = []
        for first in range(0, length, CHUNK):
            queries = slice(first, first + CHUNK)
            index = bucket[place[queries, None] - place + length - 1]  # [queries, T]
            bias = x.new_zeros(())
            if content is not None:
                bias = bias + content[:, :, queries].gather(3, index.expand(*content.shape[:2], -1, -1))
            if position is not None:
                bias = bias + position.gather(3, index.T.expand(*position.shape[:2], -1, -1)).mT
            if mask is not None:
                bias = bias.masked_fill(~mask[:, None, None], float("-inf"))
            outputs.append(attend(q[:, queries], k, v, self.scale, bias))
        y = self.out_proj(torch.cat(outputs, 1).flatten(2))
        return y if self.output_norm is None else self.output_norm(y)

    def _places(self) -> tuple[Tensor | None, Tensor | None]:
        """Q_d and K_d [2 buckets - 1, H, head_dim], None for a term that is not there."""
        embedded = self.distances if self.position_norm is None else self.position_norm(self.distances)
        if self.position_proj is None:
            rows = slice(0 if self.to_content else self.width, (2 if self.to_position else 1) * self.width)
            if is_plain(self.in_proj):
                bias = None if self.in_proj.bias is None else self.in_proj.bias[rows]
                projected = F.linear(embedded, self.in_proj.weight[rows], bias)
            else:
                projected = self.in_proj(embedded)[:, rows]
        else:
            projected = self.position_proj(embedded)
        parts = list(projected.unflatten(-1, (-1, self.heads, self.size)).unbind(1))
        return parts[0] if self.to_content else None, parts[-1] if self.to_position else None

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        terms = self.to_position + self.to_content
        projections = length * (multiplications(self.in_proj) + multiplications(self.out_proj))
        positions = terms * self.distances.numel() * (self.width + length)
        return 2 * (projections + positions) + 4 * length**2 * self.width


def log_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance: its own up to buckets / 2, then by its logarithm up to buckets - 1.

    distance: int64, at least 0. Returns the same shape, of int64. The last bucket begins at max_distance - 1 at the
    latest.
    """
    near = buckets // 2
    far = (distance.clamp(near, max_distance - 1).double() / near).log()
    far = (far / torch.tensor((max_distance - 1) / near, dtype=torch.float64).log() * (near - 1)).ceil().long() + near
    return torch.where(distance <= near, distance, far.clamp_max(buckets - 1))
