"""Block-local attention: a query sees its own block up to itself and the whole block before."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens
from contextlab.mixers.softmax.windows import in_sight
from contextlab.ops.softmax import attend
from contextlab.registry import register
from contextlab.state import State, WindowState


@register(
    "mixer",
    "block_local",
    family="softmax",
    papers=("2312.08618",),
    cases=(
        {"block": 8},
        {"block": 1, "position": "none"},
        {"block": 5, "kv_heads": 2, "head_dim": 4, "position": "alibi"},
        {"block": 20, "heads": 2, "rope_fraction": 0.5, "qk_norm": True},
        {"block": 6, "short_conv": 3, "output_gate": True},
    ),
)
class BlockLocal(AttentionMixer):
    """Causal softmax attention to the query's own block of tokens and the block before it, with a constant state.

    Blocks are counted from each sequence's first token, so a query sees block + 1 to 2 block tokens, its own counted.
    It is the cheap layer of stacks that put one layer of full attention among several local ones, as Zebra does
    (2312.08618: local and global layers in groups, rotary positions); of that paper its summary was at hand, not the
    definition of its local layers, which is here the usual one of a window that looks at the window before.
    `transformer_xl` has the same mask, one segment after the other; here all blocks are computed at once.

    width: size of a token's vector.
    block: tokens of a block.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads (multi-head), 1 is multi-query.
    head_dim: size of a head; default width / heads.
    position: rotary (rope), a linear bias by distance (alibi), or none (absolute positions are the model's).
    rope_base: base of the rotary frequencies.
    rope_fraction: part of each head's dimensions that is rotated.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v (Primer, 2109.08668); 0 for none.
    output_gate: multiply the heads' outputs by a sigmoid gate of the token (Qwen3-Next; 2505.06708).
    """

    def __init__(
        self,
        width: PositiveInt,
        *,
        block: PositiveInt = 64,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "alibi", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        qk_norm: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
        output_gate: bool = False,
    ) -> None:
        super().__init__(
            width,
            AttentionOptions(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                position=position,
                rope_base=rope_base,
                rope_fraction=rope_fraction,
                qk_norm=qk_norm,
                bias=bias,
                short_conv=short_conv,
                output_gate=output_gate,
            ),
        )
        self.block = block

    def _attend(self, new: Tokens, state: State | None, keep_state: bool) -> tuple[Tensor, State | None]:
        read = 0 if state is None else state.length
        q = new.q
        k, v, places, after = in_sight(new.k, new.v, 2 * self.block, state, new.mask, keep_state)
        if places is None:  # then they follow one another, up to the last that was read
            last = read + q.shape[1]
            places = torch.arange(last - k.shape[1], last, device=q.device)[None]
        return block_local_attention(q, k, v, places, self.block, self.head_dim**-0.5, self.slopes), after

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length."""
        heads, dim = self.kv_heads, self.head_dim
        kept = WindowState.bytes_for(2 * self.block, 0, batch, heads, dim, dim, dtype)
        return kept + self._conv_nbytes(batch, dtype)

    def _pairs(self, length: int) -> int:
        blocks, rest = divmod(length, self.block)
        own = blocks * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
        return own + max(0, length - self.block) * self.block


def block_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    block: int,
    scale: float | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Attention to the own block and the block before, causally: time O(T block).

    q: [B, Tq, H, D], of the last Tq of the tokens of k. k: [B, Tk, Hkv, D]; Hkv divides H. v: [B, Tk, Hkv, V].
    places: [B or 1, Tk] int64, of each token in its row, one after the other; negative where there is no token.
    block: tokens of a block; the first begins at place 0.
    scale: of the scores; default D ** -0.5.
    slopes: [H]; adds -slope * distance to the scores (ALiBi).

    Returns [B, Tq, H, V]; zeros at queries of negative place.
    """
    length, before = q.shape[1], k.shape[1] - q.shape[1]
    at = places[:, before:]
    if length <= block:
        return attend(q, k, v, scale, _mask(at, places, block, slopes, q.dtype))
    # Rows are shifted so that every block begins at a multiple of the block's size, whatever the padding.
    shift = at[:, :1] % block
    known = len(shift) == 1 and not torch.compiler.is_compiling()  # a graph knows no values
    most = int(shift) if known else block - 1
    count = -(-(length + most) // block)
    line = torch.arange((count + 1) * block, device=q.device) - shift
    q_index, k_index = line[:, : count * block], line + before - block
    at = _taken(at, q_index, -1)
    places = _taken(places, k_index, -1)
    q, k, v = _taken(q, q_index), _taken(k, k_index), _taken(v, k_index)
    group = max(1, 1024 // block)  # blocks at once, so that no mask grows with the length
    outputs = []
    for first in range(0, count, group):
        size = min(group, count - first)
        own = slice(first * block, (first + size) * block)
        both = slice(own.start, own.stop + block)
        sees = _mask(_blocks(at[:, own], size), _pairs_of_blocks(places[:, both], size), block, slopes, q.dtype)
        if len(at) < len(q):
            sees = sees.expand(len(q), *sees.shape).flatten(0, 1)
        y = attend(
            _blocks(q[:, own], size),
            _pairs_of_blocks(k[:, both], size),
            _pairs_of_blocks(v[:, both], size),
            scale,
            sees,
        )
        outputs.append(y.unflatten(0, (-1, size)).flatten(1, 2))
    return _taken(torch.cat(outputs, 1), torch.arange(length, device=q.device) + shift)


def _mask(at: Tensor, places: Tensor, block: int, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What queries at [N, Q] see of keys at `places` [N, K]: [N, 1, Q, K] bool, with slopes a bias [N, H, Q, K]."""
    queries, keys = at[:, None, :, None], places[:, None, None, :]
    distance = queries - keys
    # Of two tokens in order the blocks are the same or next to each other when the later one is less than this away.
    sees = (distance >= 0) & (distance <= block + queries % block) & (keys >= 0)
    if slopes is None:
        return sees
    bias = distance * -slopes.to(at.device, dtype)[:, None, None]
    return bias.masked_fill(~sees, float("-inf"))


def _taken(x: Tensor, index: Tensor, outside: int | None = None) -> Tensor:
    """x [B or 1, T, ...] at index [B or 1, N]; beyond the ends `outside`, or some entry."""
    near = index.clamp(0, x.shape[1] - 1)
    taken = x[:, near[0]] if len(near) == 1 else x[torch.arange(len(near), device=x.device)[:, None], near]
    return taken if outside is None else taken.masked_fill(near != index, outside)


def _blocks(x: Tensor, count: int) -> Tensor:
    """[B, count * block, ...] -> [B * count, block, ...]."""
    return x.unflatten(1, (count, -1)).flatten(0, 1)


def _pairs_of_blocks(x: Tensor, count: int) -> Tensor:
    """[B, (count + 1) * block, ...] -> [B * count, 2 * block, ...]: each block after the one before it."""
    blocks = x.unflatten(1, (count + 1, -1))
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), 2).flatten(0, 1)
