"""Attendre's memory: tokens that were attended to least recently, or least often, leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer, attention_with_mass
from contextlab.policies.core.slots import KeptState, Slots
from contextlab.policies.eviction.by_attention import H2O
from contextlab.registry import register


@register(
    "policy",
    "attendre",
    family="by attention",
    papers=("2401.04881",),
    cases=({}, {"order": "frequency", "share": 0.05, "every": 1}),
)
@dataclass(eq=False)
class Attendre(H2O):
    """Attendre's memory of keys and values: the tokens that were attended last (LRA), or most often (LFA), are kept.

    A query attends to the tokens that get `share` of its attention or more, so to 1 / share of them at most; of the
    query heads that share a key head each counts. For recency the reading of a token is its first use; for frequency
    it is none. What counts as attended is our choice: only the paper's abstract was at hand, which names the two
    orders and says that the memory is read by retrieval. Its third order, FIFO, is streaming_llm with sinks=0.
    The paper's layer also lets queries wait in a memory of their own and attend when they leave it, so that they see
    what was read after them. It is trained so; a causal model's queries must not, and none waits here.

    sinks: first tokens of each row that are never dropped; the paper has none.
    window: last tokens that are never dropped.
    order: "recency" drops the tokens that were attended least recently, "frequency" those attended least often.
    share: part of its attention from which on a query attends to a token, above 0 and at most 1.
    every: slots made free at a time while decoding; default an eighth; 1 as in the paper.
    """

    only_scores = False
    order: Literal["recency", "frequency"] = "recency"
    share: float = 1 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("recency", "frequency"):
            raise InputError(f"order: expected 'recency' or 'frequency', got {self.order!r}")
        if not 0 < self.share <= 1:
            raise InputError(
                f"share: expected a part in (0, 1], got {self.share!r}; 0.02 counts about 50 keys for a query"
            )

    def _answer(
        self, layer: KVLayer, q: Tensor, slots: Slots, state: KeptState, places: Tensor, padded: bool
    ) -> tuple[Tensor, Tensor | None]:
        count, latest = q.shape[1], self.order == "recency"
        times = torch.arange(state.length + 1, state.length + count + 1, device=q.device, dtype=torch.float32)
        y, got = attention_with_mass(
            q, slots["keys"], slots["values"], scale=layer.scale, weight=times if latest else torch.ones_like(times),
            visible=slots["position"][:, 0] >= 0 if padded else None, share=self.share, latest=latest, sink=layer.sink,
            cap=layer.cap,
        )  # fmt: skip
        mass = got.unflatten(1, (layer.kv_heads, -1))
        mass = (mass.amax(2) if latest else mass.sum(2)).to(torch.float32)
        old = state.mass if state.mass is not None else mass[..., :0]
        if latest:
            mass[..., mass.shape[2] - count :].clamp_min_(times)
            mass[..., : old.shape[2]].clamp_min_(old)
        else:
            mass[..., : old.shape[2]] += old
        return y, mass
