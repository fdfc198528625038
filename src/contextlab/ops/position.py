"""Where a token stands: rotary angles, ALiBi slopes, the sinusoidal table."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from contextlab.errors import InputError


def rotary_size(head_dim: int, fraction: float = 1.0) -> int:
    """The number of a head's dimensions that RoPE turns, int(head_dim * fraction), which must be even.

    Raises InputError that names the nearest fraction that fits.
    """
    size = int(head_dim * fraction + 1e-4)  # so that 6 x 0.333333 gives 2
    if size < 2 or size % 2 or size > head_dim:
        if head_dim < 2:
            raise InputError(f"RoPE turns pairs of dimensions, so head_dim must be at least 2, got {head_dim}")
        fits = min(range(2, head_dim + 1, 2), key=lambda n: abs(n - head_dim * fraction)) / head_dim
        raise InputError(
            f"RoPE must turn an even number of dimensions, at least 2: head_dim {head_dim} x fraction "
            f"{fraction:g} gives {size}; the nearest fraction that fits is {fits:g}"
        )
    return size


def rope_table(positions: Tensor, size: int, base: float = 10000.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The cosines and sines of RoPE's angles m base^(-2j / size) (2104.09864, eq. 15), for `rotate`.

    positions: m, [T] or [B, T] int64.
    size: number of turned dimensions, even.
    base: of the geometric frequencies.
    dtype: of the values that will be turned; half precisions get a float32 table.

    Returns [..., T, 1, size / 2, 2], which broadcasts over heads. The angles are computed in float64: in float32
    the angle at position 1e6 is wrong by up to 0.03 radian.
    """
    inverse = base ** (torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / -size)
    angles = positions[..., None, None].to(torch.float64) * inverse
    table = torch.stack((angles.cos(), angles.sin()), -1)
    return table.to(torch.float64 if dtype == torch.float64 else torch.float32)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the first dimensions of each head by the rotations of `rope_table`; the rest pass through.

    Dimensions 2j and 2j + 1 are a pair, as in the paper and in GPT-J; see `pairs_of_halves` for Llama's.

    x: [B, T, H, D]. table: [..., T, 1, size / 2, 2], size <= D. Returns [B, T, H, D] in the dtype of x.
    """
    size = 2 * table.shape[-2]
    turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()
    if (
        plain
        and all(step % 2 == 0 for step in (*turned.stride()[:-1], turned.storage_offset()))
        and x.shape[-1] % 2 == 0
    ):
        # One pass over memory; a table that repeats for each head makes the inner loop H times as long.
        rotations = torch.view_as_complex(table.expand(*table.shape[:-3], x.shape[2], -1, -1).contiguous())
        turned = torch.view_as_real(torch.view_as_complex(turned.unflatten(-1, (-1, 2))) * rotations).flatten(-2)
    else:
        cos, sin = table.unbind(-1)
        first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2).to(x.dtype)
    return turned if rest is None else torch.cat([turned, rest], -1)


def rope(x: Tensor, positions: Tensor, base: float = 10000.0, fraction: float = 1.0) -> Tensor:
    """Rotary position embedding (RoFormer, 2104.09864, eq. 34).

    x: [B, T, H, D]. positions: [T] or [B, T] int64. base: of the geometric frequencies.
    fraction: part of the head's dimensions that is turned; int(D * fraction) must be even.

    Returns [B, T, H, D].
    """
    return rotate(x, rope_table(positions, rotary_size(x.shape[-1], fraction), base, x.dtype))


def pairs_of_halves(x: Tensor, size: int) -> Tensor:
    """Reorder heads whose dimensions j and j + size / 2 are turned together (Llama) as `rotate` pairs them.

    Done to the rows of the query and key projections, it makes a Llama checkpoint ours.

    x: [..., D]. size: number of turned dimensions, even, at most D. Returns [..., D].
    """
    return torch.cat([x[..., :size].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), x[..., size:]], -1)


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slope of each head (2108.12409, section 3): 2^(-8 i / n), i = 1..n, for n a power of two.

    Other numbers of heads take the slopes of the power of two below, then every other one of twice that.

    heads: at least 1. Returns [heads] float64; the bias of a key at distance d is -slope * d.
    """
    if heads < 1:
        raise InputError(f"heads must be at least 1, got {heads}")
    below = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * i / below) for i in range(1, below + 1)]
    slopes += [2 ** (-4 * i / below) for i in range(1, 2 * below, 2)][: heads - below]
    return torch.tensor(slopes, dtype=torch.float64)


def sinusoidal(positions: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sinusoidal absolute positions (1706.03762, section 3.5): sine at even, cosine at odd dimensions.

    positions: [...] int64. width: D. dtype: of the result; the angles are computed in float64.

    Returns [..., D].
    """
    even = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None].to(torch.float64) * 10000.0 ** (-even / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., :width].to(dtype)
