"""A form with a low-rank change beside it, which is trained where the form's own numbers are codes."""

from __future__ import annotations

from typing import Annotated, Any, Self

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from contextlab.mixers.forms.base import LinearForm
from contextlab.mixers.forms.low_rank import nearest_of_rank
from contextlab.mixers.forms.wrapped import Wrapped
from contextlab.ops.dense import dense
from contextlab.registry import register


@register(
    "linear",
    "adapted",
    family="low-rank",
    papers=("2305.14314", "2402.02446"),
    cases=(
        {"rank": 2, "form": "int", "options": {"bits": 4, "group": 8}},
        {"rank": 3, "alpha": 6.0, "form": "ternary"},
        {"rank": 2, "form": "low_rank", "options": {"rank": 3}},
    ),
)
class Adapted(Wrapped):
    """A form with an adapter that stays beside it: y = Q(W) x + (alpha / rank) B A x.

    B [outputs, rank] and A [rank, inputs] are floating numbers that can be trained while the form's codes stay as they
    are (QLoRA, 2305.14314, eq. 5; there in bfloat16 beside codes of four bits). A dense weight's nearest has
    the form's own nearest, and in B A the best of what that left out (LQER, 2402.02446, without its scales).

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    rank: of B A; the smaller of inputs and outputs stands in for a larger one.
    alpha: B A counts times alpha / rank; None is `rank`.
    form: that stores the weight, by name.
    options: of that form.
    """

    def __init__(
        self,
        inputs: PositiveInt,
        outputs: PositiveInt,
        bias: bool,
        *,
        rank: PositiveInt,
        alpha: Annotated[float, Field(gt=0)] | None = None,
        form: str = "int",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(inputs, outputs, bias, form, options)
        self.scale = 1.0 if alpha is None else alpha / rank
        rank = min(rank, inputs, outputs)
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.down = nn.Parameter(torch.zeros(rank, inputs))

    @classmethod
    @torch.no_grad()
    def around(cls, stored: LinearForm, generator: torch.Generator, **options: Any) -> Self:
        """One that answers as this form does and becomes its owner: B is zero, A is drawn as LoRA's are in peft.

        stored: loses its bias to what is returned. options: those of the class, its form's name and
            options among them.
        """
        like = stored.get_buffer("like")
        with torch.device("meta"):
            made = cls.empty(stored.in_features, stored.out_features, stored.bias is not None, **options)
        made.inner, made.bias, stored.bias = stored, stored.bias, None
        made.register_buffer("like", torch.empty_like(like), persistent=False)
        made.up = nn.Parameter(torch.zeros(made.up.shape, dtype=like.dtype, device=like.device))
        drawn = torch.rand(made.down.shape, generator=generator, dtype=torch.float32)
        bound = stored.in_features**-0.5  # Kaiming's uniform draw with a = 5 ** 0.5
        made.down = nn.Parameter((2 * bound * drawn - bound).to(device=like.device, dtype=like.dtype))
        return made.train(stored.training)

    def moved(self, x: Tensor) -> Tensor:
        """See `Wrapped.moved`: x itself."""
        return x

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """See `LinearForm.assign`."""
        self.inner.assign(weight)
        up, down = nearest_of_rank((weight - self.inner.dense()) / self.scale, len(self.down))
        self.up.copy_(up)
        self.down.copy_(down)

    def dense(self) -> Tensor:
        """See `LinearForm.dense`."""
        return self.inner.dense() + self.scale * (self.up @ self.down)

    @property
    def multiplications(self) -> int:
        """See `LinearForm.multiplications`."""
        return self.inner.multiplications + len(self.down) * (self.in_features + self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        return super().forward(x) + self.scale * dense(dense(x, self.down), self.up)
