"""Tokens in few bits, all but the last encoded: how they are stored, and the slots that hold them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies.core.holders import largest_fitting
from contextlab.policies.core.slots import Slots
from contextlab.policies.storage.codecs import Codec, Integers
from contextlab.state import State, own, tensor_bytes


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
                if block is not None and dim and dim % min(block, dim):
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
            if isinstance(codec, Integers) and codec.block is not None and sizes[name]:
                fitted[name] = Integers(codec.bits, min(codec.block, sizes[name]))
        return dataclasses.replace(self, **fitted)

    def store(self, layer: KVLayer, values: dict[str, Tensor], room: int, length: int) -> Slots:
        """See `Holder.store`: values each [B, Hkv, n, ...]; what was encoded before is decoded, and encoded again."""
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

    def group_nbytes(self, layer: KVLayer, dtype: torch.dtype) -> int:
        """Bytes of one head's encoded group: keys, and values where they are held apart."""
        form = self.at(layer)
        keys = form.keys.nbytes(self.group, layer.key_dim, dtype)
        return keys + (form.values.nbytes(self.group, layer.value_dim, dtype) if layer.value_dim else 0)

    def packed_nbytes(self, tokens: int, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """The most bytes that so many tokens, or fewer, take."""
        group = self.group_nbytes(layer, dtype)
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
        if not new.shape[3]:  # keys are the values
            return new.new_empty(*new.shape[:2], self.used + new.shape[2], 0)
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
        joined: dict[str, dict[str, Tensor]] = {}
        for name, x in tokens.items():
            if not x.shape[3]:
                joined[name] = {}
                continue
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
        some = self.packed.have is not None or not (valid.is_meta or bool(valid.all()))
        packed = self.packed.append(new["keys"], new["values"], valid if some else None)
        positions = torch.cat((self["position"], new["position"]), 2)
        length = self.length + new["position"].shape[2]
        return PackedSlots({"position": positions}, packed.used, packed=packed, length=length)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, Hkv, N, ...] at the slots index [B, n] of each row: [B, Hkv, n, ...]."""
    shape = (len(x), x.shape[1], index.shape[1], *x.shape[3:])
    return x.gather(2, index.view(len(x), 1, -1, *(1 for _ in x.shape[3:])).expand(shape))
