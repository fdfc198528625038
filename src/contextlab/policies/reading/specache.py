"""SpeCache: all tokens are read in few bits, and those that matter most in full precision."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from contextlab.errors import check_whole
from contextlab.ops.kv import KVLayer, attend_cached
from contextlab.policies.core.base import in_own_places
from contextlab.policies.core.budget import Amount
from contextlab.policies.core.ranking import coarse
from contextlab.policies.reading.fetching import fetched
from contextlab.policies.reading.selective import ReadState, SelectivePolicy
from contextlab.policies.storage.packed import Packed
from contextlab.policies.storage.quantize import Quantize
from contextlab.registry import register
from contextlab.state import KVState, own


@dataclass
class CopiedState(ReadState):
    """A `ReadState` with a copy of all keys and values in few bits, on the model's device; None where none is read."""

    packed: Packed | None = None


@register(
    "policy",
    "specache",
    family="selective",
    papers=("2503.16163",),
    cases=({"group": 4}, {"bits": 1, "value_bits": 4, "group": 6, "ahead": True}),
)
class SpeCache(SelectivePolicy):
    """SpeCache: each decoded token reads a copy of all in few bits, and the tokens that matter most to it as they are.

    The copy is KIVI's (see `quantize`): keys by channel, values by token, the last tokens not encoded. A query's scores
    with the copy's keys choose the tokens whose keys and values are then fetched and take the copy's places in that
    query's softmax. The copy is resident; what it was made of may be offloaded.

    The paper fetches them a step ahead: each step decodes two tokens at once, the next one and, by what the copy made
    the model guess, one after it, whose queries choose what the next step will find fetched. A policy serves one layer
    and decodes no second token. By default the token's own query chooses: that is what the guessed token's query
    would choose if the guess was right and its query not changed by the few bits, a bound of the method that cannot be
    fetched ahead of time. With ahead=True the query of the token before chooses, which needs no guess and can be.

    Heads that share a key head choose together. For 1 bit public code of the method takes levels a quarter of the
    range within its ends; here, as for other bits, they are the ends.

    budget: what one token may read: "512tok", of which it reads the latest and the best in full precision; "25%" or
        "64MB", these with the whole copy counted.
    bits: of a number of a key in the copy: 1, 2, 4 or 8; the paper has 1 and 2.
    value_bits: of a number of a value; default bits.
    group: tokens in a group of keys, which are encoded at once.
    channels: numbers of a value that share a scale; a divisor of a head's, which is used where it has fewer.
    window: the least number of last tokens that are not encoded.
    skip: first layers that read everything as it is.
    ahead: choose by the query of the token before.
    offload: keep keys and values in the CPU's memory, as the paper does, and fetch what is read in full precision.
    """

    kind = CopiedState

    def __init__(
        self,
        budget: Amount = None,
        bits: int = 2,
        value_bits: int | None = None,
        group: int = 32,
        channels: int = 32,
        window: int = 32,
        skip: int = 0,
        ahead: bool = False,
        offload: bool = False,
    ) -> None:
        check_whole(window=(window, 1))
        self.copy = Quantize(bits, value_bits, "channel", group, channels, window).storage
        super().__init__(budget, window, 1, 0, skip, ahead, offload)

    @property
    def segment(self) -> int:
        """See `SelectivePolicy.segment`: what is encoded at once."""
        return self.copy.group

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        self.copy.check(layers)
        super().check(layers)

    def summary_nbytes(self, layer: KVLayer, tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `SelectivePolicy.summary_nbytes`: the copy's codes, keys and values."""
        groups = tokens // self.segment
        return batch * layer.kv_heads * groups * self.copy.group_nbytes(layer, dtype)

    def summarise(self, keys: Tensor) -> dict[str, Tensor]:
        """See `SelectivePolicy.summarise`: nothing, the copy is read itself."""
        return {}

    def relevance(self, q: Tensor, summary: dict[str, Tensor]) -> Tensor:
        """See `SelectivePolicy.relevance`: the scores with the copy's keys, of which in few bits many are alike."""
        return coarse(q @ summary["keys"].mT)

    def convert(self, layer: KVLayer, state: KVState) -> CopiedState:
        """See `Policy.convert`."""
        paged = super().convert(layer, state)
        after = CopiedState(paged.kv, paged.summary, offloaded=paged.offloaded, length=paged.length)
        if self.budget.everything:
            return after
        keys, values = state.cached()
        none = {"keys": keys[:, :0].transpose(1, 2), "values": values[:, :0].transpose(1, 2)}
        packed = Packed(self.copy.at(layer), recent={name: own(x) for name, x in none.items()})
        places = state.positions()
        return dataclasses.replace(
            after,
            packed=self._packed(layer, packed, keys, values, state.start, None if places is None else places >= 0),
        )

    def _packed(
        self, layer: KVLayer, packed: Packed, k: Tensor, v: Tensor, start: Tensor, valid: Tensor | None
    ) -> Packed:
        """The copy with further tokens, k [B, T, Hkv, D] and v [B, T, Hkv, V]; valid: [B, T] bool, None for all True.

        Their keys are turned back by their row's padding, so that they are encoded as they would be alone.
        """
        if valid is not None or packed.have is not None:
            k = in_own_places(layer, k, start)
        return packed.append(k.transpose(1, 2), v.transpose(1, 2), valid)

    def _extended(
        self, layer: KVLayer, state: ReadState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> ReadState:
        assert isinstance(state, CopiedState)
        after = super()._extended(layer, state, q, k, v, mask)
        assert isinstance(after, CopiedState)
        if after.packed is None:
            return after
        packed = self._packed(layer, after.packed, k, v, after.kv.start.to(k.device), mask)
        return dataclasses.replace(after, packed=packed)

    def _summary(self, state: ReadState, among: int) -> dict[str, Tensor]:
        assert isinstance(state, CopiedState)
        packed = state.packed
        assert packed is not None
        keys = packed.recent["keys"][:, :, :0]
        if packed.codes:
            keys = packed.form.keys.decode(packed.codes["keys"], self.segment, keys.shape[3], keys.dtype).flatten(2, 3)
        keys = keys[:, :, :among]  # fewer where every row is padded
        return {"keys": torch.nn.functional.pad(keys, (0, 0, 0, among - keys.shape[2]))}

    def _read(self, layer: KVLayer, q: Tensor, state: ReadState, pages: Tensor) -> tuple[Tensor, int]:
        """The answer [B, 1, H, V] of one token from the copy, and from some tokens and the latest ones as they are."""
        assert isinstance(state, CopiedState)
        assert state.packed is not None
        slots, _, _ = self._chosen(state, pages)  # where it holds no token, that is the row's first, or the last
        start = state.kv.start.to(q.device)
        keys, values = (fetched(x, slots, q.device) for x in (state.kv.keys, state.kv.values))
        padded = state.kv.padded
        if padded:
            q = in_own_places(layer, q, start)
            keys = in_own_places(layer, keys.transpose(1, 2), start).transpose(1, 2)
        all_of = {}
        for name, x in (("keys", keys), ("values", values)):
            all_of[name] = state.packed[name].scatter(2, slots[..., None].expand(x.shape), x)
        places = torch.arange(state.length, device=q.device) - start[:, None]
        y = attend_cached(
            q, all_of["keys"], all_of["values"], scale=layer.scale, visible=places >= 0 if padded else None,
            slopes=layer.slopes, cap=layer.cap, q_position=places[:, -1:],
            k_position=places[:, None].expand(-1, layer.kv_heads, -1),
        )  # fmt: skip
        return y, slots.shape[2]

    def _remedy(self, part: float) -> str:
        return f"raise it above {math.ceil(100 * part)}%, lower bits or raise group"
