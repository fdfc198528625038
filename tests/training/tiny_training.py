"""A tiny task and model for the tests of training: sums of what was read, and a causal mixing MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.prompt import Learner, Prompt, Task
from contextlab.spec import Spec


@dataclass(frozen=True)
class Sums(Task):
    """Predict a scaled running mean of the coordinates in use."""

    length: int = 6
    size: int = 3
    used: int = 3
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.used > self.size:
            raise InputError(f"used {self.used} is larger than size {self.size}")

    @property
    def input_size(self) -> int:
        return self.size

    @property
    def output_size(self) -> int:
        return 1

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        x = torch.randn(batch, self.length, self.size, generator=generator, device=device)
        x[..., self.used :] = 0
        y = x.sum(-1, keepdim=True).cumsum(1) * self.scale
        shot = torch.arange(self.length, device=device).expand(batch, -1)
        return Prompt(x, y, torch.ones_like(shot, dtype=torch.bool), shot)

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        return (prediction - prompt.targets).square().mean()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        return {"error": (prediction - prompt.targets).square().mean(-1)}

    def learners(self) -> dict[str, Learner]:
        return {}


@dataclass(frozen=True)
class Some(Sums):
    """Scores the last few positions of each prompt only, of some prompts 1 and of others all."""

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        prompt = super().sample(batch, generator, device)
        first = torch.randint(self.length, (batch, 1), generator=generator, device=device)
        prompt.scored = prompt.shot >= first
        return prompt

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        square = (prediction - prompt.targets).square().squeeze(-1)
        return (square * prompt.scored).sum() / prompt.scored.sum()


class TinySpec(Spec):
    width: int = 8
    read_in: str = "vector"
    input_size: int = 3
    output_size: int = 1


class Tiny(nn.Module):
    """Has what training asks of a Model: `spec`, `blocks`, and a forward of inputs."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__()
        self.spec = TinySpec(**options)
        generator = torch.Generator().manual_seed(seed)
        width = self.spec.width
        self.read_in = nn.Linear(self.spec.input_size, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width, bias=False)})
            for _ in range(2)
        )
        self.read_out = nn.Linear(width, self.spec.output_size)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.read_in(inputs)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x.cumsum(1))))
        return self.read_out(x)
