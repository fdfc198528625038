"""The symbol that followed a special one before: what an induction head does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.ngrams import Induction
from contextlab.learners.recall import Lookup
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.corrupting import chosen_of


@register(
    "task",
    "induction_head",
    family="recall",
    papers=("2312.00752",),
    cases=({"length": 64}, {"length": 32, "trigger": "any"}),
)
@dataclass(frozen=True)
class InductionHead(TokenTask):
    """The induction head's task, as for Mamba (2312.00752): what followed the trigger, when it comes again.

    Random symbols, among them the trigger once; the trigger again is the last token, at which alone a prediction
    counts. `shot` is 1 there.

    vocabulary: number of symbols.
    length: tokens in the prompt.
    trigger: "special" is a symbol of its own (id `vocabulary`), "any" one of the symbols, drawn anew for each prompt.
    """

    one_prediction: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 8, "length": 24},
        "hard": {"vocabulary": 64, "length": 1024, "trigger": "any"},
    }

    vocabulary: PositiveInt = 16
    length: PositiveInt = 256
    trigger: Literal["special", "any"] = "special"

    def __post_init__(self) -> None:
        check_options(self)
        if self.length < 3:
            raise InputError(
                f"length {self.length} has no room for the trigger, a token and the trigger; use 3 or more"
            )
        if self.vocabulary < 3:
            raise InputError(f"vocabulary {self.vocabulary} leaves nothing to predict; use 3 or more")

    @property
    def input_size(self) -> int:
        return self.vocabulary + (self.trigger == "special")

    def symbol(self, token: int) -> str:
        """Symbols as numbers, a trigger of its own as !."""
        return "!" if token == self.vocabulary else str(token)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts [batch, length]. `hidden`: at [batch], the place of the first trigger."""
        place = torch.randint(self.length - 2, (batch, 1), generator=generator, device=device)
        if self.trigger == "special":
            key = torch.full((batch, 1), self.vocabulary, device=device)
            inputs = torch.randint(self.vocabulary, (batch, self.length), generator=generator, device=device)
        else:
            key = torch.randint(self.vocabulary, (batch, 1), generator=generator, device=device)
            inputs = torch.randint(self.vocabulary - 1, (batch, self.length), generator=generator, device=device)
            inputs = inputs + (inputs >= key)  # all other symbols
        inputs.scatter_(1, place, key)
        inputs[:, -1:] = key
        targets = torch.zeros_like(inputs)
        targets[:, -1:] = inputs.gather(1, place + 1)
        scored = torch.zeros_like(inputs, dtype=torch.bool)
        scored[:, -1] = True
        shot = (torch.arange(self.length, device=device) > place).long()
        return Prompt(inputs, targets, scored, shot, hidden={"at": place.squeeze(1)})

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The first trigger and another token in each other's places, so that another one follows the trigger."""
        assert prompt.hidden is not None
        inputs, place = prompt.inputs, prompt.hidden["at"].unsqueeze(1)
        at = torch.arange(self.length, device=inputs.device)
        other = inputs.roll(-1, 1) != prompt.targets[:, -1:]  # what follows there
        fits = (at < self.length - 2) & ((at - place).abs() > 1) & other  # so that the answers stay where they are
        number, there = chosen_of(fits, generator)
        number = torch.where(there, number, place)
        moved = inputs.scatter(1, place, inputs.gather(1, number)).scatter(1, number, inputs.gather(1, place))
        targets = prompt.targets.clone()
        targets[:, -1:] = moved.gather(1, number + 1)
        return Prompt(moved, targets, prompt.scored, (at > number).long(), hidden={"at": number.squeeze(1)})

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "distance": tokens from the first trigger to the second."""
        assert prompt.hidden is not None
        found = super().facets(prompt)
        return {**found, "distance": (found["position"] - prompt.hidden["at"].unsqueeze(1)).clamp_min(0)}

    def learners(self) -> dict[str, Learner]:
        """`induction`, which makes no error."""
        return {"induction": Induction(self.input_size), "lookup": Lookup(self.input_size)}

    def splits(self) -> dict[str, Task]:
        """'train', and 2, 4 and 16 times the tokens."""
        longer = {f"length={n * self.length}": self.replace(length=n * self.length) for n in (2, 4, 16)}
        return {"train": self, **longer}

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the symbols that can follow."""
        choices = self.vocabulary - (self.trigger == "any")
        return {"accuracy": 1 / choices, "cross_entropy": math.log(choices)}
