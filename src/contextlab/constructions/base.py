"""Construction: weights of a model that carries out a known algorithm, written down rather than trained."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec
from contextlab.prompt import Learner, Task
from contextlab.registry import register

C = TypeVar("C", bound="type[Construction]")


@dataclass(frozen=True)
class Construction(ABC):
    """Base: a frozen dataclass of its options that says what the model is and what its weights are."""

    name: ClassVar[str]
    """As a model is registered, set by `construction`."""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """What the model's ModelSpec says, sizes included."""

    @abstractmethod
    def write(self, model: Model) -> None:
        """Write the weights, all of which are zero."""

    @abstractmethod
    def learner(self) -> Learner:
        """The learner that the model equals on every prompt of a task that it fits, at every prefix."""

    @abstractmethod
    def check_task(self, task: Task) -> None:
        """Raises InputError where the weights do not fit the task's prompts."""

    def spec(self) -> ModelSpec:
        """The model's ModelSpec, which names this construction."""
        options = {each.name: _plain(getattr(self, each.name)) for each in dataclasses.fields(self)}
        return ModelSpec.parse({**self.fields(), "construction": {"name": self.name, "options": options}})

    def write_into(self, model: Model) -> None:
        """Write the weights into a model that was built from `spec()`, in its dtype."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            self.write(model)

    def build(self, dtype: torch.dtype = torch.float32) -> Model:
        """The model, with weights rounded once, to `dtype`."""
        model = Model(self.spec()).to(dtype)
        self.write_into(model)
        return model


def construction(name: str, *, papers: Iterable[str], cases: Iterable[Mapping[str, Any]] = ({},)) -> Callable[[C], C]:
    """Decorator: make a Construction known as the model `name`. papers, cases: as of `registry.register`."""

    def add(made: C) -> C:
        def build(*values: Any, **options: Any) -> ModelSpec:
            return made(*values, **options).spec()

        build.__name__ = build.__qualname__ = name
        build.__module__, build.__doc__ = made.__module__, made.__doc__
        build.__annotations__ = {**get_type_hints(made.__init__, include_extras=True), "return": ModelSpec}
        build.__signature__ = inspect.signature(made).replace(return_annotation="ModelSpec")  # type: ignore[attr-defined]
        build.construction = made  # type: ignore[attr-defined]
        made.name = name
        register("model", name, papers=papers, cases=cases, family="construction")(build)
        return made

    return add


class Stream:
    """Where in a token's vector each named part stands. sizes: of the parts, in order."""

    def __init__(self, **sizes: int) -> None:
        self.at: dict[str, slice] = {}
        self.width = 0
        for name, size in sizes.items():
            self.at[name] = slice(self.width, self.width + size)
            self.width += size

    def __getitem__(self, name: str) -> slice:
        return self.at[name]


def reads_examples(dimensions: int, examples: int | None = None) -> dict[str, Any]:
    """What a ModelSpec says of a model of mixers alone that reads (x_i, x_{i-1}, y_{i-1}) and predicts y.

    examples: the most in a prompt, each of which has a position of its own; None for no positions.
    """
    positions = {"position": "none"} if examples is None else {"position": "learned", "max_length": examples}
    return {
        "heads": 1, "mlp": "none", "norm": "none", **positions, "read_in": "vector", "input_size": 2 * dimensions + 1,
        "output_size": 1,
    }  # fmt: skip


def put(weight: Tensor, rows: slice, columns: slice, value: float | Tensor = 1.0) -> None:
    """Set a part of weight [outputs, inputs]: to value times the identity, or to a matrix [rows, columns]."""
    part = weight[rows, columns]
    if isinstance(value, Tensor):
        part.copy_(value)
    else:
        part.copy_(value * torch.eye(*part.shape, dtype=weight.dtype, device=weight.device))


def weight_of(layer: Any) -> Tensor:
    """The matrix of a linear or embedding layer, [outputs, inputs] or [ids, width]."""
    assert isinstance(layer, nn.Linear | nn.Embedding)
    return layer.weight


def require_examples(name: str, task: Task, dimensions: int, examples: int | None = None) -> None:
    """Refuse a task whose prompts are no examples (x, y) of this size, paired as `tasks.base.lay_out` does.

    examples: the most that the model can read; None for any number. Raises InputError.
    """
    layout, size, count = (getattr(task, each, None) for each in ("layout", "dimensions", "examples"))
    if layout is None or size is None or count is None or task.output_size != 1:
        raise InputError(f"{name} reads prompts of examples (x, y) with one output, such as linear_regression draws")
    if layout != "paired":
        raise InputError(
            f"{name} reads the layout 'paired', the task has {layout!r}; set the task's layout to 'paired'"
        )
    if size != dimensions:
        raise InputError(f"{name} is written for dimensions {dimensions}, the task has {size}; give dimensions: {size}")
    if examples is not None and count > examples:
        raise InputError(f"{name} reads at most {examples} examples, the task has {count}; give examples: {count}")


def require_tokens(name: str, task: Task, vocabulary: int) -> None:
    """Refuse a task whose prompts are no tokens of this vocabulary. Raises InputError."""
    if task.read_in != "token" or task.output_size != task.input_size:
        raise InputError(f"{name} reads and predicts tokens of one vocabulary, such as induction_head draws")
    if task.input_size != vocabulary:
        raise InputError(
            f"{name} is written for vocabulary {vocabulary}, the task has {task.input_size} tokens; give vocabulary: "
            f"{task.input_size}"
        )


def _plain(value: Any) -> Any:
    """Tuples as lists, as a file has them."""
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
