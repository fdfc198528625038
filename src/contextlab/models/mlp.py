"""Position-wise MLPs: GELU, SwiGLU, GEGLU and squared ReLU, with dense or structured matrices.

Every MLP maps [B, T, width] to the same, token by token. Its last matrix is called `out_proj`, so that the stack can
make residual branches start small.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab import registry
from contextlab.errors import InputError, nearest_divisor
from contextlab.mixers.layers import Linear, multiplications
from contextlab.mixers.sites import Sited
from contextlab.registry import register

Structure = Literal["dense", "low_rank", "block_dense", "block_shuffle"]


class Mlp(Sited, ABC):
    """Base of the MLPs.

    width: size of a token's vector. ratio: hidden width over `width`.
    """

    trains_alone: ClassVar[str] = ""  # as of mixers: why several cannot be trained as one program

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @abstractmethod
    def flops(self, length: int) -> int:
        """Multiply-adds x 2 of one forward over `length` tokens, matrix products counted."""


class StructuredLinear(nn.Module):
    """A linear layer as the product of two smaller matrices (2406.16450, section 3).

    low_rank: U V, with `rank` values between them. block_dense: V is block-diagonal, U dense, `rank` between them.
    block_shuffle: both are block-diagonal, with a transposition between them, so that each output hears each input.

    inputs, outputs: sizes. structure: as above. rank: values in the middle; for block_shuffle the smaller of inputs
        and outputs. blocks: of the block-diagonal matrices.
    """

    def __init__(self, inputs: int, outputs: int, structure: Structure, rank: int, blocks: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.structure = inputs, outputs, structure
        if structure != "low_rank":
            _divides(blocks, inputs, "the inputs")
        if structure == "block_shuffle":
            rank = min(inputs, outputs)
            _divides(blocks, outputs, "the outputs")
        if structure != "low_rank":
            _divides(blocks, rank, "the rank")
        first_blocks = 1 if structure == "low_rank" else blocks
        last_blocks = blocks if structure == "block_shuffle" else 1
        # [blocks, values out, values in] of each block
        self.first = nn.Parameter(torch.empty(first_blocks, rank // first_blocks, inputs // first_blocks))
        self.weight = nn.Parameter(torch.empty(last_blocks, outputs // last_blocks, rank // last_blocks))
        with torch.no_grad():
            # Variance: as the product of the two, the layer starts like a dense one of the same fan-in.
            self.first.normal_(std=self.first.shape[-1] ** -0.5)
            self.weight.uniform_(-1, 1).mul_(self.weight.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        hidden = _block_diagonal(x, self.first)
        if self.structure == "block_shuffle":
            blocks = self.first.shape[0]
            hidden = hidden.unflatten(-1, (blocks, -1)).transpose(-1, -2).flatten(-2)
        return _block_diagonal(hidden, self.weight)

    @property
    def multiplications(self) -> int:
        """Multiply-adds for one token."""
        return self.first.numel() + self.weight.numel()


def _block_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., blocks * in] by weight [blocks, out, in] -> [..., blocks * out]."""
    if weight.shape[0] == 1:
        return F.linear(x, weight[0])
    return torch.einsum("...bi,boi->...bo", x.unflatten(-1, (weight.shape[0], -1)), weight).flatten(-2)


def _divides(blocks: int, size: int, what: str) -> None:
    if size % blocks:
        fits = nearest_divisor(size, blocks)
        raise InputError(f"blocks: {blocks} does not divide {what} {size}; the nearest that does is {fits}")


class FeedForward(Mlp):
    """Two matrices with a nonlinearity between them."""

    gated = False

    def __init__(
        self,
        width: PositiveInt,
        ratio: PositiveFloat = 4.0,
        structure: Structure = "dense",
        rank: PositiveInt | None = None,
        blocks: PositiveInt = 4,
    ) -> None:
        super().__init__(width)
        hidden = hidden_width(width, ratio, self.gated)
        rank = max(1, width // 2) if rank is None else rank

        def matrix(inputs: int, outputs: int) -> nn.Module:
            if structure == "dense":
                return Linear(inputs, outputs)
            return StructuredLinear(inputs, outputs, structure, rank, blocks)

        self.up = matrix(width, hidden * (2 if self.gated else 1))
        self.out_proj = matrix(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, width] -> [B, T, width]."""
        return self.out_proj(self.site("units", self.activation(self.up(x))))

    @staticmethod
    def activation(h: Tensor) -> Tensor:
        """h [B, T, up] -> [B, T, hidden]; a gated one takes two values for each that it gives, up = 2 hidden."""
        raise NotImplementedError

    def flops(self, length: int) -> int:
        """See `Mlp.flops`."""
        return 2 * length * (multiplications(self.up) + multiplications(self.out_proj))


def hidden_width(width: int, ratio: float, gated: bool) -> int:
    """Values in the middle; gated MLPs have three matrices: two thirds of the width keep the parameter count."""
    return max(1, round(width * ratio * (2 / 3 if gated else 1)))


@register(
    "mlp",
    "gelu",
    family="dense",
    papers=("1606.08415", "2406.16450", "2407.09835"),
    cases=({}, {"structure": "low_rank", "rank": 3}),
)
class Gelu(FeedForward):
    """out(GELU(up x)), the transformer's usual MLP.

    width: size of a token's vector.
    ratio: hidden width over `width`.
    structure: of both matrices: dense, or products of two smaller ones (see `StructuredLinear`).
    rank: values between the two smaller matrices; default width / 2.
    blocks: of the block-diagonal matrices.
    """

    @staticmethod
    def activation(h: Tensor) -> Tensor:
        return F.gelu(h)  # the tanh form is several times slower on CPU


@register(
    "mlp",
    "relu2",
    family="dense",
    papers=("2109.08668", "2406.16450"),
    cases=({}, {"structure": "block_dense", "blocks": 2}),
)
class SquaredRelu(FeedForward):
    """out(ReLU(up x)^2), Primer's MLP.

    width: size of a token's vector.
    ratio: hidden width over `width`.
    structure: of both matrices: dense, or products of two smaller ones (see `StructuredLinear`).
    rank: values between the two smaller matrices; default width / 2.
    blocks: of the block-diagonal matrices.
    """

    @staticmethod
    def activation(h: Tensor) -> Tensor:
        return F.relu(h).square()


@register(
    "mlp", "swiglu", family="gated", papers=("2002.05202", "2406.16450"), cases=({}, {"structure": "block_shuffle"})
)
class SwiGlu(FeedForward):
    """out(SiLU(gate x) * up x); the hidden width is two thirds, so that the parameter count stays.

    width: size of a token's vector.
    ratio: hidden width over `width`, before the two thirds.
    structure: of both matrices: dense, or products of two smaller ones (see `StructuredLinear`).
    rank: values between the two smaller matrices; default width / 2.
    blocks: of the block-diagonal matrices.
    """

    gated = True

    @staticmethod
    def activation(h: Tensor) -> Tensor:
        gate, value = h.chunk(2, dim=-1)
        return F.silu(gate) * value


@register("mlp", "geglu", family="gated", papers=("2002.05202", "2402.19427", "2403.08295"), cases=({}, {"tanh": True}))
class GeGlu(FeedForward):
    """out(GELU(gate x) * up x), as in Griffin and Gemma; the hidden width is two thirds.

    width: size of a token's vector.
    ratio: hidden width over `width`, before the two thirds.
    structure: of both matrices: dense, or products of two smaller ones (see `StructuredLinear`).
    rank: values between the two smaller matrices; default width / 2.
    blocks: of the block-diagonal matrices.
    tanh: take GELU's tanh form (1606.08415, section 2), as Gemma does; it is slower on a CPU.
    """

    gated = True

    def __init__(
        self,
        width: PositiveInt,
        ratio: PositiveFloat = 4.0,
        structure: Structure = "dense",
        rank: PositiveInt | None = None,
        blocks: PositiveInt = 4,
        tanh: bool = False,
    ) -> None:
        super().__init__(width, ratio, structure, rank, blocks)
        self.form = "tanh" if tanh else "none"

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, width] -> [B, T, width]."""
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.out_proj(F.gelu(gate, approximate=self.form) * value)


def build_mlp(name: str, *, width: PositiveInt, **options: Any) -> Mlp:
    """Build a registered MLP.

    name: as `contextlab list mlps` prints it. width: size of a token's vector. options: the MLP's own.
    Raises InputError on unknown, ill-typed or impossible names and options, with the nearest valid choice.
    """
    mlp = registry.lookup("mlp", name).build(width=width, **options)
    assert isinstance(mlp, Mlp)
    return mlp
