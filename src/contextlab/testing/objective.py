"""The law of tasks about training: what a step minimises is the same however its batch is cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contextlab.prompt import Task
from contextlab.testing.law import Component, law, require
from contextlab.training import TrainSpec
from contextlab.training.step import loss_and_gradients

ROUNDING = 1e-5
"""Losses are taken in float32: how far two ways to sum one may be apart, of its size."""


class Reader(nn.Module):
    """The smallest model that reads a task's prompts: [B, T] ids or [B, T, d] -> [B, T, output_size], float64."""

    def __init__(self, task: Task, width: int = 3) -> None:
        super().__init__()
        self.token = task.read_in == "token"
        drawn = torch.Generator().manual_seed(7)
        self.read_in, self.read_out = (
            nn.Parameter(torch.randn(shape, generator=drawn, dtype=torch.float64))
            for shape in ((task.input_size, width), (width, task.output_size))
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, T] ids or [B, T, d] -> [B, T, output_size], logits or vectors; each position reads all up to it."""
        read = self.read_in[inputs] if self.token else inputs @ self.read_in
        return torch.tanh(read.cumsum(1)) @ self.read_out


def off(found: Tensor, expected: Tensor) -> float:
    """How far two tensors of one shape, [...], are apart, relative to the largest entry of `expected`."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


@law("task", "objective", "Its loss is a mean over the scored positions: a step is the same however its batch is cut.")
def objective(component: Component) -> None:
    """Loss and gradients of 4 prompts in 1, 2 and 4 parts."""
    task = component.build()
    model = Reader(task)
    prompt = task.sample(4, torch.Generator().manual_seed(6)).to(torch.float64)
    params: dict[str, Tensor] = dict(model.named_parameters())
    loss = task.loss(model(prompt.inputs), prompt)
    whole = {"loss": loss.detach(), **dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))}
    for parts in (1, 2, 4):
        spec = TrainSpec(batch=4, accumulate=parts, precision="float32")
        loss, gradients = loss_and_gradients(model, task, spec, params, prompt)
        for name, found in {"loss": loss, **gradients}.items():
            far = off(found, whole[name])
            what = name if name == "loss" else f"gradient of {name}"
            require(far <= ROUNDING, f"cut into {parts} parts the {what} is off by {far:.2g} of the whole batch's")
