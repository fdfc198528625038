"""NSA: attention by three branches, to compressed blocks, to the best blocks in full and to a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from contextlab.mixers.base import Signature
from contextlab.mixers.layers import Linear, multiplications
from contextlab.mixers.softmax.base import AttentionOptions
from contextlab.mixers.sparse.base import SparseAttention
from contextlab.ops.native_sparse import check_blocks, complete_blocks, native_sparse_attention
from contextlab.ops.position import rope_table, rotate
from contextlab.registry import register
from contextlab.state import KVState, State, WindowState, own, tensor_bytes


@dataclass
class NativeSparseState(State):
    """What each branch remembers.

    chosen: every key and value of the branch that reads blocks in full.
    near: the last window - 1 of the near branch.
    recent: [B, l - 1, Hkv, 2 D], the last keys and values of the compressed branch, before they are compressed.
    compressed: [B, blocks, Hkv, 2 D], key and value of each row's complete blocks, counted from its first token; the
        rest is zero.
    """

    chosen: KVState
    near: WindowState
    recent: Tensor
    compressed: Tensor


@register(
    "mixer",
    "nsa",
    family="sparse",
    papers=("2502.11089",),
    cases=(
        {"block": 4, "top_k": 4, "window": 6},
        {"block": 8, "top_k": 3, "window": 1, "kv_heads": 1, "position": "none", "gate_hidden": 0},
        {"block": 6, "top_k": 5, "window": 5, "kv_heads": 2, "compress_block": 4, "compress_hidden": 7},
        {"block": 4, "top_k": 2, "window": 3, "initial_blocks": 0, "local_blocks": 1, "compress_block": 4},
    ),
)
class NativeSparseAttention(SparseAttention):
    """NSA: compressed blocks, the best blocks in full and a window, each of its own keys, joined by gates of the token.

    Blocks of l tokens that overlap are compressed to one key and one value each by a small network. What a query pays
    to them, summed over the heads of a key head, chooses the n blocks of l' tokens that it reads in full, always among
    them the row's first block and the last two up to its own. A third branch sees the last w tokens. The three have
    keys and values of their own, and are added by gates, sigmoids of a network of the token (2502.11089, section 3).
    The paper has l = 32, d = 16, l' = 64, n = 16, w = 512; the defaults have about its proportions at a quarter of it.

    The paper leaves open, and public code does in ways of its own, what changes numbers here: the network is two layers
    without biases, relu between them, one for keys and one for values, shared by the heads, over a block's tokens side
    by side, to which places within the block are added, learned by each key head from zero; it reads keys before RoPE
    turns them, and the compressed key is turned to the place of its block's first token. The gates' network is of that
    kind, too; public code has one layer (`gate_hidden=0`). Against fla-org/native-sparse-attention, that compresses to
    means, the blocks do not overlap, the branches share keys and values, and only the own block is forced; against
    lucidrains/native-sparse-attention-pytorch, it shares keys and values, too, turns neither queries nor keys of the
    compressed branch, adds a learned compressed token, starts the gates' biases at -2, -2 and 2, and forces the own
    block alone, which does not count in n. Keys and values have the same size here (192 and 128 in the paper).

    width: size of a token's vector.
    block: l', tokens of a block that is read in full.
    top_k: n, blocks that a query reads in full, the forced ones among them.
    window: w, tokens that the near branch sees, the query's own counted.
    compress_block: l, tokens that are compressed together, at most block; default block / 2 where that is whole, or
        block.
    compress_stride: d, tokens from one compressed block to the next, a divisor of both; default compress_block / 2
        where that is whole, or compress_block.
    compress_hidden: units between the two layers of the compressing networks; default head_dim.
    gate_hidden: units between the two layers of the gates' network; default head_dim, 0 for a single layer.
    initial_blocks: blocks from a row's first on that every query reads.
    local_blocks: blocks up to its own, which is one, that a query reads.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads. The query heads of a key head choose together.
    head_dim: size of a head; default width / heads.
    position: rotary (rope) or none.
    rope_base: base of the rotary frequencies.
    """

    tells_mixing = False

    def __init__(
        self,
        width: PositiveInt,
        *,
        block: PositiveInt = 16,
        top_k: PositiveInt = 8,
        window: PositiveInt = 64,
        compress_block: PositiveInt | None = None,
        compress_stride: PositiveInt | None = None,
        compress_hidden: PositiveInt | None = None,
        gate_hidden: NonNegativeInt | None = None,
        initial_blocks: NonNegativeInt = 1,
        local_blocks: PositiveInt = 2,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(
            width,
            AttentionOptions(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=position, rope_base=rope_base),
            block,
        )
        size = (block if block % 2 else block // 2) if compress_block is None else compress_block
        stride = (size if size % 2 else size // 2) if compress_stride is None else compress_stride
        check_blocks(block, top_k, window, size, stride, initial_blocks, local_blocks)
        self.top_k, self.window, self.size, self.stride = top_k, window, size, stride
        self.initial_blocks, self.local_blocks = initial_blocks, local_blocks
        dim, groups = self.head_dim, self.kv_heads
        # Rows: the heads of q, of k chosen and near, of v chosen and near, of k and v to be compressed.
        self.qkv_proj = Linear(width, (heads + 6 * groups) * dim)
        hidden = dim if compress_hidden is None else compress_hidden
        self.key_place = nn.Parameter(torch.zeros(groups, size, dim))
        self.value_place = nn.Parameter(torch.zeros(groups, size, dim))
        self.key_in, self.key_out = Linear(size * dim, hidden), Linear(hidden, dim)
        self.value_in, self.value_out = Linear(size * dim, hidden), Linear(hidden, dim)
        gates = dim if gate_hidden is None else gate_hidden
        self.branch_in = Linear(width, gates) if gates else None
        self.branch_proj = Linear(gates or width, 3 * heads)
        # Given, for blocks can be too long for it to be found by reading a few tokens.
        held, near, pair = (groups, None, dim), (groups, window - 1, dim), 2 * dim
        shapes = (held, held, (), near, near, (window - 1,), (), (size - 1, groups, pair), (None, groups, pair))
        self._expected = Signature(NativeSparseState, (), shapes)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. x: [B, T, width]."""
        groups, dim = self.kv_heads, self.head_dim
        qkv = self.qkv_proj(x).view(*x.shape[:2], -1, dim)
        turned, values, raw = qkv.split((self.heads + 2 * groups, 2 * groups, 2 * groups), 2)
        read = 0 if state is None else state.length
        if self.rotary:
            # RoPE is relative: the place in what was read serves for all rows, however much each is padded.
            turned = rotate(turned, self._rotations(x, read))
        q, k, near_k = turned.split((self.heads, groups, groups), 2)
        v, near_v = values.split(groups, 2)
        raw = torch.cat(raw.split(groups, 2), -1)
        before = self._empty(k, v, raw) if state is None else state
        assert isinstance(before, NativeSparseState)

        start = before.chosen.start if mask is None else before.chosen.start + (~mask).sum(1)
        padded = before.chosen.padded or mask is not None
        places = torch.arange(read, read + x.shape[1], device=x.device)[None]
        places = places - start[:, None] if padded else places
        line = torch.cat((before.recent, raw), 1)
        compressed = self._compressed(before, line, places, start[:, None] if padded else start.new_zeros(1, 1), padded)

        after = None
        if keep_state:
            after = NativeSparseState(
                before.chosen.append(k, v, mask),
                before.near.append(near_k, near_v, places, mask),
                own(line[:, x.shape[1] :]),
                own(compressed),
                length=read + x.shape[1],
            )
        k_at: Tensor | None = places
        near_at = places
        if state is not None:
            held = before.chosen.append(k, v, mask) if after is None else after.chosen
            old_k, old_v, old_at = before.near.cached()
            near_k, near_v = torch.cat((old_k, near_k), 1), torch.cat((old_v, near_v), 1)
            k, v = held.cached()
            if padded:
                k_at, near_at = held.positions(), torch.cat((old_at, places), 1)
        y = native_sparse_attention(
            q, k, v, self._gates(x), compressed=compressed.split(dim, -1), near=(near_k, near_v), block=self.block,
            top_k=self.top_k, window=self.window, compress_block=self.size, compress_stride=self.stride,
            initial_blocks=self.initial_blocks, local_blocks=self.local_blocks, q_position=places if padded else None,
            k_position=k_at if padded else None, near_position=near_at if padded else None,
        )  # fmt: skip
        return self._project_out(x, y.flatten(2)), after

    def _empty(self, k: Tensor, v: Tensor, raw: Tensor) -> NativeSparseState:
        """A state that has read nothing, for tokens like k, v [B, T, Hkv, D] and raw [B, T, Hkv, 2 D]."""
        recent = raw.new_zeros(len(raw), self.size - 1, *raw.shape[2:])
        near = WindowState.empty(k, v, self.window)
        return NativeSparseState(KVState.empty(k, v), near, recent, raw.new_zeros(len(raw), 0, *raw.shape[2:]))

    def _gates(self, x: Tensor) -> Tensor:
        """[B, T, H, 3] of x [B, T, width]."""
        hidden = x if self.branch_in is None else self.branch_in(x).relu()
        return self.branch_proj(hidden).sigmoid().unflatten(-1, (self.heads, 3))

    def _compressed(
        self, before: NativeSparseState, line: Tensor, places: Tensor, start: Tensor, padded: bool
    ) -> Tensor:
        """All compressed keys and values [B, blocks, Hkv, 2 D], those of the blocks that are complete now among them.

        line: [B, l - 1 + T, Hkv, 2 D] of the tokens held and the T new ones. places: [B or 1, T] of the new ones in
        their rows. start: [B or 1, 1], the padding of each row.
        """
        old, length = before.compressed, places.shape[1]
        total = complete_blocks(before.length + length, self.size, self.stride)
        count = -(-length // self.stride) if padded else total - old.shape[1]  # at most, or as many in every row
        if not count:
            return old
        first = complete_blocks(places[:, :1], self.size, self.stride)  # [B or 1, 1]: blocks that there were
        numbers = first + torch.arange(count, device=line.device)  # [B or 1, count]
        # Tokens follow one another, so that the place of one says where in the line all are.
        within = torch.arange(self.size, device=line.device)
        index = numbers[..., None] * self.stride + within - places[:, :1, None] + self.size - 1
        index = index.clamp(0, line.shape[1] - 1).expand(len(line), -1, -1)
        rows = torch.arange(len(line), device=line.device)[:, None, None]
        keys, values = line[rows, index].transpose(2, 3).split(self.head_dim, -1)  # [B, count, Hkv, l, D]
        keys = self.key_out(self.key_in((keys + self.key_place).flatten(3)).relu())
        values = self.value_out(self.value_in((values + self.value_place).flatten(3)).relu())
        if self.rotary:
            keys = rotate(keys, rope_table(start + numbers * self.stride, self.rotary, self.rope_base, keys.dtype))
        both = torch.cat((old, torch.cat((keys, values), -1).to(old.dtype)), 1)
        if not padded:
            return both
        slot = torch.arange(total, device=line.device)
        source = torch.where(slot < first, slot, old.shape[1] + slot - first).clamp_max(both.shape[1] - 1)
        there = slot < complete_blocks(places[:, -1:] + 1, self.size, self.stride)
        source = source.expand(len(both), -1)[..., None, None].expand(-1, -1, *both.shape[2:])
        return both.gather(1, source).masked_fill(~there[..., None, None], 0.0)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`."""
        groups, dim = self.kv_heads, self.head_dim
        held = self.size - 1 + complete_blocks(length, self.size, self.stride)
        return (
            KVState.bytes_at(length, batch, groups, dim, dim, dtype)
            + WindowState.bytes_for(self.window, 0, batch, groups, dim, dim, dtype)
            + tensor_bytes(batch, held, groups, 2 * dim, dtype=dtype)
        )

    def _pairs(self, length: int) -> int:
        blocks = complete_blocks(length, self.size, self.stride)
        seen = blocks * (length - self.size + 1) - self.stride * blocks * (blocks - 1) // 2
        return seen + _seen(length, self.block * self.top_k) + _seen(length, self.window)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        blocks = complete_blocks(length, self.size, self.stride) * self.kv_heads
        compressing = sum(multiplications(x) for x in (self.key_in, self.key_out, self.value_in, self.value_out))
        gates = multiplications(self.branch_proj) + (0 if self.branch_in is None else multiplications(self.branch_in))
        return super().flops(length) + 2 * blocks * compressing + 2 * length * gates


def _seen(length: int, most: int) -> int:
    """The sum over `length` queries of the tokens up to each, at most `most`."""
    full = min(length, most)
    return full * (full + 1) // 2 + (length - full) * most
