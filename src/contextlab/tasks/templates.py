"""Relations between symbols that were never seen (templates), and recursion over numbers and trees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.automata import Program
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask
from contextlab.tasks.composition import Part, SolvedTask
from contextlab.tasks.formal import Dyck


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


@register(
    "task",
    "binary_successor",
    family="languages",
    papers=("2305.14699",),
    cases=({"bits": 6}, {"bits": 6, "draw": "depths"}),
)
@dataclass(frozen=True)
class BinarySuccessor(SolvedTask):
    """The number after a binary number, lowest bit first, as structural recursion (2305.14699).

    A 0 becomes 1 and the rest stays; a 1 becomes 0 and the recursion goes on in the rest; after the highest bit comes
    the carry. "depth" of a solution's token is the number of calls that are made until it is known. Uniform numbers
    hardly ever recurse deeply; drawn by "depths", the number of calls is uniform. The function is the paper's; its
    way of writing numbers is not followed.

    bits: of the number; its successor has one more.
    draw: "uniform" or "depths".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"bits": 8, "draw": "depths"},
        "hard": {"bits": 48},
    }

    bits: Annotated[int, Field(ge=2)] = 16
    draw: Literal["uniform", "depths"] = "uniform"

    @property
    def problem(self) -> int:
        return self.bits + 1

    @property
    def input_size(self) -> int:
        return 3

    def symbol(self, token: int) -> str:
        """A bit, or =."""
        return "01="[token]

    def write(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        bits = torch.randint(2, (batch, self.bits), generator=generator, device=device)
        if self.draw == "depths":
            at = torch.arange(self.bits, device=device)
            ones = torch.randint(self.bits + 1, (batch, 1), generator=generator, device=device)
            bits = torch.where(at < ones, 1, torch.where(at == ones, 0, bits))
        return F.pad(bits, (0, 1), value=2)

    def solve(self, problems: Tensor) -> Tensor:
        bits = F.pad(problems[:, :-1], (0, 1))
        carried = F.pad(bits, (1, 0), value=1)[:, :-1].cummin(1).values  # whether all lower bits are 1
        return bits ^ carried

    def depth(self) -> Tensor:
        return torch.arange(self.bits + 1) + 1

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "depth": calls until the bit is known, one for each 1 below it and one more, while they go on."""
        calls = prompt.inputs[:, : self.bits].cummin(1).values.sum(1, keepdim=True) + 1
        found = super().facets(prompt)
        return {**found, "depth": found["depth"].minimum(calls)}

    def splits(self) -> dict[str, Task]:
        """'train', 'deep' (the number of calls uniform), then twice the bits."""
        found: dict[str, Task] = {"train": self}
        if self.draw == "uniform":
            found["deep"] = self.replace(draw="depths")
        return {**found, f"bits={2 * self.bits}": self.replace(bits=2 * self.bits)}

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among all tokens."""
        return {"accuracy": 1 / 3, "cross_entropy": math.log(3)}


@register(
    "task",
    "tree_traversal",
    family="languages",
    papers=("2305.14699",),
    cases=({"nodes": 5, "labels": 8}, {"nodes": 5, "labels": 8, "order": "preorder"}),
)
@dataclass(frozen=True)
class TreeTraversal(SolvedTask):
    """A binary tree written in preorder, then its nodes in another order (structural recursion, 2305.14699).

    The tree stands as its root, its left subtree and its right subtree, an empty subtree as a dot; all shapes of so
    many nodes are equally likely, and no two nodes have the same label. "depth" of a solution's token is the depth
    of its node in the tree, from 1. The functions are the paper's; its way of writing trees is not followed.

    nodes: of the tree.
    labels: nodes are labelled by so many ids.
    order: "inorder", or "preorder" (the labels without the dots).
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"nodes": 4, "labels": 26},
        "hard": {"nodes": 32, "labels": 128},
    }

    nodes: PositiveInt = 10
    labels: PositiveInt = 64
    order: Literal["inorder", "preorder"] = "inorder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes > self.labels:
            raise InputError(f"nodes {self.nodes} do not fit: there are {self.labels} labels; at most {self.labels}")

    @property
    def problem(self) -> int:
        return 2 * self.nodes + 2

    @property
    def input_size(self) -> int:
        return self.labels + 2

    def symbol(self, token: int) -> str:
        """A label (letters where they are enough), a dot for an empty subtree, or =."""
        if token >= self.labels:
            return ".="[token - self.labels]
        return chr(ord("a") + token) if self.labels <= 26 else str(token)

    def write(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        # A tree's nodes and dots, but for the last dot, are the brackets of a nested string, and the other way round.
        length = torch.full((batch,), 2 * self.nodes, device=device)
        closes = Dyck("()", self.nodes).draw(length, 2 * self.nodes, generator)
        label = torch.rand(batch, self.labels, generator=generator, device=device).argsort(1)[:, : self.nodes]
        number = (1 - closes).cumsum(1) - 1
        tokens = torch.where(closes == 1, self.labels, label.gather(1, number.clamp(min=0)))
        return torch.cat([tokens, tokens.new_tensor([self.labels, self.labels + 1]).expand(batch, -1)], 1)

    def solve(self, problems: Tensor) -> Tensor:
        return self._walk(problems)[0]

    def _walk(self, problems: Tensor) -> tuple[Tensor, Tensor]:
        """The nodes in order, and the depth of each, [B, nodes]."""
        batch, device = len(problems), problems.device
        # Nodes whose left subtree has not ended lie on a stack. A dot ends one left subtree: its node is taken off, and
        # what comes next is its right subtree. So a node's depth is kept with it; it is not the height of the stack.
        base = torch.arange(batch, device=device) * (self.nodes + 1)
        stack = torch.zeros(batch * (self.nodes + 1), dtype=torch.int64, device=device)
        levels, aside = torch.zeros_like(stack), batch * self.nodes
        out, depths = (torch.zeros(aside + 1, dtype=torch.int64, device=device) for _ in range(2))
        height, level = torch.zeros_like(base), torch.ones_like(base)
        done = torch.arange(batch, device=device) * self.nodes
        for token in problems[:, :-2].unbind(1):  # the last dot ends the tree
            node = token < self.labels
            top = base + (height - 1).clamp(min=0)
            label, depth = (token, level) if self.order == "preorder" else (stack[top], levels[top])
            writes = node if self.order == "preorder" else ~node
            at = torch.where(writes, done, aside)
            out[at], depths[at] = label, depth
            done = done + writes.long()
            after = torch.where(node, level, levels[top]) + 1
            stack[base + height] = token  # after a dot, what stands here is above the stack and means nothing
            levels[base + height] = level
            height, level = height + torch.where(node, 1, -1), after
        return out[:-1].view(batch, -1), depths[:-1].view(batch, -1)

    def depth(self) -> Tensor:
        return torch.ones(self.nodes, dtype=torch.int64)

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "depth": of the node in the tree."""
        depth = self._walk(prompt.inputs[:, : self.problem])[1]
        return {**super().facets(prompt), "depth": F.pad(depth, (self.problem - 1, 0))}

    def splits(self) -> dict[str, Task]:
        """'train', then twice the nodes where there are labels for them."""
        if 2 * self.nodes > self.labels:
            return {"train": self}
        return {"train": self, f"nodes={2 * self.nodes}": self.replace(nodes=2 * self.nodes)}

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the labels."""
        return {"accuracy": 1 / self.labels, "cross_entropy": math.log(self.labels)}
