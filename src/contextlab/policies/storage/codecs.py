"""Few bits: how a group of keys or values is written, in whole numbers or in 8-bit floating point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from contextlab.ops.bits import pack, unpack

TILT = 2**-10
"""Of a step, by which rounding favours the higher level; fractions of fewer than 2^8 parts are further from a half."""
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


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
        """See `Codec.encode`: x [..., tokens, D] as packed "codes" uint8, and each block's "scale" and "zero".

        Of one bit "scale" is the greatest value itself: the step, which is the whole range, can outgrow float16.
        """
        blocks, along = (x, -2) if self.block is None else (x.unflatten(-1, (-1, self.block)), -1)
        zero = blocks.amin(along, keepdim=True)
        wide = torch.promote_types(x.dtype, torch.float32)
        most = blocks.amax(along, keepdim=True)
        span = most.to(wide) - zero.to(wide)
        if self.bits == 1:
            codes = (blocks.to(wide) - zero.to(wide) >= (0.5 - TILT) * span) & (span > 0)
            codes = codes.to(torch.uint8).flatten(-2 if self.block is None else -3)
            return {"codes": pack(codes, 1), "scale": most, "zero": zero}
        scale = (span / (2**self.bits - 1)).to(x.dtype)
        step = scale.to(wide).masked_fill(scale == 0, 1.0)  # a block of equal values is all zero, exactly
        # What was quantized before often falls half-way between new levels; there rounding noise must not decide.
        codes = ((blocks.to(wide) - zero.to(wide)) / step + (0.5 + TILT)).floor()
        codes = codes.clamp(0, 2**self.bits - 1).to(torch.uint8)
        codes = codes.flatten(-2 if self.block is None else -3)  # long rows are packed and unpacked faster
        return {"codes": pack(codes, self.bits), "scale": scale, "zero": zero}

    def decode(self, parts: dict[str, Tensor], tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`: [..., tokens, dim]."""
        blocks = (-1, dim) if self.block is None else (-1, dim // self.block, self.block)
        codes = unpack(parts["codes"], self.bits, tokens * dim).to(dtype).unflatten(-1, blocks)
        if self.bits == 1:
            x = torch.where(codes > 0, parts["scale"].to(dtype), parts["zero"].to(dtype))
            return x if self.block is None else x.flatten(-2)
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
        """See `Codec.encode`: x [..., tokens, D] as "codes", its bits in uint8 that no cast changes, and "scale"."""
        dtype = FLOAT8[self.format]
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = (x.abs().amax(-1, keepdim=True).to(wide) / torch.finfo(dtype).max).to(x.dtype)
        step = scale.to(wide).masked_fill(scale == 0, 1.0)
        most = torch.finfo(dtype).max  # the scale was rounded, and what is beyond the largest number would become NaN
        codes = (x.to(wide) / step).clamp(-most, most).to(torch.float32).to(dtype)
        return {"codes": codes.view(torch.uint8), "scale": scale}

    def decode(self, parts: dict[str, Tensor], tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`: [..., tokens, dim]."""
        codes = parts["codes"].to(torch.int16)
        # Shifted into a float16 they are the numbers themselves, e4m3's / 2^8; casts from float8 are slow on a CPU.
        bits = codes << 8 if self.format == "e5m2" else (codes & 0x80) << 8 | (codes & 0x7F) << 7
        scale = parts["scale"].to(dtype) if self.format == "e5m2" else parts["scale"].to(dtype) * 2**8
        return bits.view(torch.float16).to(dtype) * scale

    def nbytes(self, tokens: int, dim: int, dtype: torch.dtype) -> int:
        """See `Codec.nbytes`."""
        return tokens * (dim + dtype.itemsize)
