"""Forms around another form: its inputs rotated, scaled, or some of them kept dense beside it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from contextlab import registry
from contextlab.mixers.forms.base import LinearForm
from contextlab.ops import bits as packing
from contextlab.ops.dense import dense
from contextlab.ops.hadamard import hadamard, products
from contextlab.registry import register

_FOUR: dict[str, Any] = {"form": "int", "options": {"bits": 4, "group": 8}}


class Wrapped(LinearForm):
    """What the forms of this file share: a form `inner` of the same sizes, without a bias, that does the rounding."""

    def __init__(
        self, inputs: PositiveInt, outputs: PositiveInt, bias: bool, form: str, options: dict[str, Any] | None
    ) -> None:
        super().__init__(inputs, outputs, bias)
        entry = registry.lookup("linear", form)
        found = entry.check(dict(options or {}), path="options", given=("inputs", "outputs", "bias"))
        self.inner: LinearForm = entry.factory.empty(inputs, outputs, False, **found)  # type: ignore[attr-defined]

    @abstractmethod
    def moved(self, x: Tensor) -> Tensor:
        """What the inner form is given, [..., I], of inputs [..., I]."""

    def dense(self) -> Tensor:
        """See `LinearForm.dense`: what the whole does with each unit vector."""
        one = torch.eye(self.in_features, dtype=self.dtype, device=self._buffers["like"].device)  # type: ignore[union-attr]
        return self.inner.dense() @ self.moved(one).T

    @property
    def multiplications(self) -> int:
        """See `LinearForm.multiplications`."""
        return self.inner.multiplications

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        y: Tensor = self.inner(self.moved(x))
        return y if self.bias is None else y + self.bias


@register(
    "linear",
    "rotated",
    family="bits",
    papers=("2404.00456",),
    cases=(_FOUR, {"form": "int", "options": {"bits": 4, "latent": True}}, {"form": "nvfp4"}),
)
class Rotated(Wrapped):
    """A form of the weight and inputs that a randomised Hadamard matrix has rotated: exact but for the form's rounding.

    y = Q(W H) (H^T x). The rotation spreads what is large, so that fewer bits lose less (QuaRot). There norms and
    neighbouring layers take the rotations in; here each layer has its own, in front of it, so that layers of any mixer
    can have it: it costs a transform of the inputs (`ops.hadamard`) and an eighth of a byte for each input.

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    form: that stores the rotated weight, by name.
    options: of that form.
    seed: of the signs that make the rotation random.
    """

    def __init__(
        self,
        inputs: PositiveInt,
        outputs: PositiveInt,
        bias: bool,
        *,
        form: str = "int",
        options: dict[str, Any] | None = None,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        super().__init__(inputs, outputs, bias, form, options)
        drawn = torch.randint(2, (inputs,), generator=torch.Generator().manual_seed(seed), device="cpu")
        self.register_buffer("signs", packing.pack(drawn.to(torch.uint8), 1).to(torch.empty(0).device))

    def moved(self, x: Tensor) -> Tensor:
        """See `Wrapped.moved`: x H, [..., I]."""
        signs = self._buffers["signs"]
        assert signs is not None
        ones = packing.unpack(signs, 1, self.in_features).to(x.dtype)
        return hadamard(x, 1 - 2 * ones)

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """See `LinearForm.assign`."""
        self.inner.assign(self.moved(weight))

    @property
    def multiplications(self) -> int:
        """See `LinearForm.multiplications`."""
        return self.inner.multiplications + products(self.in_features)


@register("linear", "scaled", family="bits", papers=("2306.00978",), cases=(_FOUR, {"form": "mxfp4"}))
class Scaled(Wrapped):
    """A form of the weight with each input's column scaled, and the inputs divided by as much.

    y = Q(W diag(s)) (x / s): what has a large s is rounded in finer steps (AWQ). There the division is taken in by the
    layer before; here it stays, a number for each input. A weight alone says nothing of s, which is then 1: the
    conversion `awq` searches it.

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    form: that stores the scaled weight, by name.
    options: of that form.
    """

    def __init__(
        self,
        inputs: PositiveInt,
        outputs: PositiveInt,
        bias: bool,
        *,
        form: str = "int",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(inputs, outputs, bias, form, options)
        self.register_buffer("scale", torch.ones(inputs))

    def moved(self, x: Tensor) -> Tensor:
        """See `Wrapped.moved`: x / s, [..., I]."""
        scale = self._buffers["scale"]
        assert scale is not None
        return x / scale

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """See `LinearForm.assign`: for the scale that it has."""
        scale = self._buffers["scale"]
        assert scale is not None
        self.inner.assign(weight * scale)

    @torch.no_grad()
    def rescale(self, scale: Tensor) -> None:
        """Take a scale for each input, [I], positive; `assign` is to follow."""
        self._buffers["scale"].copy_(scale)  # type: ignore[union-attr]


@register("linear", "outliers", family="bits", papers=("2208.07339",), cases=({"share": 0.1, **_FOUR}, {}))
class Outliers(Wrapped):
    """A few inputs' columns dense beside a form of all others (LLM.int8's split).

    y = Q(W without them) x + W_dense x_dense; the dense columns can be trained. Which they are is fixed, not found anew
    for each token as there; a weight alone takes those with the largest number, the conversion `outliers` those with
    the largest inputs. Their codes in the form are zeros.

    inputs: of the layer.
    outputs: of the layer.
    bias: whether there is one.
    share: of the inputs that are dense; one at least.
    form: that stores the others, by name.
    options: of that form.
    """

    def __init__(
        self,
        inputs: PositiveInt,
        outputs: PositiveInt,
        bias: bool,
        *,
        share: Annotated[float, Field(gt=0, le=1)] = 0.01,
        form: str = "int",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(inputs, outputs, bias, form, options)
        count = min(inputs, max(1, round(share * inputs)))
        self.register_buffer("places", torch.arange(count, dtype=torch.int32))
        self.kept = nn.Parameter(torch.zeros(outputs, count))

    @property
    def columns(self) -> Tensor:
        """[count] int64: the inputs that are dense."""
        places = self._buffers["places"]
        assert places is not None
        return places.long()

    def moved(self, x: Tensor) -> Tensor:
        """See `Wrapped.moved`: x itself."""
        return x

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """See `LinearForm.assign`."""
        self.split(weight, weight.abs().amax(0))

    @torch.no_grad()
    def split(self, weight: Tensor, size: Tensor) -> None:
        """Take a weight [O, I] with those of its columns dense that have the largest of `size` [I]."""
        chosen = size.topk(self.kept.shape[1]).indices.sort().values
        self._buffers["places"].copy_(chosen)  # type: ignore[union-attr]
        rest = weight.index_fill(1, chosen, 0)
        self.inner.assign(rest)
        self.kept.copy_((weight - self.inner.dense())[:, chosen])

    def dense(self) -> Tensor:
        """See `LinearForm.dense`."""
        return self.inner.dense().index_add(1, self.columns, self.kept)

    @property
    def multiplications(self) -> int:
        """See `LinearForm.multiplications`."""
        return self.inner.multiplications + self.kept.numel()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        return super().forward(x) + dense(x[..., self.columns], self.kept)
