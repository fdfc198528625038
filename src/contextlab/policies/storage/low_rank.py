"""Low rank: keys and values by their coordinates in a few directions that the prompt's own tokens span best."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import KVLayer, attend_cached
from contextlab.ops.softmax import capped
from contextlab.policies.core.base import Policy
from contextlab.policies.core.slots import Slots
from contextlab.registry import register
from contextlab.state import KVState, State, own, tensor_bytes

NAMES = ("keys", "values")


@dataclass
class LowRankState(State):
    """What `LowRank` keeps of one layer: coordinates of all tokens but the last, and these as they are.

    coded: "keys" [B, Hkv, room, r] and "values" [B, Hkv, room, s], coordinates of the tokens in order.
    basis: "keys" [B, Hkv, r, D] and "values" [B, Hkv, s, V], orthonormal rows; empty as long as nothing is coded.
    recent: "keys" [B, Hkv, n, D] and "values" [B, Hkv, n, V] of the last tokens, as the model made them.
    start: [B] int64, the left-padding tokens of each row.
    fixed: [B] bool, whether a row's basis stays as it is.
    padded: whether any piece came with a mask.
    """

    coded: Slots
    basis: dict[str, Tensor]
    recent: dict[str, Tensor]
    start: Tensor
    fixed: Tensor
    padded: bool = dataclasses.field(default=False, metadata={"static": True})


@register(
    "policy",
    "low_rank",
    family="low rank",
    papers=("2408.05646", "2410.21465"),
    cases=({"rank": 4}, {"rank": 3, "value_rank": 7, "unrotate": False}, {"rank": 0.75}),
)
class LowRank(Policy):
    """Keys and values of all but the last tokens in few dimensions (Eigen Attention; per prompt as in ShadowKV).

    A head's directions are the leading right singular vectors of its keys, and of its values, in the first piece that
    is read (or as many tokens as window and rank take, if that is shorter), not centred; they stay, and later tokens
    are projected on them. Eigen Attention finds them on calibration data, with queries beside the keys where positions
    are not rotary, and puts them into the weights. ShadowKV takes the prompt's keys, all heads of a layer in one, and
    leaves the values and the tokens that are generated as they are. Values are never made up again in full: weights
    are applied to their coordinates.

    rank: dimensions of a key that are held; a number below 1 is a part of the head's.
    value_rank: of a value; default rank.
    window: last tokens that stay as they are.
    unrotate: whether rotary positions are taken off a key before and put back at reading, as in both papers: keys of
        lower rank, for a rotation of all of them with each token. Without, or where positions are not rotary, queries
        are compared with the coordinates.
    """

    serves_caps = True

    values_apart = "factors keys and values each by themselves"

    def __init__(
        self, rank: int | float = 0.5, value_rank: int | float | None = None, window: int = 32, unrotate: bool = True
    ) -> None:
        for name, value in (("rank", rank), ("value_rank", rank if value_rank is None else value_rank)):
            if isinstance(value, bool) or not value > 0 or (value >= 1 and value != int(value)):
                raise InputError(f"{name}: expected a whole number, or a part of a head between 0 and 1, got {value!r}")
        check_whole(window=(window, 0))
        self.rank, self.value_rank = rank, rank if value_rank is None else value_rank
        self.window, self.unrotate = window, unrotate

    @property
    def turns(self) -> bool:
        """See `Policy.turns`."""
        return self.unrotate

    @property
    def lossless(self) -> bool:
        """See `Policy.lossless`."""
        return False

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        for layer in layers:
            sizes = {"rank": (self.rank, layer.key_dim), "value_rank": (self.value_rank, layer.value_dim)}
            for name, (rank, most) in sizes.items():
                if rank > most:
                    raise InputError(f"{name}: {rank} is more than the {most} numbers of a head; at most {most}")

    def ranks(self, layer: KVLayer) -> dict[str, int]:
        """Dimensions held of a key and of a value."""
        given = {"keys": (self.rank, layer.key_dim), "values": (self.value_rank, layer.value_dim)}
        return {name: int(rank) if rank >= 1 else max(1, round(rank * dim)) for name, (rank, dim) in given.items()}

    def nbytes(self, length: int, layer: KVLayer, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """The exact bytes of a layer after reading so many tokens."""
        ranks, coded = self.ranks(layer), max(0, length - self.window)
        numbers = KVState.capacity(coded) * sum(ranks.values())
        numbers += (length - coded) * (layer.key_dim + layer.value_dim)
        if coded:
            numbers += ranks["keys"] * layer.key_dim + ranks["values"] * layer.value_dim
        size = tensor_bytes(batch, layer.kv_heads, numbers, dtype=dtype)
        return size + tensor_bytes(batch, dtype=torch.int64) + tensor_bytes(batch, dtype=torch.bool)

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
        state = self._continued(LowRankState, layer, k, v, state)
        start = state.start if mask is None else state.start + (~mask).sum(1)
        new = {"keys": k.transpose(1, 2), "values": v.transpose(1, 2)}
        recent = {name: torch.cat((state.recent[name], x), 2) for name, x in new.items()}
        now = dataclasses.replace(
            state, recent=recent, start=start, padded=state.padded or mask is not None, length=state.length + k.shape[1]
        )
        y = self._decoded(layer, q, now) if q.shape[1] == 1 and now.coded.used else self._read(layer, q, now)
        return y, self._coded(layer, now) if keep_state else None

    def _read(self, layer: KVLayer, q: Tensor, state: LowRankState) -> Tensor:
        """Attention over all tokens, the coded ones made up again in full."""
        keys, values = state.recent["keys"], state.recent["values"]
        if state.coded.used:
            keys = torch.cat((self._keys(layer, state), keys), 2)
            values = torch.cat((state.coded["values"] @ state.basis["values"], values), 2)
        places = torch.arange(state.length, device=q.device) - state.start[:, None]
        return attend_cached(
            q, keys, values, scale=layer.scale, visible=places >= 0 if state.padded else None, slopes=layer.slopes,
            cap=layer.cap, q_position=places[:, state.length - q.shape[1] :],
            k_position=places[:, None].expand(-1, layer.kv_heads, -1),
        )  # fmt: skip

    def _decoded(self, layer: KVLayer, q: Tensor, state: LowRankState) -> Tensor:
        """The same for one token, whose query meets coordinates where it can; values stay coordinates."""
        q = (q * layer.scale).transpose(1, 2).unflatten(1, (layer.kv_heads, -1)).flatten(2, 3)  # [B, Hkv, G, D]
        coded = state.coded.used
        if self._turns(layer):
            old = q @ self._keys(layer, state).mT
        else:
            old = q @ state.basis["keys"].mT @ state.coded["keys"].mT
        scores = capped(torch.cat((old, q @ state.recent["keys"].mT), 3), layer.cap)
        places = torch.arange(state.length, device=q.device) - state.start[:, None]
        if layer.slopes is not None:
            distance = (places[:, -1:] - places)[:, None, None]
            scores = scores - layer.slopes.to(scores).view(layer.kv_heads, -1, 1) * distance
        if state.padded:
            scores = scores.masked_fill((places < 0)[:, None, None], float("-inf"))
        p = scores.softmax(-1)
        p = p.nan_to_num(0.0) if state.padded else p
        y = p[..., :coded] @ state.coded["values"] @ state.basis["values"] + p[..., coded:] @ state.recent["values"]
        return y.flatten(1, 2)[:, None]

    def _coded(self, layer: KVLayer, state: LowRankState) -> LowRankState:
        """With all recent tokens coded but the last `window`."""
        before, leave = state.coded.used, max(0, state.recent["keys"].shape[2] - self.window)
        if not leave:
            return state
        tokens = dict(state.recent)
        if self._turns(layer):
            tokens["keys"] = self._turned(layer, tokens["keys"], before, -1)
        coded, basis, fixed = state.coded, state.basis, state.fixed
        if not basis or not bool(fixed.all()):
            coded, basis, fixed = self._based(layer, state, tokens, before + leave)
        new = {name: tokens[name][:, :, :leave] @ basis[name].mT for name in NAMES}
        coded = coded.append(new, KVState.capacity(before + leave))
        recent = {name: own(x[:, :, leave:]) for name, x in state.recent.items()}
        return dataclasses.replace(state, coded=coded, basis=basis, fixed=fixed, recent=recent)

    def _based(
        self, layer: KVLayer, state: LowRankState, tokens: dict[str, Tensor], coded: int
    ) -> tuple[Slots, dict[str, Tensor], Tensor]:
        """Bases of the rows that have no fixed one, what is coded in those terms, and which rows are fixed now.

        A row with fewer tokens than window and rank has a basis that spans all that is coded, which loses nothing, and
        is given another when more were read. tokens: those not coded yet. coded: tokens that then are.
        """
        ranks = self.ranks(layer)
        place = torch.arange(state.length, device=state.start.device)
        fixes = state.length - state.start >= self.window + max(ranks.values())
        counts = (place >= state.start[:, None]) & (fixes[:, None] | (place < coded))  # [B, length]
        basis, values, keep = {}, {}, state.fixed[:, None, None, None]
        for name, x in tokens.items():
            if state.basis:
                x = torch.cat((state.coded[name] @ state.basis[name], x), 2)
            with torch.no_grad():
                x64 = x.to(torch.float64) * counts[:, None, :, None]
                directions = torch.linalg.eigh(x64.mT @ x64).eigenvectors[..., -ranks[name] :].mT  # rising order
            basis[name] = directions.to(x.dtype)
            values[name] = x[:, :, : state.coded.used] @ basis[name].mT
            if state.basis:
                basis[name] = torch.where(keep, state.basis[name], basis[name])
                values[name] = torch.where(keep, state.coded[name], values[name])
            basis[name] = own(basis[name])
        slots = Slots.of(values, KVState.capacity(state.coded.used), state.coded.length)
        return slots, basis, state.fixed | fixes

    def _turns(self, layer: KVLayer) -> bool:
        return self.unrotate and layer.turn is not None

    def _keys(self, layer: KVLayer, state: LowRankState) -> Tensor:
        """The coded keys, made up again: [B, Hkv, coded, D]."""
        keys = state.coded["keys"] @ state.basis["keys"]
        return self._turned(layer, keys, 0, 1) if self._turns(layer) else keys

    @staticmethod
    def _turned(layer: KVLayer, keys: Tensor, first: int, sign: int) -> Tensor:
        """keys [B, Hkv, N, D] of tokens first, first + 1 .., their positions put on (sign 1) or off (-1)."""
        assert layer.turn is not None
        steps = sign * torch.arange(first, first + keys.shape[2], device=keys.device)[None, :, None]
        return layer.turn(keys.transpose(1, 2), steps).transpose(1, 2)

    def convert(self, layer: KVLayer, state: KVState) -> LowRankState:
        """See `Policy.convert`; the whole state counts as the first piece."""
        keys, values = state.cached()
        recent = {"keys": keys.transpose(1, 2), "values": values.transpose(1, 2)}
        empty = self._empty(layer, keys, values)
        if not state.length:
            return empty
        start, length = state.start, state.length
        after = self._coded(
            layer, dataclasses.replace(empty, recent=recent, start=start, padded=state.padded, length=length)
        )
        return dataclasses.replace(after, recent={name: own(x) for name, x in after.recent.items()})

    def _empty(self, layer: KVLayer, k: Tensor, v: Tensor) -> LowRankState:
        """A state that has read nothing, for k [B, T, Hkv, D] and v [B, T, Hkv, V]."""
        batch, ranks = len(k), self.ranks(layer)
        recent = {name: own(x.transpose(1, 2)[:, :, :0]) for name, x in (("keys", k), ("values", v))}
        coded = {name: k.new_zeros(batch, layer.kv_heads, 0, ranks[name]) for name in NAMES}
        start = torch.zeros(batch, dtype=torch.int64, device=k.device)
        return LowRankState(Slots.of(coded, 0, 0), {}, recent, start, torch.zeros_like(start, dtype=torch.bool))
