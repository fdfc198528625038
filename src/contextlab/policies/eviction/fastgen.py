"""FastGen: heads keep the last tokens, or those that got the most attention, as the prompt shows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies.core.slots import KeptState
from contextlab.policies.eviction.by_attention import WindowJudged
from contextlab.policies.eviction.seen import Seen
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register("policy", "fastgen", family="by attention", papers=("2310.01801",), cases=({"recovery": 0.5},))
@dataclass(eq=False)
class FastGen(WindowJudged):
    """FastGen's profiles: each head keeps the last tokens, or those that got the most attention, as its prompt shows.

    When a row first holds more than the budget, each key head is judged by the attention of the last `window`
    queries: where the last tokens that fit, with the sinks, hold at least `recovery` of it, the head keeps these from
    then on; else it keeps the tokens with the most attention so far and the window, as H2O does. Differs from the
    paper in that all heads have as many slots (there those with a simple profile take fewer), and in that punctuation
    is not told apart: a policy sees no text. Special tokens are those at the start.

    window: last tokens, whose queries judge heads and which are never dropped.
    recovery: part in [0, 1] of the attention that the last tokens must hold; 0 makes all heads local.
    """

    only_scores = False
    accumulates = True
    recovery: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recovery <= 1:
            raise InputError(f"recovery: expected a part from 0 to 1, got {self.recovery!r}; 0.95 asks for 95%")

    def notes_nbytes(self, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """See `EvictionPolicy.notes_nbytes`."""
        return tensor_bytes(batch, layer.kv_heads, dtype=torch.int8)

    def remember(
        self, layer: KVLayer, notes: dict[str, Tensor], q: Tensor, places: Tensor, length: int
    ) -> dict[str, Tensor]:
        """See `EvictionPolicy.remember`: "profile" [B, Hkv], 1 of heads that are local, 0 of others, -1 of unknown."""
        return notes or {"profile": torch.full((len(q), layer.kv_heads), -1, dtype=torch.int8, device=q.device)}

    def _evict(self, layer: KVLayer, state: KeptState, limit: int, full: int | None = None) -> KeptState:
        seen, profile = self.seen(layer, state), state.notes["profile"]
        assert seen.attention is not None
        last = seen.positions[..., -1:]
        local = (seen.positions < self.sinks) | (seen.positions > last - (limit - self.sinks))
        recovered = layer.per_kv_head(seen.attention.sum(2)) * (seen.positions >= 0)
        part = (recovered * local).sum(-1) / recovered.sum(-1).clamp_min(torch.finfo(recovered.dtype).tiny)
        judged = (profile < 0) & ((seen.positions >= 0).sum(-1) > limit - (full is not None))  # those that drop now
        profile = torch.where(judged, (part >= self.recovery).to(torch.int8), profile)
        return super()._evict(layer, dataclasses.replace(state, notes={"profile": profile}), limit, full)

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: places in local heads, the attention received so far in others."""
        assert seen.mass is not None
        return torch.where((seen.notes["profile"] == 1)[..., None], seen.positions.to(seen.mass.dtype), seen.mass)
