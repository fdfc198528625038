"""Small whole numbers packed into bytes: 8 / bits of them to a byte, or five of three values."""

from __future__ import annotations

import torch
from torch import Tensor

TRITS = 5
"""Numbers of three values in a byte: 3^5 = 243 of 256 bytes are used, 1.6 bits a number."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits (uint8 [..., n]; bits 1, 2, 4 or 8), 8 / bits to a byte: uint8 [..., ceil(n bits / 8)].

    Bits j * bits .. of byte i hold code i + j * bytes, so that both ways are a few shifts of whole rows.
    """
    per = 8 // bits
    size = -(-codes.shape[-1] // per)
    planes = torch.nn.functional.pad(codes, (0, per * size - codes.shape[-1])).unflatten(-1, (per, size))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (planes << shifts[:, None]).sum(-2, dtype=torch.uint8)  # no two planes share a bit


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """What `pack` packed: uint8 [..., count]."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    planes = (packed.unsqueeze(-2) >> shifts[:, None]) & (2**bits - 1)
    return planes.flatten(-2)[..., :count]


def pack_trits(codes: Tensor) -> Tensor:
    """Codes 0, 1, 2 (uint8 [..., n]), five to a byte: uint8 [..., ceil(n / 5)].

    Byte i is the sum of 3^j times code i + j * bytes.
    """
    size = -(-codes.shape[-1] // TRITS)
    planes = torch.nn.functional.pad(codes, (0, TRITS * size - codes.shape[-1])).unflatten(-1, (TRITS, size))
    powers = 3 ** torch.arange(TRITS, dtype=torch.uint8, device=codes.device)
    return (planes * powers[:, None]).sum(-2, dtype=torch.uint8)


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """What `pack_trits` packed: uint8 [..., count]."""
    powers = 3 ** torch.arange(TRITS, dtype=torch.uint8, device=packed.device)
    planes = packed.unsqueeze(-2) // powers[:, None] % 3
    return planes.flatten(-2)[..., :count]
