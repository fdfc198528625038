"""Encoders: mixers that read both ways (`causal = False`), so they take whole sequences and leave no state."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers.base import Mixer, head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.features import Performer as PerformerFeatures
from contextlab.mixers.layers import Linear
from contextlab.mixers.softmax import Attention
from contextlab.ops.linear import working_dtype
from contextlab.ops.long_convolution import fast_size
from contextlab.ops.softmax import softmax_attention
from contextlab.registry import register
from contextlab.state import State


class Encoder(Mixer):
    """Base of the mixers that read both ways: no state; subclasses define `mix`."""

    causal: ClassVar[bool] = False

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. Returns (y, None); a state is refused."""
        return self.mix(x, mask), None

    @abstractmethod
    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: [B, T, width]. mask: [B, T] bool, False at left padding, or None. Returns [B, T, width]."""

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """0: an encoder holds nothing."""
        return 0


@register(
    "mixer",
    "encoder_attention",
    papers=("1706.03762", "1810.04805"),
    cases=(
        {},
        {"kv_heads": 2, "head_dim": 8, "rope_fraction": 0.5, "bias": True},
        {"heads": 3, "position": "none", "qk_norm": True},
        {"position": "alibi", "heads": 6},
    ),
)
class EncoderAttention(Attention):
    """Softmax attention of every token to every token, as in BERT: the reference of the encoders.

    width: size of a token's vector.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads (multi-head), 1 is multi-query.
    head_dim: size of a head; default width / heads.
    position: rotary (rope), a linear bias by distance to either side (alibi), or none (positions are the model's).
    rope_base: base of the rotary frequencies.
    rope_fraction: part of each head's dimensions that is rotated.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    bias: whether the projections have biases.
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "alibi", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        qk_norm: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(
            width,
            heads,
            kv_heads,
            head_dim,
            position=position,
            rope_base=rope_base,
            rope_fraction=rope_fraction,
            qk_norm=qk_norm,
            bias=bias,
        )

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Encoder.forward`."""
        return super().forward(x, None, mask, keep_state=False)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        return softmax_attention(
            q,
            k,
            v,
            scale=self.head_dim**-0.5,
            causal=False,
            slopes=self.slopes,
            q_position=q_position,
            k_position=k_position,
        )

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """0: an encoder holds nothing."""
        return 0

    def _pairs(self, length: int) -> int:
        return length**2


@register(
    "mixer",
    "linformer",
    papers=("2006.04768",),
    cases=(
        {"max_length": 160, "projected": 7},
        {"max_length": 150, "projected": 12, "heads": 3, "sharing": "none"},
        {"max_length": 400, "projected": 5, "heads": 2, "sharing": "key_value"},
    ),
)
class Linformer(Encoder):
    """Linformer: softmax attention to a few learned sums of the keys and values, O(T) for sequences up to a length.

    head = softmax(Q (E K)^T / sqrt(d)) (F V), with E and F [projected, max_length] learned. E and F have a
    column for each position, counted from a row's first real token, so they hold the order of the tokens as well.

    width: size of a token's vector.
    max_length: longest sequence, in real tokens.
    projected: k, the sums that take the keys' and the values' places.
    heads: number of heads, a divisor of width.
    sharing: E and F of each head ("none"), of all heads ("headwise"), or one matrix for both ("key_value").
    """

    parallel_form = "attention"

    def __init__(
        self,
        width: PositiveInt,
        max_length: PositiveInt = 512,
        projected: PositiveInt = 64,
        heads: PositiveInt = 4,
        sharing: Literal["none", "headwise", "key_value"] = "headwise",
    ) -> None:
        super().__init__(width)
        self.heads, self.size, self.max_length = heads, head_size(width, heads), max_length
        self.in_proj, self.out_proj = Linear(width, 3 * width), Linear(width, width)
        # [E or both E and F, heads or 1 for all, k, max_length]
        shape = (1 if sharing == "key_value" else 2, heads if sharing == "none" else 1, projected, max_length)
        self.sums = nn.Parameter(torch.randn(shape) * max_length**-0.5)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Encoder.mix`. Raises InputError when a sequence has more than max_length tokens."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, self.size)).unbind(2)
        kv = torch.stack((k, v), 1)  # [B, 2, T, H, d]
        longest = x.shape[1]
        if mask is not None:
            kv = left_aligned(torch.cat((k, v), -1), mask).unflatten(-1, (2, -1)).movedim(-2, 1)
            if longest > self.max_length:
                longest = int(mask.sum(1).amax())
        if longest > self.max_length:
            raise InputError(f"linformer: a sequence of {longest} tokens does not fit max_length {self.max_length}")
        sums = self.sums[..., :longest].expand(2, self.heads, -1, -1)
        k, v = torch.einsum("chkt,bcthd->bckhd", sums, kv[:, :, :longest]).unbind(1)
        return self.out_proj(softmax_attention(q, k, v, causal=False).flatten(2))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * length * (projections + 4 * self.width * self.sums.shape[2])


@register("mixer", "fnet", papers=("2105.03824",), cases=({}, {"normalise": False}))
class FNet(Encoder):
    """FNet: the real part of the Fourier transform over tokens and channels, with nothing to learn.

    A padded row is transformed over its real tokens alone, by a chirp: O(T log T) too, and rows may differ in length.

    width: size of a token's vector.
    normalise: divide by sqrt(T width), so that the transform keeps the norm; False is the paper's plain sum, which
        grows with the length and needs a norm after it.
    """

    parallel_form = "Fourier transform"

    def __init__(self, width: PositiveInt, normalise: bool = True) -> None:
        super().__init__(width)
        self.normalise = normalise

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Encoder.mix`."""
        inner = x.to(working_dtype(x.dtype))
        if mask is None:
            return torch.fft.fft2(inner, dim=(1, 2), norm="ortho" if self.normalise else "backward").real.to(x.dtype)
        y = _padded_dft(torch.fft.fft(without_padding(inner, mask), dim=2), mask).real
        if self.normalise:
            y = y * (mask.sum(1).clamp_min(1) * self.width).to(y.dtype).rsqrt()[:, None, None]
        return y.to(x.dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`: of a real two-dimensional FFT, 2.5 n log2 n with n = length x width."""
        values = length * self.width
        return int(2.5 * values * math.log2(values)) + values


@register("mixer", "performer", papers=("2009.14794",), cases=({}, {"features": 9, "heads": 2}, {"heads": 3}))
class Performer(Encoder):
    """Performer (FAVOR+): softmax attention of every token to every token, estimated by random features in O(T).

    The causal form is `linear_attention` with feature_map "performer".

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    features: random directions of a head; the size of a head by default. The estimate's error falls with their root.
    """

    parallel_form = "chunks"

    def __init__(self, width: PositiveInt, heads: PositiveInt = 4, features: PositiveInt | None = None) -> None:
        super().__init__(width)
        size = head_size(width, heads)
        self.heads = heads
        self.feature = PerformerFeatures(size, heads, size if features is None else features)
        self.in_proj, self.out_proj = Linear(width, 3 * width), Linear(width, width)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Encoder.mix`."""
        q, k, v = self.in_proj(without_padding(x, mask)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        places, work = torch.arange(x.shape[1], device=x.device), working_dtype(x.dtype)
        q = self.feature(q, places, True).to(work)
        k = without_padding(self.feature(k, places, False), mask).to(work)
        v = F.pad(v, (0, 1), value=1.0).to(work)  # the denominator is the read-out of a column of ones
        o = torch.einsum("bthf,bhfd->bthd", q, torch.einsum("bthf,bthd->bhfd", k, v))
        o = o[..., :-1] / (o[..., -1:] + self.feature.floor)
        return self.out_proj(o.flatten(2).to(x.dtype))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.feature.products
        return 2 * length * (projections + 2 * self.feature.features * (self.width + self.heads))


@register(
    "mixer",
    "ponet",
    papers=("2110.02442",),
    cases=({}, {"heads": 2, "segment": 7, "local": 5}, {"heads": 3, "segment": 200, "local": 1}),
)
class PoNet(Encoder):
    """PoNet: pooling at three ranges in place of attention, O(T): y = W ((g + s) o + l).

    g: the attention of the mean query to all keys, which are the values too. s: the maximum over the token's segment.
    l: the maximum over the token's neighbours. o: a projection of the token itself. Segments are of equal length here,
    from each row's first real token on; the paper takes a text's sentences.

    width: size of a token's vector.
    heads: of the attention, a divisor of width.
    segment: tokens of a segment.
    local: tokens of the local maximum, the token in the middle; odd.
    """

    parallel_form = "pooling"

    def __init__(
        self, width: PositiveInt, heads: PositiveInt = 4, segment: PositiveInt = 16, local: PositiveInt = 3
    ) -> None:
        super().__init__(width)
        if local % 2 == 0:
            raise InputError(f"local must be odd, with the token in the middle, got {local}; {local + 1} is nearest")
        head_size(width, heads)
        self.heads, self.segment, self.local = heads, segment, local
        self.in_proj, self.out_proj = Linear(width, 5 * width), Linear(width, width)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Encoder.mix`."""
        length = x.shape[1]
        q, k, o, segment, local = self.in_proj(without_padding(x, mask)).chunk(5, -1)
        # Nothing is left of padding: zero in the mean's sum, -inf in the maxima, no key of the attention.
        tokens = length if mask is None else mask.sum(1, keepdim=True).clamp_min(1)
        mean = (q.sum(1) / tokens).unflatten(-1, (self.heads, -1)).unsqueeze(1)
        keys = k.unflatten(-1, (self.heads, -1))
        if mask is None:
            g = softmax_attention(mean, keys, keys, causal=False)
            segment = self._segments(segment)
            local = self._neighbours(local)
        else:
            real = mask.long() - 1  # 0 at real tokens, -1 at padding
            g = softmax_attention(
                mean, keys, keys, causal=False, q_position=torch.zeros_like(real[:, :1]), k_position=real
            )
            lowest = float("-inf")
            place = (torch.arange(length, device=x.device) - (~mask).sum(1, keepdim=True)).clamp_min(0)
            segment = self._segments(left_aligned(segment, mask, lowest))
            segment = without_padding(segment.gather(1, place.unsqueeze(-1).expand_as(segment)), mask)
            local = without_padding(self._neighbours(local.masked_fill(~mask.unsqueeze(-1), lowest)), mask)
        return self.out_proj((g.flatten(2) + segment) * o + local)

    def _segments(self, x: Tensor) -> Tensor:
        """[B, T, D]: the maximum over each segment, at each of its tokens."""
        length = x.shape[1]
        pieces = F.pad(x, (0, 0, 0, -length % self.segment), value=float("-inf")).unflatten(1, (-1, self.segment))
        return pieces.amax(2).repeat_interleave(self.segment, 1)[:, :length]

    def _neighbours(self, x: Tensor) -> Tensor:
        """[B, T, D]: the maximum over the tokens around each."""
        return F.max_pool1d(x.mT, self.local, stride=1, padding=self.local // 2).mT

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        return 2 * length * (self.in_proj.weight.numel() + self.out_proj.weight.numel() + 2 * self.width)


@register(
    "mixer",
    "merged_attention",
    papers=("2210.09461",),
    cases=({}, {"ratio": 0.5, "heads": 2}, {"ratio": 0.2, "heads": 3}),
)
class MergedAttention(Encoder):
    """Attention to merged tokens: before it, the most alike pairs of keys and values become their means (ToMe).

    Tokens at even places are matched with the most alike (by the cosine of the keys, averaged over heads) at odd
    places, the best matches are merged, and the scores gain the log of the number of tokens that a key stands for
    (proportional attention). As a mixer it gives every token an output, so queries are not merged, and nothing stays
    merged for the next block, as it does in ToMe and MAELRE: of the attention's cost 1 - ratio is left, and the
    matching costs a quarter of one head's scores. Order is the model's to tell (position "learned" or "sinusoidal").

    width: size of a token's vector.
    heads: number of heads, a divisor of width.
    ratio: merged tokens over all, at most 0.5.
    """

    parallel_form = "attention"

    def __init__(
        self, width: PositiveInt, heads: PositiveInt = 4, ratio: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    ) -> None:
        super().__init__(width)
        self.heads, self.size, self.ratio = heads, head_size(width, heads), ratio
        self.in_proj, self.out_proj = Linear(width, 3 * width), Linear(width, width)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Encoder.mix`."""
        q, k, v = self.in_proj(without_padding(x, mask)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if mask is not None:
            k, v = left_aligned(torch.cat((k, v), -1), mask).chunk(2, -1)
        k, v, stands_for, exists = merge_alike(k, v, self.ratio, None if mask is None else mask.sum(1))
        # q . k / sqrt(d) + log of the number, as one more dimension of both.
        bias = (stands_for.log() * self.size**0.5).to(k.dtype)[..., None, None].expand(-1, -1, self.heads, 1)
        places = None if mask is None else exists.long() - 1  # a key at -1 is seen by none
        y = softmax_attention(
            F.pad(q, (0, 1), value=1.0),
            torch.cat((k, bias), -1),
            v,
            scale=self.size**-0.5,
            causal=False,
            q_position=None if places is None else torch.zeros_like(q[:1, :, 0, 0], dtype=torch.int64),
            k_position=places,
        )
        return self.out_proj(y.flatten(2))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        keys = length - int(self.ratio * length)
        return 2 * length * projections + 4 * length * keys * self.width + 2 * (length // 2) ** 2 * self.size


def merge_alike(
    k: Tensor, v: Tensor, ratio: float, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge keys and values by bipartite soft matching (ToMe, 2210.09461).

    k: [B, T, H, K]. v: [B, T, H, V]. ratio: merged tokens over a row's tokens, at most 0.5, rounded down.
    tokens: [B] int64, each row's tokens, its first; None for all T.

    Returns keys [B, n, H, K], values [B, n, H, V], the number of tokens that each stands for [B, n] (float), and
    whether it exists [B, n] bool: rows with fewer tokens have fewer. n is the largest that a row has, or more.
    """
    batch, length, heads, _ = k.shape
    fewest = int(ratio * length)  # merged in every row
    if tokens is None:
        tokens = torch.full((batch,), length, device=k.device)
    elif length:
        fewest = int(ratio * int(tokens.amin()))
    place = torch.arange(length, device=k.device)
    real = place < tokens[:, None]
    if length < 2:
        return k, v, torch.ones_like(k[..., 0, 0]), real
    with torch.no_grad():
        unit = F.normalize(k.mean(2), dim=-1)
        alike = unit[:, 0::2] @ unit[:, 1::2].mT
        alike = alike.masked_fill(~(real[:, 0::2, None] & real[:, None, 1::2]), float("-inf"))
        best, match = alike.max(-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        merged = order.argsort(-1) < (ratio * tokens.double()).floor()[:, None]
        rest = order[:, fewest:]
        exists = torch.cat((((~merged) & real[:, 0::2]).gather(1, rest), real[:, 1::2]), 1)
        count = torch.ones_like(unit[:, 1::2, 0]).scatter_add(1, match, merged.to(unit.dtype))
        stands_for = torch.cat((torch.ones_like(rest, dtype=count.dtype), count), 1)
    both = torch.cat((k, v), -1).flatten(2)
    even, odd = both[:, 0::2], both[:, 1::2]
    into = match.unsqueeze(-1).expand(even.shape)
    odd = odd.scatter_add(1, into, even.masked_fill(~merged.unsqueeze(-1), 0)) / count.unsqueeze(-1)
    both = torch.cat((even.gather(1, rest.unsqueeze(-1).expand(-1, -1, even.shape[-1])), odd), 1)
    k, v = both.unflatten(-1, (heads, -1)).split((k.shape[-1], v.shape[-1]), -1)
    return k, v, stands_for, exists


def left_aligned(x: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """x [B, T, ...] with each row's real tokens first and `fill` after them. mask: [B, T] bool, False at padding."""
    place = torch.arange(mask.shape[1], device=x.device)
    real = mask.sum(1, keepdim=True)
    index = ((place - real) % max(1, mask.shape[1])).view(*mask.shape, *(1,) * (x.ndim - 2))
    beyond = (place >= real).view(index.shape)
    return x.gather(1, index.expand(x.shape)).masked_fill(beyond, fill)


def _padded_dft(x: Tensor, mask: Tensor) -> Tensor:
    """The Fourier transform over each row's n real tokens, by Bluestein's chirp, as one convolution for all rows.

    With 2 j k = j^2 + k^2 - (k - j)^2 the sum over j of x_j w^(j k), w = exp(-2 pi i / n), is a convolution with
    w^(-m^2 / 2) between two products with w^(j^2 / 2). x: [B, T, D] complex, zero at padding. Returns the same shape.
    """
    length = mask.shape[1]
    tokens = mask.sum(1, keepdim=True).clamp_min(1)

    def chirp(at: Tensor) -> Tensor:  # the angle's integer part is exact
        angle = (at * at % (2 * tokens)).double() / tokens * -math.pi
        return torch.polar(torch.ones_like(angle), angle).to(x.dtype).unsqueeze(-1)

    turn = chirp(torch.arange(length, device=x.device) - (length - tokens))
    size = fast_size(2 * length)
    lag = torch.arange(size, device=x.device)
    kernel = chirp(torch.minimum(lag, size - lag)).conj()
    spectrum = torch.fft.fft(x * turn, size, 1) * torch.fft.fft(kernel, dim=1)
    return torch.fft.ifft(spectrum, dim=1)[:, :length] * turn
