"""The contracts between tasks, learners and models: Prompt, Task, Learner, Predictor."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from contextlab import registry
from contextlab.errors import InputError

HIGHER_IS_BETTER = frozenset({"accuracy", "allowed_accuracy", "exact_match", "solved"})
"""Metrics that are better when larger; all others are errors."""


def wide(prediction: Tensor) -> Tensor:
    """A prediction of any shape in float32, or in float64 if that is what it is: losses and errors are computed so."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


@dataclass
class Prompt:
    """One batch of in-context problems.

    inputs: [B, T, d] float, or [B, T] int64 token ids.
    targets: [B, T, k] float, or [B, T] int64; what the prediction at each position should be.
    scored: [B, T] bool; the positions where a prediction counts.
    shot: [B, T] int64; the number of in-context examples seen before the prediction at this position.
    xs: [B, n, d] float or None; the examples' inputs, before the layout made tokens of them (for learners).
    ys: [B, n, k] float or None; the examples' outputs (as seen in the context, noise included).
    at: [n] int64 or None; the position at which the output of example i is predicted.
    hidden: name -> [B, ...], what drew the prompts (an automaton, a member of a pool), for oracles and for measures;
        no model sees it.
    """

    inputs: Tensor
    targets: Tensor
    scored: Tensor
    shot: Tensor
    xs: Tensor | None = None
    ys: Tensor | None = None
    at: Tensor | None = None
    hidden: dict[str, Tensor] | None = None

    @property
    def batch(self) -> int:
        return self.inputs.shape[0]

    @property
    def length(self) -> int:
        """Tokens in each sequence, T."""
        return self.inputs.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        own = (self.inputs, self.targets, self.scored, self.shot, self.xs, self.ys, self.at)
        return sum(tensor.nbytes for tensor in (*own, *(self.hidden or {}).values()) if tensor is not None)

    def to(self, *args: Any, **kwargs: Any) -> Prompt:
        """Move as `Tensor.to` does; a dtype applies to floating-point tensors only."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None, non_blocking)

        return self._map(lambda name, value: move(value))

    def rows(self, start: int, stop: int) -> Prompt:
        """The prompts start..stop-1 of the batch."""
        return self._map(lambda name, value: value if name == "at" else value[start:stop])

    def take(self, index: Tensor) -> Prompt:
        """The prompts of these numbers, in this order. index: [n] int64, on the prompts' device."""
        return self._map(lambda name, value: value if name == "at" else value[index])

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name: `inputs` [B, T, ...] and so on; those in `hidden` as "hidden.NAME" [B, ...]."""
        found: dict[str, Tensor] = {}

        def note(name: str, value: Tensor) -> Tensor:
            found[name] = value
            return value

        self._map(note)
        return found

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Prompt:
        """The same with other tensors, [B, T, ...] or of any shape, one for each of `tensors()`."""
        return self._map(lambda name, value: tensors[name])

    @staticmethod
    def join(prompts: Sequence[Prompt]) -> Prompt:
        """Batches of the same form as one; `at` is that of the first."""

        def whole(name: str, value: Tensor) -> Tensor:
            parent, _, key = name.partition(".")
            each = [getattr(prompt, parent) for prompt in prompts]
            return value if name == "at" else torch.cat([part[key] for part in each] if key else each)

        return prompts[0]._map(whole)

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Prompt:
        changed: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, dict):
                changed[each.name] = {name: change(f"hidden.{name}", item) for name, item in value.items()}
            else:
                changed[each.name] = None if value is None else change(each.name, value)
        return Prompt(**changed)


def last_scored(prompt: Prompt, among: Tensor | None = None) -> Tensor:
    """Each prompt's last place whose prediction counts, [B] int64; -1 where there is none.

    among: [B, T] bool, places that may be meant; None for all.
    """
    at = torch.arange(prompt.length, device=prompt.scored.device)
    fits = prompt.scored if among is None else prompt.scored & among
    return torch.where(fits, at, -1).amax(1)


def asked_at(clean: Prompt, corrupted: Prompt) -> Tensor:
    """Where each clean prompt asks what its corrupted one asks, too: [B] int64, -1 where there is no such place.

    The last place at which a prediction counts in both, with the same token (or example's x) before it, whose answers
    differ.
    """
    differs = ~_alike(clean.targets, corrupted.targets)
    if clean.xs is None or corrupted.xs is None or clean.at is None:
        same = _alike(clean.inputs, corrupted.inputs)
    else:
        same = torch.zeros_like(differs)
        same[:, clean.at] = _alike(clean.xs, corrupted.xs)
    return last_scored(clean, differs & same & corrupted.scored)


def _alike(one: Tensor, other: Tensor) -> Tensor:
    """Where two [B, T, ...] are the same, [B, T]."""
    same = one == other
    return same.flatten(2).all(2) if same.ndim > 2 else same


Predictor = Callable[..., Tensor]
"""A model (called with `prompt.inputs`) or a Learner (called with the prompt); see `evaluation.predict`."""


class Learner(ABC):
    """A reference algorithm that answers a prompt without training; called exactly as a model is.

    The prediction at each position uses only what a causal model could have seen there. A registered learner that is a
    dataclass holds its fields to their annotations, however it is made.
    """

    def __post_init__(self) -> None:
        """Called by dataclasses. Raises InputError on options that the annotations do not allow."""
        registry.check_fields("learner", self)

    @abstractmethod
    def __call__(self, prompt: Prompt) -> Tensor:
        """The predictions, of the shape of a model's: [B, T, k] float, or [B, T, vocabulary] logits."""


@dataclass(frozen=True)
class Task(ABC):
    """Draws prompts, says what is scored, names the learners that solve it. Subclasses are frozen dataclasses."""

    read_in: ClassVar[Literal["vector", "token"]] = "vector"
    metric: ClassVar[str] = "error"
    """The metric that reports and curves show first; a key of `errors`."""
    higher_is_better: ClassVar[bool] = False
    one_prediction: ClassVar[bool] = False
    """Whether every prompt has one scored position, so that models that read it whole (encoders, pooled) serve, too."""
    unbounded: ClassVar[tuple[str, ...]] = ()  # options that may be larger than counts may
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named difficulties: options that replace the defaults."""

    @property
    @abstractmethod
    def input_size(self) -> int:
        """Width of an input vector, or the number of token ids."""

    @property
    @abstractmethod
    def output_size(self) -> int:
        """Width of a prediction."""

    @abstractmethod
    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw `batch` prompts. The generator must live on `device`; the same state of it gives the same prompts."""

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The prompts with the same question, `asked_at`, in a context that gives it another answer.

        Of the same shape, and as this task draws them or nearly so; the targets are those of that context. In a row for
        which there is none, the prompt is as it was. The generator must live on the prompts' device.
        Raises InputError where the task tells no such context.
        """
        raise InputError(f"corrupt: {task_name(self)} tells no context that gives the same question another answer")

    @abstractmethod
    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """The training loss, a scalar: a mean over the scored positions of the whole batch.

        A trainer that cuts a batch weighs the loss of each part by its number of scored positions.
        """

    @abstractmethod
    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """metric name -> [B, T] values (meaningful where `prompt.scored`)."""

    @abstractmethod
    def learners(self) -> dict[str, Learner]:
        """The learners to compare with, the best known one first."""

    def splits(self) -> dict[str, Task]:
        """Named variations to evaluate on; the first is the training distribution itself, called 'train'."""
        return {"train": self}

    def chance(self) -> Mapping[str, float]:
        """The value of each metric that a predictor which has learned nothing gets."""
        return {}

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """What is known of each prediction, to group errors by: name -> [B, T] (meaningful where `prompt.scored`)."""
        at = torch.arange(prompt.length, device=prompt.scored.device)
        return {"position": at.expand(prompt.batch, -1), "shot": prompt.shot}

    def text(self, tokens: Sequence[int]) -> str:
        """Token ids as a person reads them."""
        return " ".join(map(str, tokens))

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """One prompt as a person reads it: example after example, or token after token."""
        lines = []
        if prompt.xs is not None and prompt.ys is not None:
            for x, y in zip(prompt.xs[row].tolist(), prompt.ys[row].tolist(), strict=True):
                lines.append(f"{_numbers(x)} -> {_numbers(y)}")
        else:
            for x, y, scored in zip(
                prompt.inputs[row].tolist(), prompt.targets[row].tolist(), prompt.scored[row].tolist(), strict=True
            ):
                lines.append(_numbers(x) + (f"   [{_numbers(y)}]" if scored else ""))
        return "\n".join(lines)

    @property
    def growing(self) -> list[str]:
        """The options that a curriculum may let grow."""
        return [each.name for each in dataclasses.fields(self) if each.init]

    def replace(self, **options: Any) -> Any:
        """The same task with some options changed (used by splits and curricula)."""
        return dataclasses.replace(self, **options)


def task_name(task: Task) -> str:
    """The name that it is registered by; else that of its class."""
    entry = registry.entry_of("task", task)
    return type(task).__name__ if entry is None else entry.name


def _numbers(values: list[float] | float) -> str:
    """A vector in few characters."""
    values = values if isinstance(values, list) else [values]
    shown = " ".join(f"{value: .2f}" for value in values[:8])
    return shown + (f" ... ({len(values)})" if len(values) > 8 else "")
