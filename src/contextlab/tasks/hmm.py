"""GINC: documents and few-shot prompts from a mixture of hidden Markov models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.learners.automata import BaumWelch, HMMPosterior
from contextlab.learners.text import ContextNgram
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask

SEPARATOR = 0
"""Token that slot 0 shows for every value, and that stands between examples."""


@register(
    "task",
    "hmm_mixture",
    family="languages",
    papers=("2111.02080",),
    cases=(
        {"vocabulary": 12, "values": 4, "slots": 4, "models": 3, "length": 48},
        {
            "vocabulary": 12,
            "values": 4,
            "slots": 4,
            "models": 3,
            "form": "examples",
            "examples": 8,
            "example_length": 4,
        },
    ),
)
@dataclass(frozen=True)
class HMMMixture(TokenTask):
    """A mixture of hidden Markov models, the concept of a document being which one (GINC, 2111.02080).

    A hidden state is a value (an entity) and a slot (a property); the token is what a memory of values by slots
    holds there, slot 0 the separator for every value. Value and slot move independently: the slot by a matrix of
    the concept, a random mixture of permutations; the value by one matrix for all concepts, which mostly stays.
    Matrices and memory are drawn as in the paper's public code.

    In the form "document" the chain runs through the prompt and each next token is predicted. In the form
    "examples" there are examples of `example_length` tokens of one concept, each a fresh chain from an even value
    and from one slot that all examples share, with separators between; the last token of each is scored. There
    the paper's label is the likeliest last token; here it is the token drawn. `shot` is the number of whole
    examples seen ("document": tokens seen before).

    vocabulary: number of symbols, the separator included.
    values: number of values.
    slots: number of slots.
    models: concepts in the mixture.
    length: tokens in a document.
    form: "document" or "examples".
    examples: examples in a prompt.
    example_length: tokens in an example.
    stay: weight of staying in the matrix of values.
    temperature: of the weights of the permutations; smaller is nearer to one permutation.
    pool_seed: of memory and matrices.
    part: "train", or "test" for as many other concepts.
    """

    metric: ClassVar[str] = "cross_entropy"
    higher_is_better: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 20, "values": 5, "slots": 5, "models": 3, "length": 64},
        "hard": {"vocabulary": 150, "models": 20, "form": "examples", "examples": 32, "example_length": 10},
    }

    vocabulary: Annotated[int, Field(ge=2)] = 50
    values: PositiveInt = 10
    slots: Annotated[int, Field(ge=2)] = 10
    models: PositiveInt = 5
    length: PositiveInt = 256
    form: Literal["document", "examples"] = "document"
    examples: PositiveInt = 32
    example_length: Annotated[int, Field(ge=2)] = 5
    stay: Annotated[float, Field(ge=0, lt=1)] = 0.8
    temperature: PositiveFloat = 0.1
    pool_seed: NonNegativeInt = 0
    part: Literal["train", "test"] = "train"

    @property
    def period(self) -> int:
        """Tokens from one example's start to the next one's."""
        return self.example_length + 1

    @property
    def input_size(self) -> int:
        return self.vocabulary

    def symbol(self, token: int) -> str:
        """The separator as /, other tokens by number."""
        return "/" if token == SEPARATOR else str(token)

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The tokens; of a document, whose every token is predicted from those before, without the answers."""
        if self.form == "examples":
            return super().words(prompt, row)
        return " ".join(self.symbol(token) for token in prompt.inputs[row].tolist())

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts; `hidden` has which concept, [batch]."""
        ginc = concepts(self, str(device))
        model = torch.randint(self.models, (batch,), generator=generator, device=device)
        if self.form == "document":
            first = ginc.start.cumsum(1)[model]
            uniform = torch.rand(batch, 1, generator=generator, device=device, dtype=torch.float64)
            state = (first <= uniform * first[:, -1:]).sum(1).clamp(max=self.values * self.slots - 1)
            value, slot = state // self.slots, state % self.slots
            tokens = self._chain(ginc, model, value, slot, self.length + 1, generator)
            at = torch.arange(self.length, device=device).expand(batch, -1)
            everywhere = torch.ones_like(at, dtype=torch.bool)
            return Prompt(tokens[:, :-1], tokens[:, 1:], everywhere, at.clone(), hidden={"model": model})
        slot = torch.randint(1, self.slots, (batch, 1), generator=generator, device=device).expand(-1, self.examples)
        value = torch.randint(self.values, slot.shape, generator=generator, device=device)
        own = model.unsqueeze(1).expand_as(slot)
        tokens = self._chain(ginc, own.flatten(), value.flatten(), slot.flatten(), self.example_length, generator)
        tokens = torch.nn.functional.pad(tokens, (0, 1), value=SEPARATOR).view(batch, -1)[:, :-1]
        at = torch.arange(tokens.shape[1] - 1, device=device).expand(batch, -1)
        asked = at % self.period == self.example_length - 2
        return Prompt(tokens[:, :-1], tokens[:, 1:], asked, at // self.period, hidden={"model": model})

    def _chain(
        self, ginc: Concepts, model: Tensor, value: Tensor, slot: Tensor, length: int, generator: torch.Generator
    ) -> Tensor:
        """Tokens [B, length] of chains that start in the given hidden states [B]."""
        uniform = torch.rand(
            length - 1, 2, len(model), 1, generator=generator, device=model.device, dtype=torch.float64
        )
        by_value, by_slot = ginc.value.cumsum(1), ginc.slot.cumsum(2)
        tokens = [ginc.memory[value, slot]]
        for for_value, for_slot in uniform:
            value = (by_value[value] <= for_value).sum(1).clamp(max=self.values - 1)
            slot = (by_slot[model, slot] <= for_slot).sum(1).clamp(max=self.slots - 1)
            tokens.append(ginc.memory[value, slot])
        return torch.stack(tokens, 1)

    def learners(self) -> dict[str, Learner]:
        """`hmm_posterior`, the exact posterior over concepts and start; Kneser-Ney and Baum-Welch without them.

        On the test part the optimum is the posterior over its own concepts; `train_posterior`, which knows the
        train part's only, shows how far knowing the wrong concepts goes.
        """
        found: dict[str, Learner] = {"hmm_posterior": self._posterior(self)}
        if self.part == "test":
            found["train_posterior"] = self._posterior(self.replace(part="train"))
        tokens = self.length if self.form == "document" else self.examples * self.period - 2
        return {
            **found,
            "kneser_ney": ContextNgram(self.vocabulary, order=3, discount=0.75),
            "baum_welch": BaumWelch(self.vocabulary, states=16, every=max(tokens // 8, 1)),
        }

    def _posterior(self, task: HMMMixture) -> HMMPosterior:
        ginc = concepts(task, "cpu")
        if self.form == "document":
            return HMMPosterior(ginc.start.unsqueeze(1), ginc.transition, ginc.emission)
        slot = torch.arange(1, self.slots).unsqueeze(1)
        start = (torch.arange(self.values * self.slots) % self.slots == slot).double() / self.values
        start = start.expand(self.models, -1, -1)
        return HMMPosterior(start, ginc.transition, ginc.emission, self.period, SEPARATOR)

    def splits(self) -> dict[str, Task]:
        """'train', 'new concepts', the other form, and more of the same."""
        other: Literal["document", "examples"] = "examples" if self.form == "document" else "document"
        found: dict[str, Task] = {"train": self}
        if self.part == "train":
            found["new concepts"] = self.replace(part="test")
        found[other] = self.replace(form=other)
        if self.form == "document":
            return {**found, f"length={2 * self.length}": self.replace(length=2 * self.length)}
        return {**found, f"examples={2 * self.examples}": self.replace(examples=2 * self.examples)}

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among all tokens."""
        return {"cross_entropy": math.log(self.vocabulary)}


@dataclass(frozen=True, eq=False)
class Concepts:
    """One part's concepts. start: [models, values * slots]. slot: [models, slots, slots]. value: [values, values].
    memory: [values, slots] tokens."""

    start: Tensor
    slot: Tensor
    value: Tensor
    memory: Tensor
    vocabulary: int

    @property
    def transition(self) -> Tensor:
        """Of hidden states value * slots + slot, [models, values * slots, values * slots]."""
        return torch.stack([torch.kron(self.value, slot) for slot in self.slot])

    @property
    def emission(self) -> Tensor:
        """[models, values * slots, vocabulary], the same for all."""
        shown = torch.nn.functional.one_hot(self.memory.flatten(), self.vocabulary).double()
        return shown.expand(len(self.slot), -1, -1)


@lru_cache(maxsize=32)
def concepts(task: HMMMixture, device: str) -> Concepts:
    """The concepts of the task's part, drawn on the CPU so that they do not depend on the device."""
    generator = torch.Generator().manual_seed(task.pool_seed)

    def weights(*shape: int, temperature: float) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) / temperature).softmax(-1)

    def mixed(count: int, size: int) -> Tensor:
        """Matrices that are random mixtures of `size` random permutations of `size` things, [count, size, size]."""
        order = torch.rand(count, size, size, generator=generator).argsort(-1)
        permutations = torch.nn.functional.one_hot(order, size).double()
        return torch.einsum("cp,cpij->cij", weights(count, size, temperature=task.temperature), permutations)

    memory = torch.randint(1, task.vocabulary, (task.values, task.slots), generator=generator)
    memory[:, 0] = SEPARATOR
    value = (1 - task.stay) * mixed(1, task.values)[0] + task.stay * torch.eye(task.values, dtype=torch.float64)
    slot = mixed(2 * task.models, task.slots)
    start = weights(2 * task.models, task.values * task.slots, temperature=10.0)
    part = slice(None, task.models) if task.part == "train" else slice(task.models, None)
    return Concepts(start[part].to(device), slot[part].to(device), value.to(device), memory.to(device), task.vocabulary)
