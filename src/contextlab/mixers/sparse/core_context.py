"""Core context aware attention: near tokens as they are, farther ones by one core token for each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.mixers.base import Signature
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens
from contextlab.ops.softmax import attend
from contextlab.registry import register
from contextlab.state import State, WindowState, own, tensor_bytes


@dataclass
class CoreState(State):
    """The last tokens, and a key and value for each complete group of tokens; buffers are never written in place.

    near: the last window + group - 2 tokens, of which a group that is not complete and the window are a part.
    cores: [B, H, length // group, 2 D], of each row's complete groups, counted from its first token; the rest is zero.
    """

    near: WindowState
    cores: Tensor


@register(
    "mixer",
    "core_context",
    family="sparse",
    papers=("2412.12465",),
    cases=(
        {"group": 4, "window": 6},
        {"group": 1, "window": 1, "heads": 2},
        {"group": 5, "window": 3, "kv_heads": 2, "position": "none"},
        {"group": 3, "window": 1, "heads": 3, "head_dim": 4, "kv_heads": 1},
        {"group": 80, "window": 20},
    ),
)
class CoreContextAttention(AttentionMixer):
    """CCA: attention to the near tokens and, in the same softmax, to one core token for each group farther back.

    Groups of g tokens are pooled by the attention that the group's last token pays to them: with its query q and the
    group's keys K, values V, the core's key is softmax(q K^T / sqrt(d)) K and its value the same of V. The query at
    place i, counted from 1, sees the first (i - s) // g cores and all tokens after those groups, from s to s + g - 1
    of them: so each token is seen once, as it is or in its core. The fusion is the joint softmax over both; it has
    no parameters.

    The paper pools tokens and projects the pooled ones to keys and values; here, as in the authors' code, rotated keys
    and values are pooled, by weights of each query head's own. The state grows by one core for each g tokens.

    width: size of a token's vector.
    group: g, tokens of a group.
    window: s, tokens that a query sees as they are at least, its own counted.
    heads: query heads.
    kv_heads: key and value heads of the near tokens, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    position: rotary (rope) or none.
    rope_base: base of the rotary frequencies.
    """

    tells_mixing = False

    def __init__(
        self,
        width: PositiveInt,
        *,
        group: PositiveInt = 16,
        window: PositiveInt = 64,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(
            width,
            AttentionOptions(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=position, rope_base=rope_base),
        )
        self.group, self.span = group, window
        self.slots = window + group - 2  # tokens that the next query or the next core may need
        # Given, for groups can be too long for it to be found by reading a few tokens.
        near = (self.kv_heads, self.slots, self.head_dim)
        shapes = (near, near, (self.slots,), (), (heads, None, 2 * self.head_dim))
        self._expected = Signature(CoreState, (), shapes)

    def _attend(self, new: Tokens, state: State | None, keep_state: bool) -> tuple[Tensor, State | None]:
        q, k, v, mask = new.q, new.k, new.v, new.mask
        if state is None:
            cores = q.new_zeros(q.shape[0], self.heads, 0, 2 * self.head_dim)
            before = CoreState(WindowState.empty(k, v, self.slots + 1), cores)
        else:
            assert isinstance(state, CoreState)
            before = state
        near, read, length = before.near, before.length, q.shape[1]
        if state is None and mask is None and not keep_state and length < self.span + self.group:
            return attend(q, k, v, self.head_dim**-0.5, is_causal=True), None  # no core is in sight yet
        places = torch.arange(read, read + length, device=q.device)[None]
        padded = near.padded or mask is not None
        if padded:
            places = places - (near.start if mask is None else near.start + (~mask).sum(1))[:, None]
        old_k, old_v, old_at = near.cached()
        line = torch.cat((torch.cat((old_k, old_v), -1), torch.cat((k, v), -1)), 1)
        at = torch.cat((old_at[: len(places)], places), 1)
        cores = self._cores(before, q, line, places, padded)
        y = self._joint(q, line, cores, places, at, read)
        if not keep_state:
            return y, None
        return y, CoreState(near.append(k, v, places, mask), own(cores), length=read + length)

    def _cores(self, before: CoreState, q: Tensor, line: Tensor, places: Tensor, padded: bool) -> Tensor:
        """All cores [B, H, groups, 2 D], those of the groups that are complete now among them.

        q: [B, T, H, D]. line: [B, N, Hkv, 2 D], keys and values of the tokens held and of the T new ones.
        places: [B or 1, T] of the new ones in their rows.
        """
        old, length, g = before.cores, q.shape[1], self.group
        total, earlier = (before.length + length) // g, line.shape[1] - length
        groups = (length + g - 1) // g if padded else total - old.shape[2]  # at most, or as many in every row
        if not groups:
            return old
        first = places[:, :1].clamp_min(0).div(g, rounding_mode="floor")  # [B or 1, 1]: cores that there were
        # Tokens follow one another, so that the place of one says where in the line all are.
        index = first * g + torch.arange(groups * g, device=q.device) - places[:, :1]
        tokens = _taken(line, index + earlier).unflatten(1, (groups, g))
        last = _taken(q, index[:, g - 1 :: g]).unflatten(2, (self.kv_heads, -1))
        scores = torch.einsum("bnhsd,bnghd->bhsng", last, tokens[..., : self.head_dim]) * self.head_dim**-0.5
        both = torch.cat((old, torch.einsum("bhsng,bnghd->bhsnd", scores.softmax(-1), tokens).flatten(1, 2)), 2)
        if not padded:
            return both
        slot = torch.arange(total, device=q.device)
        source = torch.where(slot < first, slot, old.shape[2] + slot - first).clamp_max(both.shape[2] - 1)
        there = slot < (places[:, -1:] + 1).div(g, rounding_mode="floor")
        source, there = source[:, None, :, None], there[:, None, :, None]
        return both.gather(2, source.expand(-1, both.shape[1], -1, both.shape[3])).masked_fill(~there, 0.0)

    def _joint(self, q: Tensor, line: Tensor, cores: Tensor, places: Tensor, at: Tensor, read: int) -> Tensor:
        """The softmax over cores and tokens, in chunks of the queries.

        at: [B or 1, N], the places of the tokens of `line`. read: tokens before the first query.
        """
        length, earlier = q.shape[1], line.shape[1] - q.shape[1]
        chunk = min(max(self.span + self.group, 128), 1024)
        outputs = []
        for first in range(0, max(length, 1), chunk):
            queries = slice(first, min(first + chunk, length))
            tokens = slice(max(0, earlier + first - self.slots), earlier + queries.stop)
            place, token = places[:, queries, None], at[:, None, tokens]
            seen = (place + 1 - self.span).clamp_min(0).div(self.group, rounding_mode="floor")  # cores: [B or 1, Tq, 1]
            far = cores[:, :, : max(0, read + queries.stop - self.span) // self.group].transpose(1, 2)
            number = torch.arange(far.shape[1], device=q.device)
            mask = torch.cat((number < seen, (token >= seen * self.group) & (token <= place)), -1)
            near = line[:, tokens].repeat_interleave(self.heads // self.kv_heads, 2)
            k, v = torch.cat((far, near), 1).split(self.head_dim, -1)
            outputs.append(attend(q[:, queries], k, v, self.head_dim**-0.5, mask.unsqueeze(1)))
        return torch.cat(outputs, 1)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`."""
        near = WindowState.bytes_for(self.slots + 1, 0, batch, self.kv_heads, self.head_dim, self.head_dim, dtype)
        return near + tensor_bytes(batch, self.heads, length // self.group, 2 * self.head_dim, dtype=dtype)

    def _pairs(self, length: int) -> int:
        # The sum over queries of the cores that each sees; each core stands for `group` tokens that are not seen.
        rounds, rest = divmod(max(0, length - self.span), self.group)
        cores = self.group * rounds * (rounds - 1) // 2 + rounds * (rest + 1)
        return length * (length + 1) // 2 - (self.group - 1) * cores

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        pooled = length // self.group * self.group
        return super().flops(length) + 6 * pooled * self.heads * self.head_dim


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, ...] at index [B or 1, M] -> [B, M, ...]; what is out of range is taken at the nearest end."""
    index = index.clamp(0, x.shape[1] - 1)
    if len(index) == 1:
        return x.index_select(1, index[0])
    return x.gather(1, index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
