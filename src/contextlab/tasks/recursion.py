"""Recursion over numbers and trees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.prompt import Prompt, Task
from contextlab.registry import register
from contextlab.tasks.composition import SolvedTask
from contextlab.tasks.formal_languages import Dyck


@register(
    "task",
    "binary_successor",
    family="languages",
    papers=("2305.14699", "2401.12947"),
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
    papers=("2305.14699", "2401.12947"),
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
