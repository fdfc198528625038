"""Offloading: everything is kept in the CPU's memory, and a few heads of it at a time are where the model is."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from contextlab.errors import check_whole
from contextlab.ops.kv import KVLayer
from contextlab.policies.core.base import Policy
from contextlab.policies.reading.fetching import attend_kv
from contextlab.policies.reading.selective import ReadState
from contextlab.registry import register
from contextlab.state import KVState, State, tensor_bytes


@register("policy", "head_offload", family="offloading", papers=("2502.12574",), cases=({}, {"heads": 3}))
class HeadOffload(Policy):
    """HeadInfer: keys and values are held in the CPU's memory and read by a few key heads at a time; exact.

    Nothing stays on the model's device; a layer takes `heads` key heads' tokens of it while it is answered. The paper
    fetches the next heads while these are read; here they are fetched one after the other, so that memory is saved and
    not time. On a CPU both memories are one.

    heads: key heads that are on the model's device at a time.
    """

    serves_caps = True

    def __init__(self, heads: int = 1) -> None:
        check_whole(heads=(heads, 1))
        self.heads = heads

    @property
    def chunk_invariant(self) -> bool:
        """See `Policy.chunk_invariant`: nothing is lost."""
        return True

    def attend(
        self,
        layer: KVLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None,
        mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        """See `Policy.attend`."""
        state = self._continued(ReadState, layer, k, v, state)
        before = state.kv if state.kv.keys.is_cpu else state.kv.to("cpu")  # someone may have moved it
        after = before.append(k.cpu(), v.cpu(), None if mask is None else mask.cpu())
        if before.length:
            shared, outputs = layer.heads // layer.kv_heads, []
            for first in range(0, layer.kv_heads, self.heads):
                last = min(first + self.heads, layer.kv_heads)
                part = slice(first * shared, last * shared)
                few = dataclasses.replace(
                    layer, heads=(last - first) * shared, kv_heads=last - first,
                    slopes=None if layer.slopes is None else layer.slopes[part],
                )  # fmt: skip
                keys, values = (x[:, first:last, : after.length] for x in (after.keys, after.values))
                kv = KVState(keys, values, after.start, after.padded, length=after.length)
                outputs.append(attend_kv(few, q[:, :, part], kv))
            y = torch.cat(outputs, 2)
        else:
            y = attend_kv(layer, q, after, (k, v))
        if not keep_state:
            return y, None
        read = tensor_bytes(len(k), layer.kv_heads, after.length, layer.key_dim + layer.value_dim, dtype=k.dtype)
        return y, ReadState(after, offloaded=True, read_tokens=after.length, read_nbytes=read, length=after.length)

    def bytes_read(self, state: State) -> int:
        """See `Policy.bytes_read`: all that is held."""
        return state.read_nbytes if isinstance(state, ReadState) else 0

    def convert(self, layer: KVLayer, state: KVState) -> ReadState:
        """See `Policy.convert`."""
        return ReadState(state.to("cpu"), offloaded=True, length=state.length)
