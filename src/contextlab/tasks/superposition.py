"""Task superposition: examples of several tasks in one prompt, and the mixture of their answers to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError, at_most
from contextlab.learners.base import before
from contextlab.learners.superposition import SLOTS, SuperpositionPosterior
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.averages import mean_of
from contextlab.tasks.base import TokenTask

Function = Literal["first", "second", "sum", "difference", "next_first", "next_second", "product"]
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "first": lambda a, b: a + 0 * b,
    "second": lambda a, b: b + 0 * a,
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "next_first": lambda a, b: a + 1 + 0 * b,
    "next_second": lambda a, b: b + 1 + 0 * a,
    "product": lambda a, b: a * b,
}
HELD_OUT = 5
"""One in so many operand pairs is kept for the split "new operands"."""


@register(
    "task",
    "superposition",
    family="recall",
    papers=("2410.05603",),
    cases=(
        {"numbers": 12, "examples": 8},
        {"numbers": 12, "examples": 8, "concentration": 0.0},
        {"numbers": 16, "examples": 10, "functions": ("first", "next_first"), "proportions": (0.75, 0.25)},
    ),
)
@dataclass(frozen=True)
class Superposition(TokenTask):
    """Examples `a b = c` of several tasks in one prompt; their mixture is inferred in context ("task superposition").

    Each example's task is drawn from the prompt's mixture of tasks; its answer is one token, modulo `numbers`. The
    operand pairs of a prompt differ, and no two tasks give the same answer to one. Every answer is predicted. A
    model in superposition gives each task's answer the probability that follows from its share of the context, even
    when it was trained on one task at a time (concentration 0; see the split "one task"). Of 2410.05603's tasks these
    are the copies of operands and their sums; there the answers are text, the shares in a prompt exact, and one query
    at the end is scored.

    functions: the tasks.
    numbers: operands and answers are 0, ..., numbers - 1.
    examples: n, the examples in a prompt.
    concentration: of the Dirichlet distribution that mixtures are drawn from: 0 for one task a prompt, large values for
        even mixtures.
    proportions: the mixture of every prompt; None to draw it.
    held_out: take operand pairs from those that training prompts never show.
    """

    metric: ClassVar[str] = "cross_entropy"
    higher_is_better: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"functions": ("first", "second"), "numbers": 10, "examples": 8},
        "hard": {
            "functions": ("first", "second", "sum", "difference", "next_first", "next_second"),
            "numbers": 50,
            "examples": 32,
        },
    }

    functions: tuple[Function, ...] = ("first", "second", "sum")
    numbers: PositiveInt = 20
    examples: PositiveInt = 16
    concentration: NonNegativeFloat = 1.0
    proportions: tuple[PositiveFloat, ...] | None = None
    held_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.functions or len(set(self.functions)) < len(self.functions):
            raise InputError(f"functions {', '.join(self.functions) or 'none'}: give at least one, each once")
        if self.proportions is not None and (
            len(self.proportions) != len(self.functions) or abs(sum(self.proportions) - 1) > 1e-6
        ):
            raise InputError(
                f"proportions {self.proportions} for {len(self.functions)} functions; give each one, with sum 1"
            )
        known = len(self.pairs())
        if self.examples > known:
            raise InputError(
                f"examples {self.examples}: {self.numbers} numbers have {known} {'held-out ' * self.held_out}operand "
                f"pairs whose answers differ; " + at_most(known, "use more numbers, or functions that differ")
            )

    @property
    def input_size(self) -> int:
        return self.numbers + 1

    def symbol(self, token: int) -> str:
        return "=" if token == self.numbers else str(token)

    def pairs(self) -> Tensor:
        """The operand pairs that prompts may show, [P, 2]."""
        return _pairs(self.functions, self.numbers, self.held_out)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts, T = 4 examples. hidden: `task` [B, n], and each task's answer, `answers` [B, n, tasks]."""
        pairs, tables = self.pairs().to(device), _answers(self.functions, self.numbers).to(device)
        order = torch.rand(batch, len(pairs), generator=generator, device=device)
        first, second = pairs[order.topk(self.examples, dim=1).indices].unbind(2)
        answers = tables[:, first, second].movedim(0, 2)
        task = self._tasks(batch, generator, device)
        shown = answers.gather(2, task.unsqueeze(2)).squeeze(2)
        sign = torch.full_like(first, self.numbers)
        inputs = torch.stack([first, second, sign, shown], 2).flatten(1)
        at = torch.arange(inputs.shape[1], device=inputs.device)
        return Prompt(
            inputs,
            inputs.roll(-1, 1),  # the last answer's is never scored
            (at % SLOTS == 2).expand(batch, -1),
            (at // SLOTS).expand(batch, -1),
            hidden={"task": task, "answers": answers},
        )

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The same operands, each answered by another task, so many further on, the same in a prompt."""
        if len(self.functions) == 1:
            raise InputError("corrupt: with one function every operand has one answer; use two functions or more")
        if len(set(self.proportions or (1,))) > 1:
            raise InputError("corrupt: uneven proportions say which task is likely; use even ones, or none")
        assert prompt.hidden is not None
        by = torch.randint(1, len(self.functions), (prompt.batch, 1), generator=generator, device=prompt.inputs.device)
        task, answers = (prompt.hidden["task"] + by) % len(self.functions), prompt.hidden["answers"]
        inputs = prompt.inputs.clone()
        inputs[:, SLOTS - 1 :: SLOTS] = answers.gather(2, task.unsqueeze(2)).squeeze(2)
        return replace(prompt, inputs=inputs, targets=inputs.roll(-1, 1), hidden={"task": task, "answers": answers})

    def _tasks(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """The task of each example, [batch, examples]."""
        count = len(self.functions)
        if self.proportions is not None:
            weights = torch.tensor(self.proportions, device=device).expand(batch, -1)
            return torch.multinomial(weights, self.examples, replacement=True, generator=generator)
        # Polya's urn: drawing from weights that are Dirichlet, one after another, without the weights.
        urn = torch.full((batch, count), self.concentration, device=device)
        drawn: list[Tensor] = []
        for _ in range(self.examples):
            even = torch.ones_like(urn) if not drawn else urn
            drawn.append(torch.multinomial(even, 1, generator=generator))
            urn = urn.scatter_add(1, drawn[-1], torch.ones_like(urn[:, :1]))
        return torch.cat(drawn, 1)

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """[B, T]: cross_entropy of the answer shown, kl, outside; the last two are zero where no answer is asked for.

        kl: divergence, in nats, of the probabilities that the prediction gives the tasks' answers from the tasks'
            shares in the examples before (before any, from the expected mixture): how far it is from calibrated.
        outside: probability of what is no task's answer.
        """
        assert prompt.hidden is not None
        task, answers = prompt.hidden["task"], prompt.hidden["answers"]
        counts = before(torch.nn.functional.one_hot(task, len(self.functions)).double())
        prior = torch.tensor(self._expected, dtype=torch.float64, device=counts.device)
        share = torch.where(counts.sum(2, keepdim=True) > 0, counts / counts.sum(2, keepdim=True), prior)
        asked = prediction.double().log_softmax(-1).unflatten(1, (-1, SLOTS))[:, :, 2].gather(2, answers)
        values = {
            "kl": (torch.special.xlogy(share, share) - share * asked).sum(2),
            "outside": 1 - asked.exp().sum(2),
        }
        found = {"cross_entropy": super().errors(prediction, prompt)["cross_entropy"]}
        for name, value in values.items():
            spread = torch.zeros(*value.shape, SLOTS, dtype=torch.float32, device=value.device)
            spread[:, :, 2] = value.float()
            found[name] = spread.flatten(1)
        return found

    @property
    def _expected(self) -> tuple[float, ...]:
        return self.proportions or (1 / len(self.functions),) * len(self.functions)

    def learners(self) -> dict[str, Learner]:
        """`posterior` is exact; `shares` answers with the tasks' shares in the context; `prior` reads none."""
        answers = _answers(self.functions, self.numbers)
        return {
            "posterior": SuperpositionPosterior(answers, self.concentration, self.proportions),
            "shares": SuperpositionPosterior(answers, 0.0),
            "prior": SuperpositionPosterior(answers, proportions=self._expected),
        }

    def splits(self) -> dict[str, Task]:
        """'train', one task a prompt, mixtures of all kinds, even and uneven ones, new operands, more examples."""
        count = len(self.functions)
        halves = [2.0 ** (count - k) for k in range(count)]
        found: dict[str, Task] = {
            "train": self,
            "one task": self.replace(concentration=0.0, proportions=None),
            "mixed": self.replace(concentration=1.0, proportions=None),
            "even": self.replace(proportions=(1 / count,) * count),
            "uneven": self.replace(proportions=tuple(half / sum(halves) for half in halves)),
        }
        if self.examples <= len(_pairs(self.functions, self.numbers, not self.held_out)):
            found["new operands"] = self.replace(held_out=not self.held_out)
        if 2 * self.examples <= len(self.pairs()):
            found["more examples"] = self.replace(examples=2 * self.examples)
        return found

    def chance(self) -> Mapping[str, float]:
        """Of an even guess among the numbers."""
        entropy = mean_of(self._share_entropy, self.examples)
        return {
            "cross_entropy": math.log(self.numbers),
            "kl": math.log(self.numbers) - entropy,
            "outside": 1 - len(self.functions) / self.numbers,
        }

    def _share_entropy(self, shot: int) -> float:
        """Expected entropy of the tasks' shares in so many examples; each count is binomial or beta-binomial."""
        if shot == 0:
            return -sum(p * math.log(p) for p in self._expected)
        if self.proportions is None and self.concentration == 0:
            return 0.0
        counts = torch.arange(shot + 1, dtype=torch.float64)
        choose = math.lgamma(shot + 1) - (counts + 1).lgamma() - (shot - counts + 1).lgamma()
        total, one = torch.tensor(float(shot), dtype=torch.float64), self.concentration
        result = 0.0
        for p in self._expected:
            if p == 1:
                continue
            if self.proportions is not None:
                log = choose + counts * math.log(p) + (shot - counts) * math.log1p(-p)
            else:
                rest = one * (len(self.functions) - 1)
                log = choose + (counts + one).lgamma() + (shot - counts + rest).lgamma() - (total + one + rest).lgamma()
                log = log + math.lgamma(one + rest) - math.lgamma(one) - math.lgamma(rest)
            result -= (log.exp() * torch.special.xlogy(counts / shot, counts / shot)).sum().item()
        return result

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """An example a line, and the task it is of; every answer is predicted."""
        assert prompt.hidden is not None
        lines = []
        for example, task in zip(
            prompt.inputs[row].unflatten(0, (-1, SLOTS)).tolist(), prompt.hidden["task"][row].tolist(), strict=True
        ):
            shown = " ".join(self.symbol(token) for token in example[:3])
            lines.append(f"{shown} [{self.symbol(example[3])}]   {self.functions[task]}")
        return "\n".join(lines)


@lru_cache(maxsize=32)
def _answers(functions: tuple[Function, ...], numbers: int) -> Tensor:
    """Of each task to each pair of numbers, [tasks, numbers, numbers]."""
    a, b = torch.arange(numbers).unsqueeze(1), torch.arange(numbers)
    return torch.stack([FUNCTIONS[name](a, b) % numbers for name in functions])


@lru_cache(maxsize=32)
def _pairs(functions: tuple[Function, ...], numbers: int, held_out: bool) -> Tensor:
    """Pairs whose answers all differ: one in HELD_OUT of them, or the others."""
    ordered = _answers(functions, numbers).flatten(1).sort(0).values
    known = (ordered.diff(dim=0) != 0).all(0).nonzero().squeeze(1)
    known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))]
    known = known[::HELD_OUT] if held_out else known[torch.arange(len(known)) % HELD_OUT != 0]
    return torch.stack([known // numbers, known % numbers], 1)
