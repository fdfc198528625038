"""Precision: keys and values in few bits, the last tokens as the model made them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import KVLayer, attend_held
from contextlab.policies.core.base import Policy, in_own_places
from contextlab.policies.core.holders import largest_fitting
from contextlab.policies.core.slots import Slots
from contextlab.registry import register
from contextlab.state import KVState, State, own, tensor_bytes

TILT = 2**-10
"""Of a step, by which rounding favours the higher level; fractions of fewer than 2^8 parts are further from a half."""
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits (uint8 [..., n]; bits 1, 2, 4 or 8), 8 / bits to a byte: uint8 [..., ceil(n bits / 8)].

    Bits j * bits .. of byte i hold code i + j * bytes, so that both ways are a few shifts of whole rows.
    """
    per = 8 // bits
    size = -(-codes.shape[-1] // per)
    planes = torch.nn.functional.pad(codes, (0, per * size - codes.shape[-1])).unflatten(-1, (per, size))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (planes << shifts[:, None]).sum(-2, dtype=torch.uint8)  # no two planes share a bit


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """What `pack` packed: uint8 [..., count]."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    planes = (packed.unsqueeze(-2) >> shifts[:, None]) & (2**bits - 1)
    return planes.flatten(-2)[..., :count]


class Codec(Protocol):
    """How a group of tokens' keys, or values, is written in few bytes."""

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [..., tokens, D] -> named tensors [..., ...]."""

    def decode(self, parts: dict[str, Tensor], tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
        """What `encode` wrote, [..., tokens, dim], near to what it was given."""

    def nbytes(self, tokens: int, dim: int, dtype: torch.dtype) -> int:
        """Bytes of one head's group."""


@dataclass(frozen=True)
class Integers:
    """Codes of `bits` bits, evenly spread between the least and the greatest value of a block (KIVI, 2402.02750).

    bits: 1, 2, 4 or 8. No value is further than half a step (and 1/1000) from its code's, a step being the block's
        range / (2^bits - 1); the step is rounded to the dtype, which in bfloat16 at 8 bits adds up to another half.
    block: channels of a token that make a block; None for one channel of all tokens of the group.
    """

    bits: int
    block: int | None

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """See `Codec.encode`: packed "codes" uint8, and "scale" and "zero" of each block in x's dtype."""
        blocks, along = (x, -2) if self.block is None else (x.unflatten(-1, (-1, self.block)), -1)
        zero = blocks.amin(along, keepdim=True)
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = ((blocks.amax(along, keepdim=True).to(wide) - zero.to(wide)) / (2**self.bits - 1)).to(x.dtype)
        step = scale.to(wide).masked_fill(scale == 0, 1.0)  # a block of equal values is all zero, exactly
        # What was quantized before often falls half-way between new levels; there rounding noise must not decide.
        codes = ((blocks.to(wide) - zero.to(wide)) / step + (0.5 + TILT)).floor()
        codes = codes.clamp(0, 2**self.bits - 1).to(torch.uint8)
        codes = codes.flatten(-2 if self.block is None else -3)  # long rows are packed and unpacked faster
        return {"codes": pack(codes, self.bits), "scale": scale, "zero": zero}

    def decode(self, parts: dict[str, Tensor], tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`."""
        blocks = (-1, dim) if self.block is None else (-1, dim // self.block, self.block)
        codes = unpack(parts["codes"], self.bits, tokens * dim).to(dtype).unflatten(-1, blocks)
        x = torch.addcmul(parts["zero"].to(dtype), codes, parts["scale"].to(dtype))
        return x if self.block is None else x.flatten(-2)

    def nbytes(self, tokens: int, dim: int, dtype: torch.dtype) -> int:
        """See `Codec.nbytes`."""
        blocks = dim if self.block is None else tokens * (dim // self.block)
        return -(-tokens * dim * self.bits // 8) + 2 * blocks * dtype.itemsize


@dataclass(frozen=True)
class Floats:
    """8-bit floating point (2209.05433), each token of a head scaled so that its largest number is the format's."""

    format: Literal["e4m3", "e5m2"]

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """See `Codec.encode`: "codes", the numbers' bits as uint8 (what casts a state leaves them), and "scale"."""
        dtype = FLOAT8[self.format]
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = (x.abs().amax(-1, keepdim=True).to(wide) / torch.finfo(dtype).max).to(x.dtype)
        step = scale.to(wide).masked_fill(scale == 0, 1.0)
        most = torch.finfo(dtype).max  # the scale was rounded, and what is beyond the largest number would become NaN
        codes = (x.to(wide) / step).clamp(-most, most).to(torch.float32).to(dtype)
        return {"codes": codes.view(torch.uint8), "scale": scale}

    def decode(self, parts: dict[str, Tensor], tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`."""
        codes = parts["codes"].to(torch.int16)
        # Shifted into a float16 they are the numbers themselves, e4m3's / 2^8; casts from float8 are slow on a CPU.
        bits = codes << 8 if self.format == "e5m2" else (codes & 0x80) << 8 | (codes & 0x7F) << 7
        scale = parts["scale"].to(dtype) if self.format == "e5m2" else parts["scale"].to(dtype) * 2**8
        return bits.view(torch.float16).to(dtype) * scale

    def nbytes(self, tokens: int, dim: int, dtype: torch.dtype) -> int:
        """See `Codec.nbytes`."""
        return tokens * (dim + dtype.itemsize)


@dataclass(frozen=True)
class Precision:
    """How tokens are stored: all but the last in groups, encoded; a `Holder` of eviction policies.

    keys, values: their codecs. group: tokens of a group. window: the least number of last tokens that stay as they
        are; a group is encoded when it would leave as many.
    """

    keys: Codec
    values: Codec
    group: int
    window: int

    lossless = False

    def groups(self, tokens: int) -> int:
        """Encoded groups among so many tokens."""
        return max(0, (tokens - self.window) // self.group)

    def check(self, layers: list[KVLayer]) -> None:
        """See `Holder.check`."""
        for layer in layers:
            for codec, dim, what in ((self.keys, layer.key_dim, "key"), (self.values, layer.value_dim, "value")):
                block = getattr(codec, "block", None)
                if block is not None and dim % min(block, dim):
                    fits = min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(n - block))
                    raise InputError(
                        f"channels: {block} does not divide the {dim} numbers of a {what}; the nearest that does is "
                        f"{fits}"
                    )

    def at(self, layer: KVLayer) -> Precision:
        """With blocks that are no larger than a key, or a value."""
        sizes = {"keys": layer.key_dim, "values": layer.value_dim}
        fitted = {name: getattr(self, name) for name in sizes}
        for name, codec in fitted.items():
            if isinstance(codec, Integers) and codec.block is not None:
                fitted[name] = Integers(codec.bits, min(codec.block, sizes[name]))
        return dataclasses.replace(self, **fitted)

    def store(self, layer: KVLayer, values: dict[str, Tensor], room: int, length: int) -> Slots:
        """See `Holder.store`; what was encoded before is decoded, gathered and encoded again."""
        none = {name: x[:, :, :0] for name, x in values.items()}
        packed = Packed(self.at(layer), recent={name: none[name] for name in ("keys", "values")})
        slots = PackedSlots({"position": none["position"]}, packed=packed).append(values, room)
        return dataclasses.replace(slots, length=length)

    def nbytes(self, slots: int, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """See `Holder.nbytes`."""
        positions = tensor_bytes(batch, layer.kv_heads, slots, dtype=torch.int32)
        return positions + self.packed_nbytes(slots, layer, batch, dtype)

    def fitting(self, allowed: float, each: int, most: int, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """See `Holder.fitting`."""
        return largest_fitting(lambda slots: self.nbytes(slots, layer, batch, dtype) + slots * each, allowed, most)

    def packed_nbytes(self, tokens: int, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """The most bytes that so many tokens, or fewer, take."""
        form = self.at(layer)
        group = form.keys.nbytes(self.group, layer.key_dim, dtype)
        group += form.values.nbytes(self.group, layer.value_dim, dtype)
        plain = min(tokens, max(1, self.window + self.group - 1))
        heads = batch * layer.kv_heads
        both = tensor_bytes(heads, plain, layer.key_dim + layer.value_dim, dtype=dtype)
        return heads * self.groups(tokens) * group + both + tensor_bytes(batch, dtype=torch.int64)


@dataclass
class Packed(State):
    """Keys and values of tokens in order, all but the last encoded. Nothing is written in place.

    Groups are counted from each row's own first token, so that a row is encoded as it would be alone. Rows that have
    fewer tokens than others have their recent ones last, and groups that hold nothing after their own.

    form: how they are encoded.
    codes: of each group: [B, Hkv, groups, ...]; empty as long as there is none.
    recent: "keys" [B, Hkv, n, D] and "values" [B, Hkv, n, V] of the last tokens, as the model made them.
    have: [B] int64, tokens of each row; None when every row has `used`.
    used: tokens, and slots of rows that have fewer.
    """

    form: Precision = dataclasses.field(metadata={"static": True})
    codes: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    recent: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    have: Tensor | None = None
    used: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def groups(self) -> int:
        """Groups held."""
        return self.codes["keys"]["codes"].shape[2] if self.codes else 0

    def __getitem__(self, name: str) -> Tensor:
        """The keys or values, decoded: [B, Hkv, used, ...], a copy; slots that hold no token have any numbers."""
        return self.followed(name, self.recent[name][:, :, :0])

    def followed(self, name: str, new: Tensor) -> Tensor:
        """As `self[name]`, followed by further ones: new [B, Hkv, T, ...]."""
        parts = [self.recent[name]]
        if self.codes:
            codec = self.form.keys if name == "keys" else self.form.values
            parts.insert(0, codec.decode(self.codes[name], self.form.group, new.shape[3], new.dtype).flatten(2, 3))
        if self.have is None:
            return torch.cat((*parts, new), 2)
        x = torch.cat(parts, 2)
        slot = torch.arange(self.used, device=x.device) - self.used  # from the end
        token = slot + self.have[:, None]
        encoded = token < self._groups(self.have)[:, None] * self.form.group
        return torch.cat((_rows(x, torch.where(encoded, token, x.shape[2] + slot).clamp_min(0)), new), 2)

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> Packed:
        """With further tokens: keys [B, Hkv, T, D], values [B, Hkv, T, V]; valid [B, T] bool, None for all True."""
        count, group = keys.shape[2], self.form.group
        recent = {"keys": torch.cat((self.recent["keys"], keys), 2)}
        recent["values"] = torch.cat((self.recent["values"], values), 2)
        length, used, have = recent["keys"].shape[2], self.used + count, None
        if self.have is None and valid is None:
            moved = self.form.groups(used) - self.groups
            keep, codes = length - moved * group, self.codes
            if moved:
                codes = self._joined({name: x[:, :, : moved * group] for name, x in recent.items()}, moved)
        else:
            before = self.have if self.have is not None else torch.full((len(keys),), self.used, device=keys.device)
            have = before + (count if valid is None else valid.sum(1))
            old, new = self._groups(before), self._groups(have)
            moved, codes = int((new - old).max()), self.codes
            keep = min(length, max(1, int((have - new * group).max())))
            if moved:  # each row's next tokens; a row that moves fewer gets groups that are not read
                token = old[:, None] * group + torch.arange(moved * group, device=keys.device)
                index = (token + (length - have)[:, None]).clamp(0, length - 1)
                codes = self._joined({name: _rows(x, index) for name, x in recent.items()}, moved)
                place = torch.arange(int(new.max()), device=keys.device)
                take = torch.where(place < old[:, None], place, self.groups + place - old[:, None])
                take = take.clamp_max(self.groups + moved - 1)
                codes = {name: {key: _rows(x, take) for key, x in parts.items()} for name, parts in codes.items()}
        rest = {name: own(x[:, :, length - keep :]) for name, x in recent.items()}
        return Packed(self.form, codes, rest, have, used, length=self.length + count)

    def _joined(self, tokens: dict[str, Tensor], groups: int) -> dict[str, dict[str, Tensor]]:
        """The codes, followed by those of further groups of tokens [B, Hkv, groups * group, D]."""
        joined = {}
        for name, x in tokens.items():
            codec = self.form.keys if name == "keys" else self.form.values
            new = codec.encode(x.unflatten(2, (groups, self.form.group)))
            joined[name] = {k: torch.cat((self.codes[name][k], y), 2) for k, y in new.items()} if self.codes else new
        return joined

    def _groups(self, tokens: Tensor) -> Tensor:
        return ((tokens - self.form.window) // self.form.group).clamp_min(0)


@dataclass
class PackedSlots(Slots):
    """Slots whose keys and values are encoded; "position" is in `values`. Reading a name decodes all of it."""

    packed: Packed = dataclasses.field(kw_only=True)

    def __getitem__(self, name: str) -> Tensor:
        """See `Slots.__getitem__`; keys and values are copies."""
        return super().__getitem__(name) if name in self.values else self.packed[name]

    def append(self, new: dict[str, Tensor], room: int) -> PackedSlots:
        """See `Slots.append`; no more room is made than is used."""
        valid = new["position"][:, 0] >= 0
        some = self.packed.have is not None or not bool(valid.all())
        packed = self.packed.append(new["keys"], new["values"], valid if some else None)
        positions = torch.cat((self["position"], new["position"]), 2)
        length = self.length + new["position"].shape[2]
        return PackedSlots({"position": positions}, packed.used, packed=packed, length=length)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, Hkv, N, ...] at the slots index [B, n] of each row: [B, Hkv, n, ...]."""
    shape = (len(x), x.shape[1], index.shape[1], *x.shape[3:])
    return x.gather(2, index.view(len(x), 1, -1, *(1 for _ in x.shape[3:])).expand(shape))


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
        held = state.packed
        if mask is not None or held.have is not None:
            q, k = in_own_places(layer, q, start), in_own_places(layer, k, start)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        keys, values = (held.followed("keys", k), held.followed("values", v)) if held.used else (k, v)
        places = torch.arange(held.used + k.shape[2], device=q.device) - start[:, None]
        padded = mask is not None or held.have is not None
        y = attend_held(
            q, keys, values, scale=layer.scale, visible=places >= 0 if padded else None, slopes=layer.slopes,
            q_position=places[:, held.used :], k_position=places[:, None].expand(-1, layer.kv_heads, -1),
        )  # fmt: skip
        if not keep_state:
            return y, None
        return y, PackedState(held.append(k, v, mask), start, length=state.length + k.shape[2])

    def convert(self, layer: KVLayer, state: KVState) -> PackedState:
        """See `Policy.convert`."""
        keys, values = state.held()
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

    Every token is kept; `h2o | fp8` keeps few. The paper's formats are of its table of binary formats; e4m3 is finite
    only ("fn"). Serving systems often take one scale for a tensor; that of each token needs no calibration.

    format: e4m3 (3 bits of fraction) or e5m2 (2 bits, and a wider range).
    window: the least number of last tokens that stay as they are.
    """

    def __init__(self, format: Literal["e4m3", "e5m2"] = "e4m3", window: int = 0) -> None:
        if format not in FLOAT8:
            raise InputError(f"format: expected e4m3 or e5m2, got {format!r}; e4m3 has the smaller error")
        check_whole(window=(window, 0))
        self.storage = Precision(Floats(format), Floats(format), 1, window)
