"""Precision: policies that keep every token, all but the last in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import KVLayer, attend_cached
from contextlab.policies.core.base import Policy, in_own_places
from contextlab.policies.storage.codecs import FLOAT8, Floats, Integers
from contextlab.policies.storage.packed import Packed, Precision
from contextlab.registry import register
from contextlab.state import KVState, State, own, tensor_bytes


@dataclass
class PackedState(State):
    """What a precision policy keeps of one layer.

    packed: the tokens. start: [B] int64, the left-padding tokens of each row.
    """

    packed: Packed
    start: Tensor


class PrecisionPolicy(Policy):
    """Base of the policies that keep every token, all but the last in few bits.

    As in KIVI's code a token attends to those of its own piece in full precision, and groups are encoded after that.
    """

    storage: Precision
    serves_sinks = serves_caps = True

    @property
    def lossless(self) -> bool:
        """See `Policy.lossless`."""
        return False

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        self.storage.check(layers)

    def nbytes(self, length: int, layer: KVLayer, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """The most bytes that a layer holds after reading so many tokens, or fewer."""
        return self.storage.packed_nbytes(length, layer, batch, dtype) + tensor_bytes(batch, dtype=torch.int64)

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
        state = self._continued(PackedState, layer, k, v, state)
        start = state.start if mask is None else state.start + (~mask).sum(1)
        packed = state.packed
        if mask is not None or packed.have is not None:
            q, k = in_own_places(layer, q, start), in_own_places(layer, k, start)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        keys, values = (packed.followed("keys", k), packed.followed("values", v)) if packed.used else (k, v)
        places = torch.arange(packed.used + k.shape[2], device=q.device) - start[:, None]
        padded = mask is not None or packed.have is not None
        y = attend_cached(
            q, keys, values, scale=layer.scale, visible=places >= 0 if padded else None, slopes=layer.slopes,
            sink=layer.sink, cap=layer.cap, q_position=places[:, packed.used :],
            k_position=places[:, None].expand(-1, layer.kv_heads, -1),
        )  # fmt: skip
        if not keep_state:
            return y, None
        return y, PackedState(packed.append(k, v, mask), start, length=state.length + k.shape[2])

    def convert(self, layer: KVLayer, state: KVState) -> PackedState:
        """See `Policy.convert`."""
        keys, values = state.cached()
        places = state.positions()
        empty = self._empty(layer, keys, values)
        keys = keys if places is None else in_own_places(layer, keys, state.start)
        packed = empty.packed.append(
            keys.transpose(1, 2), values.transpose(1, 2), None if places is None else places >= 0
        )
        return PackedState(packed, state.start, length=state.length)

    def _empty(self, layer: KVLayer, k: Tensor, v: Tensor) -> PackedState:
        """A state that has read nothing, for k [B, T, Hkv, D] and v [B, T, Hkv, V]."""
        none = {"keys": k.transpose(1, 2)[:, :, :0], "values": v.transpose(1, 2)[:, :, :0]}
        start = torch.zeros(len(k), dtype=torch.int64, device=k.device)
        return PackedState(Packed(self.storage.at(layer), recent={n: own(x) for n, x in none.items()}), start)


@register(
    "policy",
    "quantize",
    family="quantization",
    papers=("2402.02750",),
    cases=(
        {"group": 8},
        {"bits": 2, "value_bits": 8, "group": 5, "window": 0, "channels": 4},
        {"bits": 8, "group": 3, "keys": "token"},
    ),
)
class Quantize(PrecisionPolicy):
    """Keys in few bits per channel, values in few bits per token, the last tokens as they are (KIVI).

    Keys (rotary positions applied) are quantized channel by channel over groups of tokens, values token by token over
    groups of channels; codes are packed into bytes, and a scale and a zero of the model's dtype is held for each
    group. Every token is kept; `h2o | quantize` keeps few tokens in few bits. The keys and values of a group of
    tokens are quantized at once, so that between `window` and `window + group - 1` tokens stay as they are; in the
    paper these are up to as many keys and exactly as many values.

    An eviction policy that stores its tokens so decodes, gathers and quantizes again what it keeps. That leaves values
    as they are, and keys of groups from which nothing was dropped; others err by up to half a step more each time.
    Where little is dropped often, take keys="token", 8 bits or fp8, or let `every` be larger.

    bits: of a number of a key: 1, 2, 4 or 8.
    keys: whether a channel of a group of tokens shares a scale ("channel"), or, as for values, channels of a token
        ("token"): further off where some channels are much larger than others, but as good after any eviction.
    value_bits: of a number of a value; default bits.
    group: tokens in a group of keys.
    channels: numbers of a token that share a scale; a divisor of a head's, which is used where it has fewer.
    window: the least number of last tokens that stay as they are; the paper's code has 128.
    """

    def __init__(
        self,
        bits: int = 4,
        value_bits: int | None = None,
        keys: Literal["channel", "token"] = "channel",
        group: int = 32,
        channels: int = 32,
        window: int = 32,
    ) -> None:
        value_bits = bits if value_bits is None else value_bits
        for name, value in (("bits", bits), ("value_bits", value_bits)):
            if isinstance(value, bool) or value not in (1, 2, 4, 8):
                near = min((1, 2, 4, 8), key=lambda n: abs(n - value)) if isinstance(value, int | float) else 4
                raise InputError(f"{name}: expected 1, 2, 4 or 8, got {value!r}; the nearest is {near}")
        if keys not in ("channel", "token"):
            raise InputError(f"keys: expected 'channel' or 'token', got {keys!r}; the paper's is 'channel'")
        check_whole(group=(group, 1), channels=(channels, 1), window=(window, 0))
        block = None if keys == "channel" else channels
        self.storage = Precision(Integers(bits, block), Integers(value_bits, channels), group, window)


@register("policy", "fp8", family="quantization", papers=("2209.05433",), cases=({}, {"format": "e5m2", "window": 0}))
class FP8(PrecisionPolicy):
    """Keys and values as 8-bit floating-point numbers, with a scale for each token of a head.

    Every token is kept; `h2o | fp8` keeps few. The formats are from the paper's table of binary formats; e4m3 has no
    infinity ("fn"). Serving systems often take one scale for a tensor; that of each token needs no calibration.

    format: e4m3 (3 bits of fraction) or e5m2 (2 bits, and a wider range).
    window: the least number of last tokens that stay as they are.
    """

    def __init__(self, format: Literal["e4m3", "e5m2"] = "e4m3", window: int = 0) -> None:
        if format not in FLOAT8:
            raise InputError(f"format: expected e4m3 or e5m2, got {format!r}; e4m3 has the smaller error")
        check_whole(window=(window, 0))
        self.storage = Precision(Floats(format), Floats(format), 1, window)
