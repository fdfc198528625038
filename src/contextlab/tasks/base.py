"""Bases of the tasks: prompts of (x, y) examples, and prompts of tokens."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab import registry
from contextlab.errors import InputError
from contextlab.prompt import Prompt, Task, wide

Layout = Literal["paired", "interleaved"]


def check_options(task: Task) -> None:
    """Check a task's fields against their annotations. Raises InputError as the registry does."""
    registry.check_fields("task", task)


@dataclass(frozen=True)
class TokenTask(Task):
    """Base: the model reads token ids and answers with logits; cross-entropy over the scored positions.

    Subclasses draw `targets` [B, T] int64 and, for tasks without one right answer, choose cross-entropy as `metric`.
    """

    read_in: ClassVar[Literal["vector", "token"]] = "token"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def output_size(self) -> int:
        return self.input_size  # the same as input_size, so that embeddings can be tied

    def symbol(self, token: int) -> str:
        """A token as `contextlab show task --sample` prints it."""
        return str(token)

    def text(self, tokens: Sequence[int]) -> str:
        """See `Task.text`: as symbols."""
        return " ".join(map(self.symbol, tokens))

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean cross-entropy in nats over the scored positions. prediction: logits [B, T, output_size]."""
        each = F.cross_entropy(wide(prediction).transpose(1, 2), prompt.targets, reduction="none")
        return (each * prompt.scored).sum() / prompt.scored.sum().clamp_min(1)

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """accuracy (1 where the largest logit is the target's) and cross_entropy in nats, [B, T]."""
        return {
            "accuracy": (prediction.argmax(-1) == prompt.targets).float(),
            "cross_entropy": F.cross_entropy(wide(prediction).transpose(1, 2), prompt.targets, reduction="none"),
        }

    def answered(self, prompt: Prompt, inputs: Tensor) -> Prompt:
        """A prompt with other inputs [B, T], and what the best learner, which must make no error, answers to them."""
        other = replace(prompt, inputs=inputs)
        answers = next(iter(self.learners().values()))(other).argmax(-1)
        return replace(other, targets=torch.where(prompt.scored, answers, prompt.targets))

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The tokens as symbols; after a scored one `[answer]`, what should be predicted there."""
        parts = []
        for token, target, scored in zip(
            prompt.inputs[row].tolist(), prompt.targets[row].tolist(), prompt.scored[row].tolist(), strict=True
        ):
            parts.append(self.symbol(token) + (f"[{self.symbol(target)}]" if scored else ""))
        return " ".join(parts)


@dataclass(frozen=True)
class ExamplesTask(Task):
    """Base: prompts of n examples (x, y) of one function each; squared error of y.

    Subclasses define `draw`. Prediction i has seen i examples, i = 0 .. examples - 1. Targets [B, T, k] are y as seen
    in the context, noise included.

    dimensions: d, the size of x.
    examples: n, the (x, y) problems in a prompt.
    layout: "paired" has n tokens (x_i, x_{i-1}, y_{i-1}), "interleaved" has 2 n tokens (x_1, 0), (0, y_1), ...; the
        prediction of y_i is read at the token that first shows x_i.
    """

    metric: ClassVar[str] = "squared_error"

    dimensions: PositiveInt = 20
    examples: PositiveInt = 40
    layout: Layout = "paired"

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def input_size(self) -> int:
        pair = self.dimensions + self.output_size
        return pair if self.layout == "interleaved" else self.dimensions + pair

    @property
    def output_size(self) -> int:
        return 1

    @abstractmethod
    def draw(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Drawn:
        """Draw the examples of `batch` prompts."""

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts, float32; T = examples ("paired") or 2 * examples ("interleaved")."""
        drawn = self.draw(batch, generator, device)
        return lay_out(drawn, self.layout)

    def another(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Another function for each prompt: its outputs [B, n, k] at xs [B, n, d], with noise, and what defines it.

        Raises InputError where the task cannot draw a function for given inputs.
        """
        raise InputError(f"corrupt: {type(self).__name__} draws no other function of the same inputs")

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The same inputs with another function (`another`); outputs that are not scored stay."""
        return corrupt_examples(prompt, self.layout, lambda xs, ys: self.another(xs, generator))

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean squared error over the scored positions, summed over outputs. prediction: [B, T, k]."""
        square = (wide(prediction) - prompt.targets).square().sum(-1)
        return (square * prompt.scored).sum() / prompt.scored.sum()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """squared_error [B, T], summed over outputs, against y as seen."""
        return {"squared_error": (wide(prediction) - prompt.targets).square().sum(-1)}


@dataclass(frozen=True)
class LabelTask(ExamplesTask):
    """Base: examples whose y is a label -1 or +1; the prediction is the logit of +1."""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean cross-entropy in nats over the scored positions. prediction: logits of +1, [B, T, 1]."""
        return (self._cross_entropy(prediction, prompt) * prompt.scored).sum() / prompt.scored.sum()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """accuracy (a logit of 0 is half right) and cross_entropy in nats, [B, T]."""
        right = (wide(prediction).squeeze(-1).sign() * prompt.targets.squeeze(-1) + 1) / 2
        return {"accuracy": right, "cross_entropy": self._cross_entropy(prediction, prompt)}

    def chance(self) -> Mapping[str, float]:
        """Of a guess at even odds."""
        return {"accuracy": 0.5, "cross_entropy": math.log(2)}

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """Every label the other one: of linear classes a function as likely, of others the negated one, maybe not of
        the class."""
        return corrupt_examples(prompt, self.layout, lambda xs, ys: (-ys, None), True)

    @staticmethod
    def _cross_entropy(prediction: Tensor, prompt: Prompt) -> Tensor:
        return F.softplus(-wide(prediction) * prompt.targets).squeeze(-1)


@dataclass
class Drawn:
    """Examples before the layout makes tokens of them.

    xs: [B, n, d]. ys: [B, n, k], as seen in the context. scored: [B, n] bool; None for all.
    hidden: what drew them, for oracles; see `Prompt.hidden`. targets: [B, n, k] where the prediction is not held to ys.
    """

    xs: Tensor
    ys: Tensor
    scored: Tensor | None = None
    hidden: dict[str, Tensor] | None = None
    targets: Tensor | None = None


def lay_out(drawn: Drawn, layout: Layout) -> Prompt:
    """Tokens from examples; see `ExamplesTask`."""
    xs, ys, scored = drawn.xs, drawn.ys, drawn.scored
    targets = ys if drawn.targets is None else drawn.targets
    batch, examples, size = xs.shape
    if scored is None:
        scored = torch.ones(batch, examples, dtype=torch.bool, device=xs.device)
    shot = torch.arange(examples, device=xs.device)
    if layout == "paired":
        inputs = torch.cat([xs, F.pad(torch.cat([xs, ys], -1)[:, :-1], (0, 0, 1, 0))], -1)
        return Prompt(inputs, targets, scored, shot.expand(batch, -1), xs, ys, shot, drawn.hidden)
    inputs = xs.new_zeros(batch, examples, 2, size + ys.shape[-1])
    inputs[:, :, 0, :size] = xs
    inputs[:, :, 1, size:] = ys
    nothing = torch.zeros_like(targets)
    return Prompt(
        inputs.flatten(1, 2),
        torch.stack([targets, nothing], 2).flatten(1, 2),
        torch.stack([scored, torch.zeros_like(scored)], 2).flatten(1, 2),
        torch.stack([shot, shot + 1], 1).flatten().expand(batch, -1),
        xs,
        ys,
        2 * shot,
        drawn.hidden,
    )


def corrupt_examples(
    prompt: Prompt,
    layout: Layout,
    outputs: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor] | None]],
    everywhere: bool = False,
) -> Prompt:
    """The same inputs with other outputs.

    outputs: (xs [B, n, d], ys [B, n, k], float32) -> other ys, and what is hidden. everywhere: of all examples; else
    those whose prediction does not count keep theirs.
    """
    assert prompt.xs is not None
    assert prompt.ys is not None
    xs, ys = prompt.xs.float(), prompt.ys.float()
    scored = prompt.scored[:, prompt.at]
    other, hidden = outputs(xs, ys)
    other = other if everywhere else torch.where(scored.unsqueeze(-1), other, ys)
    return lay_out(Drawn(xs, other, scored, hidden), layout).to(prompt.inputs.dtype)


def rotated(ys: Tensor, generator: torch.Generator) -> Tensor:
    """One-hot labels [B, n, classes] of which each is another one, the same in a prompt: so many further on."""
    classes = ys.shape[-1]
    by = torch.randint(1, classes, (len(ys), 1, 1), generator=generator, device=ys.device)
    number = torch.arange(classes, device=ys.device)
    return ys.gather(-1, ((number - by) % classes).expand_as(ys))
