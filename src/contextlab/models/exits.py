"""Early exits: tokens that go no further up the stack once the model is sure of them (CALM, 2207.07061)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from contextlab.errors import InputError
from contextlab.spec import Spec


class ExitSpec(Spec):
    """When a token goes no further up the stack; its prediction is then made of the vector that it has there.

    CALM's rules (2207.07061, sections 3.1 and 3.5), outside of training. What layers above would have written of the
    token into their states they write of that vector (section 3.1, state propagation): attention its keys and values, a
    recurrent mixer what it makes of it.

    by: how sure the model is after a layer. "softmax": the difference of the two highest probabilities that the
        read-out gives to the normed vector, which costs a read-out a layer; "saturation": the cosine of the vectors
        before and after the layer.
    threshold: a token leaves where this is above; at 1 none does.
    first: layers that each token goes through at least.
    decay: makes the threshold fall along a text: at place t it is 0.9 threshold + 0.1 exp(-decay t / length), as early
        tokens that are wrong spoil more (eq. 5); None leaves it as it is.
    length: N of that formula, tokens of a text; the paper's are those that are written, here the prompt counts, too.
    """

    by: Literal["softmax", "saturation"] = "softmax"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    first: PositiveInt = 1
    decay: NonNegativeFloat | None = None
    length: PositiveInt | None = None

    @model_validator(mode="after")
    def _whole(self) -> ExitSpec:
        if (self.decay is None) != (self.length is None):
            raise InputError("decay and length belong together: give both, for example decay=4 and length=512, or none")
        return self

    def thresholds(self, places: Tensor) -> Tensor:
        """At places [B, T] of tokens in their texts, float32 of the same shape."""
        if self.decay is None or self.length is None:
            return torch.full_like(places, self.threshold, dtype=torch.float32)
        fall = (-self.decay * places.clamp_min(0) / self.length).exp()
        return (0.9 * self.threshold + 0.1 * fall).clamp(0, 1).float()


class Exits:
    """Which tokens of one reading have left, and after which layer.

    used: [B, T] int64, layers that each went through so far; 0 at padding.
    gone: [B, T] bool, where it goes no further.
    """

    def __init__(self, spec: ExitSpec, layers: int, mask: Tensor | None, places: Tensor) -> None:
        """layers: of the model. mask: [B, T] bool, where there are tokens. places: [B, T] of them in their texts."""
        self.spec, self.layers = spec, layers
        self.threshold = spec.thresholds(places)
        self.gone = torch.zeros_like(places, dtype=torch.bool) if mask is None else ~mask
        self.used = torch.zeros_like(places)
        self.number = 0  # layers that were passed
        self.all_gone = False

    def kept(self, before: Tensor, after: Tensor) -> Tensor:
        """after [B, T, D], but `before` of tokens that have left."""
        return torch.where(self.gone[..., None], before, after)

    def passed(self, before: Tensor, after: Tensor, read_out: Callable[[Tensor], Tensor]) -> Tensor:
        """The stream after a layer [B, T, D]; from here on tokens of which the model is sure are gone.

        before, after: [B, T, D], the stream before the layer, and as the layer made it. read_out: of [B, T, D].
        """
        x = self.kept(before, after)
        self.number += 1
        self.used = torch.where(self.gone, self.used, self.number)
        if self.spec.first <= self.number < self.layers and not self.all_gone:
            self.gone = self.gone | (self._sure(before, x, read_out) > self.threshold)
            self.all_gone = bool(self.gone.all())
        return x

    def _sure(self, before: Tensor, after: Tensor, read_out: Callable[[Tensor], Tensor]) -> Tensor:
        if self.spec.by == "saturation":
            return torch.cosine_similarity(before.float(), after.float(), dim=-1).clamp_max(1)
        two = read_out(after).float().softmax(-1).topk(2, -1).values
        return two[..., 0] - two[..., 1]
