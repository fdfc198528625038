"""Where a token stands: rotary angles, ALiBi slopes, the sinusoidal table; other ways are in position_variants.py."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from contextlab.errors import InputError
from contextlab.spec import Spec

STEPS = 64
"""Places whose rotations are made at once while tokens are decoded one by one."""


def rotary_size(head_dim: int, fraction: float = 1.0) -> int:
    """The number of a head's dimensions that RoPE turns, int(head_dim * fraction), which must be even.

    Raises InputError that names the nearest fraction that fits.
    """
    size = int(head_dim * fraction + 1e-4)  # so that 6 x 0.333333 gives 2
    if size < 2 or size % 2 or size > head_dim:
        if head_dim < 2:
            raise InputError(f"RoPE rotates pairs of dimensions, so head_dim must be at least 2, got {head_dim}")
        wanted, most = head_dim * fraction, head_dim - head_dim % 2
        below = min(max(2, int(wanted) - int(wanted) % 2), most)
        fits = min((below, min(below + 2, most)), key=lambda n: abs(n - wanted)) / head_dim
        raise InputError(
            f"RoPE must rotate an even number of dimensions, at least 2: head_dim {head_dim} x fraction "
            f"{fraction:g} gives {size}; the nearest fraction that fits is {fits:g}"
        )
    return size


class RopeScaling(Spec):
    """A change of RoPE's frequencies, for contexts longer than those of the training.

    Rules that change with the length read so far (dynamic NTK) are left out: keys that are held already were turned at
    other frequencies, so what a model answers would depend on how its input was cut.

    kind: "linear" divides all by the factor (position interpolation, 2306.15595); "ntk" raises the base so that the
        lowest frequency is divided by it (NTK-aware); "yarn" divides those that turn less than `slow` times in the
        original length, leaves those that turn more than `fast` times, with a ramp between, and sharpens attention
        (2309.00071); "llama3" does so with turns `slow` and `fast` of 1 and 4 and a ramp in the frequency (Llama 3.1);
        "p_rope" turns only the part `keep` of the pairs that turn fastest, and the rest not at all (2410.06205);
        "longrope" divides each by its own factor and sharpens attention (LongRoPE, 2402.13753).
    factor: length wanted over the original one.
    original_length: tokens of the training; for yarn, llama3 and longrope.
    slow, fast: turns; default 1 and 32 for yarn, 1 and 4 for llama3.
    sharpen: factor of the rotated queries and keys; None is 0.1 log(factor) + 1 for yarn, for longrope
        sqrt(1 + log(factor) / log(original_length)), else 1.
    keep: part of the pairs that p_rope turns.
    factors: of longrope, one for each pair, those that turn fastest first.
    plain_tokens: of longrope, the first tokens of each sequence (places 0 to plain_tokens - 1) that keep the angles and
        the sharpness of plain RoPE, the paper's n-hat. How far such a token is from later ones depends on where both
        stand, so places are counted from each row's first token, not from its padding.
    """

    kind: Literal["linear", "ntk", "yarn", "llama3", "p_rope", "longrope"]
    factor: Annotated[float, Field(ge=1)] = 1.0
    original_length: PositiveInt | None = None
    slow: PositiveFloat | None = None
    fast: PositiveFloat | None = None
    sharpen: PositiveFloat | None = None
    keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    factors: tuple[PositiveFloat, ...] | None = None
    plain_tokens: NonNegativeInt = 0

    @model_validator(mode="after")
    def _fits(self) -> RopeScaling:
        used = {
            "linear": {"factor", "sharpen"},
            "ntk": {"factor", "sharpen"},
            "yarn": {"factor", "original_length", "slow", "fast", "sharpen"},
            "llama3": {"factor", "original_length", "slow", "fast"},
            "p_rope": {"keep"},
            "longrope": {"factor", "factors", "original_length", "plain_tokens", "sharpen"},
        }[self.kind]
        stray = [name for name in sorted(self.model_fields_set - used - {"kind"}) if getattr(self, name) is not None]
        if stray:
            raise InputError(f"{stray[0]}: {self.kind} does not take it; it takes {', '.join(sorted(used))}")
        if "original_length" in used and self.original_length is None:
            raise InputError(f"original_length: {self.kind} needs the tokens of the training, for example 8192")
        if self.kind == "longrope" and not self.factors:
            raise InputError("factors: longrope needs one for each pair of rotated dimensions")
        slow, fast = self.turns()
        if slow >= fast:
            raise InputError(f"slow: {slow:g} turns are not fewer than fast = {fast:g}; the usual are 1 and {fast:g}")
        return self

    def turns(self) -> tuple[float, float]:
        """slow and fast, with their defaults."""
        return self.slow or 1.0, self.fast or (4.0 if self.kind == "llama3" else 32.0)


def rope_frequencies(size: int, base: float = 10000.0, scaling: RopeScaling | None = None) -> tuple[Tensor, float]:
    """RoPE's angles for one step, [size / 2] float64, and the factor of what is turned. size: turned dimensions.

    They are kept for the next call, which in decoding comes with the next token: nobody may change them.
    """
    return (_frequencies.__wrapped__ if torch.compiler.is_compiling() else _frequencies)(size, base, scaling)


@lru_cache(maxsize=64)
def _frequencies(size: int, base: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """See `rope_frequencies`. On the CPU whatever the default device is: what is kept serves all of them."""
    cpu = torch.device("cpu")
    index = torch.arange(0, size, 2, dtype=torch.float64, device=cpu)
    plain = base ** (index / -size)
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, scaling.sharpen or 1.0
    if scaling.kind == "ntk":
        return (base * scaling.factor ** (size / max(size - 2, 1))) ** (index / -size), scaling.sharpen or 1.0
    if scaling.kind == "p_rope":
        kept = math.floor(scaling.keep * (size // 2) + 1e-6)
        if kept < 1:
            raise InputError(
                f"keep: {scaling.keep:g} of {size // 2} pairs is less than one; the least that fits is {2 / size:g}"
            )
        return torch.where(torch.arange(size // 2, device=cpu) < kept, plain, 0.0), 1.0
    length, (slow, fast) = scaling.original_length or 1, scaling.turns()
    if scaling.factors is not None:
        if len(scaling.factors) != size // 2:
            raise InputError(f"factors: {len(scaling.factors)} of them for {size // 2} pairs of rotated dimensions")
        factors = torch.tensor(scaling.factors, dtype=torch.float64, device=cpu)
        return plain / factors, scaling.sharpen or longrope_temperature(scaling.factor, length)
    if scaling.kind == "llama3":
        turns = length * plain / (2 * math.pi)
        ramp = ((turns - slow) / (fast - slow)).clamp(0, 1)  # 0: divided, 1: as it was
        return (1 - ramp) * plain / scaling.factor + ramp * plain, 1.0

    def pair(turns: float) -> float:
        """The pair of dimensions that turns so often in the original length."""
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), size - 1)
    # As YaRN's code has it, also where the original length is so short or the base so small that low > high.
    ramp = ((torch.arange(size // 2, dtype=torch.float64, device=cpu) - low) / ((high - low) or 0.001)).clamp(0, 1)
    sharpen = scaling.sharpen or 0.1 * math.log(scaling.factor) + 1.0
    return plain / scaling.factor * ramp + plain * (1 - ramp), sharpen


def rope_factors(size: int, base: float, scaling: RopeScaling) -> list[float]:
    """By what a scaling divides the frequency of each pair, those that turn fastest first."""
    return (rope_frequencies(size, base)[0] / rope_frequencies(size, base, scaling)[0]).tolist()


def longrope_temperature(factor: float, length: int) -> float:
    """By what LongRoPE multiplies rotated queries and keys: sqrt(1 + log(factor) / log(length)), 1 for no extension.

    factor: length wanted over the original one. length: the original one; of one token it is 1.
    """
    return math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 and length > 1 else 1.0


def rope_table(
    positions: Tensor,
    size: int,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    scaling: RopeScaling | None = None,
) -> Tensor:
    """The cosines and sines of RoPE's angles m base^(-2j / size) (2104.09864, eq. 15), for `rotate`.

    positions: m, [T] or [B, T] int64; where the scaling has plain_tokens, places in the row, not counting padding.
    size: number of turned dimensions, even.
    base: of the geometric frequencies.
    dtype: of the values that will be turned; half precisions get a float32 table.
    scaling: a change of the frequencies, or None.

    Returns [..., T, 1, size / 2, 2], which broadcasts over heads. The angles are computed in float64: in float32
    the angle at position 1e6 is wrong by up to 0.03 radian.
    """
    inverse, sharpen = rope_frequencies(size, base, scaling)
    places = positions[..., None, None].to(torch.float64)
    table = rotations(places * inverse.to(positions.device), dtype)
    table = table if sharpen == 1 else table * sharpen
    if scaling is None or not scaling.plain_tokens:
        return table
    plain = rope_table(positions, size, base, dtype)
    return torch.where(places[..., None] < scaling.plain_tokens, plain, table)


def step_table(
    place: int, size: int, base: float, dtype: torch.dtype, scaling: RopeScaling | None, device: torch.device
) -> Tensor:
    """`rope_table` of the one position `place`, [1, 1, size / 2, 2]: all layers of a decoded token want the same.

    It is kept for the next layer: nobody may change it.
    """
    if torch.compiler.is_compiling():
        return rope_table(torch.full((1,), place, device=device), size, base, dtype, scaling)
    block, row = divmod(place, STEPS)
    table = _step_tables(block, size, base, dtype, scaling, device, torch.is_inference_mode_enabled())
    return table[row : row + 1]


@lru_cache(maxsize=8)
def _step_tables(
    block: int,
    size: int,
    base: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None,
    device: torch.device,
    inference: bool,  # what was made in inference mode cannot be used by autograd
) -> Tensor:
    """`rope_table` of a block's places, [STEPS, 1, size / 2, 2]: its making costs little more than that of one row."""
    first = block * STEPS
    return rope_table(torch.arange(first, first + STEPS, device=device), size, base, dtype, scaling)


def rotations(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """The table for `rotate` of angles [..., T, H or 1, size / 2] float64; see `rope_table` for dtype."""
    table = torch.stack((angles.cos(), angles.sin()), -1)
    return table.to(torch.float64 if dtype == torch.float64 else torch.float32)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the first dimensions of each head by the rotations of `rope_table`; the rest pass through.

    Dimensions 2j and 2j + 1 are a pair, as in the paper and in GPT-J; see `pairs_of_halves` for Llama's.

    x: [B, T, H, D]. table: [..., T, 1 or H, size / 2, 2], size <= D. Returns [B, T, H, D] in the dtype of x.
    """
    size = 2 * table.shape[-2]
    turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()
    if (
        plain
        and all(step % 2 == 0 for step in (*turned.stride()[:-1], turned.storage_offset()))
        and x.shape[-1] % 2 == 0
    ):
        if x.shape[1] > 1:
            # One pass over memory; a table that repeats for each head makes the inner loop H times as long.
            table = table.expand(*table.shape[:-3], x.shape[2], -1, -1).contiguous()
        rotations = torch.view_as_complex(table)
        pairs = torch.view_as_complex(turned.view(*turned.shape[:-1], size // 2, 2))
        turned = torch.view_as_real(pairs * rotations).flatten(-2)
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


def halves_of_pairs(x: Tensor, size: int) -> Tensor:
    """The inverse of `pairs_of_halves`: of dimensions 2j and 2j + 1 a pair, j and j + size / 2. x: [..., D]."""
    return torch.cat([x[..., :size].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), x[..., size:]], -1)


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
