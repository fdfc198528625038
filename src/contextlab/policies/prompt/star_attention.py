"""Star Attention: the prompt is read block by block, each with the first; what follows reads everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.ops.softmax import softmax_attention
from contextlab.policies.core.base import Policy
from contextlab.policies.core.budget import Amount, Budget
from contextlab.policies.reading.fetching import attend_kv
from contextlab.registry import register
from contextlab.state import KVState, State, tensor_bytes


@register("policy", "star_attention", family="prefill", papers=("2411.17116",))
class StarAttention(Policy):
    """Star Attention: the first piece is read in blocks, each token seeing its own block and the first one.

    Its cost is linear in the length. All keys and values are kept, and every later piece, the question and what is
    generated, reads all of them: so give the context in one piece and the question after it. The paper does each block
    on a machine of its own; here they are rows of one batch.

    budget: what a token of the first piece may read, half of it the first block and half its own: "8192tok", "25%" of
        the piece, or "64MB" by all layers and rows together.
    """

    serves_caps = True

    bounds = "prefill"

    def __init__(self, budget: Amount = None) -> None:
        self.budget = Budget.of(budget)

    @property
    def chunk_invariant(self) -> bool:
        """See `Policy.chunk_invariant`: only the first piece is read in blocks."""
        return self.budget.everything

    def block(self, layer: KVLayer, length: int, batch: int, dtype: torch.dtype) -> int:
        """Tokens in a block of a piece of `length`: half of what a token may read. Raises InputError when none."""
        if self.budget.everything:
            return length
        amount = self.budget.amount
        if self.budget.kind == "ratio":
            amount *= length
        elif self.budget.kind == "bytes":
            amount /= layer.states * tensor_bytes(batch, layer.kv_heads, layer.key_dim + layer.value_dim, dtype=dtype)
        if amount < 2:
            raise InputError(
                f"budget: {self.budget} is {amount:.3g} tokens of {length} in {batch} rows, and a token reads at least "
                "two, itself and the first; raise it"
            )
        return int(amount) // 2

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
        before = KVState.empty(k, v) if state is None else state
        if not isinstance(before, KVState):
            raise InputError(f"expected the state of this policy, a KVState, got {type(before).__name__}")
        after = before.append(k, v, mask)
        size = self.block(layer, q.shape[1], len(q), k.dtype) if not before.length else 0
        if 0 < size < q.shape[1]:
            start = after.start if after.padded else None
            y = star_attention(q, k, v, size, scale=layer.scale, slopes=layer.slopes, cap=layer.cap, start=start)
        else:
            y = attend_kv(layer, q, after, None if before.length else (k, v))
        return y, after if keep_state else None

    def convert(self, layer: KVLayer, state: KVState) -> KVState:
        """See `Policy.convert`: what was read is kept."""
        return state


def star_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    *,
    scale: float,
    slopes: Tensor | None = None,
    cap: float | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Causal attention of each token over its own block and the first one.

    q: [B, T, H, D]. k: [B, T, Hkv, D], v: [B, T, Hkv, V]. block: tokens in a block.
    slopes: [H] of ALiBi. cap: of the scores, see `KVLayer`.
    start: [B] int64, left-padding tokens of each row, from whose end blocks count.

    Returns [B, T, H, V]; what it says at padding means nothing.
    """
    batch, length = q.shape[:2]
    at = None
    if start is not None:  # padding goes to the end, where no token sees it
        at = (torch.arange(length, device=q.device) + start[:, None]) % length
        q, k, v = (x.take_along_dim(at[..., None, None], 1) for x in (q, k, v))
    count = -(-length // block)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, count * block - length)).unflatten(1, (count, block)) for x in (q, k, v))
    own = torch.arange(count * block, device=q.device).view(count, block)
    first = own[:1] if slopes is not None else None
    options: dict[str, Any] = {"scale": scale, "slopes": slopes, "cap": cap}
    y = [softmax_attention(q[:, 0], k[:, 0], v[:, 0], **options, q_position=first, k_position=first)]
    if count > 1:
        q_at = k_at = None
        if slopes is not None:
            q_at = own[1:].repeat(batch, 1)
            k_at = torch.cat((own[:1].expand(count - 1, -1), own[1:]), 1).repeat(batch, 1)
        both = (torch.cat((x[:, :1].expand(-1, count - 1, -1, -1, -1), x[:, 1:]), 2).flatten(0, 1) for x in (k, v))
        rest = softmax_attention(q[:, 1:].flatten(0, 1), *both, **options, q_position=q_at, k_position=k_at)
        y.append(rest.unflatten(0, (batch, count - 1)).flatten(1, 2))
    out = torch.cat(y, 1)[:, :length]
    if start is None:
        return out
    back = (torch.arange(length, device=q.device) - start[:, None]) % length
    return out.take_along_dim(back[..., None, None], 1)
