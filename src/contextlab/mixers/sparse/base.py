"""The base of mixers that choose which keys each query reads."""

from __future__ import annotations

from typing import ClassVar

from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions


class SparseAttention(AttentionMixer):
    """Base: attention whose queries read a part of the keys.

    width: size of a token's vector. options: heads, positions and the like. block: tokens of a block, for counting
    operations; 1 where keys are chosen one by one.
    """

    hard_choices: ClassVar[bool] = True
    summaries: ClassVar[bool] = False  # whether queries are compared with summaries of blocks first

    def __init__(self, width: int, options: AttentionOptions, block: int = 1) -> None:
        super().__init__(width, options)
        self.block = block

    def _reads(self, length: int) -> int:
        """Keys that the last of `length` queries reads, for counting operations."""
        raise NotImplementedError

    def _pairs(self, length: int) -> int:
        # In few steps: what the last query of each stretch reads stands for all of it.
        total, first = 0, 0
        while first < length:
            last = min(max(1, 2 * first), length)
            total += (last - first) * min(self._reads(last), last)
            first = last
        summaries = length * (length // self.block) // 2 if self.summaries else 0
        return total + summaries // 2  # keys only: no values are read of them
