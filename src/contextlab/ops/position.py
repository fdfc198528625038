"""Where a token stands: rotary angles (xPos, CARoPE, CLEX, GALI), ALiBi slopes, the sinusoidal table."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops.softmax import resolve_positions, softmax_attention
from contextlab.spec import Spec


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
        "p_rope" turns only the part `keep` of the pairs that turn fastest, and the rest not at all (2410.06205).
    factor: length wanted over the original one.
    original_length: tokens of the training; for yarn and llama3.
    slow, fast: turns; default 1 and 32 for yarn, 1 and 4 for llama3.
    sharpen: factor of the rotated queries and keys; None is 0.1 log(factor) + 1 for yarn, else 1.
    keep: part of the pairs that p_rope turns.
    """

    kind: Literal["linear", "ntk", "yarn", "llama3", "p_rope"]
    factor: Annotated[float, Field(ge=1)] = 1.0
    original_length: PositiveInt | None = None
    slow: PositiveFloat | None = None
    fast: PositiveFloat | None = None
    sharpen: PositiveFloat | None = None
    keep: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _fits(self) -> RopeScaling:
        used = {
            "linear": {"factor", "sharpen"},
            "ntk": {"factor", "sharpen"},
            "yarn": {"factor", "original_length", "slow", "fast", "sharpen"},
            "llama3": {"factor", "original_length", "slow", "fast"},
            "p_rope": {"keep"},
        }[self.kind]
        stray = [name for name in sorted(self.model_fields_set - used - {"kind"}) if getattr(self, name) is not None]
        if stray:
            raise InputError(f"{stray[0]}: {self.kind} does not take it; it takes {', '.join(sorted(used))}")
        if "original_length" in used and self.original_length is None:
            raise InputError(f"original_length: {self.kind} needs the tokens of the training, for example 8192")
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


def rope_table(
    positions: Tensor,
    size: int,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    scaling: RopeScaling | None = None,
) -> Tensor:
    """The cosines and sines of RoPE's angles m base^(-2j / size) (2104.09864, eq. 15), for `rotate`.

    positions: m, [T] or [B, T] int64.
    size: number of turned dimensions, even.
    base: of the geometric frequencies.
    dtype: of the values that will be turned; half precisions get a float32 table.
    scaling: a change of the frequencies, or None.

    Returns [..., T, 1, size / 2, 2], which broadcasts over heads. The angles are computed in float64: in float32
    the angle at position 1e6 is wrong by up to 0.03 radian.
    """
    inverse, sharpen = rope_frequencies(size, base, scaling)
    table = rotations(positions[..., None, None].to(torch.float64) * inverse.to(positions.device), dtype)
    return table if sharpen == 1 else table * sharpen


def step_table(
    place: int, size: int, base: float, dtype: torch.dtype, scaling: RopeScaling | None, device: torch.device
) -> Tensor:
    """`rope_table` of the one position `place`, [1, 1, size / 2, 2]: all layers of a decoded token want the same.

    It is kept for the next layer: nobody may change it.
    """
    if torch.compiler.is_compiling():
        return rope_table(torch.full((1,), place, device=device), size, base, dtype, scaling)
    return _step_table(place, size, base, dtype, scaling, device, torch.is_inference_mode_enabled())


@lru_cache(maxsize=8)
def _step_table(
    place: int,
    size: int,
    base: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None,
    device: torch.device,
    inference: bool,  # what was made in inference mode cannot be used by autograd
) -> Tensor:
    """See `step_table`."""
    return rope_table(torch.full((1,), place, device=device), size, base, dtype, scaling)


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


def xpos_rates(size: int, scale_base: float = 512.0) -> Tensor:
    """The logarithm of xPos's factor for each step of distance, [size / 2] float64, negative.

    Pair j fades by ((2 j / size + 0.4) / 1.4)^(1 / scale_base) (2212.10554, eq. 9): those that turn fastest fade most.
    """
    pair = torch.arange(0, size, 2, dtype=torch.float64) / size
    return ((pair + 0.4) / 1.4).log() / scale_base


def xpos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: int,
    *,
    scale_base: float = 512.0,
    scale: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """Causal attention whose scores fade with distance, each pair of dimensions at a rate of its own (xPos).

    The score of key m for query n is the sum over pairs j of Re(q_j conj(k_j)) zeta_j^((n - m) / scale_base), with
    zeta_j = (2 j / size + 0.4) / 1.4 (2212.10554, algorithm 1; the division by 512 is that of the authors' code).
    There q is multiplied by zeta^n and k by zeta^-m, which overflow in float32 from position 36,000 on. Here keys come
    as they are and both factors count from the first query of a chunk: a key's is at most 1 but in the chunk itself,
    where it is at most e^8, so that no position is too large.

    q, k: [B, Tq, H, D] and [B, Tk, Hkv, D], turned by `rotate` already. v: [B, Tk, Hkv, V].
    size: of the dimensions that fade, the first of each head, even; the rest do not.
    scale_base: steps in which a pair fades by its zeta, at least 16.
    scale, q_position, k_position: as for `softmax_attention`; the queries' positions follow one another.

    Returns [B, Tq, H, V].
    """
    rates = xpos_rates(size, scale_base).to(q.device)
    length, n_keys = q.shape[1], k.shape[1]
    chunk = min(1024, int(-8 / rates[0].item()))
    if chunk < 64:
        raise InputError(f"scale_base must be at least 16, got {scale_base:g}")
    q_at, k_at = resolve_positions(q, k, q_position, k_position)
    outputs = []
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        seen = n_keys if q_position is not None else n_keys - length + last
        origin = q_at[:, first : first + 1]
        part_q = _faded(q[:, first:last], rates, q_at[:, first:last] - origin)
        # Keys after the chunk are seen by no query of it; the clamp keeps what the mask hides finite.
        part_k = _faded(k[:, :seen], rates, (origin - k_at[:, :seen]).clamp_min(-chunk))
        given = (None, None) if q_position is None else (q_at[:, first:last], k_at)
        y = softmax_attention(part_q, part_k, v[:, :seen], scale=scale, q_position=given[0], k_position=given[1])
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _faded(x: Tensor, rates: Tensor, steps: Tensor) -> Tensor:
    """x [B, T, H, D], its pairs multiplied by exp(rates steps); steps: [B or 1, T] int64."""
    factor = (steps[..., None, None].to(torch.float64) * rates).exp()
    factor = factor.masked_fill(factor < 1e-26, 0.0)  # subnormal numbers are slow, and nothing next to any other key
    factor = factor.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    size = 2 * len(rates)
    faded = (x[..., :size].unflatten(-1, (-1, 2)) * factor[..., None]).flatten(-2).to(x.dtype)
    return faded if size == x.shape[-1] else torch.cat((faded, x[..., size:]), -1)


def carope_phases(
    log_f: Tensor, pairs: int, before: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The angles that tokens add up to when each says how fast its head turns (CARoPE, 2507.23083, section 2).

    Pair i stands at phi_i(m) = sum over t <= m of f(x_t)^i, in float64.

    log_f: [B, T, H], the logarithm of f, at most 0. pairs: P; i is 0 to P - 1.
    before: [B, H, P], what an earlier piece came to. mask: [B, T] bool; padding adds nothing.

    Returns phi [B, T, H, P] and its last, modulo 2 pi: cosines and sines are the same, and no stream too long.
    """
    steps = (log_f[..., None].to(torch.float64) * torch.arange(pairs, device=log_f.device)).exp()
    if mask is not None:
        steps = steps.masked_fill(~mask[..., None, None], 0.0)
    total = steps.cumsum(1)
    if before is not None:
        total = total + before[:, None].to(torch.float64)
    return total, total[:, -1].remainder(2 * math.pi)


def clex_frequencies(count: int, size: int, base: float, up: Tensor, down: Tensor) -> list[Tensor]:
    """RoPE's frequencies at the length factors t = 1 to `count`, by a neural ODE in t (CLEX, 2310.16450).

    d log theta / dt = silu((log theta + log theta_ntk(t)) up) down + xi(t), from RoPE's frequencies at t = 1, where
    theta_ntk(t), those of the NTK-aware rule for a factor alpha = 2 t - 1, solves the equation without the network:
    xi_i(t) = -4 i / ((size - 2) alpha). All this, the sum within the network included, is as in the authors' code.
    It is solved by RK4 in log alpha, in which xi is constant, in `clex_steps(t)` steps from each t to the next.

    size: of the turned dimensions, at least 4. up: [size / 2, W]. down: [W, size / 2].

    Returns `count` tensors [size / 2] float64, differentiable in up and down.
    """
    if size < 4:
        raise InputError(f"CLEX needs at least 4 rotated dimensions, got {size}; the nearest that fits is 4")
    up, down = up.to(torch.float64), down.to(torch.float64)
    index = torch.arange(0, size, 2, dtype=torch.float64, device=up.device)
    start, slope = index * (-math.log(base) / size), index / (size - 2)

    def rate(u: float, z: Tensor) -> Tensor:  # dz / du, for dt = (alpha / 2) du
        return F.silu((z + start - slope * u) @ up) @ down * (math.exp(u) / 2) - slope

    z, found = start, [start.exp()]
    for t in range(1, count):
        begin, end = math.log(2 * t - 1), math.log(2 * t + 1)
        h = (end - begin) / clex_steps(t)
        for n in range(clex_steps(t)):
            u = begin + n * h
            a = rate(u, z)
            b = rate(u + h / 2, z + h / 2 * a)
            c = rate(u + h / 2, z + h / 2 * b)
            z = z + h / 6 * (a + 2 * b + 2 * c + rate(u + h, z + h * c))
        found.append(z.exp())
    return found


def clex_steps(t: int) -> int:
    """RK4 steps from the factor t to t + 1: of at most 0.25 in log(2 t - 1)."""
    return math.ceil(4 * math.log((2 * t + 1) / (2 * t - 1)))


def gali_places(places: Tensor, length: int, original: int, window: int) -> Tensor:
    """The places that the first `length` tokens take within a trained length of `original` (GALI, 2502.02659, eq. 2).

    As many of the first tokens as must share a step of 1 / g each, with the least g that leaves the last `window`
    their whole steps; the rest keep theirs, up to original - 1 (the paper's algorithm 2).

    places: [...] int64, of 0 to length - 1. original: more than `window`. Returns [...] float64.
    """
    more = length - original
    if more <= 0:
        return places.to(torch.float64)
    group = -(-(length - window) // (original - window))
    shared = more - (-more // (group - 1))  # tokens on shared steps: `more`, and the steps that they take
    exact = places.to(torch.float64)
    return torch.where(places < shared, exact / group, exact - more)


def gali_table(places: Tensor, original: int, size: int, base: float, dtype: torch.dtype) -> Tensor:
    """`rope_table` at places between whole ones, by linear interpolation of the rotations, not of the angles.

    A score is linear in the rotation of its key, so that this interpolates scores between whole distances, as GALI
    does (2502.02659, eq. 3 without its noise), for queries at whole places.

    places: [T] or [B, T] float64; those beyond original - 1 count as that.
    """
    whole = rope_table(torch.arange(original, device=places.device), size, base, dtype)  # few, however many tokens
    places = places.clamp_max(original - 1)
    below = places.floor()
    part = (places - below).to(whole.dtype)[..., None, None, None]
    return torch.lerp(whole[below.long()], whole[places.ceil().long()], part)


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
