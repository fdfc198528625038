"""What an eviction policy judges tokens by."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from contextlab.ops.kv import KVLayer, attention_rows


@dataclass(frozen=True)
class Seen:
    """What an eviction policy judges tokens by.

    keys: [B, Hkv, N, D] as held (rotary positions applied). values: [B, Hkv, N, V].
    positions: [B, Hkv, N] int64, places of the tokens in their rows, -1 where a slot holds none.
    queries: [B, n, H, D], the last `observe` ones (fewer when fewer were read), or None.
    mass: [B, Hkv, N], the attention that each token got from all queries so far, or the number that `mark` gave it; or
        None.
    length: tokens read so far, padding included. layer: the layer.
    notes: what `EvictionPolicy.remember` returned last.
    visible: [B, N] or, where heads hold different numbers of tokens, [B, Hkv, N] bool, False at slots that hold no
        token; None for all True.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    queries: Tensor | None
    mass: Tensor | None
    length: int
    layer: KVLayer
    notes: dict[str, Tensor] = field(default_factory=dict)
    visible: Tensor | None = None

    @cached_property
    def attention(self) -> Tensor | None:
        """[B, H, n, N], the attention weights of `queries`; None without any."""
        if self.queries is None or not self.queries.shape[1]:
            return None
        last, count = self.positions[:, 0, -1:], self.queries.shape[1]  # the last slot is the last query's own
        return attention_rows(
            self.queries, self.keys, scale=self.layer.scale, visible=self.visible, slopes=self.layer.slopes,
            sink=self.layer.sink, cap=self.layer.cap, q_position=last + torch.arange(1 - count, 1, device=last.device),
            k_position=self.positions,
        )  # fmt: skip
