"""Softmax attention whose rotary positions follow the length read (CLEX, GALI)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens
from contextlab.ops.position import rope_table, rotary_size, rotate, rotations
from contextlab.ops.position_variants import clex_frequencies, clex_steps, gali_places, gali_table
from contextlab.ops.softmax import resolve_positions, softmax_attention
from contextlab.registry import register


def _turned_size(head_dim: int, fraction: float, what: str) -> int:
    """`rotary_size`, of 4 at least: the first pair's frequency is 1 whatever is learned."""
    size = rotary_size(head_dim, fraction)
    if size < 4:
        raise InputError(f"{what} needs at least 4 rotated dimensions, got {size} of head_dim {head_dim}")
    return size


class TurnedOnRead(AttentionMixer):
    """Base: the state holds keys as they are, and blocks of queries turn all keys they see, each in its own way.

    Blocks go by a token's place in its row, so that what is answered depends neither on cuts nor on padding. Each
    block, and so each token that is read alone, turns all its keys anew: their trigonometry comes on top of attention.
    """

    def __init__(self, width: int, options: AttentionOptions) -> None:
        super().__init__(width, replace(options, position="none"))  # keys are not rotated when they are written
        self.turned = rotary_size(self.head_dim, options.rope_fraction)

    @abstractmethod
    def _block(self, place: int) -> int:
        """The block of a query at this place."""

    @abstractmethod
    def _bounds(self, block: int) -> tuple[int, int]:
        """The places of a block: its first, and that after its last."""

    def _frequencies(self, blocks: int) -> list[Tensor]:
        """What `_tables` needs of the first blocks."""
        return []

    @abstractmethod
    def _tables(
        self, block: int, frequencies: list[Tensor], q_at: Tensor, k_at: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The rotations of queries at q_at [B or 1, Tq] of the block and of the keys at k_at [B or 1, Tk]."""

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        q = new.q
        q_at, k_at = resolve_positions(q, k, q_position, k_position)
        length, total, padded = q.shape[1], k.shape[1], q_position is not None
        # The first query's place in the rows with most and with least padding.
        least, most = q_at[:, 0].aminmax() if padded else (total - length, total - length)
        least, most = int(least), int(most)
        k_at = k_at.clamp_min(0)  # padding, which no query sees
        y = q.new_zeros(*q.shape[:3], v.shape[-1])
        blocks = range(self._block(max(least, 0)), self._block(max(most + length - 1, 0)) + 1)
        frequencies = self._frequencies(blocks.stop)
        for block in blocks:
            begin, end = self._bounds(block)
            first = max(begin - most, 0) if block else 0
            part = slice(first, min(end - least, length))
            seen = total - length + part.stop if not padded else total
            turns = self._tables(block, frequencies, q_at[:, part].clamp_min(0), k_at[:, :seen], q.dtype)
            got = softmax_attention(
                rotate(q[:, part], turns[0]),
                rotate(k[:, :seen], turns[1]),
                v[:, :seen],
                scale=self.head_dim**-0.5,
                q_position=q_position[:, part] if q_position is not None else None,
                k_position=k_position,
            )
            if padded:
                inside = (q_at[:, part] >= begin) & (q_at[:, part] < end)
                got = torch.where(inside[..., None, None], got, y[:, part])
            y[:, part] = got
        return y


@register(
    "mixer",
    "clex_attention",
    family="softmax",
    papers=("2310.16450",),
    cases=(
        {"original_length": 16},
        {"original_length": 30, "max_factor": 2, "kv_heads": 2, "rope_fraction": 0.67, "hidden": 3, "qk_norm": True},
        {"original_length": 7, "max_factor": 4, "heads": 2, "short_conv": 3, "output_gate": True},
    ),
)
class ClexAttention(TurnedOnRead):
    """Continuous length extrapolation (CLEX): RoPE's frequencies follow a learned ODE in the length that is read.

    At t times the trained length L the frequencies are those that the ODE of `ops.clex_frequencies` comes to at t; a
    query at place n, counted from 0, reads at t = n // L + 1, up to max_factor. As in the authors' code the state
    holds keys that are not turned, so that each query sees all keys at its own t. There all queries of a piece take
    the t of its end, so that answers depend on how the input is cut; a token read alone takes the t that it has here.
    Until it is trained this is RoPE with NTK-aware frequencies for a factor 2 t - 1.

    width: size of a token's vector.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    original_length: L, tokens of the training.
    max_factor: largest t.
    hidden: size of the network's hidden layer; default the turned dimensions.
    sample: in training draw t for each whole sequence that fits, and its tokens' places, in order, from t L (the
        paper's position extrapolation), so that short sequences train the frequencies of long ones.
    rope_base: base of the rotary frequencies.
    rope_fraction: part of each head's dimensions that is rotated, 4 at least.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v; 0 for none.
    norm_eps: of that normalisation; None takes PyTorch's default.
    output_gate: multiply the heads' outputs by a sigmoid gate of the token.
    """

    def __init__(
        self,
        width: PositiveInt,
        *,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        original_length: PositiveInt = 1024,
        max_factor: PositiveInt = 16,
        hidden: PositiveInt | None = None,
        sample: bool = False,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        qk_norm: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
        norm_eps: PositiveFloat | None = None,
        output_gate: bool = False,
    ) -> None:
        super().__init__(
            width,
            AttentionOptions(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rope_base=rope_base,
                rope_fraction=rope_fraction,
                qk_norm=qk_norm,
                norm_eps=norm_eps,
                output_gate=output_gate,
                bias=bias,
                short_conv=short_conv,
            ),
        )
        self.original_length, self.max_factor, self.sample = original_length, max_factor, sample
        size = _turned_size(self.head_dim, rope_fraction, "CLEX")
        hidden = size if hidden is None else hidden
        self.ode_up = nn.Parameter(torch.randn(size // 2, hidden) * (size // 2) ** -0.5)
        self.ode_down = nn.Parameter(torch.zeros(hidden, size // 2))

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        q, length = new.q, new.q.shape[1]
        if self.sample and self.training and length == k.shape[1] <= self.original_length * self.max_factor:
            t = int(torch.randint(-(-length // self.original_length), self.max_factor + 1, ()))
            places = torch.randperm(t * self.original_length, device=q.device)[:length].sort().values
            table = rotations(places[:, None, None] * self._frequencies(t)[-1], q.dtype)
            q, k = rotate(q, table), rotate(k, table)
            return softmax_attention(q, k, v, scale=self.head_dim**-0.5, q_position=q_position, k_position=k_position)
        return super()._score(new, k, v, q_position, k_position)

    def _frequencies(self, blocks: int) -> list[Tensor]:
        return clex_frequencies(blocks, self.turned, self.rope_base, self.ode_up, self.ode_down)

    def _block(self, place: int) -> int:
        return min(place // self.original_length, self.max_factor - 1)

    def _bounds(self, block: int) -> tuple[int, int]:
        last = block == self.max_factor - 1
        return block * self.original_length, 2**62 if last else (block + 1) * self.original_length

    def _tables(
        self, block: int, frequencies: list[Tensor], q_at: Tensor, k_at: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        theta = frequencies[block]
        return rotations(q_at[..., None, None] * theta, dtype), rotations(k_at[..., None, None] * theta, dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`; the ODE's steps counted, four evaluations of the network each."""
        steps = sum(clex_steps(t) for t in range(1, self._block(length - 1) + 1))
        return super().flops(length) + 16 * steps * self.ode_up.numel()


@register(
    "mixer",
    "gali_attention",
    family="softmax",
    papers=("2502.02659",),
    cases=(
        {"original_length": 16, "window": 4, "chunk": 8},
        {"original_length": 30, "window": 29, "chunk": 20, "kv_heads": 2, "rope_fraction": 0.67, "qk_norm": True},
        {"original_length": 5, "window": 1, "chunk": 7, "heads": 2, "short_conv": 3, "output_gate": True},
    ),
)
class GaliAttention(TurnedOnRead):
    """Greedy attention logit interpolation (GALI): reads on beyond the trained length within its distances, untrained.

    The parameters are those of `attention`, and up to the trained length L it is attention with RoPE. Farther queries
    are taken in chunks: for each, all tokens up to its end are put on places from 0 to L - 1, at least
    the last `window` at whole steps, and as few of the first as possible at steps of 1 / g, with the least g that fits
    them in. Scores at distances between whole ones are interpolated between those at the two whole ones
    (`ops.gali_table`).

    Two things differ from the paper: its Gaussian noise on interpolated scores is left out, so that answers do not
    depend on a draw, and chunks lie at fixed places, the last one counted as full, where in the paper it ends with
    the prompt and each generated token is a chunk of its own, so that answers would depend on the cuts (chunk 1 is
    that, at a turn of all keys for each token).

    width: size of a token's vector.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    original_length: L, tokens of the training.
    window: last tokens that keep whole distances, less than original_length.
    chunk: queries that put the tokens on the same places.
    rope_base: base of the rotary frequencies.
    rope_fraction: part of each head's dimensions that is rotated.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v; 0 for none.
    norm_eps: of that normalisation; None takes PyTorch's default.
    output_gate: multiply the heads' outputs by a sigmoid gate of the token.
    """

    def __init__(
        self,
        width: PositiveInt,
        *,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        original_length: Annotated[int, Field(ge=2)] = 1024,
        window: PositiveInt = 128,
        chunk: PositiveInt = 256,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        qk_norm: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
        norm_eps: PositiveFloat | None = None,
        output_gate: bool = False,
    ) -> None:
        super().__init__(
            width,
            AttentionOptions(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rope_base=rope_base,
                rope_fraction=rope_fraction,
                qk_norm=qk_norm,
                norm_eps=norm_eps,
                output_gate=output_gate,
                bias=bias,
                short_conv=short_conv,
            ),
        )
        if window >= original_length:
            raise InputError(
                f"window {window} is not below original_length {original_length}, so no distance is left to "
                "interpolate; "
                f"the nearest that fits is {original_length - 1}"
            )
        self.original_length, self.span, self.chunk = original_length, window, chunk

    def _block(self, place: int) -> int:
        return -(-(place + 1 - self.original_length) // self.chunk) if place >= self.original_length else 0

    def _bounds(self, block: int) -> tuple[int, int]:
        end = self.original_length + block * self.chunk
        return (end - self.chunk if block else 0), end

    def _tables(
        self, block: int, frequencies: list[Tensor], q_at: Tensor, k_at: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        length = self._bounds(block)[1]
        q_at, k_at = (gali_places(at, length, self.original_length, self.span) for at in (q_at, k_at))
        # A query between whole places stands at the next, so that distances between are the keys' alone.
        turn = rope_table(q_at.ceil().to(torch.int64), self.turned, self.rope_base, dtype)
        return turn, gali_table(k_at, self.original_length, self.turned, self.rope_base, dtype)
