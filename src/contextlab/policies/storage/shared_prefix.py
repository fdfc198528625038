"""Sharing: what the rows of a batch have in common is held and read once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from contextlab.ops.kv import KVLayer, values_of
from contextlab.ops.merge import attention_with_lse, merge_attention
from contextlab.policies.core.base import Policy
from contextlab.policies.reading.fetching import attend_kv
from contextlab.registry import register
from contextlab.state import KVState, State


@dataclass
class SharedPrefixState(State):
    """The tokens with which all rows begin, once, and each row's own after them.

    suffix: each row's keys and values after the prefix, a batch of B.
    prefix: a batch of one, whatever B is; `select` leaves it as it is.
    """

    suffix: KVState
    prefix: KVState

    def select(self, rows: Tensor) -> SharedPrefixState:
        """See `State.select`; the prefix is shared with this state."""
        return dataclasses.replace(self, suffix=self.suffix.select(rows))


@register("policy", "shared_prefix", family="sharing", papers=("2402.05099",))
class SharedPrefix(Policy):
    """Hydragen: a prefix that all rows share is held once, and read by all of their queries at once; exact.

    Attention over the prefix is one matrix product for the whole batch, attention over each row's own tokens another;
    both are made one by their sums of exponentiated scores. Shared is whatever a batch of one has read when its state
    is repeated by `select`, and the tokens with which an unpadded batch begins, as far as their queries, keys and
    values are the same in all rows but for rounding. There is one prefix, where the paper has trees of them, too.
    """

    serves_caps = True

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
        state = self._continued(SharedPrefixState, layer, k, v, state)
        batch, count = q.shape[:2]
        prefix, suffix, common = state.prefix, state.suffix, 0
        if not suffix.length and not suffix.padded:
            if batch == 1:
                common = count
            elif count > 1 and (mask is None or bool(mask.all())):
                common = common_tokens(q, k, v)
        answers = []
        if common:
            only = None if mask is None or batch > 1 else mask[:, :common]
            prefix = prefix.append(k[:1, :common], v[:1, :common], only)
            answers.append(attend_kv(layer, q[:1, :common], prefix).expand(batch, -1, -1, -1))
        if common < count:
            suffix = suffix.append(k[:, common:], v[:, common:], None if mask is None else mask[:, common:])
            answers.append(self._both(layer, q[:, common:], prefix, suffix))
        y = answers[0] if len(answers) == 1 else torch.cat(answers, 1)
        return y, SharedPrefixState(suffix, prefix, length=state.length + count) if keep_state else None

    def convert(self, layer: KVLayer, state: KVState) -> SharedPrefixState:
        """See `Policy.convert`."""
        k, v = state.cached()
        none = KVState.empty(k, v)
        if len(k) == 1:
            return SharedPrefixState(none, state, length=state.length)
        common = 0 if state.padded else common_tokens(k, v)
        if not common:
            return SharedPrefixState(state, KVState.empty(k[:1], v[:1]), length=state.length)
        prefix = KVState.empty(k[:1], v[:1]).append(k[:1, :common], v[:1, :common])
        rest = none.append(k[:, common:], v[:, common:]) if common < state.length else none
        return SharedPrefixState(rest, prefix, length=state.length)

    def _both(self, layer: KVLayer, q: Tensor, prefix: KVState, suffix: KVState) -> Tensor:
        """The answer of each row's last tokens: q [B, T, H, D]."""
        if not prefix.length:
            return attend_kv(layer, q, suffix)
        batch, count = q.shape[:2]
        k, v = (x.transpose(1, 2) for x in suffix.cached())
        before = prefix.length - prefix.start  # tokens of the prefix, [1]
        at = _places(suffix, before)
        seen = at >= before if suffix.padded else None
        own = attention_with_lse(
            q, k, values_of(k, v), scale=layer.scale, causal=True, visible=seen, slopes=layer.slopes,
            cap=layer.cap, q_position=at[:, -count:], k_position=at,
        )  # fmt: skip
        k, v = (x.transpose(1, 2) for x in prefix.cached())
        there = _places(prefix, 0)
        y, total = attention_with_lse(  # all rows' queries, as if they were one row's
            q.flatten(0, 1)[None], k, values_of(k, v), scale=layer.scale, visible=there >= 0 if prefix.padded else None,
            slopes=layer.slopes, cap=layer.cap, q_position=at[:, -count:].expand(batch, -1).reshape(1, -1),
            k_position=there,
        )  # fmt: skip
        return merge_attention([own, (y[0].unflatten(0, (batch, count)), total[0].unflatten(0, (batch, count)))])


def common_tokens(*tensors: Tensor) -> int:
    """How many tokens at the start all rows of the tensors [B, T, ...] have in common, but for rounding.

    A matrix product rounds a row by where it stands in the batch; so values may differ by some units in the last place
    of the largest.
    """
    if tensors[0].numel() == 0:
        return 0
    same = []
    for x in (each for each in tensors if each.shape[-1]):  # values have no numbers where keys are the values
        near = min(16 * torch.finfo(x.dtype).eps, 0.01) * x.abs().amax()
        same.append(((x - x[:1]).abs() <= near).flatten(2).all(2).all(0))
    return int(torch.stack(same).all(0).int().cummin(0).values.sum())


def _places(kv: KVState, before: Tensor | int) -> Tensor:
    """The place [B or 1, length] of each token in its row, after `before` tokens; padding comes before all of these."""
    at = kv.positions()
    return (torch.arange(kv.length, device=kv.start.device)[None] if at is None else at) + before
