"""Multi-head latent attention: the state is one low-rank latent and one rotary key a token, for all heads."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers.base import Mixer, head_size
from contextlab.mixers.layers import Linear, RMSNorm, is_plain, multiplications
from contextlab.ops.kv import KVLayer
from contextlab.ops.position import rope_table, rotate
from contextlab.ops.softmax import softmax_attention
from contextlab.registry import register
from contextlab.state import KVState, State


@register(
    "mixer",
    "mla",
    family="softmax",
    papers=("2405.04434", "2412.19437"),
    cases=(
        {},
        {"heads": 3, "head_dim": 5, "rope_dim": 4, "value_dim": 11, "rank": 9},
        {"heads": 2, "rank": 3, "query_rank": 8, "rope_base": 500.0, "rope_dim": 2},
        {"heads": 2, "rope_dim": 0},
        {"heads": 2, "rope_dim": 4, "rank": 6, "latent_norm": False},
    ),
)
class LatentAttention(Mixer):
    """Multi-head latent attention with decoupled RoPE; its state is a latent and one rotary key a token.

    Keys and values of all heads are linear maps of a latent c_t = RMSNorm(W x_t) (DeepSeek-V2, 2405.04434, eqs.
    9-19). What RoPE turns cannot be mapped so: it is a separate part of each query, and one key for all heads.
    A read of one token maps its queries into the space of the latents and attends there, so that the keys and
    values of the heads are never made; longer reads make them, which costs less.

    width: size of a token's vector.
    heads: query heads.
    head_dim: size of the part of a head's key without position; default width / heads.
    rope_dim: size of the rotary part of queries and of the shared key, even, 0 for none; default about head_dim / 2.
    value_dim: size of a head's value; default head_dim.
    rank: size of the latent; default 4 head_dim, the paper's.
    query_rank: size of the latent that the queries are made from, or None for queries straight from the token.
    rope_base: base of the rotary frequencies.
    latent_norm: RMS-normalise the latent, the paper's; without, keys and values are linear in the token, so that
        attention of another form can be written as this (MHA2MLA, 2502.14837).
    """

    parallel_form = "attention"
    served: Any = None  # a policy at this layer, while one is attached: `policies.Served`

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        rope_dim: NonNegativeInt | None = None,
        value_dim: PositiveInt | None = None,
        rank: PositiveInt | None = None,
        query_rank: PositiveInt | None = None,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        latent_norm: bool = True,
    ) -> None:
        super().__init__(width)
        self.heads = heads
        self.head_dim = head_size(width, heads) if head_dim is None else head_dim
        self.rope_dim = max(2, self.head_dim // 4 * 2) if rope_dim is None else rope_dim
        if self.rope_dim % 2:
            raise InputError(
                f"rope_dim must be even, for RoPE rotates pairs, got {rope_dim}; the nearest is {self.rope_dim + 1}"
            )
        self.value_dim = self.head_dim if value_dim is None else value_dim
        self.rank = 4 * self.head_dim if rank is None else rank
        self.rope_base = rope_base
        queries = heads * (self.head_dim + self.rope_dim)  # rows: head by head, the part without position first
        self.q_down = None if query_rank is None else Linear(width, query_rank)
        self.q_norm = None if query_rank is None else RMSNorm(query_rank, eps=1e-6)
        self.q_up = Linear(width if query_rank is None else query_rank, queries)
        self.kv_down = Linear(width, self.rank + self.rope_dim)  # rows: the latent, then the rotary key
        self.kv_norm = RMSNorm(self.rank, eps=1e-6) if latent_norm else None
        self.kv_up = Linear(self.rank, heads * (self.head_dim + self.value_dim))  # rows: head by head, key then value
        self.out_proj = Linear(heads * self.value_dim, width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. x: [B, T, width].

        The state is a `KVState` of one head whose keys are [latent, rotary key] and whose values have size 0.
        """
        batch, length, _ = x.shape
        read = 0 if state is None else state.length
        # RoPE is relative: the place in what was read serves for all rows, however much each is padded.
        turn = rope_table(torch.arange(read, read + length, device=x.device), self.rope_dim, self.rope_base, x.dtype)
        q = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q, q_rope = self.q_up(q).view(batch, length, self.heads, -1).split((self.head_dim, self.rope_dim), -1)
        q_rope = _rotated(q_rope, turn)
        latent, k_rope = self.kv_down(x).split((self.rank, self.rope_dim), -1)
        k_rope = _rotated(k_rope[:, :, None], turn)
        latent = latent if self.kv_norm is None else self.kv_norm(latent)
        latent = latent.to(k_rope.dtype)[:, :, None]

        entry = torch.cat((latent, k_rope), -1)  # all that is kept of the token
        if self.served is not None:
            absorbed, value_up = self._absorb(q, q_rope)
            mean, after = self.served.attend(absorbed, entry, entry[..., :0], state, mask, keep_state)
            y = torch.einsum("bthr,hdr->bthd", mean[..., : self.rank], value_up)
            return self.out_proj(y.flatten(2)), after

        after = None
        if keep_state or state is not None or mask is not None:
            before = KVState.empty(entry, entry[..., :0]) if state is None else state
            if not isinstance(before, KVState):
                raise InputError(f"a {type(before).__name__} was left by a policy; attach that policy to continue it")
            after = before.append(entry, entry[..., :0], mask)
        places = None if after is None else after.positions()
        attend = self._absorbed if length == 1 and is_plain(self.kv_up) else self._expanded
        entries = entry if state is None or after is None else after.cached()[0]
        y = attend(q, q_rope, entries, None if places is None else places[:, read:], places)
        return self.out_proj(y.flatten(2)), after if keep_state else None

    def _expanded(
        self, q: Tensor, q_rope: Tensor, entries: Tensor, q_places: Tensor | None, places: Tensor | None
    ) -> Tensor:
        """Attention [B, T, heads, value_dim] over the keys and values of each head, made from what is held."""
        latent, k_rope = entries.split((self.rank, self.rope_dim), -1)
        kv = self.kv_up(latent[:, :, 0]).unflatten(-1, (self.heads, -1))
        k, v = kv.split((self.head_dim, self.value_dim), -1)
        q, k = torch.cat((q, q_rope), -1), torch.cat((k, k_rope.expand(-1, -1, self.heads, -1)), -1)
        return softmax_attention(q, k, v, q_position=q_places, k_position=places)

    def _absorbed(
        self, q: Tensor, q_rope: Tensor, entries: Tensor, q_places: Tensor | None, places: Tensor | None
    ) -> Tensor:
        """The same for one token, in the space of the latents: q . (W c) = (W^T q) . c."""
        q, value_up = self._absorb(q, q_rope)
        latent = entries[..., : self.rank]
        mean = softmax_attention(q, entries, latent, scale=self.scale, q_position=q_places, k_position=places)
        return torch.einsum("bthr,hdr->bthd", mean, value_up)

    def _absorb(self, q: Tensor, q_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, T, heads, rank + rope_dim] for what is held, and each head's map [heads, value_dim, rank]."""
        up = self.kv_up.weight
        if not is_plain(self.kv_up):  # an adapter or few bits stand before the weight: what the layer does counts
            up = self.kv_up(torch.eye(self.rank, dtype=q.dtype, device=q.device)).mT
        by_head = up.reshape(self.heads, self.head_dim + self.value_dim, self.rank)
        key_up, value_up = by_head.split((self.head_dim, self.value_dim), 1)
        return torch.cat((torch.einsum("bthd,hdr->bthr", q, key_up), q_rope), -1), value_up

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float((self.head_dim + self.rope_dim) ** -0.5)

    def kv_layer(self) -> KVLayer:
        """What a policy needs to know to serve this layer: one key head, whose keys are the values, too."""
        return KVLayer(
            index=0, count=1, heads=self.heads, kv_heads=1, key_dim=self.rank + self.rope_dim, value_dim=0,
            scale=self.scale, turn=self._turned if self.rope_dim else None, latent=self.rank,
        )  # fmt: skip

    def _turned(self, x: Tensor, steps: Tensor) -> Tensor:
        """x [B, T, H, rank + rope_dim], whose last part is rotated, by steps [B or 1, T, H or 1] more."""
        plain, part = x.split((self.rank, self.rope_dim), -1)
        table = rope_table(steps, self.rope_dim, self.rope_base, x.dtype)
        return torch.cat((plain, _rotated(part, table.squeeze(-3))), -1)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the buffer's capacity, which grows by a quarter at a time."""
        return KVState.bytes_at(length, batch, 1, self.rank + self.rope_dim, 0, dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`; only the pairs of query and key that the mask lets through are counted."""
        layers = (self.q_down, self.q_up, self.kv_down, self.kv_up, self.out_proj)
        matrices = sum(multiplications(layer) for layer in layers if layer is not None)
        pairs = self.heads * (self.head_dim + self.rope_dim + self.value_dim) * length * (length + 1) // 2
        return 2 * length * matrices + 2 * pairs


def _rotated(part: Tensor, turn: Tensor) -> Tensor:
    """`rotate` for a slice that may start at an odd place, where pairs cannot be viewed as complex numbers.

    The products by one make copies, of the slice and, in the backward, of the gradient's slice.
    """
    return rotate(part * 1, turn) * 1
