"""The Conversion contract: a trained model in, a cheaper one out, and what was done to each of its layers."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from contextlab import registry
from contextlab.allocator import give_back
from contextlab.convert.calibration import Calibration
from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec
from contextlab.models.io import require_own


@dataclass(frozen=True)
class Change:
    """What was done to one part of a model.

    layer: the part's name in the model that was given, such as "blocks.0.mlp.up"; "blocks.3" of a whole block.
    did: what, in a few words.
    error: what it cost, a share; 0 where nothing is lost. `of` says of what.
    of: "weights", ||W - W'|| / ||W||; "outputs", ||X W^T - X W'^T|| / ||X W^T|| on the calibration's inputs X; or
        another measure of the conversion's own, which its docstring names.
    bytes_before, bytes_after: of what is stored for the part.
    """

    layer: str
    did: str
    error: float
    of: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Converted:
    """What a conversion gives: a new model, in evaluation mode, and a line for each part that was changed."""

    model: Model
    lines: list[Change] = field(default_factory=list)


@dataclass(frozen=True)
class Conversion(ABC):
    """Base of every way from a trained model to a cheaper one. Subclasses are frozen dataclasses; fields are options.

    A subclass writes `plan` and `apply`. The model that is given is never changed.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Of "calibration" (prompts that the model is read on), "training" and "models" (others beside the one given)."""
    nothing: ClassVar[Mapping[str, Any] | None] = None
    """Options with which the model stays as it is, so that it answers as before; None where there are none."""
    places_by_data: ClassVar[bool] = False
    """Whether the data choose which of like layers are changed, so that `plan` is right up to their order."""

    by_data: ClassVar[tuple[str, ...]] = ()
    """Options of layers whose values the data choose, so that `plan` has others in their place."""

    takes: ClassVar[tuple[str, ...] | None] = None
    """Mixers whose layers it changes, where it is for these alone; None: whatever a model is made of."""

    def __post_init__(self) -> None:
        """Called by dataclasses. Raises InputError on options that the annotations do not allow."""
        registry.check_fields("conversion", self)

    @property
    def name(self) -> str:
        """The name that it is registered with; its class' own where it is not."""
        entry = registry.entry_of("conversion", self)
        return type(self).__name__ if entry is None else entry.name

    @property
    def family(self) -> str:
        """The family that it is registered with; "" where it is not."""
        entry = registry.entry_of("conversion", self)
        return "" if entry is None else entry.family

    @property
    def options(self) -> dict[str, Any]:
        """The options that are not their defaults, but for models."""
        found = {each.name: (getattr(self, each.name), each.default) for each in dataclasses.fields(self)}
        return {name: value for name, (value, default) in found.items() if value != default and not _models(value)}

    @abstractmethod
    def plan(self, spec: ModelSpec) -> ModelSpec:
        """The spec of what comes out, found without weights. Raises InputError where the model cannot be converted.

        Where the data choose (which blocks to drop, say), it is that of a model all of whose layers are alike.
        """

    @abstractmethod
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """Convert a model that `plan` has allowed, in evaluation mode; it must be left as it is.

        What is not changed the new model may share with it: `set_apart` is done afterwards.
        data: there where the conversion needs calibration; else it may be, for errors of outputs to be measured.
        """

    def __call__(
        self, model: Model, data: Calibration | None = None, generator: torch.Generator | None = None
    ) -> Converted:
        """The converted model, and what was done to each layer.

        data: what the model is read on, where that is needed. generator: of what is drawn; None seeds one with 0.

        Raises InputError where data are missing, or the model cannot be converted.
        """
        require_own(model, self.name)
        if "calibration" in self.needs and data is None:
            raise InputError(f"{self.name}: needs data to calibrate on; give a task or text (--data TASK or FILE)")
        self.plan(model.spec)
        before = model.training
        model.eval()
        try:
            made = self.apply(model, data, torch.Generator().manual_seed(0) if generator is None else generator)
        finally:
            model.train(before)
        set_apart(made.model, model)
        return made


def _models(value: Any) -> bool:
    """Whether an option is a model, or several."""
    return isinstance(value, nn.Module) or (isinstance(value, tuple | list) and any(map(_models, value)))


def copied(model: Model) -> Model:
    """A model of its own with the same weights, in evaluation mode."""
    return copy.deepcopy(model).eval()


def set_apart(new: Model, old: Model) -> None:
    """Give a model that shares tensors with another copies of its own.

    They are made last, when what the conversion itself took is free again: its peak is then that of two models.
    """
    give_back()
    theirs = {each.data_ptr() for each in (*old.parameters(), *old.buffers())}
    for tensor in (*new.parameters(), *new.buffers()):
        if tensor.data_ptr() in theirs:
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def module_nbytes(module: nn.Module) -> int:
    """Bytes of all that is saved of a module: parameters and persistent buffers, what is shared once."""
    held = {id(each): each.nbytes for each in module.state_dict(keep_vars=True).values()}
    return sum(held.values())


@torch.no_grad()
def relative_error(before: Tensor, after: Tensor, moment: Tensor | None = None) -> tuple[float, str]:
    """How far a layer's outputs are from what they were, and "outputs"; without a moment, its weights, and "weights".

    before, after: [O, I], the layer's weight. moment: [I, I], X^T X of its inputs X: then the error is
    ||X D^T|| / ||X W^T|| with D = W - W', the root of tr(D M D^T) / tr(W M W^T).
    """
    of = "weights" if moment is None else "outputs"
    norm, lost = (_norm(each.double(), moment) for each in (before, before - after))
    return (lost / norm if norm > 0 else float(lost > 0)), of


def _norm(weight: Tensor, moment: Tensor | None) -> float:
    """||W||, or ||X W^T|| of a weight [O, I] and the moment [I, I] of X."""
    squared = weight.square() if moment is None else weight @ moment * weight
    return max(0.0, float(squared.sum())) ** 0.5
