"""What a conversion costs: attention transfer against a plain loop, and memory.

    python benchmarks/convert.py             tokens a second of attention transfer and of a loop that runs both models
    python benchmarks/convert.py --llama     the same of a Llama-shaped model of 100 million parameters (minutes)
    python benchmarks/convert.py --memory    peak memory of converting that one
    ... --threads N                          PyTorch's threads

The plain loop runs the whole teacher and then the whole student, and compares what their mixers give, as published
code does; its gradients go through the student's stack. Both train the same mixers with the same optimiser, in turns.
Time is the processor's, so that what else runs on the machine does not count.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.convert import Distil, Linearize, convert
from contextlab.convert.teacher import Layers, LayerTask, task_of
from contextlab.models import Model, ModelSpec, build_model
from contextlab.prompt import Prompt
from contextlab.tasks import build_task
from contextlab.training import TrainSpec, TrainState, train_step

LENGTH = 256
SMALL = {
    "width": 128, "depth": 4, "heads": 4, "mlp_ratio": 2,
    "layers": [{"mixer": "attention", "options": {"short_conv": 4, "rope_scaling": {"kind": "p_rope", "keep": 0.25}}}],
}  # fmt: skip
LLAMA = {
    "width": 768, "depth": 14, "heads": 12, "mlp": "swiglu", "read_in": "token", "input_size": 256, "output_size": 256,
    "layers": [{"mixer": "attention", "options": {"heads": 12, "kv_heads": 12}}],
}  # fmt: skip


class Whole(nn.Module):
    """A student that is run whole, and what its mixers give."""

    def __init__(self, student: Model, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.spec, self.layers, self.blocks = student.spec, layers, student.blocks
        self._student = (student,)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, T, n D]."""
        found: list[Tensor] = []
        hooks = [
            self.blocks[i].mixer.register_forward_hook(lambda _, given, made: found.append(made[0]))
            for i in self.layers
        ]
        try:
            self._student[0](tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(found, -1)


@dataclass(frozen=True, repr=False)
class WholeTask(LayerTask):
    """The tokens, and what a teacher's mixers give, from a reading of the whole teacher."""

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """See `Task.sample`."""
        prompt = self.task.sample(batch, generator, device)
        with torch.no_grad():
            made = Whole(self._model, self.layers)(prompt.inputs)
        return Prompt(prompt.inputs, made, torch.ones_like(prompt.scored), prompt.shot)


def rates(which: str, sizes: dict[str, Any] = SMALL, batch: int = 8, rounds: int = 5, each: int = 3) -> dict[str, Any]:
    """Tokens a second of both, rivals taking turns; which: the layers that are replaced. sizes: of the teacher."""
    text = build_task("language_modelling", length=LENGTH)
    teacher = build_model(ModelSpec.parse(sizes).for_task(text)).eval()
    method = Linearize(mixer="gated_delta_net", layers=which)
    layers = tuple(method.changed(teacher.spec))
    settings = TrainSpec(steps=1000, batch=batch, optimizer="adamw", compile="off")
    runs: dict[str, Any] = {}
    for name in ("attention transfer", "plain loop"):
        student = method(teacher).model.train()
        task = task_of(teacher, text, Distil(attention=1.0), layers)
        assert isinstance(task, LayerTask)
        model: nn.Module = Layers(student, layers)
        if name == "plain loop":
            for parameter in student.parameters():
                parameter.requires_grad_(False)
            for i in layers:
                student.blocks[i].mixer.requires_grad_(True)
            model = Whole(student, layers)
            task = WholeTask(text, task.teacher, layers, task.scales, teacher)
        runs[name] = (model, task, TrainState.start(model, settings))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, (model, task, state) in runs.items():
            began = time.process_time()
            for _ in range(each):
                train_step(model, task, settings, state)
            if turn:  # the first is to warm up
                found[name].append(each * batch * LENGTH / (time.process_time() - began))
    return found


def peak(to: str) -> None:
    """Print the peak memory, beyond Python and torch, of making a model and converting it, over its bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = build_model(LLAMA).eval()
    weights = model.weight_nbytes
    convert(model, to, budget=0)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{to:<22}{model.parameter_count / 1e6:>6.0f} million parameters: {(after - before) / weights:.2f} x its bytes"
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.peak:
        peak(chosen.peak)
    elif chosen.memory:
        for to in ("gqa:kv_heads=4", "mla:rank=256", "gated_delta_net"):  # each in a process of its own
            subprocess.run([sys.executable, os.path.abspath(__file__), "--peak", to], check=True)
    else:
        for which in ("all", "half"):
            found = rates(which, LLAMA, 1, 3, 1) if chosen.llama else rates(which)
            shown = {name: f"{statistics.median(values):,.0f}" for name, values in found.items()}
            ratios = sorted(a / b for a, b in zip(*found.values(), strict=True))
            print(f"layers {which}: tokens a second of a core {shown}")
            print(f"  {statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
