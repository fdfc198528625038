"""KVzip: what a model attends to when it is made to repeat the context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import SCORES, KVLayer, attention_rows
from contextlab.policies.core.slots import gathered
from contextlab.policies.eviction.seen import Seen
from contextlab.policies.eviction.two_pass import Recorder, TwoPassPolicy
from contextlab.registry import register


@register("policy", "kvzip", family="two-pass", papers=("2505.23416",), cases=())
@dataclass(eq=False)
class KVzip(TwoPassPolicy):
    """KVzip: the tokens that a model attends to when it is made to repeat the context, whatever is asked later.

    `watch` reads the context and then, with all of it in view, each chunk of it once more behind a request to repeat
    it. A token's importance is the greatest attention that any of these queries pays it, among its chunk, the sinks
    and the repetition itself. Tokens read after the context count more than any of it. Differs from the paper in that
    each head and layer gets an even share of the budget; with AdaKV(of=policy, floor=0) the heads of a layer share.

    window: last tokens that are never dropped; the paper protects none.
    chunk: tokens that are repeated at a time.
    request: the token ids that ask for a repetition; none by default, as for a model that knows no instructions.
    lead: last tokens of the chunk before that stand in front of a chunk, so that it is found.
    every: slots made free at a time while decoding; default an eighth. The paper compresses the context only.
    """

    window: int = 1
    chunk: int = 2048
    request: list[int] | None = None
    lead: int = 8
    reposition: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(chunk=(self.chunk, 1), lead=(self.lead, 0))
        self._importance: dict[int, Tensor] = {}

    def _watch(
        self, model: Any, recorder: Recorder, layers: list[KVLayer], tokens: Tensor, mask: Tensor | None
    ) -> None:
        """See `TwoPassPolicy._watch`: the greatest attention of the queries that repeat the text."""
        if mask is not None and not bool(mask.all()):
            raise InputError("KVzip: expected texts of the same length without padding; watch each length alone")
        if tokens.ndim != 2:
            raise InputError(f"KVzip: expected token ids [batch, time], got {list(tokens.shape)}")
        length = tokens.shape[1]
        _, state = model.read(tokens)
        context = dict(recorder.last)
        self._keys = context[0]
        parts: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}
        request = tokens.new_tensor(self.request or []).expand(len(tokens), -1)
        for first in range(0, length, self.chunk):
            last = min(first + self.chunk, length)
            lead = tokens[:, max(0, first - self.lead) : first]
            model.read(torch.cat((request, lead, tokens[:, first:last]), 1), state)
            for layer in layers:
                first_keys, again = context[layer.index].k, recorder.last[layer.index]
                few = min(self.sinks, first)
                keys = torch.cat((first_keys[:, :few], first_keys[:, first:last], again.k), 1)
                place = (*range(few), *range(first, last), *range(length, length + again.q.shape[1]))
                best = greatest_attention(layer, again.q, keys, torch.tensor(place, device=keys.device))
                parts[layer.index].append(best[..., few : few + last - first])
        self._importance = {index: torch.cat(found, 2) for index, found in parts.items()}

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the greatest attention while the context was repeated."""
        self._must_be_known(seen)
        known = gathered(self._importance[seen.layer.index], seen.positions.clamp(0, self.watched - 1))
        return known.masked_fill(seen.positions >= self.watched, 2.0)  # no attention is above 1


def greatest_attention(layer: KVLayer, q: Tensor, keys: Tensor, position: Tensor) -> Tensor:
    """The greatest weight that each key gets from any of the queries, of all heads that share its head.

    q: [B, T, H, D]. keys: [B, N, Hkv, D], the last T the queries' own. position: [N], where they stand (for ALiBi).

    Returns [B, Hkv, N]; one pass over blocks of queries.
    """
    batch, count, heads, _ = q.shape
    total, kv_heads = keys.shape[1:3]
    block = max(1, SCORES // max(1, batch * heads * total))
    best = q.new_zeros(batch, kv_heads, total)
    for first in range(0, count, block):
        last = min(first + block, count)
        stop = total - count + last
        rows = attention_rows(
            q[:, first:last], keys[:, :stop].transpose(1, 2), scale=layer.scale, slopes=layer.slopes, sink=layer.sink,
            cap=layer.cap,
            q_position=position[None, stop - (last - first) : stop],
            k_position=position[:stop].expand(batch, kv_heads, -1),
        )  # fmt: skip
        found = rows.amax(2).unflatten(1, (kv_heads, -1)).amax(2)
        best[..., :stop] = torch.maximum(best[..., :stop], found)
    return best
