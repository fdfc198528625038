"""Run by `torchrun` in test_distributed.py: each rank writes what it found to FOLDER/rankN.safetensors."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from leaving import leave_together
from safetensors.torch import save_file
from tiny_training import Some, Sums, Tiny
from torch import Tensor

import contextlab.tasks  # noqa: F401  (registers every task)
from contextlab import registry
from contextlab.prompt import Task
from contextlab.testing.objective import Reader, off
from contextlab.training import TrainSpec, train
from contextlab.training.distributed import workers
from contextlab.training.step import loss_and_gradients

SPEC = TrainSpec(steps=40, batch=16, accumulate=2, warmup=5, log_every=5, checkpoint_every=15)
FIXED = TrainSpec(examples=20, epochs=5, batch=8, accumulate=2, warmup=2, checkpoint_every=0)


def cut(task: Task, rank: int) -> Tensor:
    """How far loss and gradients of 4 prompts, 2 a process, are from those of one process: in 1 part and in 2, [2]."""
    model = Reader(task)
    prompt = task.sample(4, torch.Generator().manual_seed(6)).to(torch.float64)
    loss = task.loss(model(prompt.inputs), prompt)
    expected = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    team = workers("cpu", model)
    wrapped, worst = team.wrap(model), []
    for parts in (1, 2):
        spec, own = TrainSpec(batch=4, accumulate=parts), prompt.rows(2 * rank, 2 * rank + 2)
        loss, gradients = loss_and_gradients(wrapped, task, spec, dict(model.named_parameters()), own)
        found = [team.mean(loss), *gradients.values()]
        worst.append(torch.tensor([off(one, other) for one, other in zip(found, expected, strict=True)]).max())
    return torch.stack(worst)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    whole = Tiny()
    result = train(whole, Sums(), SPEC, folder=folder / "whole")
    found = {f"whole.{name}": tensor for name, tensor in whole.state_dict().items()}
    found["losses"] = torch.tensor(result.history["loss"].to_numpy())

    # Ctrl-C that reaches one process only stops both at the same step; resumed, nothing has changed.
    def stop(step: int, steps: int, loss: float) -> None:
        if step == 20:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        train(Tiny(), Sums(), SPEC, folder=folder / "stopped", progress=stop)
        raise AssertionError("not stopped")
    except KeyboardInterrupt:
        pass
    resumed = Tiny(seed=rank + 1)
    train(resumed, Sums(), SPEC, folder=folder / "stopped", resume=True)
    found |= {f"resumed.{name}": tensor for name, tensor in resumed.state_dict().items()}

    # A fixed set of prompts: both processes share each of its batches, so this is the training of one process.
    fixed = Tiny().double()
    train(fixed, Some(), FIXED)
    found |= {f"fixed.{name}": tensor for name, tensor in fixed.state_dict().items()}

    # The averaged gradient of each half of a batch is the gradient of the batch.
    model, task = Tiny().double(), Sums()
    prompt = task.sample(16, torch.Generator().manual_seed(0)).to(torch.float64)
    wrapped = workers("cpu", model).wrap(model)
    half = prompt.rows(8 * rank, 8 * rank + 8)
    _, gradients = loss_and_gradients(wrapped, task, SPEC, dict(model.named_parameters()), half)
    found |= {f"gradient.{name}": tensor for name, tensor in gradients.items()}
    # So is that of every task, however many positions of its prompts are scored, and so is the loss that is reported.
    found["off.Some"] = cut(Some(), rank)
    for entry in registry.entries("task"):
        found[f"off.{entry.name}"] = cut(entry.build(**entry.cases[0]), rank)  # the law sees the other cases
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"rank{rank}.safetensors")
    leave_together(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
