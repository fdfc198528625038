"""Relations between symbols that were never seen: templates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.automata import Program
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask
from contextlab.tasks.composition import Part


@register(
    "task",
    "symbol_templates",
    family="languages",
    papers=("2310.09753",),
    cases=({"symbols": 20}, {"templates": ("AxB", "AyB"), "labels": ("A", "B"), "symbols": 20}),
)
@dataclass(frozen=True)
class SymbolTemplates(TokenTask):
    """Strings made from templates by replacing wildcards with symbols; the answer depends on the template (2310.09753).

    In a template, capital letters are wildcards and all else stands for itself; the same wildcard is the same symbol,
    different wildcards are different symbols, drawn without replacement for each prompt. The label of a template is
    a wildcard of it, whose symbol is then the answer, or a sign of its own. Templates are equally likely, and no two
    may be equal up to renaming wildcards. The test part draws its symbols from a set that training never sees. As in
    the paper's public code, whose labels are numbers or tokens, and which has a third set to validate.

    templates: strings of one length.
    labels: one character for each template.
    symbols: number of symbols that may replace wildcards, in each part.
    part: "train" or "test".
    """

    one_prediction: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"templates": ("AA", "AB"), "labels": ("0", "1"), "symbols": 32},
        "hard": {"templates": ("ABAB", "ABBA", "AABB", "ABBC"), "labels": ("A", "B", "A", "C"), "symbols": 512},
    }

    templates: tuple[str, ...] = ("ABA", "ABB")
    labels: tuple[str, ...] = ("0", "1")
    symbols: PositiveInt = 64
    part: Part = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.templates or not self.templates[0] or len({len(template) for template in self.templates}) > 1:
            raise InputError(f"templates {self.templates} must be one or more strings of one length above 0")
        if len(self.labels) != len(self.templates) or any(len(label) != 1 for label in self.labels):
            raise InputError(
                f"labels {self.labels} do not fit: {len(self.templates)} templates need as many labels of one character"
            )
        for template, label in zip(self.templates, self.labels, strict=True):
            if label.isupper() and label not in template:
                raise InputError(f"label {label!r} is a wildcard that template {template!r} does not have")
        shapes = [self._shape(template) for template in self.templates]
        for i, shape in enumerate(shapes):
            if shape in shapes[:i]:
                raise InputError(
                    f"templates {self.templates[shapes.index(shape)]!r} and {self.templates[i]!r} make the same "
                    "strings; leave one out"
                )
        if self.wildcards > self.symbols:
            raise InputError(
                f"symbols {self.symbols} are too few: a template has {self.wildcards} wildcards; use at least "
                f"{self.wildcards}"
            )

    @staticmethod
    def _shape(template: str) -> tuple[str | int, ...]:
        """The template with each wildcard as the place where it first stands."""
        return tuple(template.index(letter) if letter.isupper() else letter for letter in template)

    @property
    def wildcards(self) -> int:
        """Most different wildcards in a template."""
        return max(len({letter for letter in template if letter.isupper()}) for template in self.templates)

    @cached_property
    def signs(self) -> list[str]:
        """Characters that stand for themselves, in templates and labels; ids after both parts' symbols."""
        return sorted({letter for text in (*self.templates, *self.labels) for letter in text if not letter.isupper()})

    @property
    def input_size(self) -> int:
        return 2 * self.symbols + len(self.signs) + 1

    def symbol(self, token: int) -> str:
        """Symbols as s0, s1, ... (test: t0, t1, ...), signs as they are, and = where the answer is predicted."""
        if token < self.symbols:
            return f"s{token}"
        if token < 2 * self.symbols:
            return f"t{token - self.symbols}"
        return [*self.signs, "="][token - 2 * self.symbols]

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each place of each template, and for its label: which wildcard, and the id of the sign if none is.

        [templates, length + 1] each; and for each place of a template the place where its letter first stands.
        """
        which, sign, first = [], [], []
        for template, label in zip(self.templates, self.labels, strict=True):
            names = sorted({letter for letter in template if letter.isupper()})
            text = template + label
            which.append([names.index(c) if c.isupper() else -1 for c in text])
            sign.append([0 if c.isupper() else 2 * self.symbols + self.signs.index(c) for c in text])
            first.append([template.index(c) for c in template])
        return torch.tensor(which), torch.tensor(sign), torch.tensor(first)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts: the string and =; only there is an answer scored."""
        which, sign, _ = (table.to(device) for table in self._tables)
        template = torch.randint(len(which), (batch,), generator=generator, device=device)
        put = torch.rand(batch, self.symbols, generator=generator, device=device).topk(self.wildcards or 1, 1).indices
        put = put + (self.symbols if self.part == "test" else 0)
        which, sign = which[template], sign[template]
        text = torch.where(which < 0, sign, put.gather(1, which.clamp(min=0)))
        inputs = torch.cat([text[:, :-1], torch.full_like(text[:, :1], self.input_size - 1)], 1)
        targets = F.pad(text[:, -1:], (inputs.shape[1] - 1, 0))
        scored = torch.zeros_like(inputs, dtype=torch.bool)
        scored[:, -1] = True
        return Prompt(inputs, targets, scored, torch.zeros_like(inputs), hidden={"template": template})

    def _answers(self, tokens: Tensor) -> Tensor:
        """The label of the template that the string is made from, found by comparing its places; 0 before."""
        which, sign, first = (table.to(tokens.device) for table in self._tables)
        text = tokens[:, :-1]
        alike = text.unsqueeze(2) == text.unsqueeze(1)  # [B, n, n]
        equal = first.unsqueeze(2) == first.unsqueeze(1)  # [M, n, n]
        relation = (alike.unsqueeze(1) == equal).flatten(2).all(2)
        wild = which[:, :-1] >= 0
        fixed = torch.where(wild, text.unsqueeze(1) < 2 * self.symbols, text.unsqueeze(1) == sign[:, :-1]).all(2)
        template = (relation & fixed).to(torch.uint8).argmax(1)
        place = (which[:, :-1] == which[:, -1:]).to(torch.uint8).argmax(1)  # where the label's wildcard stands
        copied = text.gather(1, place[template].unsqueeze(1)).squeeze(1)
        answer = torch.where(which[template, -1] < 0, sign[template, -1], copied)
        return F.pad(answer.unsqueeze(1), (text.shape[1], 0))

    def learners(self) -> dict[str, Learner]:
        """`evaluator`, which finds the template by which places are alike."""
        return {"evaluator": Program(self._answers, self.input_size)}

    def splits(self) -> dict[str, Task]:
        """'train', then 'new symbols', which training never sees."""
        if self.part == "test":
            return {"train": self}
        return {"train": self, "new symbols": self.replace(part="test")}

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among all tokens."""
        return {"accuracy": 1 / self.input_size, "cross_entropy": math.log(self.input_size)}
