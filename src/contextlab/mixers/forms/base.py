"""The contract of linear forms: modules that stand in a linear layer's place and store its weights in their own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from contextlab import registry
from contextlab.ops.dense import dense
from contextlab.ops.rounding import noise_of, straight_through

AT_ONCE = 1 << 17
"""Numbers of a packed weight that are made dense at once where there are few tokens: half a megabyte in float32."""
FEW_TOKENS = 16


class LinearForm(nn.Module, ABC):
    """Base of the forms. All that a form holds are parameters and buffers, so that its `state_dict` is the file.

    It is no `nn.Linear`: `mixers.layers.is_plain` says no, so that mixers call it and never read its weight.

    inputs, outputs: sizes. bias: whether there is one.
    """

    exact_gradients = True
    """Whether gradients in training are those of the product that it computes, and not rounded themselves."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.register_buffer("like", torch.empty(0), persistent=False)  # has no bytes; the model's dtype shows in it

    @classmethod
    def empty(cls, inputs: int, outputs: int, bias: bool, **options: Any) -> Self:
        """One that a file is loaded into; under `torch.device("meta")` it takes no memory. options: the form's own."""
        return cls(inputs, outputs, bias, **options)

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """The form's nearest to a dense layer, of the same dtype and device.

        weight: [O, I] float. bias: [O] or None. options: the form's own. It draws nothing: the same weight gives the
        same form.
        """
        made = cls.beside(weight, bias, **options)
        made.assign(weight.detach())
        return made

    @classmethod
    @torch.no_grad()
    def beside(cls, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """One that a weight [O, I] is yet to be taken into: of its sizes, dtype and device, with the bias [O]."""
        outputs, inputs = weight.shape
        made = cls.empty(inputs, outputs, bias is not None, **options).to(device=weight.device, dtype=weight.dtype)
        if bias is not None and made.bias is not None:
            made.bias.copy_(bias)
        return made

    @classmethod
    def nbytes(cls, inputs: int, outputs: int, bias: bool, dtype: torch.dtype = torch.float32, **options: Any) -> int:
        """The exact bytes of its parameters and buffers in a model of this dtype, without making it."""
        with torch.device("meta"):
            made = cls.empty(inputs, outputs, bias, **options).to(dtype)
        return sum(each.numel() * each.element_size() for each in made.state_dict().values())

    @abstractmethod
    def assign(self, weight: Tensor) -> None:
        """Take what is nearest to weight [O, I] into the form's own tensors, in place."""

    @abstractmethod
    def dense(self) -> Tensor:
        """[O, I], what it computes with, in `dtype`."""

    def read(self, x: Tensor) -> Tensor:
        """What inputs x [..., I] are to the form, [..., I]: x itself, or rounded where the form says so."""
        return x

    @property
    def weight(self) -> Tensor:
        """[O, I]: the parameter that is trained, where there is one, else `dense()`."""
        own = self._parameters.get("weight")
        return self.dense() if own is None else own

    @property
    def holds_weight(self) -> bool:
        """Whether its weight is a parameter, as a dense layer's is, and nothing else is held but a bias."""
        return set(self.state_dict()) <= {"weight", "bias"}

    @property
    def dtype(self) -> torch.dtype:
        """Of its floating numbers, in which it computes."""
        like = self._buffers["like"]
        assert like is not None
        return like.dtype

    @property
    def multiplications(self) -> int:
        """Multiply-adds for one token."""
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        return dense(x, self.dense(), self.bias)

    def extra_repr(self) -> str:
        """Sizes, as of `nn.Linear`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class RoundedForm(LinearForm):
    """Base of the forms whose numbers are rounded to few values.

    A subclass says how: `quantise`, `dequantise`, `layout`. Packed, the form holds codes in buffers and nothing of its
    weight is trained. With `latent=True` it holds the weight [O, I] itself as a parameter, computes with what the
    packed form would, and gradients pass straight through the rounding (1308.3432); `packed()` is the packed form of
    it, which computes the same.

    inputs, outputs, bias: as of `LinearForm`.
    latent: hold the weight that is trained, not the codes.
    rounding: of a latent weight in training: to the nearest, or up or down at random, right on average. What is not
        being trained is always rounded to the nearest.
    seed: of the random rounding (`ops.rounding.noise_of`).
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool, latent: bool, rounding: str = "nearest", seed: int = 0
    ) -> None:
        super().__init__(inputs, outputs, bias)
        self.latent, self.rounding, self.seed = latent, rounding, seed
        if latent:
            self._parameters["weight"] = nn.Parameter(torch.zeros(outputs, inputs))
            return
        for name, (shape, dtype) in self.layout(inputs, outputs).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    @abstractmethod
    def layout(self, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Each buffer's shape and dtype; None is the model's."""

    @abstractmethod
    def quantise(self, weight: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """weight [O, I] -> codes uint8 or int8 [O, I] as "codes", and what else `layout` names, of its shape.

        noise: [O, I] in [0, 1) to round by; None rounds to the nearest.
        """

    @abstractmethod
    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """[O, I] in this dtype, from what `quantise` gave."""

    def pack(self, codes: Tensor) -> Tensor:
        """codes [O, I] as they are stored, [O, bytes]."""
        return codes

    def unpack(self, codes: Tensor) -> Tensor:
        """What `pack` packed, [O, I]."""
        return codes

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """See `LinearForm.assign`."""
        if self.latent:
            self.weight.copy_(weight)
        else:
            self.store(self.quantise(weight))

    @torch.no_grad()
    def store(self, parts: Mapping[str, Tensor]) -> None:
        """Take what `quantise` gave, codes [O, I] among it, into the buffers; whoever rounds better writes here."""
        for name, part in parts.items():
            self._buffers[name].copy_(self.pack(part) if name == "codes" else part)  # type: ignore[union-attr]

    def parts(self) -> dict[str, Tensor]:
        """What `quantise` gave, codes [O, I] among it."""
        return {
            name: self.unpack(part) if name == "codes" else part
            for name, part in self._buffers.items()
            if part is not None and name != "like"
        }

    def dense(self) -> Tensor:
        """See `LinearForm.dense`; of a latent weight with gradients that pass straight through."""
        if not self.latent:
            return self.dequantise(self.parts(), self.dtype)
        weight = self.weight
        with torch.no_grad():
            random = self.training and self.rounding == "stochastic"
            parts = self.quantise(weight, noise_of(weight, self.seed) if random else None)
            rounded = self.dequantise(parts, weight.dtype)
        return straight_through(rounded, weight)

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows `begin` up to `end` of `dense()`, [end - begin, I], of a packed form."""
        parts = {
            name: part[begin:end] if part.ndim and len(part) == self.out_features else part
            for name, part in self._buffers.items()
            if part is not None and name != "like"
        }
        return self.dequantise({**parts, "codes": self.unpack(parts["codes"])}, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs].

        Without gradients on a CPU a large packed weight is made dense some rows after others, which stay in the cache:
        a copy of the whole would take longer than the product, and as much memory as the dense layer.
        """
        few = x.numel() <= FEW_TOKENS * self.in_features
        at_once = max(1, (AT_ONCE if few else 16 * AT_ONCE) // self.in_features)
        if (
            self.latent
            or torch.is_grad_enabled()
            or x.device.type != "cpu"
            or at_once >= self.out_features
            or torch.compiler.is_compiling()
        ):
            return super().forward(x)
        ends = range(0, self.out_features, at_once)
        y = torch.cat([dense(x, self.rows(at, min(at + at_once, self.out_features))) for at in ends], -1)
        return y if self.bias is None else y + self.bias

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The options that make it again, but for those of its training."""

    @torch.no_grad()
    def packed(self) -> Self:
        """The same layer with its codes alone: it computes what this one does when it is not being trained."""
        return type(self).of(self.weight, self.bias, **self.options()) if self.latent else self


def build_form(name: str, *, inputs: int, outputs: int, bias: bool = False, **options: Any) -> LinearForm:
    """An empty form by its registered name, as `contextlab list linears` prints it. options: the form's own.

    Raises InputError on unknown, ill-typed or impossible names and options, with the nearest valid choice.
    """
    form = registry.lookup("linear", name).build(inputs=inputs, outputs=outputs, bias=bias, **options)
    assert isinstance(form, LinearForm)
    return form


def grouped(weight: Tensor, group: int | None) -> Tensor:
    """weight [O, I] as [O, groups, group], with zeros after the last column; None is one group a row."""
    size = weight.shape[1] if group is None else min(group, weight.shape[1])
    short = -weight.shape[1] % size
    padded = nn.functional.pad(weight, (0, short)) if short else weight
    return padded.unflatten(1, (-1, size))


def groups_of(inputs: int, group: int | None) -> int:
    """How many groups `grouped` makes of so many inputs."""
    return 1 if group is None else -(-inputs // min(group, inputs))


def spread(scale: Tensor, inputs: int, group: int | None) -> Tensor:
    """Numbers of groups [O, groups] as [O, inputs], or [O, 1] where a row is one group."""
    if scale.shape[1] == 1:
        return scale
    assert group is not None
    return scale.repeat_interleave(group, 1)[:, :inputs]
